// Pairs of bfloat16 in registers, as AVX-512 BF16 and AMX multiply them. Included only by kernels.cpp.
#pragma once

#include "vec.h"

#if defined(__AVX512BF16__)
namespace cllm::cpu {
namespace {

// From the lanes of one register behind those of the next to pairs.
CLLM_INLINE __m512i interleaved(__m512bh both) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)both);
}

void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  // x[4 i + j] holds, of rows 4 i to 4 i + 3, column 4 k + j in its quarter k.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even[] = {_mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88)};
    const __m512i odd[] = {_mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd), _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd)};
    y[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    y[8 + j] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    y[12 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

}  // namespace
}  // namespace cllm::cpu
#endif
