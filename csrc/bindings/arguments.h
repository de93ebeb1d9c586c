// From the integers that Python hands over to the structs of the kernels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "../common/types.h"

namespace cllm {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Strided strided(uintptr_t address, int64_t s0, int64_t s1, int64_t s2) {
  return {pointer<void>(address), {s0, s1, s2}};
}

#define CLLM_STATE_FIELD(type, name, dtype, shape) +1
constexpr size_t state_field_count = 0
#include "jacobi_state.inc"
    ;
#undef CLLM_STATE_FIELD

using StateFields = std::array<uintptr_t, state_field_count>;

inline JacobiState jacobi_state(const StateFields& fields, int64_t rows, int64_t width, int64_t capacity,
                                int64_t context_width, int64_t eos_count) {
  const uintptr_t* field = fields.data();
  return {
#define CLLM_STATE_FIELD(type, name, dtype, shape) pointer<type>(*field++),
#include "jacobi_state.inc"
#undef CLLM_STATE_FIELD
      rows, width, capacity, context_width, eos_count};
}

}  // namespace cllm
