// A linear layer for few rows, on weights where they lie. Included only by kernels.cpp.
//
// Lanes run along the inputs, for x and weights alike, so that nothing is packed. An output is the sum of `native`
// lanes, each added up in the order of the inputs, then joined by one fixed tree: its bits depend on its own row of x
// and its own weights alone, not on how many other rows or outputs are computed beside it.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace cllm::cpu {
namespace {

// What x is made of: bf16 where an instruction multiplies pairs of it, else floats; then a register of bf16 weights
// widens to two, of the even and of the odd inputs, and x stands in that order.
#if defined(__AVX512BF16__)
template <class T>
using Input = T;
#else
template <class T>
using Input = float;
#endif

// Inputs per step.
template <class T>
constexpr int linear_step = std::is_same<T, float>::value ? native : 2 * native;

// Rows of a register tile, and its outputs by how many rows the tallest tile has: as many sums as fit beside the
// operands, and enough of them to hide the latency of the FMA.
constexpr int linear_rows = 4;
#if defined(__AVX512F__)
constexpr int tile_outputs(int rows) { return rows <= 2 ? 8 : 6; }
#elif defined(__AVX2__)
constexpr int tile_outputs(int rows) { return rows <= 2 ? 6 : rows == 3 ? 4 : 3; }
#else
constexpr int tile_outputs(int rows) { return rows <= 2 ? 4 : 3; }
#endif

// Sums of four vectors, each by the same tree.
CLLM_INLINE void add_lanes(const vfloat* from, float* to) {
#if defined(__AVX__)
#if defined(__AVX512F__)
  __m256 v[4];
  for (int i = 0; i < 4; ++i)
    v[i] = _mm512_castps512_ps256(from[i]) + _mm512_extractf32x8_ps(from[i], 1);
#else
  const vfloat* v = from;
#endif
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int i = 0; i < 4; ++i) to[i] = (from[i][0] + from[i][1]) + (from[i][2] + from[i][3]);
#endif
}

// sum[r][c] += the products of `steps` steps of row r of x and row c of the weights. Meanwhile `Fetch` rows of the
// weights that come after these, at `next`, are fetched into the L2 cache: the L1 cache has no room for them, and
// fetching them there was measured to cost a quarter of the time on 16 rows.
template <int R, int C, int Fetch>
CLLM_INLINE void add_products(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t steps,
                              const float* next, vfloat (&sum)[R][C]) {
  for (int64_t k = 0; k < steps * native; k += native) {
    vfloat y[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      y[c] = load(w + c * w_stride + k);
      if (c < Fetch) __builtin_prefetch(next + c * w_stride + k, 0, 2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat z = load(x + r * x_stride + k);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] += z * y[c];
    }
  }
}

#if defined(__AVX512BF16__)
template <int R, int C, int Fetch>
CLLM_INLINE void add_products(const bf16_t* x, int64_t x_stride, const bf16_t* w, int64_t w_stride, int64_t steps,
                              const bf16_t* next, vfloat (&sum)[R][C]) {
  for (int64_t k = 0; k < steps * 2 * native; k += 2 * native) {
    __m512bh y[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      memcpy(&y[c], w + c * w_stride + k, sizeof y[c]);
      if (c < Fetch) __builtin_prefetch(next + c * w_stride + k, 0, 2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512bh z;
      memcpy(&z, x + r * x_stride + k, sizeof z);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], z, y[c]);
    }
  }
}
#else
template <int R, int C, int Fetch>
CLLM_INLINE void add_products(const float* x, int64_t x_stride, const bf16_t* w, int64_t w_stride, int64_t steps,
                              const bf16_t* next, vfloat (&sum)[R][C]) {
  for (int64_t k = 0; k < steps * 2 * native; k += 2 * native) {
    vuint pairs[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      memcpy(&pairs[c], w + c * w_stride + k, sizeof pairs[c]);
      if (c < Fetch) __builtin_prefetch(next + c * w_stride + k, 0, 2);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      vfloat y[C];
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        y[c] = reinterpret_cast<vfloat>(odd ? pairs[c] & 0xffff0000u : pairs[c] << 16);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vfloat z = load(x + r * x_stride + k + odd * native);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[r][c] += z * y[c];
      }
    }
  }
}
#endif

template <class T>
size_t linear_row_size(const LinearParams& p) {
  const bool in_place = std::is_same<T, Input<T>>::value && p.inputs % linear_step<T> == 0;
  return in_place ? 0 : round_up(p.inputs, linear_step<T>) * sizeof(Input<T>);
}

// A row of x, with zeros up to a whole number of steps.
template <class T>
void linear_inputs(const LinearParams& p, int64_t row, void* to) {
  constexpr int step = linear_step<T>;
  const T* x = reinterpret_cast<const T*>(static_cast<const char*>(p.x) + row * p.x_bytes);
  if constexpr (std::is_same<T, Input<T>>::value) {
    memcpy(to, x, p.inputs * sizeof(T));
    memset(static_cast<T*>(to) + p.inputs, 0, (round_up(p.inputs, step) - p.inputs) * sizeof(T));
  } else {
    for (int64_t k = 0; k < p.inputs; k += step) {
      vuint pairs = {};
      memcpy(&pairs, x + k, minimum(step, p.inputs - k) * sizeof(T));
      store(static_cast<float*>(to) + k, reinterpret_cast<vfloat>(pairs << 16));
      store(static_cast<float*>(to) + k + native, reinterpret_cast<vfloat>(pairs & 0xffff0000u));
    }
  }
}

// Rows [row, row + R) of outputs [output, output + C).
template <class T, int R, int C, int Fetch>
CLLM_INLINE void linear_tile(const LinearParams& p, int64_t row, int64_t output, const T* next) {
  constexpr int step = linear_step<T>, groups = (R * C + 3) / 4;
  const int64_t steps = p.inputs / step, end = steps * step;
  const T* weight = static_cast<const T*>(p.weight) + output * p.weight_stride;
  const Input<T>* x = reinterpret_cast<const Input<T>*>(static_cast<const char*>(p.x) + row * p.x_bytes);
  const int64_t x_stride = p.x_bytes / sizeof(Input<T>);
  vfloat sum[R][C] = {};
  add_products<R, C, Fetch>(x, x_stride, weight, p.weight_stride, steps, next, sum);
  if (end < p.inputs) {
    T tail[C * step] = {};
    for (int c = 0; c < C; ++c)
      memcpy(tail + c * step, weight + c * p.weight_stride + end, (p.inputs - end) * sizeof(T));
    add_products<R, C, 0>(x + end, x_stride, tail, step, 1, nullptr, sum);
  }

  float total[groups * 4];
#pragma GCC unroll 16
  for (int g = 0; g < groups; ++g) {
    vfloat v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = g * 4 + i < R * C ? sum[(g * 4 + i) / C % R][(g * 4 + i) % C] : vfloat{};
    add_lanes(v, total + g * 4);
  }
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + output : nullptr;
  for (int r = 0; r < R; ++r) {
    T* out = static_cast<T*>(p.out) + (row + r) * p.out_stride + output;
    for (int c = 0; c < C; ++c) narrow(bias ? total[r * C + c] + widen(bias[c]) : total[r * C + c], out + c);
  }
}

// Outputs [begin, end) in groups of C, all rows of a group before the next, whose weights are fetched meanwhile:
// `Fetch` of their C rows by each tile, so that the memory never rests.
template <class T, int C, int Fetch>
void linear_outputs(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t tiles = (p.rows + linear_rows - 1) / linear_rows;
  for (int64_t output = begin; output < end; output += C)
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = p.rows * i / tiles, count = p.rows * (i + 1) / tiles - row;
      const T* next = static_cast<const T*>(p.weight) + (output + C + i * Fetch) * p.weight_stride;
      with_block<linear_rows>(count, [&](auto size) {
        constexpr int R = decltype(size)::value;
        if (i * Fetch < C)
          linear_tile<T, R, C, Fetch>(p, row, output, next);
        else
          linear_tile<T, R, C, 0>(p, row, output, nullptr);
      });
    }
}

template <class T>
void linear(const LinearParams& p, int64_t begin, int64_t end) {
  const auto run = [&](auto outputs) {
    constexpr int C = decltype(outputs)::value;
    const int64_t whole = begin + (end - begin) / C * C;
    if (p.rows <= linear_rows)
      linear_outputs<T, C, C>(p, begin, whole);
    else if (p.rows <= 2 * linear_rows)
      linear_outputs<T, C, (C + 1) / 2>(p, begin, whole);
    else
      linear_outputs<T, C, (C + 2) / 3>(p, begin, whole);
    linear_outputs<T, 1, 1>(p, whole, end);
  };
  if (p.rows <= 2) return run(std::integral_constant<int, tile_outputs(1)>{});
  if (p.rows == 3) return run(std::integral_constant<int, tile_outputs(3)>{});
  run(std::integral_constant<int, tile_outputs(4)>{});
}

}  // namespace
}  // namespace cllm::cpu
