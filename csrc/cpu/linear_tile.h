// A linear layer for few rows, on weights where they lie. Included only by kernels.cpp.
//
// Lanes run along the inputs, for x and weights alike, so that nothing is packed. An output is the sum of `native`
// lanes, each added up in the order of the inputs, then joined by one fixed tree: its bits depend on its own row of x
// and its own weights alone, not on how many other rows or outputs are computed beside it.
#pragma once

#include "kernels.h"
#include "quad.h"
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

// Whether the kernel reads x in another type than it has.
template <class T>
constexpr bool linear_converts = !std::is_same<T, Input<T>>::value;

// What the caches and the memory gain by was measured on CPUs that have AMX (Xeon) and on one that does not (Zen 5). On
// both, the arithmetic on long rows waits for the L2 cache unless the weights of some groups of outputs, x and the sums
// stay in the L1 cache; so inputs that are read as they lie go by blocks of `linear_depth` there (0: they do not). Where
// AMX is, the memory also gives more when rows that are fetched at the same time lie in different pages.
#if defined(__AMX_BF16__)
constexpr bool on_amx = true;
#else
constexpr bool on_amx = false;
#endif
// Bytes of x in a block, and how many a row and all of them have at least where blocks pay.
constexpr int64_t depth_bytes = on_amx ? 1024 : 1792, long_row = on_amx ? 8192 : 6144, large_x = on_amx ? 0 : 96 << 10;
template <class T>
constexpr int linear_depth = linear_converts<T> ? 0 : depth_bytes / sizeof(T);
// Rows that are taken together: at least, however long they are, and by blocks.
constexpr int64_t least_rows = 4 * linear_rows, rows_by_blocks = 8 * linear_rows;
// Groups of outputs in a band, by blocks and where weights have less than a page a row: see `linear_outputs`.
constexpr int64_t block_groups = on_amx ? 2 : 1, page_groups = on_amx ? 4 : 1;
// Whether lines are asked for twice: see `linear_block`.
template <class T>
constexpr bool fetches_twice = on_amx || linear_converts<T>;
// Bytes of weights that up to `linear_rows` rows read without fetching ahead. Whether they come from the L2 cache or the
// one behind it, the fetches would take more time (up to half) than the misses.
constexpr int64_t small_layer = 1 << 20;

template <class T>
bool linear_in_blocks(const LinearParams& p) {
  const int64_t bytes = p.inputs * static_cast<int64_t>(sizeof(T));
  return linear_depth<T> && p.rows > linear_rows && bytes >= long_row && p.rows * bytes > large_x;
}

template <class T>
bool is_small(const LinearParams& p) {
  return p.outputs * p.weight_stride * static_cast<int64_t>(sizeof(T)) <= small_layer;
}

// Register tiles that the rows are shared out to. Three or four rows are two of them where the memory takes the time:
// then the core spends half of it on weights that it has, while more are on their way.
template <class T>
int64_t linear_tiles(const LinearParams& p) {
  if (!fetches_twice<T> && p.rows > 2 && p.rows <= linear_rows && !is_small<T>(p)) return 2;
  return (p.rows + linear_rows - 1) / linear_rows;
}

template <class T>
int64_t linear_band(const LinearParams& p) {
  if (linear_in_blocks<T>(p)) return block_groups;
  return p.weight_stride * static_cast<int64_t>(sizeof(T)) < page_bytes ? page_groups : 1;
}

// What a tile fetches of the weights that come after its own: in each step a line of each of `Rows` rows, and where
// `Ahead`, the line that many steps behind it as well. They go to the L2 cache: the L1 cache has no room for them, and
// fetching them there was measured to cost a quarter of the time on 16 rows.
template <int Rows, int Ahead = 0>
struct Fetch {
  static constexpr int rows = Rows;

  template <class T>
  CLLM_INLINE void line(const T* next, int64_t stride, int row) {
    if (row >= Rows) return;
    if (Ahead) __builtin_prefetch(next + row * stride + Ahead * linear_step<T>, 0, 2);
    __builtin_prefetch(next + row * stride, 0, 2);
  }
};

// sum[r][c] += the products of one step of row r of x and row c of the weights, of its first `count` inputs where
// `Tail`. Meanwhile weights at `next` are fetched, of rows `next_stride` values apart.
template <int R, int C, class Next, bool Tail>
CLLM_INLINE void add_products(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t count,
                              const float* next, int64_t next_stride, vfloat (&sum)[R][C]) {
  vfloat y[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    y[c] = load_register<vfloat, Tail>(w + c * w_stride, count);
    Next::line(next, next_stride, c);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const vfloat z = load_register<vfloat, Tail>(x + r * x_stride, count);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[r][c] += z * y[c];
  }
}

#if defined(__AVX512BF16__)
template <int R, int C, class Next, bool Tail>
CLLM_INLINE void add_products(const bf16_t* x, int64_t x_stride, const bf16_t* w, int64_t w_stride, int64_t count,
                              const bf16_t* next, int64_t next_stride, vfloat (&sum)[R][C]) {
  __m512bh y[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    y[c] = load_register<__m512bh, Tail>(w + c * w_stride, count);
    Next::line(next, next_stride, c);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m512bh z = load_register<__m512bh, Tail>(x + r * x_stride, count);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], z, y[c]);
  }
}
#else
// x has zeros behind its end.
template <int R, int C, class Next, bool Tail>
CLLM_INLINE void add_products(const float* x, int64_t x_stride, const bf16_t* w, int64_t w_stride, int64_t count,
                              const bf16_t* next, int64_t next_stride, vfloat (&sum)[R][C]) {
  vuint pairs[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    pairs[c] = load_register<vuint, Tail>(w + c * w_stride, count);
    Next::line(next, next_stride, c);
  }
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    vfloat y[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) y[c] = reinterpret_cast<vfloat>(odd ? pairs[c] & 0xffff0000u : pairs[c] << 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vfloat z = load(x + r * x_stride + odd * native);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] += z * y[c];
    }
  }
}
#endif

// A task's outputs are a multiple of what every register tile holds. Rows a page apart share a few sets of the caches.
// With many of them it pays to move them, and with some where their blocks are to stay in the L1 cache.
template <class T>
LinearLayout linear_layout(const LinearParams& p) {
  constexpr int64_t outputs = 24;
  if (linear_converts<T>) return {outputs, 1, round_up(p.inputs, linear_step<T>) * sizeof(Input<T>)};
  const size_t bytes = p.inputs * sizeof(T);
  if (bytes % page_bytes) return {outputs, 1, 0};
  if (!on_amx && linear_in_blocks<T>(p)) return {outputs, 1, bytes + depth_bytes};
  return {outputs, 1, p.rows > 16 * linear_rows ? bytes + 64 : 0};
}

// A row of x as the kernel reads it; what is converted, with zeros up to a whole number of steps.
template <class T>
void linear_inputs(const LinearParams& p, int64_t row, void* to) {
  const T* x = reinterpret_cast<const T*>(static_cast<const char*>(p.x) + row * p.x_bytes);
  if constexpr (linear_converts<T>) {
    for (int64_t k = 0; k < p.inputs; k += linear_step<T>) {
      const vuint pairs = load_register<vuint, true>(x + k, minimum(linear_step<T>, p.inputs - k));
      store(static_cast<float*>(to) + k, reinterpret_cast<vfloat>(pairs << 16));
      store(static_cast<float*>(to) + k + native, reinterpret_cast<vfloat>(pairs & 0xffff0000u));
    }
  } else {
    memcpy(to, x, p.inputs * sizeof(T));
  }
}

// Writes rows [row, row + R) of outputs [output, output + C). Outputs go by fours; those that are left over in each row
// are added up and rounded together.
template <class T, int R, int C>
CLLM_INLINE void linear_results(const LinearParams& p, int64_t row, int64_t output, const vfloat (&sum)[R][C]) {
  constexpr int rest = C % 4, whole = C - rest, fours = R * whole / 4, quads = fours + (R * rest + 3) / 4;
  const int64_t stride = p.out_stride;
  T* out = static_cast<T*>(p.out) + row * stride + output;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + output : nullptr;
  // Row and output of the sums that are left over, in their order.
  const auto left_row = [](int i) { return i / maximum(rest, 1); };
  const auto left_output = [](int i) { return whole + i % maximum(rest, 1); };
  vfloat lanes[4 * quads] = {};
#pragma GCC unroll 32
  for (int i = 0; i < R * whole; ++i) lanes[i] = sum[i / maximum(whole, 1)][i % maximum(whole, 1)];
#pragma GCC unroll 32
  for (int i = 0; i < R * rest; ++i) lanes[R * whole + i] = sum[left_row(i)][left_output(i)];
  vquad total[quads];
  add_lanes<quads>(lanes, total);
#pragma GCC unroll 8
  for (int q = 0; q < fours; ++q) {
    const int r = 4 * q / whole, c = 4 * q % whole;
    if (bias) total[q] += load_quad(bias + c);
    store_quad(out + r * stride + c, total[q]);
  }
  if constexpr (rest > 0) {
#pragma GCC unroll 4
    for (int q = fours; q < quads; ++q) {
      const int first = 4 * (q - fours);
      if (bias)
        for (int i = 0; i < 4; ++i) total[q][i] += widen(bias[left_output(first + i)]);
      T values[4];
      store_quad(values, total[q]);
      constexpr int piece = 4 % rest == 0 ? rest : 1;  // values that stand side by side
#pragma GCC unroll 4
      for (int i = 0; i < 4; i += piece) {
        const int at = first + i;
        if (at < R * rest) memcpy(out + left_row(at) * stride + left_output(at), values + i, piece * sizeof(T));
      }
    }
  }
}

// Inputs [k, end) of rows [row, row + R) of outputs [output, output + C). What the inputs before have added up comes from
// `sums`, and goes there unless these are the last ones.
template <class T, int R, int C, class Next>
CLLM_INLINE void linear_tile(const LinearParams& p, int64_t row, int64_t output, int64_t k, int64_t end, const T* next,
                             int64_t next_stride, float* sums) {
  constexpr int step = linear_step<T>;
  const int64_t whole = end / step * step, w_stride = p.weight_stride;
  const T* weight = static_cast<const T*>(p.weight) + output * w_stride;
  const Input<T>* x = reinterpret_cast<const Input<T>*>(static_cast<const char*>(p.x) + row * p.x_bytes);
  const int64_t x_stride = p.x_bytes / sizeof(Input<T>);
  vfloat sum[R][C] = {};
  if (linear_depth<T> && k > 0)
#pragma GCC unroll 32
    for (int i = 0; i < R * C; ++i) sum[i / C][i % C] = load(sums + i * native);
  for (next -= k; k < whole; k += step)
    add_products<R, C, Next, false>(x + k, x_stride, weight + k, w_stride, step, next + k, next_stride, sum);
  if (linear_depth<T> && end < p.inputs) {
#pragma GCC unroll 32
    for (int i = 0; i < R * C; ++i) store(sums + i * native, sum[i / C][i % C]);
    return;
  }
  if (whole < end)
    add_products<R, C, Fetch<0>, true>(x + whole, x_stride, weight + whole, w_stride, end - whole, next, 0, sum);
  linear_results<T>(p, row, output, sum);
}

// Outputs [begin, end) in groups of C, all rows of a group before the next. Meanwhile weights are fetched, so that the
// memory never rests: behind the last group come those at `after`. Groups go in bands. Where the inputs go by blocks, all
// groups of a band take a block before the next one; else a group fetches some rows from all over the next band.
template <class T, int C, class Next>
void linear_outputs(const LinearParams& p, int64_t begin, int64_t end, const T* after) {
  const int64_t tiles = linear_tiles<T>(p);
  const bool blocks = C > 1 && linear_in_blocks<T>(p);
  const int64_t depth = blocks ? linear_depth<T> : maximum(p.inputs, 1), band = C * linear_band<T>(p);
  alignas(64) float sums[linear_depth<T> ? block_groups * C * rows_by_blocks * native : 1];
  const auto weights = [&](int64_t output) { return static_cast<const T*>(p.weight) + output * p.weight_stride; };
  for (int64_t first = begin, last; first < end; first = last) {
    last = minimum(first + band, end);
    const T* behind = last < end ? weights(last) : after;
    int64_t k = 0;
    do {
      const int64_t k_end = minimum(k + depth, p.inputs);
      for (int64_t output = first; output < last; output += C) {
        const int64_t stride = blocks ? p.weight_stride : (last - first) / C * p.weight_stride;
        const T* fetched = !blocks            ? behind + (output - first) / C * p.weight_stride
                           : output + C < last ? weights(output + C) + k
                           : k_end < p.inputs  ? weights(first) + k_end
                                               : behind;
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t row = p.rows * i / tiles, count = p.rows * (i + 1) / tiles - row;
          // Half of the rows by each half of the tiles; or in turn from tile to tile, from the middle of a group on.
          const int64_t from = fetches_twice<T> ? (Next::rows < C && 2 * i >= tiles ? Next::rows : 0)
                                                : i * C / tiles + (blocks ? 0 : C / 2);
          const T* next = fetched + from * stride;
          with_block<linear_rows>(count, [&](auto size) {
            linear_tile<T, decltype(size)::value, C, Next>(p, row, output, k, k_end, next, stride,
                                                           sums + ((output - first) * p.rows + row * C) * native);
          });
        }
      }
      k = k_end;
    } while (k < p.inputs);
  }
}

// All rows, of which x stays in the L2 cache.
template <class T>
void linear_block(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  const auto weights = [&](int64_t output) { return static_cast<const T*>(p.weight) + output * p.weight_stride; };
  const T* last = next ? static_cast<const T*>(next) : weights(end);
  const auto run = [&](auto outputs) {
    constexpr int C = decltype(outputs)::value;
    const int64_t whole = begin + (end - begin) / C * C;
    const T* after = whole < end ? weights(whole) : last;
    const auto outputs_by = [&](auto next) { linear_outputs<T, C, decltype(next)>(p, begin, whole, after); };
    const int64_t tiles = linear_tiles<T>(p);
    if constexpr (fetches_twice<T>) {
      // A core that has many fetches under way drops others, and the arithmetic waits for every line that was dropped. So
      // lines are asked for twice where there is arithmetic to speak of: within a tile, by both of two, or by the first
      // tiles half of the group and by the others the rest. At one row the memory is busy without it.
      if (on_amx && tiles == 1 && is_small<T>(p))
        outputs_by(Fetch<0>{});
      else if (p.rows == 1)
        outputs_by(Fetch<C>{});
      else if (tiles == 1)
        outputs_by(Fetch<C, 8>{});
      else if (tiles == 2)
        outputs_by(Fetch<C>{});
      else
        outputs_by(Fetch<(C + 1) / 2>{});
    } else {
      // Where rows are read one after the other without much arithmetic between, the core fetches them by itself, and
      // whatever else is asked for slows it down. Else all tiles together ask for each line once, in blocks some more.
      constexpr int64_t most = (C + 1) / 2;
      if (tiles == 1)
        outputs_by(Fetch<0>{});
      else
        with_block<most>(minimum((C + tiles - 1) / tiles + linear_in_blocks<T>(p), most),
                         [&](auto rows) { outputs_by(Fetch<decltype(rows)::value>{}); });
    }
    linear_outputs<T, 1, Fetch<1>>(p, whole, end, last);
  };
  if (p.rows <= 2) return run(constant<tile_outputs(1)>);
  if (p.rows == 3) return run(constant<tile_outputs(3)>);
  run(constant<tile_outputs(4)>);
}

// Many rows go in blocks, so that the outputs of a task find x in the cache.
template <class T>
void linear(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  constexpr int64_t block_bytes = 256 << 10;
  int64_t block = maximum(block_bytes / p.x_bytes / linear_rows * linear_rows, least_rows);
  if (linear_in_blocks<T>(p)) block = rows_by_blocks;
  if (p.rows <= block) return linear_block<T>(p, begin, end, next);
  const int64_t count = (p.rows + block - 1) / block, tiles = (p.rows + linear_rows - 1) / linear_rows;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = tiles * i / count * linear_rows, after = minimum(tiles * (i + 1) / count * linear_rows, p.rows);
    LinearParams part = p;
    part.x = static_cast<const char*>(p.x) + row * p.x_bytes;
    part.out = static_cast<T*>(p.out) + row * p.out_stride;
    part.rows = after - row;
    linear_block<T>(part, begin, end, i + 1 < count ? static_cast<const T*>(p.weight) + begin * p.weight_stride : next);
  }
}

}  // namespace
}  // namespace cllm::cpu
