#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace cllm::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
// Whether the CPU has tiles of bfloat16 and Linux lets this process use them, for which it wants to be asked.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & bf16) && (d & tiles) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// Worst first.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list{{"baseline", &kernels_baseline, true}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    list.push_back({"avx2", &kernels_avx2,
                    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")});
    list.push_back({"avx512", &kernels_avx512,
                    list.back().supported && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")});
    list.push_back({"avx512bf16", &kernels_avx512bf16,
                    list.back().supported && __builtin_cpu_supports("avx512bf16")});
    list.push_back({"amx", &kernels_amx, list.back().supported && has_amx()});
#endif
    return list;
  }();
  return all;
}

struct Selection {
  std::string name;
  const Kernels* kernels;
};

Selection find(const std::string& name) {
  std::string allowed;
  for (const Isa& isa : isas()) {
    if (!isa.supported) continue;
    if (name == isa.name) return {isa.name, isa.kernels};
    allowed += std::string(allowed.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name + "' was asked for; this build on this CPU has " + allowed);
}

Selection& selection() {
  static Selection chosen = [] {
    const char* name = std::getenv("CLLM_CPU_ISA");
    return find(name && *name ? name : supported_isas().back());
  }();
  return chosen;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

const Kernels& kernels() { return *selection().kernels; }
const std::string& selected_isa() { return selection().name; }
void select_isa(const std::string& name) { selection() = find(name); }

}  // namespace cllm::cpu
