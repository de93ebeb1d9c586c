// What stands between the linear layers of a decoder layer, row by row. Included only by kernels.cpp.
#pragma once

#include <cmath>

#include "kernels.h"
#include "rotary.h"
#include "vec.h"

namespace cllm::cpu {
namespace {

// Rounded to T and widened again, where the steps of a definition round in between.
template <class T>
CLLM_INLINE float rounded(float x) {
  T to;
  narrow(x, &to);
  return widen(to);
}

template <class T>
void rms_norm(const T* x, const T* weight, float eps, int64_t count, T* out) {
  vfloat sums[4] = {};
  float total = 0;
  int64_t i = 0;
  for (; i + 4 * native <= count; i += 4 * native)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const vfloat v = load(x + i + c * native);
      sums[c] += v * v;
    }
  for (; i < count; ++i) total += widen(x[i]) * widen(x[i]);
  const vfloat sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int lane = 0; lane < native; ++lane) total += sum[lane];
  const float factor = 1 / sqrtf(total / static_cast<float>(count) + eps);
  for (i = 0; i + native <= count; i += native)
    store(out + i, load(weight + i) * rounded<T>(load(x + i) * factor));
  for (; i < count; ++i) narrow(widen(weight[i]) * rounded<T>(widen(x[i]) * factor), out + i);
}

// silu(gate) * up, before the product is rounded to T. Rounded in between, as a module for each would round.
template <class T>
CLLM_INLINE vfloat gated(vfloat gate, vfloat up) {
  // exp2 takes less than 128; NaN stays
  const vfloat silu = gate / (1.0f + exp2(min(splat(127.0f), gate * -log2e)));
  return rounded<T>(silu) * up;
}

// gate = silu(gate) * up of a row. Its rest goes through a vector too, so that the place of a value decides nothing.
template <class T>
CLLM_INLINE void silu_multiply(T* gate, const T* up, int64_t count) {
  int64_t i = 0;
  for (; i + native <= count; i += native) store(gate + i, gated<T>(load(gate + i), load(up + i)));
  const int64_t rest = count - i;
  if (rest) store_some(gate + i, gated<T>(load_some(gate + i, rest), load_some(up + i, rest)), rest);
}

template <class T>
void scale_logits(T* x, int64_t count, float scale, float softcap) {
  const auto step = [&](T* values) {
    vfloat v = load(values);
    const auto round = [&] {
      store(values, v);
      v = load(values);
    };
    if (scale != 1) {
      v *= scale;
      round();
    }
    if (softcap != 0) {
      v /= softcap;
      round();
      v = tanh(v);
      round();
      v *= softcap;
      round();
    }
  };
  int64_t i = 0;
  for (; i + native <= count; i += native) step(x + i);
  if (i == count) return;
  T rest[native] = {};
  memcpy(rest, x + i, (count - i) * sizeof(T));
  step(rest);
  memcpy(x + i, rest, (count - i) * sizeof(T));
}

template <class T>
void add_rows(const T* a, const T* b, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + native <= count; i += native) store(out + i, load(a + i) + load(b + i));
  for (; i < count; ++i) narrow(widen(a[i]) + widen(b[i]), out + i);
}

}  // namespace
}  // namespace cllm::cpu
