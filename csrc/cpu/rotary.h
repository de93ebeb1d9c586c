// Rotary position embedding of one key. Included only by kernels.cpp, as vec.h is.
#pragma once

#include <type_traits>

#include "vec.h"

namespace cllm::cpu {
namespace {

// x rounded to T, which the compiler must not fuse with the sum that follows.
template <class T>
CLLM_INLINE vfloat rounded(vfloat x) {
  if constexpr (std::is_same<T, bf16_t>::value) {
#if defined(__AVX512BF16__)
    return widen((__m256i)_mm512_cvtneps_pbh(x));
#else
    return reinterpret_cast<vfloat>(round_to_half(x) & 0xffff0000u);
#endif
  } else {
    T stored[native];
    store(stored, x);
    asm("" : "+m"(stored));
    return load(stored);
  }
}

// The first `count` lanes, the others 0.
template <class T>
CLLM_INLINE vfloat load_some(const T* from, int64_t count) {
  T values[native] = {};
  memcpy(values, from, count * sizeof(T));
  return load(values);
}

template <class T>
CLLM_INLINE void store_some(T* to, vfloat x, int64_t count) {
  T values[native];
  store(values, x);
  memcpy(to, values, count * sizeof(T));
}

// Products are rounded to the type of the angles, which is T or float.
template <class T, class Angle>
CLLM_INLINE void rotate_lanes(const T* key, const Angle* cos, const Angle* sin, T* to, int64_t half, int64_t count) {
  const vfloat first = load_some(key, count), second = load_some(key + half, count);
  const vfloat a = rounded<Angle>(first * load_some(cos, count));
  const vfloat b = rounded<Angle>(second * load_some(sin, count));
  const vfloat c = rounded<Angle>(second * load_some(cos + half, count));
  const vfloat d = rounded<Angle>(first * load_some(sin + half, count));
  store_some(to, a - b, count);
  store_some(to + half, c + d, count);
}

template <class T, class Angle>
CLLM_INLINE void rotate(const T* key, const Angle* cos, const Angle* sin, T* to, int64_t rotary) {
  const int64_t half = rotary / 2;
  int64_t i = 0;
  for (; i + native <= half; i += native) rotate_lanes(key + i, cos + i, sin + i, to + i, half, native);
  if (i < half) rotate_lanes(key + i, cos + i, sin + i, to + i, half, half - i);
}

}  // namespace
}  // namespace cllm::cpu
