// Attention in bfloat16 by pairs of it: scores, and sums of values by weights, which are rounded to bfloat16. Here what AMX
// tiles and AVX-512 BF16 share, and how the latter does it; attention_amx.h has the former. Included only by kernels.cpp.
#pragma once

#include "kernels.h"
#include "pairs.h"
#include "quad.h"
#include "vec.h"

namespace cllm::cpu {
namespace {

// Inputs and keys go by so many, which a tile has.
constexpr int64_t pair_inputs = 32;
// Keys of a step: each step loads, scales and stores the output once, and with 256 and heads of 128 values what it reads and
// writes begins to leave the L1 cache.
constexpr int64_t pair_keys = 4 * pair_inputs;

template <class T>
struct AttentionPairs {
  static constexpr bool exist = false;
};

#if defined(__AVX512BF16__)

// Whether scores and sums of a call are taken by pairs.
bool takes_pairs(const AttentionParams& p) {
  return p.dtype == DType::bf16 && p.dim % pair_inputs == 0 && p.value_dim % lanes == 0;
}

struct PairOperands {
  // Queries: [16 rows][dim / 2 pairs][row].
  template <class Row>
  static void queries(const Row& row_at, int64_t rows, int64_t dim, float* to) {
    for (int64_t row = 0; row < rows; row += lanes) {
      const void* from[16];
      for (int i = 0; i < 16; ++i) from[i] = row_at(row + i);
      for (int64_t d = 0; d < dim; d += pair_inputs, to += pair_inputs / 2 * lanes) {
        __m512i pairs[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) pairs[i] = _mm512_loadu_si512(static_cast<const uint16_t*>(from[i]) + d);
        transpose(pairs);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 16 * i, pairs[i]);
      }
    }
  }

  // Values: [value_dim / 16][pairs of keys][16 values], with zeros behind the last key up to a multiple of 32.
  // False where a value is infinite or NaN, which a weight of 0 does not remove.
  static bool pack_values(const bf16_t* from, int64_t stride, int64_t keys, int64_t value_dim, float* to) {
    const __m512i infinity = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    for (int64_t d = 0; d < value_dim; d += lanes)
      for (int64_t key = 0; key < round_up(keys, pair_inputs); key += 2, to += lanes) {
        const auto values = [&](int64_t i) {
          if (i >= keys) return __m512i{};
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * stride + d)));
        };
        const __m512i pairs = _mm512_or_si512(values(key), _mm512_slli_epi32(values(key + 1), 16));
        bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs, infinity), infinity);
        _mm512_storeu_si512(to, pairs);
      }
    return !bad;
  }

  // Weights of keys `key` and the next one, of 16 rows; zeros for keys outside [begin, end).
  CLLM_INLINE __m512i weight_pairs(const float* weights, int64_t weight_stride, int64_t begin, int64_t end, int64_t key) {
    const auto of = [&](int64_t at) {
      return begin <= at && at < end ? load(weights + at * weight_stride) : vfloat{};
    };
    return interleaved(_mm512_cvtne2ps_pbh(of(key + 1), of(key)));
  }
};

#if !defined(__AMX_BF16__)

template <>
struct AttentionPairs<bf16_t> : PairOperands {
  static constexpr bool exist = true;

  static void configure() {}
  static void release() {}

  // Scores of R keys and W blocks of 16 rows.
  template <int R, int W>
  CLLM_INLINE void score_keys(const float* query, const bf16_t* keys, int64_t key_stride, int64_t dim, float* scores,
                              int64_t score_stride) {
    // As in `score_keys` of attention_tile.h.
    constexpr int reach = 3;
    const bf16_t* key[(R + reach - 1) / reach];
    for (int i = 0; i * reach < R; ++i) key[i] = keys + i * reach * key_stride;
    vfloat sum[R][W] = {};
    const bf16_t* next = keys + pair_keys * key_stride;  // fetched meanwhile
    for (const float* end = query + dim / 2 * lanes; query < end; query += lanes, next += 2 * R) {
      __builtin_prefetch(next, 0, 2);
      __m512bh q[W];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) q[w] = load_register<__m512bh, false>(query + w * dim / 2 * lanes, lanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512bh k = splat_pair(key[r / reach] + r % reach * key_stride);
#pragma GCC unroll 2
        for (int w = 0; w < W; ++w) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], q[w], k);
      }
#pragma GCC unroll 12
      for (int i = 0; i * reach < R; ++i) {
        key[i] += 2;
        asm("" : "+r"(key[i]));
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) store(scores + r * score_stride + w * lanes, sum[r][w]);
  }

  // scores[key][row] = key . query of `count` keys and one or two blocks of 16 rows.
  static void score(const float* query, const bf16_t* keys, int64_t key_stride, int64_t dim, int64_t count,
                    int64_t /*room*/, int64_t rows, float* scores, int64_t score_stride) {
    for (int64_t key = 0; key < count; key += block_rows)
      with_block<block_rows>(minimum(block_rows, count - key), [&](auto size) {
        constexpr int R = decltype(size)::value;
        const bf16_t* at = keys + key * key_stride;
        float* to = scores + key * score_stride;
        rows > lanes ? score_keys<R, 2>(query, at, key_stride, dim, to, score_stride)
                     : score_keys<R, 1>(query, at, key_stride, dim, to, score_stride);
      });
  }

  // Weights of 16 rows and of keys [begin, end), [pair of keys][row], with a zero for a key that is missing in a pair.
  static void pack_weights(const float* weights, int64_t weight_stride, int64_t begin, int64_t end, float* to) {
    for (int64_t key = begin / 2 * 2; key < end; key += 2, to += lanes)
      _mm512_storeu_si512(to, weight_pairs(weights, weight_stride, begin, end, key));
  }

  // output[row][0..16 W) = the products of R rows of weights and of values, which are `column` floats apart.
  template <int R, int W>
  CLLM_INLINE void value_sums(const float* weights, const float* values, int64_t column, int64_t pairs, float* output,
                              int64_t value_dim) {
    vfloat sum[R][W] = {};
    for (int64_t i = 0; i < pairs; ++i, weights += lanes, values += lanes) {
      __m512bh x[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) x[w] = load_register<__m512bh, false>(values + w * column, lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512bh weight = splat_pair(weights + r);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) sum[r][w] = _mm512_dpbf16_ps(sum[r][w], x[w], weight);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) store(output + r * value_dim + w * lanes, sum[r][w]);
  }

  // output[row] = the sum of values by weights, for `rows` of 16 rows and keys [begin, end) of the `keys` that were packed.
  static void add_values(const float* weights, const float* values, int64_t begin, int64_t end, int64_t keys,
                         int64_t rows, int64_t value_dim, float* output) {
    const int64_t first = begin / 2, pairs = (end + 1) / 2 - first, column = round_up(keys, pair_inputs) / 2 * lanes;
    values += first * lanes;
    const auto run = [&](int64_t row, int64_t d, auto count, auto blocks) {
      value_sums<decltype(count)::value, decltype(blocks)::value>(
          weights + row, values + d / lanes * column, column, pairs, output + row * value_dim + d, value_dim);
    };
    for (int64_t row = 0; row < rows; row += 8)
      with_block<8>(minimum(8, rows - row), [&](auto count) {
        int64_t d = 0;
        if constexpr (decltype(count)::value <= 4)  // a few sums wait for themselves
          for (; d + 4 * lanes <= value_dim; d += 4 * lanes) run(row, d, count, constant<4>);
        for (; d + 2 * lanes <= value_dim; d += 2 * lanes) run(row, d, count, constant<2>);
        for (; d < value_dim; d += lanes) run(row, d, count, constant<1>);
      });
  }

 private:
  // The pair that begins at `from`, in each lane.
  template <class U>
  CLLM_INLINE __m512bh splat_pair(const U* from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
};

#endif
#else

constexpr bool takes_pairs(const AttentionParams&) { return false; }

#endif

}  // namespace
}  // namespace cllm::cpu
