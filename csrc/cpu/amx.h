// AMX tiles of bfloat16. TDPBF16PS adds the products of [16, 32] and [32, 16] to [16, 16] floats; the second operand has
// pairs of its rows side by side. Included only by kernels.cpp.
#pragma once

#include "pairs.h"
#include "vec.h"

#if defined(__AMX_BF16__)
namespace cllm::cpu {
namespace {

constexpr int64_t tile_rows = 16, tile_inputs = 32, tile_bytes = 1024;

constexpr int64_t tiles_of(int64_t rows) { return (rows + tile_rows - 1) / tile_rows; }

// Lets no store or load pass the instructions on tiles, which the compiler does not know to touch memory.
CLLM_INLINE void tile_barrier() { asm volatile("" ::: "memory"); }

// What ldtilecfg takes: tiles 0 to 3 are sums [rows, columns], 4 and 5 first operands [rows, 32], 6 a second one [16 pairs,
// columns]. At times, most likely while another thread runs on the core, few registers are left beside the tiles that hold
// something, and an instruction waits for a free one. So operands go through as few tiles as possible, although some are loaded
// twice. Of 2 by 2 sums, a product then takes 67 cycles with four tiles of operands and 39 with two, and else 15 cycles with
// either (Xeon of the fifth generation).
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr TileConfig(int first_rows, int columns) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = tile == 4 || tile == 5 ? 64 : 4 * columns;
      rows[tile] = tile < 6 ? first_rows : 16;
    }
  }
};

// Made beforehand: a core would wait for one that was just written.
template <int Columns>
struct TileConfigs {
  static constexpr TileConfig of_rows[] = {
      {1, Columns}, {2, Columns},  {3, Columns},  {4, Columns},  {5, Columns},  {6, Columns},  {7, Columns},  {8, Columns},
      {9, Columns}, {10, Columns}, {11, Columns}, {12, Columns}, {13, Columns}, {14, Columns}, {15, Columns}, {16, Columns},
  };
};

template <int Columns = 16>
void configure_tiles(int64_t rows = tile_rows) {
  _tile_loadconfig(&TileConfigs<Columns>::of_rows[rows - 1]);
}

// The sums of G first operands by P second ones: tile 2 g + p.
template <int G, int P>
CLLM_INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (G > 1) _tile_zero(2);
  if constexpr (G > 1 && P > 1) _tile_zero(3);
}

// Writes these sums, whose rows are `stride` floats apart; those of the next first operand go `next_first` floats further,
// those of the next second one `next_second`.
template <int G, int P>
CLLM_INLINE void store_sums(float* to, int64_t stride, int64_t next_first, int64_t next_second) {
  _tile_stored(0, to, 4 * stride);
  if constexpr (P > 1) _tile_stored(1, to + next_second, 4 * stride);
  if constexpr (G > 1) _tile_stored(2, to + next_first, 4 * stride);
  if constexpr (G > 1 && P > 1) _tile_stored(3, to + next_first + next_second, 4 * stride);
}

// Adds the product of the operands in tiles 4 and 6 to a sum.
template <int Sum>
CLLM_INLINE void add_tile_product() {
  if constexpr (Sum == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (Sum == 1) _tile_dpbf16ps(1, 4, 6);
  if constexpr (Sum == 2) _tile_dpbf16ps(2, 4, 6);
  if constexpr (Sum == 3) _tile_dpbf16ps(3, 4, 6);
}

// Adds the products of first operands, whose rows are `row_bytes` and which are `next_first` bytes apart, and second ones,
// `next_second` bytes apart.
template <int G, int P, int Columns = 16>
CLLM_INLINE void add_tile_products(const char* first, int64_t row_bytes, int64_t next_first, const char* second,
                                   int64_t next_second) {
  _tile_loadd(4, first, row_bytes);
  _tile_loadd(6, second, 4 * Columns);
  add_tile_product<0>();
  if constexpr (P > 1) {
    _tile_loadd(6, second + next_second, 4 * Columns);
    add_tile_product<1>();
  }
  if constexpr (G > 1) {
    _tile_loadd(4, first + next_first, row_bytes);
    if constexpr (P > 1) {
      add_tile_product<3>();
      _tile_loadd(6, second, 4 * Columns);
    }
    add_tile_product<2>();
  }
}

}  // namespace
}  // namespace cllm::cpu
#endif
