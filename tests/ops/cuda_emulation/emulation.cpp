// Fibers, barriers and the Python module of the emulation.
#include "emulation.h"

#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/cuda_module.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what the ABI of x86-64 Linux lets a function keep, and goes on where another fiber did so.
extern "C" void cllm_switch_fiber(void** from, void* to);
asm(R"(
.text
.type cllm_switch_fiber, @function
cllm_switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cllm_switch_fiber, .-cllm_switch_fiber
)");

namespace cllm::cuda {
namespace {

constexpr size_t stack_bytes = 256 * 1024;

struct Copy {
  unsigned char* to;
  const unsigned char* from;  // null: zeros
};

struct Fiber {
  EmulatedThread thread;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  enum { ready, in_warp, in_block, done } state = done;
  std::vector<std::vector<Copy>> copies;  // groups that are under way; the last is not committed
};

struct WarpState {
  int arrived = 0, turn = 0;
  const char* operation = nullptr;
  // By turns, since a lane may be in the next operation while another one still reads the results of this.
  unsigned char operands[2][32][operand_bytes], results[2][32][operand_bytes];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<WarpState> warps;
  std::unique_ptr<unsigned char[]> memory;
  size_t memory_bytes = 0;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  int threads = 0, in_block = 0, left = 0;
  bool any = false, any_result = false;
  void* scheduler = nullptr;
#ifdef __SANITIZE_ADDRESS__
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
  std::mt19937 random{1};
};
Machine machine;

[[noreturn]] void fail(const std::string& message) {
  // Fibers cannot be unwound; a defect of a kernel ends the process of the test.
  std::fprintf(stderr, "CUDA emulation: %s (thread %u of block %u, %u, %u)\n", message.c_str(),
               machine.current->thread.thread.x, machine.current->thread.block.x, machine.current->thread.block.y,
               machine.current->thread.block.z);
  std::abort();
}

void to_scheduler() {
  Fiber& fiber = *machine.current;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber.state == Fiber::done ? nullptr : &fake, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  cllm_switch_fiber(&fiber.stack_pointer, machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
  machine.current = &fiber;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, stack_bytes);
#endif
  cllm_switch_fiber(&machine.scheduler, fiber.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  (*machine.body)();
  machine.current->state = Fiber::done;
  --machine.left;
  to_scheduler();
  std::abort();  // no one goes on here
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<unsigned char*>(stack);
  }
  fiber.copies.assign(1, {});
  fiber.state = Fiber::ready;
  // At its start a function finds the stack 8 bytes off a multiple of 16, at the address it returns to.
  void** top = reinterpret_cast<void**>(fiber.stack + stack_bytes) - 1;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void run_block(dim3 grid, dim3 block, int threads) {
  machine.left = threads;
  machine.in_block = 0;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    prepare(fiber);
    fiber.thread = {dim3(i), block, grid};
  }
  for (WarpState& warp : machine.warps) warp.arrived = warp.turn = 0;
  std::memset(machine.memory.get(), 0xFF, machine.memory_bytes);
  // A warp runs as far as it gets alone, in an arbitrary order of warps and of lanes, so that one that did not wait for
  // the others is far ahead of them.
  std::vector<int> order(threads / 32);
  for (size_t warp = 0; warp < order.size(); ++warp) order[warp] = static_cast<int>(warp);
  while (machine.left) {
    bool moved = false;
    std::shuffle(order.begin(), order.end(), machine.random);
    for (int warp : order) {
      const int flip = machine.random() % 32;
      for (bool moving = true; moving;) {
        moving = false;
        for (int i = 0; i < 32; ++i) {
          Fiber& fiber = machine.fibers[warp * 32 + (i ^ flip)];
          if (fiber.state != Fiber::ready) continue;
          to_fiber(fiber);
          moving = moved = true;
        }
      }
    }
    if (!moved) fail("threads wait for others that wait elsewhere or have ended");
  }
}

}  // namespace

EmulatedThread& this_thread() { return machine.current->thread; }
unsigned char* shared_memory() { return machine.memory.get(); }
int lane_number() { return machine.current->thread.thread.x % 32; }

void run_grid(dim3 grid, int threads, size_t shared, const std::function<void()>& body) {
  if (threads % 32 || threads > 1024 || shared > 99 * 1024) throw std::runtime_error("no GPU starts such a block");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("no GPU starts such a grid");
  if (machine.fibers.size() < static_cast<size_t>(threads)) machine.fibers.resize(threads);
  machine.warps.resize(threads / 32);
  machine.threads = threads;
  machine.memory.reset(new unsigned char[shared]);  // of just this size, so that a sanitizer sees what lies beyond
  machine.memory_bytes = shared;
  machine.body = &body;
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
  std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (const dim3& block : blocks) run_block(grid, block, threads);
}

bool block_barrier(bool value) {
  machine.any |= value;
  if (++machine.in_block == machine.threads) {
    machine.any_result = machine.any;
    machine.any = false;
    machine.in_block = 0;
    for (int i = 0; i < machine.threads; ++i) machine.fibers[i].state = Fiber::ready;
  } else {
    machine.current->state = Fiber::in_block;
    to_scheduler();
  }
  return machine.any_result;
}

Operands warp_exchange(const char* operation, const void* operand, size_t size,
                       const std::function<void(Operands, Operands)>& compute) {
  const int number = machine.current->thread.thread.x / 32, lane = lane_number();
  WarpState& warp = machine.warps[number];
  const int turn = warp.turn;
  if (warp.arrived && std::strcmp(warp.operation, operation) != 0)
    fail(std::string(operation) + " while other lanes are in " + warp.operation);
  warp.operation = operation;
  std::memcpy(warp.operands[turn][lane], operand, size);
  if (++warp.arrived == 32) {
    compute(warp.operands[turn], warp.results[turn]);
    warp.arrived = 0;
    warp.turn = 1 - turn;
    for (int i = 0; i < 32; ++i) machine.fibers[number * 32 + i].state = Fiber::ready;
  } else {
    machine.current->state = Fiber::in_warp;
    to_scheduler();
  }
  return warp.results[turn];
}

namespace {

// The elements of the four matrices that a lane gets: two neighbours of row lane / 4, or of column lane / 4.
void load_any(uint32_t (&to)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a row that does not start at a multiple of 16 bytes");
  const Registers loaded = warp_operation<Registers>("ldmatrix", row, [&](const void* const* rows, Registers* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int along = lane % 4 * 2 + i, across = lane / 4;
          const auto* from = static_cast<const uint16_t*>(rows[matrix * 8 + (transposed ? along : across)]);
          pair[i] = from[transposed ? across : along];
        }
        out[lane].word[matrix] = pair[0] | uint32_t{pair[1]} << 16;
      }
  });
  std::memcpy(to, loaded.word, sizeof to);
}

}  // namespace

void load_matrices(uint32_t (&to)[4], const void* row) { load_any(to, row, false); }
void load_transposed_matrices(uint32_t (&to)[4], const void* row) { load_any(to, row, true); }

void copy_async(void* shared, const void* global, bool real) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    fail("cp.async of 16 bytes that do not start at a multiple of 16");
  std::memset(shared, 0xFF, 16);
  machine.current->copies.back().push_back(
      {static_cast<unsigned char*>(shared), real ? static_cast<const unsigned char*>(global) : nullptr});
}

void commit_copies() { machine.current->copies.emplace_back(); }

void finish_copies(int pending) {
  auto& groups = machine.current->copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

int driver_version() { return 13000; }
int runtime_version() { return 13000; }
uint64_t capture_id(const Stream&) { return 0; }

}  // namespace cllm::cuda

PYBIND11_MODULE(emulated_cuda, module) {
  cllm::define_cuda(module);
}
