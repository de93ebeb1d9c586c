// A linear layer in bfloat16 on AMX tiles. Included only by kernels.cpp.
//
// A tile of weights is 16 outputs by 32 inputs, read where it lies. x is written in panels of 16 rows, with pairs of
// inputs of all rows side by side, as TDPBF16PS takes its second operand; a row alone lies like that as it is. A sum
// goes through one element of an accumulator in the order of the inputs: its bits depend on its own row of x and its own
// weights alone. Inputs that are no multiple of 32 go on with zeros.
#pragma once

#include "amx.h"
#include "kernels.h"
#include "quad.h"
#include "row_ops.h"

#if defined(__AMX_BF16__)

namespace cllm::cpu {
namespace {

// Of a long row of weights so many inputs are fetched ahead, about as far as the hardware needs to see that it is read on.
constexpr int64_t fetched_inputs = 1024;
// Tiles of outputs in a band: see `amx_block`.
constexpr int64_t band_tiles = 4;
// x that stays in the L2 cache, which has 2 MB on the CPUs that have AMX.
constexpr int64_t amx_block_bytes = 1 << 20;
// Weights of a layer that two such layers find in that cache.
constexpr int64_t amx_gated_bytes = 1 << 20;

// A register of inputs from `k` on, with zeros behind the last.
CLLM_INLINE __m512i inputs_from(const bf16_t* row, int64_t k, int64_t inputs) {
  return load_register<__m512i, true>(row + k, minimum(tile_inputs, inputs - k));
}

CLLM_INLINE const bf16_t* weights_of(const LinearParams& p, int64_t output) {
  return static_cast<const bf16_t*>(p.weight) + output * p.weight_stride;
}

// Of few rows, weights that come from memory bind, and `amx_block` fetches these better than `amx_gated`.
LinearLayout amx_layout(const LinearParams& p) {
  const size_t row_bytes = round_up(p.inputs, tile_inputs) * sizeof(bf16_t);
  if (p.rows == 1) return {2 * tile_rows, 1, p.inputs % tile_inputs ? row_bytes : 0};
  const int64_t weight_bytes = p.outputs * p.weight_stride * sizeof(bf16_t);
  return {2 * tile_rows, tile_rows, row_bytes, p.rows > 4 * tile_rows || weight_bytes <= amx_gated_bytes};
}

// A panel of x from `row` on: tiles over the inputs, each [16 pairs, rows].
void amx_inputs(const LinearParams& p, int64_t row, void* to) {
  const char* x = static_cast<const char*>(p.x) + row * p.x_bytes;
  const int64_t rows = minimum(p.rows - row, tile_rows);
  char* tile = static_cast<char*>(to);
  for (int64_t k = 0; k < p.inputs; k += tile_inputs) {
    const auto inputs = [&](int64_t i) {
      return inputs_from(reinterpret_cast<const bf16_t*>(x + i * p.x_bytes), k, p.inputs);
    };
    if (p.rows == 1) {
      _mm512_storeu_si512(tile, inputs(0));
      tile += 64;
      continue;
    }
    __m512i pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) pairs[i] = i < rows ? inputs(i) : __m512i{};
    transpose(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + 64 * i, pairs[i]);
    tile += tile_bytes;
  }
}

// Of 16 rows of bfloat16 values [outputs], given as [outputs, rows], register m holding outputs m and m + 8: afterwards
// register r holds rows r and r + 8.
void transpose_halves(__m512i (&x)[8]) {
  __m512i y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm512_unpacklo_epi16(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi32(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi32(y[i + j], y[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm512_unpacklo_epi64(x[i], x[i + 4]);
    y[2 * i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 4]);
  }
  // Quarters 0 and 2 are one row, 1 and 3 the other.
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = _mm512_shuffle_i64x2(y[i], y[i], 0xd8);
}

// Writes sums [count, columns] of `rows` columns.
template <int Columns>
void amx_results(const LinearParams& p, const float* sums, int64_t row, int64_t rows, int64_t output, int64_t count) {
  bf16_t* out = static_cast<bf16_t*>(p.out) + row * p.out_stride + output;
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  vfloat bias{};
  if (p.bias) {
    bf16_t values[tile_rows] = {};
    memcpy(values, static_cast<const bf16_t*>(p.bias) + output, count * sizeof(bf16_t));
    bias = load(values);
  }
  if constexpr (Columns == 1) {
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(load(sums) + bias));
  } else {
    alignas(64) float biases[tile_rows];
    store(biases, bias);
    __m512i pairs[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      pairs[i] = (__m512i)_mm512_cvtne2ps_pbh(load(sums + (i + 8) * Columns) + biases[i + 8],
                                              load(sums + i * Columns) + biases[i]);
    transpose_halves(pairs);
#pragma GCC unroll 16
    for (int64_t i = 0; i < tile_rows; ++i) {
      if (i >= rows) break;
      const __m256i values = i < 8 ? _mm512_castsi512_si256(pairs[i % 8]) : _mm512_extracti64x4_epi64(pairs[i % 8], 1);
      if (count == tile_rows) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * p.out_stride), values);
      } else {
        _mm256_mask_storeu_epi16(out + i * p.out_stride, mask, values);
      }
    }
  }
}

// Rows of weights that are fetched into the L2 cache, the first `inputs` of each: `count` from `first` on, `stride` values
// apart.
struct FetchedRows {
  const bf16_t* first;
  int64_t stride, count, inputs;

  CLLM_METHOD void operator()(int64_t k) const {
    if (k >= inputs) return;
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(first + i * stride + k, 0, 2);
  }
};

// In tiles 0 to 3, the sums of P panels of x from `row` on by G tiles of `count` rows of weights, which are `apart` values
// from each other. Meanwhile `beside` is called for every 32 inputs.
template <int G, int P, int Columns, class Beside>
CLLM_INLINE void amx_sums(const LinearParams& p, int64_t row, const bf16_t* weight, int64_t apart, int64_t count,
                          const Beside& beside) {
  const int64_t stride = p.weight_stride * sizeof(bf16_t), panel_bytes = Columns * p.x_bytes;
  const char* x = static_cast<const char*>(p.x) + row * p.x_bytes;
  const auto add_products = [&](const void* w, int64_t w_stride, int64_t next) {
    add_tile_products<G, P, Columns>(static_cast<const char*>(w), w_stride, next, x, panel_bytes);
    x += 64 * Columns;
  };
  zero_sums<G, P>();
  tile_barrier();
  int64_t k = 0;
  for (; k + tile_inputs <= p.inputs; k += tile_inputs) {
    add_products(weight + k, stride, apart * sizeof(bf16_t));
    beside(k);
  }
  if (k == p.inputs) return;
  alignas(64) char memory[G * tile_bytes];
  for (int g = 0; g < G; ++g)
    for (int64_t i = 0; i < count; ++i)
      _mm512_store_si512(memory + g * tile_bytes + 64 * i,
                         inputs_from(weight + g * apart + i * p.weight_stride, k, p.inputs));
  tile_barrier();
  add_products(memory, 64, tile_bytes);
  tile_barrier();
}

// Outputs [output, output + count), of G tiles, of P panels from `row` on. Meanwhile `next` is fetched.
template <int G, int P, int Columns>
void amx_tile(const LinearParams& p, int64_t row, int64_t output, int64_t count, const FetchedRows& next) {
  amx_sums<G, P, Columns>(p, row, weights_of(p, output), tile_rows * p.weight_stride, minimum(count, tile_rows), next);
  alignas(64) float sums[tile_rows * Columns];
  const auto results = [&](int g, int panel) {
    tile_barrier();
    const int64_t first = row + panel * tile_rows;
    amx_results<Columns>(p, sums, first, minimum(p.rows - first, tile_rows), output + g * tile_rows,
                         minimum(count, tile_rows));
    tile_barrier();
  };
  _tile_stored(0, sums, 4 * Columns);
  results(0, 0);
  if constexpr (P > 1) {
    _tile_stored(1, sums, 4 * Columns);
    results(0, 1);
  }
  if constexpr (G > 1) {
    _tile_stored(2, sums, 4 * Columns);
    results(1, 0);
  }
  if constexpr (G > 1 && P > 1) {
    _tile_stored(3, sums, 4 * Columns);
    results(1, 1);
  }
}

// Rows [row, row_end), of which x stays in the L2 cache. Outputs go in bands, and while a band is computed, as many rows of
// the weights behind it are fetched.
template <int Columns>
void amx_block(const LinearParams& p, int64_t row, int64_t row_end, int64_t begin, int64_t end, const bf16_t* after) {
  const int64_t panels = tiles_of(row_end - row), pairs = (panels + 1) / 2;
  // Where the memory binds, it gives more with fewer rows read at once, and with these in different pages: of rows that
  // share one, a group of outputs fetches some from all over the next band.
  const int64_t most = pairs > 1 ? 2 * tile_rows : tile_rows;
  const bool spread = pairs == 1 && p.weight_stride * sizeof(bf16_t) < page_bytes;
  const int64_t tiles = tiles_of(end - begin), bands = (tiles + band_tiles - 1) / band_tiles;
  int64_t band = 0;
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t left = end - first;
    last = spread ? minimum(begin + tiles * ++band / bands * tile_rows, end)
                  : first + (left >= most ? most : minimum(left, tile_rows));
    const int64_t step = spread ? tile_rows : last - first, groups = (last - first + step - 1) / step;
    const bf16_t* next = last < end ? weights_of(p, last) : after;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t output = first + group * step, count = minimum(step, last - output);
      if (count < tile_rows) configure_tiles<Columns>(count);
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t panel = row + 2 * i * tile_rows, fetched = count * i / pairs;
        const FetchedRows rows{next + (fetched * groups + group) * p.weight_stride, groups * p.weight_stride,
                               count * (i + 1) / pairs - fetched, spread ? p.inputs : fetched_inputs};
        with_block<2>(tiles_of(count), [&](auto tiles) {
          with_block<Columns == 1 ? 1 : 2>(minimum(panels - 2 * i, 2), [&](auto width) {
            amx_tile<decltype(tiles)::value, decltype(width)::value, Columns>(p, panel, output, count, rows);
          });
        });
      }
      if (count < tile_rows) configure_tiles<Columns>();
    }
  }
}

// Rows of x that stay in the L2 cache.
CLLM_INLINE int64_t amx_block_rows(const LinearParams& p) {
  return maximum(amx_block_bytes / maximum(p.x_bytes, 1) / (2 * tile_rows), 1) * 2 * tile_rows;
}

template <int Columns>
void amx_rows(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  const bf16_t* last = next ? static_cast<const bf16_t*>(next) : weights_of(p, end);
  const int64_t block = amx_block_rows(p);
  for (int64_t row = 0; row < p.rows; row += block)
    amx_block<Columns>(p, row, minimum(row + block, p.rows), begin, end, row + block < p.rows ? weights_of(p, begin) : last);
}

void amx_begin(const LinearParams& p) { p.rows == 1 ? configure_tiles<1>() : configure_tiles(); }
void amx_end(const LinearParams&) { _tile_release(); }

void amx_linear(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  p.rows == 1 ? amx_rows<1>(p, begin, end, next) : amx_rows<tile_rows>(p, begin, end, next);
}

// silu(gate) * up of up to 16 outputs of one or two panels. It is computed some at a time, beside the next sums, since
// vectors and tiles have units of their own. Sums have rows in the lanes, and so have the panels of the layer behind.
class GatedResults {
 public:
  // Of all outputs of the two layers, which have no bias; the panels begin at `to`.
  GatedResults(int64_t outputs, void* to) : outputs_(outputs), to_(static_cast<char*>(to)) {}

  // Those of the sums in the tiles: 0 and 1 of the gate, 2 and 3 of the other layer, of P panels from `row` on.
  template <int P>
  void take(int64_t row, int64_t output, int64_t count) {
    finish();
    tile_barrier();
    store_sums<2, P>(sums_[0], tile_rows, 2 * tile_rows * tile_rows, tile_rows * tile_rows);
    tile_barrier();
    const int64_t row_bytes = round_up(outputs_, tile_inputs) * sizeof(bf16_t);
    at_ = to_ + row * row_bytes + output * tile_rows * sizeof(bf16_t);
    panel_bytes_ = tile_rows * row_bytes;
    count_ = count;
    // With zeros for the second half of the last tile, where it has none.
    const bool half = output % tile_inputs == 0 && output + tile_rows >= outputs_;
    pairs_ = half ? tile_rows : tile_rows / 2;
    panels_ = P;
    panel_ = pair_ = 0;
  }

  void some() {
    if (panel_ == panels_) return;
    for (int i = 0; i < 2; ++i, ++pair_) {
      const __m512bh both = _mm512_cvtne2ps_pbh(result(2 * pair_ + 1), result(2 * pair_));
      _mm512_storeu_si512(at_ + panel_ * panel_bytes_ + 64 * pair_, interleaved(both));
    }
    if (pair_ < pairs_) return;
    pair_ = 0;
    ++panel_;
  }

  void finish() {
    while (panel_ < panels_) some();
  }

 private:
  // Of an output, in the lanes of its rows; 0 behind the last output.
  CLLM_METHOD vfloat result(int64_t i) const {
    if (i >= count_) return vfloat{};
    // Rounded as the results of linear layers.
    const vfloat gate = load(sums_[panel_] + i * tile_rows), up = load(sums_[2 + panel_] + i * tile_rows);
    const __m512i both = interleaved(_mm512_cvtne2ps_pbh(up, gate));
    return gated<bf16_t>((vfloat)_mm512_slli_epi32(both, 16), (vfloat)_mm512_and_si512(both, _mm512_set1_epi32(~0xffff)));
  }

  int64_t outputs_;
  char *to_, *at_ = nullptr;
  alignas(64) float sums_[4][tile_rows * tile_rows];
  int64_t panel_bytes_ = 0, count_ = 0;
  int panels_ = 0, panel_ = 0, pairs_ = 0, pair_ = 0;
};

// Sums for `results`, of P panels from `row` on.
template <int P, class Fetch>
CLLM_INLINE void gated_tile(const LinearParams& gate, const LinearParams& up, int64_t row, int64_t output, int64_t count,
                            const Fetch& fetch, GatedResults& results) {
  const bf16_t* weight = weights_of(gate, output);
  amx_sums<2, P, tile_rows>(gate, row, weight, weights_of(up, output) - weight, count, [&](int64_t k) {
    fetch(k);
    results.some();
  });
  results.take<P>(row, output, count);
}

// See `gated_linear` in kernels.h.
void amx_gated(const LinearParams& gate, const LinearParams& up, int64_t begin, int64_t end, void* to) {
  const int64_t block = amx_block_rows(gate);
  GatedResults results(gate.outputs, to);
  for (int64_t first = 0; first < gate.rows; first += block) {
    const int64_t behind = minimum(first + block, gate.rows), pairs = (behind - first + 2 * tile_rows - 1) / (2 * tile_rows);
    for (int64_t output = begin; output < end; output += tile_rows) {
      const int64_t count = minimum(tile_rows, end - output);
      if (count < tile_rows) configure_tiles(count);
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t row = first + 2 * i * tile_rows, fetched = tile_rows * i / pairs;
        const int64_t next = output + tile_rows + fetched, rows = tile_rows * (i + 1) / pairs - fetched;
        const FetchedRows gates{weights_of(gate, next), gate.weight_stride, rows, fetched_inputs};
        const FetchedRows ups{weights_of(up, next), up.weight_stride, rows, fetched_inputs};
        const auto fetch = [&](int64_t k) {
          gates(k);
          ups(k);
        };
        behind - row > tile_rows ? gated_tile<2>(gate, up, row, output, count, fetch, results)
                                 : gated_tile<1>(gate, up, row, output, count, fetch, results);
      }
      if (count < tile_rows) configure_tiles();
    }
  }
  results.finish();
}

}  // namespace
}  // namespace cllm::cpu
#endif
