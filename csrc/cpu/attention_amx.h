// What AMX tiles do of the attention in bfloat16: scores, and sums of values by weights, which are rounded to bfloat16.
// Included only by kernels.cpp.
#pragma once

#include "amx.h"
#include "attention_pairs.h"
#include "kernels.h"

#if defined(__AMX_BF16__)
namespace cllm::cpu {
namespace {

template <>
struct AttentionPairs<bf16_t> : PairOperands {
  static constexpr bool exist = true;

  // Around all the others.
  static void configure() { configure_tiles(); }
  static void release() { _tile_release(); }

  // Scores of G tiles of keys and W blocks of 16 rows.
  template <int G, int W>
  CLLM_INLINE void score_tiles(const float* query, const char* keys, int64_t key_bytes, int64_t dim, float* scores,
                               int64_t score_stride) {
    const char* q = reinterpret_cast<const char*>(query);
    zero_sums<G, W>();
    for (int64_t d = 0; d < dim; d += tile_inputs, keys += 64, q += tile_bytes)
      add_tile_products<G, W>(keys, key_bytes, tile_rows * key_bytes, q, dim * 32);
    store_sums<G, W>(scores, score_stride, tile_rows * score_stride, tile_rows);
  }

  // scores[key][row] = key . query of `count` keys, of `room` that may be read, and one or two blocks of 16 rows.
  static void score(const float* query, const bf16_t* keys, int64_t key_stride, int64_t dim, int64_t count, int64_t room,
                    int64_t rows, float* scores, int64_t score_stride) {
    const int64_t key_bytes = key_stride * sizeof(bf16_t);
    const auto run = [&](int64_t key, auto tiles) {
      constexpr int G = decltype(tiles)::value;
      const char* at = reinterpret_cast<const char*>(keys) + key * key_bytes;
      float* to = scores + key * score_stride;
      rows > tile_rows ? score_tiles<G, 2>(query, at, key_bytes, dim, to, score_stride)
                       : score_tiles<G, 1>(query, at, key_bytes, dim, to, score_stride);
    };
    int64_t key = 0;
    for (; key + 2 * tile_rows <= count; key += 2 * tile_rows) run(key, constant<2>);
    for (; key + tile_rows <= count; key += tile_rows) run(key, constant<1>);
    if (key < count) {
      // Another configuration takes longer than the scores of a tile.
      const bool whole = key + tile_rows <= room;
      if (!whole) configure_tiles(count - key);
      run(key, constant<1>);
      if (!whole) configure_tiles();
    }
    tile_barrier();
  }

  // output[row][0..16 W) = the products of weights [row][keys] and values, which are `column` bytes apart.
  template <int W>
  CLLM_INLINE void value_tiles(const char* weights, const char* values, int64_t column, int64_t keys, float* output,
                               int64_t value_dim) {
    W > 1 ? zero_sums<2, 2>() : zero_sums<1, 1>();
    for (int64_t key = 0; key < keys; key += tile_inputs, weights += tile_bytes, values += tile_bytes) {
      _tile_loadd(4, weights, 64);
      _tile_loadd(6, values, 64);
      add_tile_product<0>();
      if constexpr (W > 1) {
        _tile_loadd(6, values + column, 64);
        add_tile_product<1>();
        _tile_loadd(6, values + 2 * column, 64);
        add_tile_product<2>();
        _tile_loadd(6, values + 3 * column, 64);
        add_tile_product<3>();
      }
    }
    W > 1 ? store_sums<2, 2>(output, value_dim, 2 * lanes, lanes) : store_sums<1, 1>(output, value_dim, 0, 0);
  }

  // Weights of 16 rows and of keys [begin, end) as first operands, [keys / 32][row][32], with zeros around them.
  static void pack_weights(const float* weights, int64_t weight_stride, int64_t begin, int64_t end, float* to) {
    for (int64_t key = begin / tile_inputs * tile_inputs; key < end; key += tile_inputs, to += tile_bytes / 4) {
      __m512i pairs[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) pairs[i] = weight_pairs(weights, weight_stride, begin, end, key + 2 * i);
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 16 * i, pairs[i]);
    }
  }

  // output[row] = the sum of values by weights, for 16 rows, whatever `rows` is, and keys [begin, end) of the `keys` that
  // were packed.
  static void add_values(const float* weights, const float* values, int64_t begin, int64_t end, int64_t keys,
                         int64_t /*rows*/, int64_t value_dim, float* output) {
    const int64_t first = begin / tile_inputs * tile_inputs, column = round_up(keys, tile_inputs) * 2 * tile_rows;
    const char* from = reinterpret_cast<const char*>(values) + first * 2 * tile_rows;
    const char* w = reinterpret_cast<const char*>(weights);
    int64_t d = 0;
    for (; d + 4 * lanes <= value_dim; d += 4 * lanes, from += 4 * column)
      value_tiles<4>(w, from, column, end - first, output + d, value_dim);
    for (; d < value_dim; d += lanes, from += column)
      value_tiles<1>(w, from, column, end - first, output + d, value_dim);
  }
};

}  // namespace
}  // namespace cllm::cpu
#endif
