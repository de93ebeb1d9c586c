// The host's counterpart of csrc/cuda/platform.h: runs a kernel's blocks one after the other, the threads of a block as
// fibers that switch where threads wait for each other. Tests only.
//
// What a GPU leaves undefined is made to show: shared memory starts as NaN, a copy's target is NaN until the copy is
// waited for, the blocks of a grid run in an arbitrary order, threads that wait in different places are an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "common/types.h"
#include "cuda/stream.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define CLLM_KERNEL(threads, blocks) void

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cllm::cuda {

struct EmulatedThread {
  dim3 thread, block, grid;
};
EmulatedThread& this_thread();
#define threadIdx (::cllm::cuda::this_thread().thread)
#define blockIdx (::cllm::cuda::this_thread().block)
#define gridDim (::cllm::cuda::this_thread().grid)

// Runs `body` on every thread of the grid.
void run_grid(dim3 grid, int threads, size_t shared, const std::function<void()>& body);

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared, const Stream&, const Params& params) {
  run_grid(grid, threads, shared, [&] { kernel(params); });
}

unsigned char* shared_memory();
// Waits for all threads of the block; true if `value` is for any.
bool block_barrier(bool value);

constexpr int operand_bytes = 96;
using Operands = unsigned char (*)[operand_bytes];
// Waits for all lanes of the warp, which must be in the same operation; the last one to come turns the operands of all
// lanes into their results. Returns the results.
Operands warp_exchange(const char* operation, const void* operand, size_t size,
                       const std::function<void(Operands operands, Operands results)>& compute);
int lane_number();

template <class Result, class Operand, class Compute>
Result warp_operation(const char* name, const Operand& operand, const Compute& compute) {
  static_assert(sizeof(Operand) <= operand_bytes && sizeof(Result) <= operand_bytes);
  const Operands results = warp_exchange(name, &operand, sizeof operand, [&](Operands in, Operands out) {
    Operand operands[32];
    Result computed[32];
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&operands[lane], in[lane], sizeof(Operand));
    compute(operands, computed);
    for (int lane = 0; lane < 32; ++lane) std::memcpy(out[lane], &computed[lane], sizeof(Result));
  });
  Result result;
  std::memcpy(&result, results[lane_number()], sizeof result);
  return result;
}

constexpr uint32_t all_lanes = 0xFFFFFFFFu;

inline float exp2_fast(float x) { return std::exp2(x); }

inline float widen(float x) { return x; }
inline float widen(bf16_t x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(f16_t x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return value;
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bf16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = static_cast<uint16_t>((x != x ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, f16_t* to) {
  const _Float16 value = static_cast<_Float16>(x);
  std::memcpy(&to->bits, &value, 2);
}
template <class T>
uint32_t pack(float low, float high) {
  T pair[2];
  narrow(low, &pair[0]);
  narrow(high, &pair[1]);
  return pair[0].bits | uint32_t{pair[1].bits} << 16;
}

template <class T>
T load_shared_result(const T* at) {
  return *at;
}
inline uint32_t draw_ticket(uint32_t* ticket) { return (*ticket)++; }

struct MatrixOperand {
  float d[4];
  uint32_t a[4], b[2];
};
struct Accumulator {
  float d[4];
};

// The lanes that hold the parts of the matrices: PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <class T>
void multiply_matrices(const MatrixOperand* operand, Accumulator* result) {
  float a[16][16], b[16][8], d[16][8];
  const auto half = [](uint32_t pair, int i) { return widen(T{static_cast<uint16_t>(pair >> 16 * i)}); };
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      a[row][member * 2 + i % 2 + (i >= 4 ? 8 : 0)] = half(operand[lane].a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) b[member * 2 + i % 2 + (i >= 2 ? 8 : 0)][group] = half(operand[lane].b[i / 2], i % 2);
    for (int i = 0; i < 4; ++i) d[i < 2 ? group : group + 8][member * 2 + i % 2] = operand[lane].d[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) result[lane].d[i] = d[i < 2 ? lane / 4 : lane / 4 + 8][lane % 4 * 2 + i % 2];
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const MatrixOperand operand{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto result = warp_operation<Accumulator>("mma", operand, [](const MatrixOperand* in, Accumulator* out) {
    multiply_matrices<T>(in, out);
  });
  std::memcpy(d, result.d, sizeof result.d);
}

struct Registers {
  uint32_t word[4];
};

void load_matrices(uint32_t (&to)[4], const void* row);
void load_transposed_matrices(uint32_t (&to)[4], const void* row);

void copy_async(void* shared, const void* global, bool real);
void commit_copies();
void finish_copies(int pending);
template <int Pending>
void wait_for_copies() {
  finish_copies(Pending);
}

}  // namespace cllm::cuda

inline void __syncthreads() { cllm::cuda::block_barrier(false); }
inline bool __syncthreads_or(bool value) { return cllm::cuda::block_barrier(value); }

inline void __syncwarp() {
  cllm::cuda::warp_operation<int>("syncwarp", 0, [](const int*, int* out) { std::memset(out, 0, 32 * sizeof(int)); });
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return cllm::cuda::warp_operation<T>("shfl_xor", value, [&](const T* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane ^ mask];
  });
}
template <class T>
T __shfl_up_sync(uint32_t, T value, int step) {
  return cllm::cuda::warp_operation<T>("shfl_up", value, [&](const T* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane < step ? lane : lane - step];
  });
}
template <class T>
T __shfl_sync(uint32_t, T value, int source) {
  return cllm::cuda::warp_operation<T>("shfl", value, [&](const T* in, T* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[source];
  });
}
inline uint32_t __ballot_sync(uint32_t, bool value) {
  return cllm::cuda::warp_operation<uint32_t>("ballot", value, [](const bool* in, uint32_t* out) {
    uint32_t mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= uint32_t{in[lane]} << lane;
    for (int lane = 0; lane < 32; ++lane) out[lane] = mask;
  });
}
inline bool __any_sync(uint32_t, bool value) { return __ballot_sync(0, value) != 0; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
