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

#if defined(__AMX_BF16__)

namespace cllm::cpu {
namespace {

// Of a long row of weights so many inputs are fetched ahead, about as far as the hardware needs to see that it is read on.
constexpr int64_t fetched_inputs = 1024;
// Tiles of outputs in a band: see `amx_block`.
constexpr int64_t band_tiles = 4;
// x that stays in the L2 cache, which has 2 MB on the CPUs that have AMX.
constexpr int64_t amx_block_bytes = 1 << 20;

// A register of inputs from `k` on, with zeros behind the last.
CLLM_INLINE __m512i inputs_from(const bf16_t* row, int64_t k, int64_t inputs) {
  return load_register<__m512i, true>(row + k, minimum(tile_inputs, inputs - k));
}

LinearLayout amx_layout(const LinearParams& p) {
  if (p.rows == 1 && p.inputs % tile_inputs == 0) return {2 * tile_rows, 1, 0};
  return {2 * tile_rows, p.rows == 1 ? 1 : tile_rows, round_up(p.inputs, tile_inputs) * sizeof(bf16_t)};
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
};

// Outputs [output, output + count), of G tiles, of P panels from `row` on. Meanwhile `next` is fetched.
template <int G, int P, int Columns>
void amx_tile(const LinearParams& p, int64_t row, int64_t output, int64_t count, const FetchedRows& next) {
  const int64_t stride = p.weight_stride * sizeof(bf16_t), panel_bytes = Columns * p.x_bytes;
  const bf16_t* weight = static_cast<const bf16_t*>(p.weight) + output * p.weight_stride;
  const char* x = static_cast<const char*>(p.x) + row * p.x_bytes;
  const auto add_products = [&](const char* w, int64_t w_stride) {
    add_tile_products<G, P, Columns>(w, w_stride, tile_rows * w_stride, x, panel_bytes);
    x += 64 * Columns;
  };
  zero_sums<G, P>();
  tile_barrier();
  int64_t k = 0;
  for (; k + tile_inputs <= p.inputs; k += tile_inputs) {
    add_products(reinterpret_cast<const char*>(weight + k), stride);
    if (k >= next.inputs) continue;
    for (int64_t i = 0; i < next.count; ++i) __builtin_prefetch(next.first + i * next.stride + k, 0, 2);
  }
  alignas(64) char memory[2 * tile_bytes];
  if (k < p.inputs) {
    for (int64_t i = 0; i < count; ++i)
      _mm512_store_si512(memory + 64 * i, inputs_from(weight + i * p.weight_stride, k, p.inputs));
    tile_barrier();
    add_products(memory, 64);
    tile_barrier();
  }
  float* sums = reinterpret_cast<float*>(memory);
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
  const int64_t panels = (row_end - row + tile_rows - 1) / tile_rows, pairs = (panels + 1) / 2;
  // Where the memory binds, it gives more with fewer rows read at once, and with these in different pages: of rows that
  // share one, a group of outputs fetches some from all over the next band.
  const int64_t most = pairs > 1 ? 2 * tile_rows : tile_rows;
  const bool spread = pairs == 1 && p.weight_stride * sizeof(bf16_t) < page_bytes;
  const int64_t tiles = (end - begin + tile_rows - 1) / tile_rows, bands = (tiles + band_tiles - 1) / band_tiles;
  int64_t band = 0;
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t left = end - first;
    last = spread ? minimum(begin + tiles * ++band / bands * tile_rows, end)
                  : first + (left >= most ? most : minimum(left, tile_rows));
    const int64_t step = spread ? tile_rows : last - first, groups = (last - first + step - 1) / step;
    const bf16_t* next = last < end ? static_cast<const bf16_t*>(p.weight) + last * p.weight_stride : after;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t output = first + group * step, count = minimum(step, last - output);
      if (count < tile_rows) configure_tiles<Columns>(count);
      for (int64_t i = 0; i < pairs; ++i) {
        const int64_t panel = row + 2 * i * tile_rows, fetched = count * i / pairs;
        const FetchedRows rows{next + (fetched * groups + group) * p.weight_stride, groups * p.weight_stride,
                               count * (i + 1) / pairs - fetched, spread ? p.inputs : fetched_inputs};
        const auto tile = [&](auto heights, auto width) {
          amx_tile<decltype(heights)::value, decltype(width)::value, Columns>(p, panel, output, count, rows);
        };
        using One = std::integral_constant<int, 1>;
        using Two = std::integral_constant<int, 2>;
        const bool wide = 2 * i + 1 < panels, tall = count > tile_rows;
        if constexpr (Columns > 1) {
          if (wide) {
            tall ? tile(Two{}, Two{}) : tile(One{}, Two{});
            continue;
          }
        }
        tall ? tile(Two{}, One{}) : tile(One{}, One{});
      }
      if (count < tile_rows) configure_tiles<Columns>();
    }
  }
}

template <int Columns>
void amx_rows(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  const auto weights = [&](int64_t output) { return static_cast<const bf16_t*>(p.weight) + output * p.weight_stride; };
  const bf16_t* last = next ? static_cast<const bf16_t*>(next) : weights(end);
  const int64_t block = maximum(amx_block_bytes / maximum(p.x_bytes, 1) / (2 * tile_rows), 1) * 2 * tile_rows;
  configure_tiles<Columns>();
  for (int64_t row = 0; row < p.rows; row += block)
    amx_block<Columns>(p, row, minimum(row + block, p.rows), begin, end, row + block < p.rows ? weights(begin) : last);
  _tile_release();
}

void amx_linear(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  p.rows == 1 ? amx_rows<1>(p, begin, end, next) : amx_rows<tile_rows>(p, begin, end, next);
}

}  // namespace
}  // namespace cllm::cpu
#endif
