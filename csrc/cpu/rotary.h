// Rotary position embedding of one key. Included only by kernels.cpp, as vec.h is.
#pragma once

#include "vec.h"

namespace cllm::cpu {
namespace {

// x rounded to T. It goes through memory, lest the compiler fuse a product with the sum that follows.
template <class T>
CLLM_INLINE vfloat rounded(vfloat x) {
  T stored[native];
  store(stored, x);
  asm("" : "+m"(stored));
  return load(stored);
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
void rotate(const void* key, const void* cos, const void* sin, void* to, int64_t rotary) {
  const int64_t half = rotary / 2;
  const T* from = static_cast<const T*>(key);
  const Angle *c = static_cast<const Angle*>(cos), *s = static_cast<const Angle*>(sin);
  T* out = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + native <= half; i += native) rotate_lanes(from + i, c + i, s + i, out + i, half, native);
  if (i < half) rotate_lanes(from + i, c + i, s + i, out + i, half, half - i);
}

}  // namespace
}  // namespace cllm::cpu
