// Attention of one tile of queries of one cache head. Included only by kernels.cpp.
//
// The rows of a tile are token x head of the group that shares a cache head: row = token * group + member.
// Scores are computed transposed, [key][row], with rows in the lanes: keys are read where they lie, one
// broadcast scalar per row block, and the softmax over keys needs no horizontal step. The output is
// [row][value], with values in the lanes and probabilities broadcast.
#pragma once

#include <cmath>
#include <utility>

#include "attention_amx.h"
#include "kernels.h"
#include "vec.h"

namespace cllm::cpu {
namespace {

// Keys that are scored at a time: a multiple of every block_rows, and few enough to take a third of a 32 KiB L1 cache
// beside the queries of one or two blocks of rows.
CLLM_INLINE int64_t score_tile(int64_t dim) { return maximum(24, minimum(96, 3072 / dim / 24 * 24)); }

// Keys of a softmax step: more, because each step loads, scales and stores the output once.
CLLM_INLINE int64_t key_tile(int64_t dim) { return minimum(96, 2 * score_tile(dim)); }

// Blocks of 16 lanes that are computed together, so that what is broadcast is loaded once for all: as many as keep their
// sums in registers.
#if defined(__AVX512F__)
constexpr int wide = 2;
#else
constexpr int wide = 1;
#endif

// The parts of the scratch memory, in floats; each starts at a multiple of 16.
struct Layout {
  int64_t rows, padded_rows, padded_value_dim, keys;
  int64_t query, scores, output, peak, total, correction, lowest, highest, own, key, value, weights, sums, size;

  Layout(const AttentionParams& p, int64_t count) {
    rows = count * p.group();
    padded_rows = round_up(rows, lanes);
    padded_value_dim = round_up(p.value_dim, lanes);
    keys = takes_pairs(p) ? pair_keys : key_tile(p.dim);
    query = 0;
    scores = query + padded_rows * p.dim;
    // Output, maxima and sums stand together: they are what a partial result consists of.
    // AMX tiles write the scores of 16 keys where there are fewer left.
    output = scores + (takes_pairs(p) ? keys + lanes : keys) * padded_rows;
    peak = output + padded_rows * padded_value_dim;
    total = peak + padded_rows;
    correction = total + padded_rows;
    lowest = correction + padded_rows;
    highest = lowest + padded_rows;
    own = highest + padded_rows;
    key = own + padded_rows;
    value = key + round_up(keys * p.dim, lanes);
    weights = value + keys * padded_value_dim;
    sums = weights + (takes_pairs(p) ? 2 * lanes * keys : 0);
    size = sums + (takes_pairs(p) ? 2 * lanes * padded_value_dim : 0);
  }
};

// Keys or values that come later, fetched to the L2 cache while others are computed with, some in each step: of many
// fetches at once a core drops most.
struct NextRows {
  const char* at;
  int64_t step;  // bytes; 0: this is done elsewhere

  CLLM_METHOD void lines(int count) {
    for (int i = 0; i < count; ++i) __builtin_prefetch(at + 64 * i, 0, 2);
    at += step;
  }
};

// scores[r][lane] = sum over d of keys[r][d] * query[d][lane], for R keys and W blocks of lanes. The queries of a block
// stand behind those of the block before it.
template <int R, int W>
CLLM_INLINE void score_keys(const float* query, const float* keys, int64_t key_stride, int64_t dim, float* scores,
                            int64_t score_stride, NextRows fetch) {
  // A pointer for every three keys, which the stride reaches from it; for one each there are too few registers. The asm,
  // which does nothing, hides from the compiler what they have in common.
  constexpr int reach = 3;
  const float* key[(R + reach - 1) / reach];
  for (int i = 0; i * reach < R; ++i) key[i] = keys + i * reach * key_stride;
  vfloat sum[R][W * parts] = {};
  for (const float* end = query + dim * lanes; query < end; query += lanes) {
    fetch.lines(1);
    vfloat q[W * parts];
#pragma GCC unroll 4
    for (int v = 0; v < W * parts; ++v) q[v] = load(query + v / parts * lanes * dim + v % parts * native);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vfloat k = splat(key[r / reach][r % reach * key_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < W * parts; ++v) sum[r][v] += k * q[v];
    }
#pragma GCC unroll 12
    for (int i = 0; i * reach < R; ++i) {
      ++key[i];
      asm("" : "+r"(key[i]));
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < W * parts; ++v) store(scores + r * score_stride + v * native, sum[r][v]);
}

// output[r][0..16) = output[r][0..16) * correction[r] + sum over keys of weights[key][r] * values[key][0..16), for R
// rows and W blocks of 16 values, which are `column` apart.
template <int R, int W>
CLLM_INLINE void add_values(const float* weights, int64_t weight_stride, const float* values, int64_t value_stride,
                            int64_t column, int64_t keys, float* output, int64_t output_stride, const float* correction,
                            NextRows fetch) {
  vfloat sum[R][W * parts];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < W * parts; ++v)
      sum[r][v] = load(output + r * output_stride + v * native) * splat(correction[r]);
  for (int64_t key = 0; key < keys; ++key) {
    fetch.lines(W);
    vfloat x[W * parts];
#pragma GCC unroll 4
    for (int v = 0; v < W * parts; ++v)
      x[v] = load(values + key * value_stride + v / parts * column + v % parts * native);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vfloat w = splat(weights[key * weight_stride + r]);
#pragma GCC unroll 4
      for (int v = 0; v < W * parts; ++v) sum[r][v] += w * x[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < W * parts; ++v) store(output + r * output_stride + v * native, sum[r][v]);
}

// Values of one key to [16 values][key][16], with zeros behind the last. 16 values of many keys then lie side by side;
// where they were, a stride of a power of two would make them compete for a few sets of the L1 cache.
template <class T>
CLLM_INLINE void pack_values(const T* from, float* to, int64_t keys, int64_t value_dim) {
  int64_t d = 0;
  for (; d + lanes <= value_dim; d += lanes)
    for (int v = 0; v < parts; ++v) store(to + d * keys + v * native, load(from + d + v * native));
  if (d < value_dim)
    for (int64_t i = 0; i < lanes; ++i) to[d * keys + i] = d + i < value_dim ? widen(from[d + i]) : 0;
}

// Calls `body(at, W)` for pieces of `count`, a multiple of 16, that are W blocks of lanes long: `wide`, and 1 at the end.
template <class Body>
CLLM_INLINE void in_blocks(int64_t count, const Body& body) {
  int64_t at = 0;
  for (; at + wide * lanes <= count; at += wide * lanes) body(at, constant<wide>);
  if constexpr (wide > 1)
    for (; at < count; at += lanes) body(at, constant<1>);
}

// One step of the online softmax of 16 rows: scores of keys [begin, end) become weights, and `correction` what
// earlier sums must be multiplied by. `lowest`, `highest` and `own` are what each row sees: keys from `lowest` to
// `highest`, but for those from `length` on that are before `own`. `all`: every row sees every key. Scores are to be
// multiplied by `scale`.
CLLM_INLINE void softmax_step(float* scores, int64_t stride, int64_t begin, int64_t end, bool all,
                              const int32_t* lowest, const int32_t* highest, const int32_t* own, int32_t length,
                              float scale, float softcap, float* peak, float* total, float* correction) {
  const int64_t keys = end - begin;
  if (softcap > 0 || scale <= 0) {
    for (int64_t key = 0; key < keys; ++key)
      for (int v = 0; v < parts; ++v) {
        float* here = scores + key * stride + v * native;
        const vfloat x = load(here) * scale;
        store(here, softcap > 0 ? softcap * tanh(x / softcap) : x);
      }
    scale = 1;
  }
  if (!all)
    for (int v = 0; v < parts; ++v) {
      vint low, high, low_own;
      memcpy(&low, lowest + v * native, sizeof low);
      memcpy(&high, highest + v * native, sizeof high);
      memcpy(&low_own, own + v * native, sizeof low_own);
      for (int64_t key = 0; key < keys; ++key) {
        float* here = scores + key * stride + v * native;
        const vint row = static_cast<int32_t>(begin + key) - vint{};
        if (begin + key >= length) low = low_own;
        store(here, (low <= row) & (row <= high) ? load(here) : splat(-INFINITY));
      }
    }

  vfloat old_peak[parts], new_peak[parts], other_peak[parts], shift[parts], sum[parts];
#pragma GCC unroll 4
  for (int v = 0; v < parts; ++v) new_peak[v] = other_peak[v] = old_peak[v] = load(peak + v * native);
  // Keeps the maximum where the score is NaN, which then shows in the sum. Two at a time, as one waits for itself.
  for (int64_t key = 0; key + 1 < keys; key += 2)
#pragma GCC unroll 4
    for (int v = 0; v < parts; ++v) {
      const float* here = scores + key * stride + v * native;
      new_peak[v] = max(load(here) * scale, new_peak[v]);
      other_peak[v] = max(load(here + stride) * scale, other_peak[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < parts; ++v) {
    if (keys % 2) other_peak[v] = max(load(scores + (keys - 1) * stride + v * native) * scale, other_peak[v]);
    new_peak[v] = max(other_peak[v], new_peak[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < parts; ++v) {
    store(peak + v * native, new_peak[v]);
    // A row that has seen nothing yet keeps weights of 0, as 2^(-inf - 0).
    shift[v] = new_peak[v] == -INFINITY ? vfloat{} : new_peak[v];
    const vfloat factor = exp2(old_peak[v] - shift[v]);
    store(correction + v * native, factor);
    sum[v] = load(total + v * native) * factor;
  }
  for (int64_t key = 0; key < keys; ++key)
#pragma GCC unroll 4
    for (int v = 0; v < parts; ++v) {
      float* here = scores + key * stride + v * native;
      const vfloat weight = exp2(load(here) * scale - shift[v]);
      store(here, weight);
      sum[v] += weight;
    }
#pragma GCC unroll 4
  for (int v = 0; v < parts; ++v) store(total + v * native, sum[v]);
}

// Divides by the sum, with the sink in it, and writes row `row` of a tile.
template <class T>
CLLM_INLINE void write_row(const AttentionParams& p, const AttentionTask& task, int64_t row, const float* output,
                           float peak, float total) {
  const int64_t token = task.first + row / p.group(), head = task.head * p.group() + row % p.group();
  float factor = 1;
  if (p.sinks) {
    const float sink = p.sinks[head] * log2e;
    const float top = peak > sink ? peak : sink;
    if (top != -INFINITY) {
      factor = exp2f(peak - top);
      total = total * factor + exp2f(sink - top);
      peak = top;
    }
  }
  p.lse[(task.row * p.heads + head) * p.width + token] = total == 0 ? -INFINITY : peak * ln2 + logf(total);
  factor = total == 0 ? 0 : factor / total;
  T* out = static_cast<T*>(p.out) + ((task.row * p.width + token) * p.heads + head) * p.value_dim;
  int64_t d = 0;
  for (; d + native <= p.value_dim; d += native) store(out + d, load(output + d) * factor);
  for (; d < p.value_dim; ++d) narrow(output[d] * factor, out + d);
}

template <class T>
void attend(const AttentionParams& p, const AttentionTask& task, float* scratch) {
  const Layout at(p, task.count);
  const int64_t group = p.group(), rows = at.rows, padded = at.padded_rows, value_dim = at.padded_value_dim;
  float* query = scratch + at.query;
  float* scores = scratch + at.scores;
  float* output = task.partial ? task.partial : scratch + at.output;
  float* peak = output + padded * value_dim;
  float* total = peak + padded;
  float* correction = scratch + at.correction;
  int32_t* lowest = reinterpret_cast<int32_t*>(scratch + at.lowest);
  int32_t* highest = reinterpret_cast<int32_t*>(scratch + at.highest);
  int32_t* own = reinterpret_cast<int32_t*>(scratch + at.own);
  const int64_t length = p.lengths[task.row], start = p.starts[task.row];

  // Scores and their maxima are in base 2: a power of 2 costs less than one of e.
  const float scale = p.scale * log2e, softcap = p.softcap * log2e;

  // Queries, scaled and transposed to [16 rows][d][lane], or by pairs; lanes beyond the last row repeat it and
  // are not read.
  using Pairs = AttentionPairs<T>;
  const bool paired = Pairs::exist && takes_pairs(p);
  const auto query_row = [&](int64_t row) {
    const int64_t real = minimum(row, rows - 1);
    return static_cast<const T*>(p.query.data) + task.row * p.query.strides[0] +
           (task.first + real / group) * p.query.strides[1] + (task.head * group + real % group) * p.query.strides[2];
  };
  if constexpr (Pairs::exist)
    if (paired) Pairs::queries(query_row, padded, p.dim, query);
  if (!paired)
    for (int64_t row = 0; row < padded; ++row) {
      const T* from = query_row(row);
      float* to = query + row / lanes * lanes * p.dim + row % lanes;
      for (int64_t d = 0; d < p.dim; ++d) to[d * lanes] = widen(from[d]) * scale;
    }
  const bool chain = p.branch == p.width;
  for (int64_t i = 0, row = 0; i < task.count; ++i) {
    const int64_t token = task.first + i, inside = chain ? token : token % p.branch;
    const int64_t slid = p.sliding_window ? inside - p.sliding_window + 1 : -length;
    const int64_t low = maximum(start, length + slid);
    const int64_t low_own = maximum(start, length + token - inside + maximum(0, slid));
    for (const int64_t behind = i + 1 < task.count ? row + group : padded; row < behind; ++row) {
      lowest[row] = static_cast<int32_t>(low);
      highest[row] = static_cast<int32_t>(length + token);
      own[row] = static_cast<int32_t>(low_own);
    }
  }
  for (int64_t row = 0; row < padded; ++row) {
    peak[row] = -INFINITY;
    total[row] = 0;
  }
  memset(output, 0, sizeof(float) * padded * value_dim);

  const T* key_rows = static_cast<const T*>(p.key_cache.data) + task.row * p.key_cache.strides[0] +
                      task.head * p.key_cache.strides[1];
  const T* value_rows = static_cast<const T*>(p.value_cache.data) + task.row * p.value_cache.strides[0] +
                        task.head * p.value_cache.strides[1];
  const float one = 1;
  const bool in_place = std::is_same<T, float>::value && p.value_dim % lanes == 0 && (rows <= block_rows || p.value_dim <= 32);
  const int64_t column = in_place ? 1 : at.keys;  // from one value to the next, times 16

  // What rows [row, last] see at most begins at least(row), and what all of them see is [all_least(last),
  // all_behind(row)). Of one chain, positions do not decrease along the rows. With branches they do, and all rows share
  // what is before the window.
  const int64_t first_slid = p.sliding_window ? length - p.sliding_window + 1 : 0;
  const int64_t last_slid = p.sliding_window ? first_slid + p.branch - 1 : 0;
  const auto least = [&](int64_t row) { return chain ? lowest[row] : maximum(start, first_slid); };
  const auto all_least = [&](int64_t last) {
    return chain ? lowest[last] : minimum(length, maximum(start, last_slid));
  };
  const auto all_behind = [&](int64_t row) { return chain ? highest[row] + 1 : length; };

  if constexpr (Pairs::exist) Pairs::configure();
  for (int64_t tile = task.key_begin; tile < task.key_end; tile += at.keys) {
    const int64_t tile_end = minimum(tile + at.keys, task.key_end);

    const float *keys = nullptr, *values = nullptr;
    int64_t key_stride = 0, value_stride = 0;
    bool packed = false;  // the values, by pairs
    if constexpr (Pairs::exist)
      if (paired)
        packed = Pairs::pack_values(value_rows + tile * p.value_cache.strides[2], p.value_cache.strides[2],
                                    tile_end - tile, p.value_dim, scratch + at.value);
    if constexpr (std::is_same<T, float>::value) {
      keys = key_rows + tile * p.key_cache.strides[2];
      key_stride = p.key_cache.strides[2];
    } else if (!paired) {
      for (int64_t key = tile; key < tile_end; ++key)
        widen_row(key_rows + key * p.key_cache.strides[2], scratch + at.key + (key - tile) * p.dim, p.dim);
      keys = scratch + at.key;
      key_stride = p.dim;
    }
    if (in_place) {
      values = reinterpret_cast<const float*>(value_rows + tile * p.value_cache.strides[2]);
      value_stride = p.value_cache.strides[2];
    } else if (!packed) {
      for (int64_t key = tile; key < tile_end; ++key)
        pack_values(value_rows + key * p.value_cache.strides[2], scratch + at.value + (key - tile) * lanes, at.keys,
                    p.value_dim);
      values = scratch + at.value;
      value_stride = lanes;
    }

    const auto seen = [&](int64_t row, int64_t count) {
      return std::make_pair(maximum(tile, least(row)), minimum(tile_end, highest[row + count - 1] + 1));
    };
    const auto softmax = [&](int64_t row) {
      const auto [begin, end] = seen(row, lanes);
      if (begin >= end) {
        for (int i = 0; i < lanes; ++i) correction[row + i] = 1;
        return;
      }
      const bool all = all_least(row + lanes - 1) <= begin && end <= all_behind(row);
      softmax_step(scores + (begin - tile) * padded + row, padded, begin, end, all, lowest + row, highest + row,
                   own + row, static_cast<int32_t>(length), paired ? scale : 1, softcap, peak + row, total + row,
                   correction + row);
    };
    if constexpr (Pairs::exist) {
      // Rows go by pieces of two blocks of lanes, and what one step leaves for the next stays in the L1 cache.
      constexpr int64_t piece = 2 * lanes;
      const int64_t pieces = (padded + piece - 1) / piece;
      const auto score = [&](int64_t i) {
        const int64_t row = i * piece, count = minimum(piece, padded - row);
        const auto [begin, end] = seen(row, count);
        Pairs::score(query + row * p.dim / 2, key_rows + begin * p.key_cache.strides[2], p.key_cache.strides[2], p.dim,
                     end - begin, p.capacity - begin, count, scores + (begin - tile) * padded + row, padded);
      };
      const auto weights_of = [&](int64_t row) { return scratch + at.weights + row % (2 * piece) * at.keys / 2; };
      const auto weigh = [&](int64_t i) {
        for (int64_t row = i * piece; row < minimum((i + 1) * piece, padded); row += lanes) {
          const auto [begin, end] = seen(row, lanes);
          softmax(row);
          if (packed) Pairs::pack_weights(scores + row, padded, begin - tile, end - tile, weights_of(row));
        }
      };
      const auto add = [&](int64_t i) {
        float* sums = scratch + at.sums;
        const int64_t first = i * piece, behind = minimum(first + piece, padded);
        for (int64_t row = first; row < behind; row += lanes) {
          const auto [begin, end] = seen(row, lanes);
          Pairs::add_values(weights_of(row), scratch + at.value, begin - tile, end - tile, tile_end - tile,
                            minimum(lanes, rows - row), value_dim, sums + (row - first) * value_dim);
        }
        for (int64_t row = first; row < minimum(behind, rows); ++row, sums += value_dim)
          for (int64_t d = 0; d < value_dim; d += native) {
            float* here = output + row * value_dim + d;
            store(here, load(here) * correction[row] + load(sums + d));
          }
      };
      // One step behind the other, since a core waits for what it has just written when tiles read it, or the reverse.
      for (int64_t i = 0; paired && i < pieces + 2; ++i) {
        if (i < pieces) score(i);
        if (0 < i && i <= pieces) weigh(i - 1);
        if (packed && i > 1) add(i - 2);
      }
      if (packed) continue;
    }

    if (!paired) {
      // Meanwhile the first rows fetch the keys of the next tile, and further down its values.
      const int64_t step = score_tile(p.dim);
      for (int64_t part = tile; part < tile_end; part += step)
        in_blocks(padded, [&](int64_t row, auto blocks) {
          constexpr int W = decltype(blocks)::value;
          const int64_t begin = maximum(part, least(row));
          const int64_t end = minimum(minimum(part + step, tile_end), highest[row + W * lanes - 1] + 1);
          for (int64_t key = begin; key < end; key += block_rows)
            with_block<block_rows>(minimum(block_rows, end - key), [&](auto count) {
              constexpr int R = decltype(count)::value;
              const T* next = key_rows + (key + at.keys) * p.key_cache.strides[2];
              score_keys<R, W>(query + row * p.dim, keys + (key - tile) * key_stride, key_stride, p.dim,
                               scores + (key - tile) * padded + row, padded,
                               {reinterpret_cast<const char*>(next), row ? 0 : R * int64_t{sizeof(T)}});
            });
        });
      for (int64_t row = 0; row < padded; row += lanes) softmax(row);
    }

    // The values of a piece, of every key, stay in the L1 cache for all rows. Blocks are of about one size: a small one
    // waits for its own sums.
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
    in_blocks(value_dim, [&](int64_t d, auto columns) {
      constexpr int W = decltype(columns)::value;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = rows * block / blocks, count = rows * (block + 1) / blocks - row, last = row + count - 1;
        // The keys that all rows of the block see; what only some see follows row by row, because a weight of 0
        // does not remove a NaN.
        const int64_t begin = minimum(tile_end, maximum(tile, all_least(last)));
        const int64_t end = maximum(begin, minimum(tile_end, all_behind(row)));
        const auto at_key = [&](int64_t key) { return values + (key - tile) * value_stride + d * column; };
        const T* next = value_rows + (begin + at.keys) * p.value_cache.strides[2] + d;
        const NextRows fetch{reinterpret_cast<const char*>(next),
                             block > 1 ? 0 : p.value_cache.strides[2] * int64_t{sizeof(T)}};
        with_block<block_rows>(count, [&](auto size) {
          add_values<decltype(size)::value, W>(scores + (begin - tile) * padded + row, padded, at_key(begin),
                                               value_stride, lanes * column, end - begin, output + row * value_dim + d,
                                               value_dim, correction + row, fetch);
        });
        if (least(row) >= begin && highest[last] < end) continue;
        for (int64_t i = row; i <= last; ++i) {
          const int64_t from = maximum(tile, lowest[i]), to = minimum(tile_end, highest[i] + 1);
          const auto add = [&](int64_t first, int64_t behind) {
            if (first < behind)
              add_values<1, W>(scores + (first - tile) * padded + i, padded, at_key(first), value_stride,
                               lanes * column, behind - first, output + i * value_dim + d, value_dim, &one,
                               {fetch.at, 0});
          };
          add(from, minimum(begin, to));
          add(maximum(maximum(end, from), own[i]), to);
        }
      }
    });
  }

  if constexpr (Pairs::exist) Pairs::release();

  if (!task.partial)
    for (int64_t row = 0; row < rows; ++row)
      write_row<T>(p, task, row, output + row * value_dim, peak[row], total[row]);
}

template <class T>
void merge(const AttentionParams& p, const AttentionTask& first, int64_t splits) {
  const Layout at(p, first.count);
  const int64_t size = at.padded_rows * at.padded_value_dim, partial = size + 2 * at.padded_rows;
  for (int64_t row = 0; row < at.rows; ++row) {
    float top = -INFINITY;
    for (int64_t i = 0; i < splits; ++i) {
      const float peak = first.partial[i * partial + size + row];
      if (peak > top) top = peak;
    }
    const float shift = top == -INFINITY ? 0 : top;
    float total = 0;
    float* sum = first.partial + row * at.padded_value_dim;
    for (int64_t i = 0; i < splits; ++i) {
      const float* from = first.partial + i * partial;
      const float weight = exp2f(from[size + row] - shift);
      total += weight * from[size + at.padded_rows + row];
      const float* add = from + row * at.padded_value_dim;
      for (int64_t d = 0; d < at.padded_value_dim; d += native) {
        const vfloat x = load(add + d) * weight;
        store(sum + d, i ? load(sum + d) + x : x);
      }
    }
    write_row<T>(p, first, row, sum, top, total);
  }
}

}  // namespace
}  // namespace cllm::cpu
