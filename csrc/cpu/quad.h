// Vectors of four floats, into which the lanes of wider ones are added up, and registers filled in part. Included only
// by kernels.cpp, as vec.h is.
#pragma once

#include "vec.h"

namespace cllm::cpu {
namespace {

typedef float vquad __attribute__((vector_size(16)));
typedef uint16_t vquad_half __attribute__((vector_size(8)));
typedef uint32_t vquad_word __attribute__((vector_size(16)));

CLLM_INLINE vquad load_quad(const float* from) {
  vquad x;
  memcpy(&x, from, sizeof x);
  return x;
}

CLLM_INLINE vquad load_quad(const bf16_t* from) {
  vquad_half x;
  memcpy(&x, from, sizeof x);
  return reinterpret_cast<vquad>(__builtin_convertvector(x, vquad_word) << 16);
}

CLLM_INLINE void store_quad(float* to, vquad x) { memcpy(to, &x, sizeof x); }

// As `narrow` rounds; with AVX-512 BF16, numbers below float32's normal range count as 0.
CLLM_INLINE void store_quad(bf16_t* to, vquad x) {
#if defined(__AVX512BF16__)
  const __m128bh high = _mm_cvtneps_pbh(x);
  memcpy(to, &high, sizeof(vquad_half));
#else
  const vquad_word bits = reinterpret_cast<vquad_word>(x);
  const vquad_word rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  const vquad_half high = __builtin_convertvector(rounded >> 16, vquad_half);
  memcpy(to, &high, sizeof high);
#endif
}

// The sums of four vectors, each by the same tree.
CLLM_INLINE vquad add_lanes(const vfloat (&from)[4]) {
#if defined(__AVX__)
  __m256 v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#if defined(__AVX512F__)
    v[i] = _mm512_castps512_ps256(from[i]) + _mm512_extractf32x8_ps(from[i], 1);
#else
    v[i] = from[i];
#endif
  // In each half of a register: two sums of one vector, two of the next.
  __m256 pair[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    pair[i] = _mm256_blend_ps(v[2 * i], v[2 * i + 1], 0xcc) + _mm256_shuffle_ps(v[2 * i], v[2 * i + 1], 0x4e);
  const __m256 sums = _mm256_shuffle_ps(pair[0], pair[1], 0x88) + _mm256_shuffle_ps(pair[0], pair[1], 0xdd);
  return _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
#else
  vquad sums;
  for (int i = 0; i < 4; ++i) sums[i] = (from[i][0] + from[i][2]) + (from[i][1] + from[i][3]);
  return sums;
#endif
}

// The same of `Quads` times four vectors, each four into a quad; two quads at once take two thirds of the instructions.
template <int Quads>
CLLM_INLINE void add_lanes(const vfloat (&from)[4 * Quads], vquad (&to)[Quads]) {
#if defined(__AVX512F__)
  constexpr int paired = Quads / 2 * 2;
#pragma GCC unroll 8
  for (int q = 0; q < paired; q += 2) {
    // The halves of a register belong to one quad each; in them it goes on as above.
    vfloat v[4], pair[2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vfloat a = from[4 * q + i], b = from[4 * q + 4 + i];
      v[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      pair[i] = _mm512_mask_blend_ps(0xcccc, v[2 * i], v[2 * i + 1]) + _mm512_shuffle_ps(v[2 * i], v[2 * i + 1], 0x4e);
    const vfloat sums = _mm512_shuffle_ps(pair[0], pair[1], 0x88) + _mm512_shuffle_ps(pair[0], pair[1], 0xdd);
    const vfloat both = _mm512_shuffle_f32x4(sums, sums, 0x08) + _mm512_shuffle_f32x4(sums, sums, 0x0d);
    to[q] = _mm512_castps512_ps128(both);
    to[q + 1] = _mm512_extractf32x4_ps(both, 1);
  }
#else
  constexpr int paired = 0;
#endif
#pragma GCC unroll 16
  for (int q = paired; q < Quads; ++q) {
    const vfloat v[4] = {from[4 * q], from[4 * q + 1], from[4 * q + 2], from[4 * q + 3]};
    to[q] = add_lanes(v);
  }
}

// A register; of its values the first `count` where `Part`, and zeros.
template <class Register, bool Part, class T>
CLLM_INLINE Register load_register(const T* from, int64_t count) {
  static_assert(sizeof(Register) == native * 4, "one register");
  Register x;
  if constexpr (!Part) {
    memcpy(&x, from, sizeof x);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
      x = reinterpret_cast<Register>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
    else
      x = reinterpret_cast<Register>(
          _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), from));
#else
    T values[sizeof(Register) / sizeof(T)] = {};
    memcpy(values, from, count * sizeof(T));
    memcpy(&x, values, sizeof x);
#endif
  }
  return x;
}

}  // namespace
}  // namespace cllm::cpu
