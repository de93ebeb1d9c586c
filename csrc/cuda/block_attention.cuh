// block_attention: one block for each tile of rows, cache head and split of the keys; the splits are merged by the last
// block of a tile or by a kernel of its own.
//
// Rows are token x head of the group that shares a cache head, so that a group of any size fills a tile:
// row = token * group + member. Scores and their maxima are in base 2. The online softmax and the split along the cache
// follow FlashAttention-2 (Dao, 2023, arXiv:2307.08691) and Flash-Decoding (Dao et al., 2023).
#pragma once

#include <type_traits>

#include "attention_plan.h"
#include "platform.h"

namespace cllm::cuda {

constexpr float log2e = 1.4426950408889634f;
constexpr float ln2 = 0.6931471805599453f;

// How a block is cut up. Warps divide the rows of the tile (16 each) and the keys of a step; `Dim` is the larger head
// size, rounded up to one that is compiled.
template <int Dim_, int RowWarps_, int KeyWarps_, int Keys_, int Stages_>
struct Tile {
  static constexpr int dim = Dim_, row_warps = RowWarps_, key_warps = KeyWarps_, keys = Keys_, stages = Stages_;
  static constexpr int rows = 16 * row_warps, threads = 32 * row_warps * key_warps, warp_keys = keys / key_warps;
  // Elements of a row of the queries, keys or values in shared memory. An odd number of 16-byte chunks, so that eight
  // rows of a matrix lie in different banks.
  static constexpr int stride = dim + 8;
  static constexpr int chunks = dim / 8;
  static constexpr int sum_stride = dim + 4;
  static constexpr int shared_bytes = (rows + 2 * stages * keys) * stride * 2;
  // Queries of the widest heads would not fit into registers.
  static constexpr bool query_in_registers = dim <= 128;
  static_assert(warp_keys % 16 == 0 && dim % 16 == 0, "a warp multiplies 16 x 16 matrices");
  static_assert(key_warps * rows * (sum_stride + 2) * 4 <= shared_bytes, "sums take the place of keys and values");
};

// The keys that a block looks at, and those of them that every row of its tile sees.
struct KeyRange {
  int begin, end, all_begin, all_end;
};

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__device__ inline int larger(int a, int b) { return a > b ? a : b; }

template <class Tile>
__device__ KeyRange key_range(const AttentionArguments& a, int length, int start, int tile, int split) {
  const int group = static_cast<int>(a.params.group()), window = static_cast<int>(a.params.sliding_window);
  const int first = tile * Tile::rows / group;
  const int last = smaller(tile * Tile::rows + Tile::rows - 1, a.rows - 1) / group;
  // Of one chain, positions rise with the rows; with branches all rows share what is before the window.
  const int branch = static_cast<int>(a.params.branch);
  const bool chain = branch == a.params.width;
  KeyRange range{start, length + last + 1, start, length + (chain ? first + 1 : 0)};
  if (window) {
    range.begin = larger(start, length + (chain ? first : 0) - window + 1);
    range.all_begin = larger(start, length + (chain ? last : branch - 1) - window + 1);
  }
  // Lengths on a device are not checked by the host; what lies outside the cache is not read.
  range.end = smaller(range.end, static_cast<int>(a.params.capacity));
  range.begin = smaller(larger(range.begin, 0), range.end);
  if (a.splits > 1) {
    int size = larger(split_keys, (range.end - range.begin + a.splits - 1) / a.splits);
    size = (size + Tile::keys - 1) / Tile::keys * Tile::keys;
    // A split may begin far behind the last key.
    const int64_t begin = range.begin + static_cast<int64_t>(split) * size;
    range.begin = begin < range.end ? static_cast<int>(begin) : range.end;
    range.end = smaller(range.end - range.begin, size) + range.begin;
  }
  return range;
}

// Rows [first, first + Rows) of 16-bit elements to shared memory; rows from `end` on and elements from `dim` on become
// zeros. Whole vectors arrive later, by wait_for_copies.
template <class Tile, int Rows>
__device__ __forceinline__ void load_rows(uint16_t* shared, const uint16_t* global, int64_t stride, int first, int end,
                                          int dim, bool aligned) {
  for (int index = threadIdx.x; index < Rows * Tile::chunks; index += Tile::threads) {
    const int row = index / Tile::chunks, at = index % Tile::chunks * 8;
    uint16_t* to = shared + row * Tile::stride + at;
    const bool real = first + row < end && at < dim;
    const uint16_t* from = real ? global + (first + row) * stride + at : global;
    if (aligned) {
      copy_async(to, from, real);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) to[e] = real && at + e < dim ? from[e] : 0;
    }
  }
}

template <class T>
__device__ __forceinline__ bool is_broken(uint16_t bits) {
  constexpr uint16_t exponent = std::is_same_v<T, bf16_t> ? 0x7F80 : 0x7C00;
  return (bits & exponent) == exponent;
}

// Joins the splits of a row, weighted by their sums, on one warp; empty splits are not read.
template <class T>
__device__ void merge_row(const AttentionArguments& a, int64_t batch, int64_t head, int row) {
  const AttentionParams& p = a.params;
  const int lane = threadIdx.x % 32, group = static_cast<int>(p.group());
  const int64_t base = (batch * p.kv_heads + head) * a.splits * a.rows + row;
  const int64_t token = row / group, query_head = head * group + row % group;

  float top = -INFINITY;
  for (int split = lane; split < a.splits; split += 32)
    top = fmaxf(top, load_shared_result(a.partial_lse + base + static_cast<int64_t>(split) * a.rows));
  for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(all_lanes, top, step));
  const float sink = p.sinks ? p.sinks[query_head] * log2e : -INFINITY;
  top = fmaxf(top, sink);
  const float shift = top == -INFINITY ? 0.0f : top;

  // Results of several splits are on their way at the same time: one after the other, each would take as long as a launch.
  constexpr int most = 256 / 32, ahead = 4;
  float sum[most] = {}, total = 0;
  for (int begin = 0; begin < a.splits; begin += 32) {
    const int split = begin + lane;
    const float lse = split < a.splits
                          ? load_shared_result(a.partial_lse + base + static_cast<int64_t>(split) * a.rows)
                          : -INFINITY;
    const float weight = exp2_fast(lse - shift);
    const uint32_t filled = __ballot_sync(all_lanes, lse != -INFINITY);
    total += weight;
    const int count = smaller(32, a.splits - begin);
    for (int i = 0; i < count; i += ahead) {
      float value[ahead][most];
#pragma unroll
      for (int next = 0; next < ahead; ++next) {
        const float* from = a.partial_out + (base + static_cast<int64_t>(begin + i + next) * a.rows) * p.value_dim;
        const bool read = filled >> (i + next) & 1;
#pragma unroll
        for (int d = 0; d < most; ++d)
          value[next][d] = read && d * 32 + lane < p.value_dim ? load_shared_result(from + d * 32 + lane) : 0.0f;
      }
#pragma unroll
      for (int next = 0; next < ahead; ++next) {
        const float one = __shfl_sync(all_lanes, weight, i + next);
#pragma unroll
        for (int d = 0; d < most; ++d) sum[d] += one * value[next][d];
      }
    }
  }
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(all_lanes, total, step);
  total += exp2_fast(sink - shift);
  T* out = static_cast<T*>(p.out) + ((batch * p.width + token) * p.heads + query_head) * p.value_dim;
  const float factor = total == 0 ? 0.0f : 1 / total;
#pragma unroll
  for (int d = 0; d < most; ++d)
    if (d * 32 + lane < p.value_dim) narrow(sum[d] * factor, out + d * 32 + lane);
  if (lane == 0) p.lse[(batch * p.heads + query_head) * p.width + token] = (shift + log2f(total)) * ln2;
}

// One warp's share of a tile: 16 rows and some keys of every step.
template <class T, class Tile>
struct Warp {
  static constexpr int key_tiles = Tile::warp_keys / 8, steps = Tile::dim / 16;
  float output[2 * steps][4] = {};
  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
  uint32_t query[Tile::query_in_registers ? steps : 1][4];
  // What rows lane / 4 and lane / 4 + 8 see: keys from `lowest` to `highest`, but for those from `length` on that are
  // before `own`.
  int lowest[2], highest[2], own[2], length;

  __device__ __forceinline__ bool sees(int half, int key) const {
    return key >= (key < length ? lowest[half] : own[half]) && key <= highest[half];
  }

  __device__ void load_query(const uint16_t* queries, int step, uint32_t (&to)[4]) const {
    const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % Tile::row_warps;
    const int row = row_warp * 16 + lane % 16;
    load_matrices(to, queries + row * Tile::stride + step * 16 + lane / 16 * 8);
  }

  // A step of the online softmax over keys [first, first + warp_keys). With `masked`, rows see only some of them.
  __device__ __forceinline__ void step(const uint16_t* queries, const uint16_t* keys, const uint16_t* values, int first,
                                       bool masked, float scale, float cap) {
    const int lane = threadIdx.x % 32;
    float score[key_tiles][4] = {};
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      uint32_t loaded[4];
      if constexpr (!Tile::query_in_registers) load_query(queries, step, loaded);
      const uint32_t(&rows)[4] = Tile::query_in_registers ? query[Tile::query_in_registers ? step : 0] : loaded;
#pragma unroll
      for (int pair = 0; pair < key_tiles / 2; ++pair) {
        uint32_t key[4];
        load_matrices(key, keys + (pair * 16 + lane / 16 * 8 + lane % 8) * Tile::stride + step * 16 + lane / 8 % 2 * 8);
        mma<T>(score[2 * pair], rows, key[0], key[1]);
        mma<T>(score[2 * pair + 1], rows, key[2], key[3]);
      }
    }

    float new_peak[2] = {peak[0], peak[1]};
#pragma unroll
    for (int tile = 0; tile < key_tiles; ++tile)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float x = score[tile][e] * scale;
        if (cap > 0) {
          // `cap` is in base 2 as well; tanh(x) = sign(x) (1 - e^-2|x|) / (1 + e^-2|x|) does not overflow
          const float decay = exp2_fast(fabsf(x) / cap * (-2 * log2e));
          const float bounded = cap * (1 - decay) / (1 + decay);
          x = x < 0 ? -bounded : bounded;
        }
        if (masked) {
          const int key = first + tile * 8 + lane % 4 * 2 + e % 2;
          if (!sees(e / 2, key)) x = -INFINITY;
        }
        score[tile][e] = x;
        new_peak[e / 2] = fmaxf(new_peak[e / 2], x);  // the maximum ignores NaN, which shows in the sum
      }

    float shift[2], sum[2] = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& top = new_peak[half];
      top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
      shift[half] = top == -INFINITY ? 0.0f : top;  // a row that has seen nothing keeps weights of 0
      const float correction = exp2_fast(peak[half] - shift[half]);
      peak[half] = top;
      total[half] *= correction;
#pragma unroll
      for (int tile = 0; tile < 2 * steps; ++tile) {
        output[tile][2 * half] *= correction;
        output[tile][2 * half + 1] *= correction;
      }
    }
    uint32_t weight[key_tiles][2];
#pragma unroll
    for (int tile = 0; tile < key_tiles; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[tile][e] = exp2_fast(score[tile][e] - shift[e / 2]);
        sum[e / 2] += score[tile][e];
      }
      weight[tile][0] = pack<T>(score[tile][0], score[tile][1]);
      weight[tile][1] = pack<T>(score[tile][2], score[tile][3]);
    }
    total[0] += sum[0];  // of this lane's keys; the lanes of a row are added up at the end
    total[1] += sum[1];

#pragma unroll
    for (int pair = 0; pair < key_tiles / 2; ++pair) {
      const uint32_t rows[4] = {weight[2 * pair][0], weight[2 * pair][1], weight[2 * pair + 1][0],
                                weight[2 * pair + 1][1]};
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        uint32_t value[4];
        load_transposed_matrices(value, values + (pair * 16 + lane % 16) * Tile::stride + step * 16 + lane / 16 * 8);
        mma<T>(output[2 * step], rows, value[0], value[1]);
        mma<T>(output[2 * step + 1], rows, value[2], value[3]);
      }
    }
  }

  // Makes outputs NaN that see a value which is not finite, of `count` keys from `first` on.
  __device__ void break_outputs(const uint16_t* values, int first, int count) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < count; ++i)
#pragma unroll
      for (int tile = 0; tile < 2 * steps; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (sees(e / 2, first + i) && is_broken<T>(values[i * Tile::stride + tile * 8 + lane % 4 * 2 + e % 2]))
            output[tile][e] = NAN;
        }
  }
};

// Sums over the warps that share rows, and their division, to the result or to this split's part of it.
template <class T, class Tile>
__device__ void write_rows(const AttentionArguments& a, const Warp<T, Tile>& warp, unsigned char* memory, int tile,
                           int split, int64_t batch, int64_t head) {
  const AttentionParams& p = a.params;
  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % Tile::row_warps;
  const int key_warp = threadIdx.x / 32 / Tile::row_warps, group = static_cast<int>(p.group());
  float* peaks = reinterpret_cast<float*>(memory);  // [key warps][rows]
  float* totals = peaks + Tile::key_warps * Tile::rows;
  float* sums = totals + Tile::key_warps * Tile::rows;  // [key warps][rows][sum_stride]

  __syncthreads();  // all have used their keys and values, whose place this takes
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = warp.total[half];
    total += __shfl_xor_sync(all_lanes, total, 1);
    total += __shfl_xor_sync(all_lanes, total, 2);
    const int slot = key_warp * Tile::rows + row_warp * 16 + half * 8 + lane / 4;
    if (lane % 4 == 0) {
      peaks[slot] = warp.peak[half];
      totals[slot] = total;
    }
#pragma unroll
    for (int step = 0; step < Tile::dim / 8; ++step) {
      float2 pair;
      pair.x = warp.output[step][2 * half];
      pair.y = warp.output[step][2 * half + 1];
      *reinterpret_cast<float2*>(sums + slot * Tile::sum_stride + step * 8 + lane % 4 * 2) = pair;
    }
  }
  __syncthreads();

  // A warp takes whole rows.
  for (int local = threadIdx.x / 32; local < Tile::rows; local += Tile::threads / 32) {
    const int row = tile * Tile::rows + local;
    if (row >= a.rows) break;
    const int64_t token = row / group, query_head = head * group + row % group;
    const float sink = a.splits == 1 && p.sinks ? p.sinks[query_head] * log2e : -INFINITY;
    float top = sink;
    for (int w = 0; w < Tile::key_warps; ++w) top = fmaxf(top, peaks[w * Tile::rows + local]);
    const float shift = top == -INFINITY ? 0.0f : top;
    float total = exp2_fast(sink - shift), factor[Tile::key_warps];
#pragma unroll
    for (int w = 0; w < Tile::key_warps; ++w) {
      factor[w] = exp2_fast(peaks[w * Tile::rows + local] - shift);
      total += totals[w * Tile::rows + local] * factor[w];
    }
    const float inverse = total == 0 ? 0.0f : 1 / total;
    const int64_t slot = ((batch * p.kv_heads + head) * a.splits + split) * a.rows + row;
    T* out = static_cast<T*>(p.out) + ((batch * p.width + token) * p.heads + query_head) * p.value_dim;
    for (int d = lane; d < p.value_dim; d += 32) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < Tile::key_warps; ++w)
        sum += sums[(w * Tile::rows + local) * Tile::sum_stride + d] * factor[w];
      if (a.splits > 1)
        a.partial_out[slot * p.value_dim + d] = sum * inverse;
      else
        narrow(sum * inverse, out + d);
    }
    if (lane == 0) {
      const float lse = shift + log2f(total);
      if (a.splits > 1)
        a.partial_lse[slot] = lse;
      else
        p.lse[(batch * p.heads + query_head) * p.width + token] = lse * ln2;
    }
  }
}

// Grid: (tiles of rows x splits) x cache heads x batch rows.
template <class T, class Tile>
CLLM_KERNEL(Tile::threads, 1) attention_kernel(AttentionArguments a) {
  const AttentionParams& p = a.params;
  unsigned char* memory = shared_memory();
  uint16_t* queries = reinterpret_cast<uint16_t*>(memory);
  uint16_t* stages = queries + Tile::rows * Tile::stride;  // keys and values, by turns
  constexpr int part = Tile::keys * Tile::stride;

  const int tile = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  const int length = p.lengths[batch], start = p.starts[batch], group = static_cast<int>(p.group());
  const int lane = threadIdx.x % 32, row_warp = threadIdx.x / 32 % Tile::row_warps;
  const int key_warp = threadIdx.x / 32 / Tile::row_warps;
  const KeyRange range = key_range<Tile>(a, length, start, tile, split);

  if (a.splits > 1 && range.begin >= range.end) {  // an empty split
    const int64_t slot = ((batch * p.kv_heads + head) * a.splits + split) * a.rows;
    const int behind = smaller((tile + 1) * Tile::rows, a.rows);
    for (int row = tile * Tile::rows + threadIdx.x; row < behind; row += Tile::threads)
      a.partial_lse[slot + row] = -INFINITY;
  } else {
    const auto* key_rows = static_cast<const uint16_t*>(p.key_cache.data) + batch * p.key_cache.strides[0] +
                           head * p.key_cache.strides[1];
    const auto* value_rows = static_cast<const uint16_t*>(p.value_cache.data) + batch * p.value_cache.strides[0] +
                             head * p.value_cache.strides[1];
    const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
    const int count = (range.end - range.begin + Tile::keys - 1) / Tile::keys;
    const auto load_step = [&](int step) {
      if (step < count) {
        uint16_t* to = stages + step % Tile::stages * 2 * part;
        const int first = range.begin + step * Tile::keys;
        load_rows<Tile, Tile::keys>(to, key_rows, p.key_cache.strides[2], first, range.end, dim, a.aligned);
        load_rows<Tile, Tile::keys>(to + part, value_rows, p.value_cache.strides[2], first, range.end, value_dim,
                                    a.aligned);
      }
      commit_copies();  // an empty group where nothing is left, so that the groups count the steps
    };

    // Rows behind the last repeat it and are not written.
    const auto* query_rows = static_cast<const uint16_t*>(p.query.data) + batch * p.query.strides[0];
    for (int index = threadIdx.x; index < Tile::rows * Tile::chunks; index += Tile::threads) {
      const int local = index / Tile::chunks, at = index % Tile::chunks * 8;
      const int row = smaller(tile * Tile::rows + local, a.rows - 1);
      const uint16_t* from =
          query_rows + row / group * p.query.strides[1] + (head * group + row % group) * p.query.strides[2];
      uint16_t* to = queries + local * Tile::stride + at;
      if (a.aligned) {
        copy_async(to, at < dim ? from + at : from, at < dim);
      } else {
#pragma unroll 1
        for (int e = 0; e < 8; ++e) to[e] = at + e < dim ? from[at + e] : 0;
      }
    }
#pragma unroll
    for (int step = 0; step < Tile::stages - 1; ++step) load_step(step);  // the queries belong to the first group

    Warp<T, Tile> warp;
    warp.length = length;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = smaller(tile * Tile::rows + row_warp * 16 + half * 8 + lane / 4, a.rows - 1);
      const int token = row / group, inside = token % static_cast<int>(p.branch);
      const int slid = p.sliding_window ? inside - static_cast<int>(p.sliding_window) + 1 : -length;
      warp.highest[half] = smaller(length + token, range.end - 1);
      warp.lowest[half] = larger(start, length + slid);
      warp.own[half] = larger(start, length + token - inside + larger(0, slid));
    }
    const float scale = p.scale * log2e, cap = p.softcap * log2e;

#pragma unroll 1
    for (int step = 0; step < count; ++step) {
      wait_for_copies<Tile::stages - 2>();
      __syncthreads();  // this step's keys are there, and the stage that is loaded next is free
      load_step(step + Tile::stages - 1);
      if constexpr (Tile::query_in_registers)
        if (step == 0)
#pragma unroll
          for (int i = 0; i < Tile::dim / 16; ++i) warp.load_query(queries, i, warp.query[i]);
      uint16_t* keys = stages + step % Tile::stages * 2 * part;
      uint16_t* values = keys + part;
      const int first = range.begin + step * Tile::keys;
      const int next = first + Tile::keys;
      const bool masked = first < range.all_begin || next > range.all_end || next > range.end;
      if (masked) {
        // A weight of 0 does not remove a value that is not finite, so these are taken out.
        bool broken = false;
        for (int index = threadIdx.x; index < Tile::keys * Tile::chunks; index += Tile::threads) {
          const uint4 chunk =
              *reinterpret_cast<const uint4*>(values + index / Tile::chunks * Tile::stride + index % Tile::chunks * 8);
          for (uint32_t pair : {chunk.x, chunk.y, chunk.z, chunk.w})
            broken |= is_broken<T>(static_cast<uint16_t>(pair)) || is_broken<T>(static_cast<uint16_t>(pair >> 16));
        }
        if (__syncthreads_or(broken)) {
          warp.break_outputs(values + key_warp * Tile::warp_keys * Tile::stride, first + key_warp * Tile::warp_keys,
                             Tile::warp_keys);
          __syncthreads();
          for (int index = threadIdx.x; index < Tile::keys * Tile::dim; index += Tile::threads) {
            uint16_t& value = values[index / Tile::dim * Tile::stride + index % Tile::dim];
            if (is_broken<T>(value)) value = 0;
          }
          __syncthreads();
        }
      }
      warp.step(queries, keys + key_warp * Tile::warp_keys * Tile::stride,
                values + key_warp * Tile::warp_keys * Tile::stride, first + key_warp * Tile::warp_keys, masked, scale,
                cap);
    }
    wait_for_copies<0>();  // of the queries, where no step waited for them
    write_rows<T, Tile>(a, warp, memory, tile, split, batch, head);
  }

  if (!a.merge_in_block) return;
  int* last = reinterpret_cast<int*>(memory);
  __syncthreads();  // the partial results of all threads come before the ticket
  if (threadIdx.x == 0) {
    uint32_t* ticket = a.tickets + (batch * p.kv_heads + head) * a.tiles + tile;
    *last = draw_ticket(ticket) + 1 == static_cast<uint32_t>(a.splits);
    if (*last) *ticket = 0;  // for the next launch
  }
  __syncthreads();
  if (!*last) return;
  for (int local = threadIdx.x / 32; local < Tile::rows; local += Tile::threads / 32)
    if (tile * Tile::rows + local < a.rows) merge_row<T>(a, batch, head, tile * Tile::rows + local);
}

constexpr int merge_threads = 128;

// Grid: rows, four to a block, x cache heads x batch rows.
template <class T>
CLLM_KERNEL(merge_threads, 4) merge_kernel(AttentionArguments a) {
  const int row = blockIdx.x * (merge_threads / 32) + threadIdx.x / 32;
  if (row < a.rows) merge_row<T>(a, blockIdx.z, blockIdx.y, row);
}

}  // namespace cllm::cuda

