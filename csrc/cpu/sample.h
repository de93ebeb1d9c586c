// Argmax of one row with Gumbel noise: cllm_kernels/ops/converge.py specifies it. Included only by kernels.cpp.
#pragma once

#include <cmath>

#include "../common/philox.h"
#include "argmax.h"
#include "kernels.h"
#include "vec.h"

namespace cllm::cpu {
namespace {

// High and low words of the products of 32-bit words.
CLLM_INLINE void multiply(uint32_t a, vuint b, vuint* high, vuint* low) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(b), factor = _mm512_set1_epi64(a);
  const __m512i even = _mm512_mul_epu32(x, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  *high = reinterpret_cast<vuint>(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd));
  *low = reinterpret_cast<vuint>(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(b), factor = _mm256_set1_epi64x(a);
  const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  *high = reinterpret_cast<vuint>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA));
  *low = reinterpret_cast<vuint>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
#else
  for (int i = 0; i < native; ++i) {
    const uint64_t product = uint64_t{a} * b[i];
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    (*low)[i] = static_cast<uint32_t>(product);
  }
#endif
}

// philox4x32 of common/philox.h for `native` counters (group, 0, noise_stream, token).
CLLM_INLINE void noise_words(vuint group, uint32_t token, uint32_t key0, uint32_t key1, vuint word[4]) {
  word[0] = group;
  word[1] = vuint{};
  word[2] = vuint{} + noise_stream;
  word[3] = vuint{} + token;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    vuint high0, low0, high1, low1;
    multiply(0xD2511F53u, word[0], &high0, &low0);
    multiply(0xCD9E8D57u, word[2], &high1, &low1);
    word[0] = high1 ^ word[1] ^ key0;
    word[1] = low1;
    word[2] = high0 ^ word[3] ^ key1;
    word[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

CLLM_INLINE vfloat gumbel(vuint word) {
  const vfloat u = (__builtin_convertvector(word, vfloat) + 0.5f) * 0x1p-32f;
  const vfloat series = u * (1.0f + u * (0.5f + u * (1.0f / 3.0f)));
  const vfloat exponential = u < 0x1p-10f ? series : -log(max(splat(0x1p-25f), 1.0f - u));
  return -log(exponential);
}

// Above every value that `gumbel` takes, which is -log(2^-33) at most.
constexpr float noise_bound = 23.0f;

// A group of 16 counters serves 64 entries of the vocabulary, its first words the first 16 of them, and so on.
constexpr int64_t group_entries = 64;
static_assert(argmax_block % group_entries == 0, "blocks hold whole groups");

// Takes entries [begin, end) into account, begin a multiple of 64 in the vocabulary as well as here.
template <class T>
void sample_block(const T* values, int64_t first, int64_t begin, int64_t end, const Noise& noise, Best* best) {
  const uint64_t key = static_cast<uint64_t>(noise.seed);
  const uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  vuint count;
  for (int lane = 0; lane < native; ++lane) count[lane] = lane;
  vfloat top = splat(-INFINITY);
  vint where = {};
  for (int64_t group = begin; group < end; group += group_entries) {
    T padded[group_entries];
    const T* from = values + group;
    if (group + group_entries > end) {  // the last entries of the vocabulary
      for (int64_t i = 0; i < group_entries; ++i) {
        if (group + i < end)
          padded[i] = from[i];
        else
          narrow(-INFINITY, &padded[i]);
      }
      from = padded;
    }
    for (int part = 0; part < 16; part += native) {
      vuint word[4];
      const uint32_t counter = static_cast<uint32_t>((first + group) / group_entries * 16 + part);
      noise_words(count + counter, static_cast<uint32_t>(noise.token), key0, key1, word);
      for (int w = 0; w < 4; ++w) {
        const int entry = 16 * w + part;
        const vfloat x = load(from + entry) * noise.inverse_temperature + gumbel(word[w]);
        const vint larger = x > top;
        const vint index = reinterpret_cast<vint>(count) + static_cast<int32_t>(group - begin + entry);
        top = larger ? x : top;
        where = larger ? index : where;
      }
    }
  }
  for (int lane = 0; lane < native; ++lane) {
    const int64_t index = first + begin + where[lane];
    if (top[lane] > best->value || (top[lane] == best->value && index < best->index)) {
      best->value = top[lane];
      best->index = index;
    }
  }
}

// Noise costs ten times what reading a logit costs, so blocks are left out whose largest logit cannot win with any.
template <class T>
Best sample(const T* values, int64_t first, int64_t count, const Noise& noise) {
  Best best{-INFINITY, INT64_MAX, false};
  const Best largest = argmax(values, count);
  if (largest.nan) return largest;
  const int64_t start = largest.index / argmax_block * argmax_block;
  sample_block(values, first, start, start + argmax_block < count ? start + argmax_block : count, noise, &best);
  for (int64_t begin = 0; begin < count; begin += argmax_block) {
    if (begin == start) continue;
    const int64_t end = begin + argmax_block < count ? begin + argmax_block : count;
    const float ceiling = argmax(values + begin, end - begin).value * noise.inverse_temperature + noise_bound;
    if (ceiling >= best.value) sample_block(values, first, begin, end, noise, &best);
  }
  return best;
}

}  // namespace
}  // namespace cllm::cpu
