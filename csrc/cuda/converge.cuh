// converge_ in one launch: each block finds the best token of a part of the vocabulary at one position, and the last
// block to finish does all that follows, a warp for each row. It has to be one block, because NaN logits of any row
// keep every row from moving.
#pragma once

#include "../common/philox.h"
#include "ops.h"
#include "platform.h"

namespace cllm::cuda {

constexpr int converge_threads = 256;
constexpr int converge_warps = converge_threads / 32;

// Best tokens are compared as numbers: the logit's bits in order, then the inverted index, so that the lowest wins.
// Any token is above no_key, and NaN above all.
constexpr uint64_t no_key = 0;
constexpr uint64_t nan_key = ~uint64_t{0};

struct ConvergeArguments {
  Logits logits;
  JacobiState state;
  Mode mode;
  Refill refill;
  float inverse_temperature;
  int64_t split;  // logits of a block, a multiple of 64
  int splits;
  uint64_t* keys;  // [positions][splits]
  uint32_t* ticket;
};

__device__ inline uint64_t make_key(float value, uint32_t index) {
  value += 0.0f;  // -0 equals 0
  const uint32_t bits = __float_as_uint(value);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~index;
}

__device__ inline int64_t key_token(uint64_t key) { return ~static_cast<uint32_t>(key); }

struct Best {
  float value = NAN;  // less than anything, as `add` compares
  uint32_t index = no_index;
  bool nan = false;
  static constexpr uint32_t no_index = ~uint32_t{0};

  // Indices must come in ascending order.
  __device__ void add(float logit, float score, uint32_t at) {
    nan |= logit != logit;
    if (!(score <= value)) {
      value = score;
      index = at;
    }
  }
  __device__ uint64_t key() const { return nan ? nan_key : index == no_index ? no_key : make_key(value, index); }
};

__device__ inline uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

template <class T>
__device__ Best best_of(const T* logits, int64_t begin, int64_t end) {
  constexpr int vector = 16 / sizeof(T), unroll = 4;
  struct alignas(16) Pack {
    T element[vector];
  };
  Best best;
  // Elements up to the first whole vector and behind the last one.
  const int64_t off = reinterpret_cast<uintptr_t>(logits + begin) % 16 / sizeof(T);
  const int64_t first = off ? begin + vector - off < end ? begin + vector - off : end : begin;
  const int64_t vectors = (end - first) / vector;
  const Pack* packs = reinterpret_cast<const Pack*>(logits + first);
  for (int64_t at = begin + threadIdx.x; at < first; at += converge_threads) {
    const float value = widen(logits[at]);
    best.add(value, value, static_cast<uint32_t>(at));
  }
  for (int64_t group = threadIdx.x; group < vectors; group += unroll * converge_threads) {
    Pack pack[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (group + u * converge_threads < vectors) pack[u] = packs[group + u * converge_threads];
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      const int64_t here = group + u * converge_threads;
      if (here >= vectors) break;
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        const float value = widen(pack[u].element[e]);
        best.add(value, value, static_cast<uint32_t>(first + here * vector + e));
      }
    }
  }
  for (int64_t at = first + vectors * vector + threadIdx.x; at < end; at += converge_threads) {
    const float value = widen(logits[at]);
    best.add(value, value, static_cast<uint32_t>(at));
  }
  return best;
}

__device__ inline float gumbel(uint32_t word) {
  const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  const float series = u * (1.0f + u * (0.5f + u * (1.0f / 3.0f)));
  const float exponential = u < 0x1p-10f ? series : -logf(fmaxf(1.0f - u, 0x1p-25f));
  return -logf(exponential);
}

// With the noise of new token `token`; a counter's four words serve entries that stand 16 apart.
template <class T>
__device__ Best sample_of(const T* logits, int64_t begin, int64_t end, float inverse_temperature, int64_t seed,
                          uint32_t token) {
  const uint64_t key = static_cast<uint64_t>(seed);
  Best best;
  for (int64_t counter = begin / 4 + threadIdx.x; counter < (end + 63) / 64 * 16; counter += converge_threads) {
    const int64_t entry = counter / 16 * 64 + counter % 16;
    if (entry >= end) continue;
    const Philox4x32 words = philox4x32({{static_cast<uint32_t>(counter), 0, noise_stream, token}},
                                        static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t at = entry + 16 * w;
      if (at >= end) break;
      const float value = widen(logits[at]);
      best.add(value, value * inverse_temperature + gumbel(words.word[w]), static_cast<uint32_t>(at));
    }
  }
  return best;
}

// The largest of the block's keys, in its first thread. `scratch` holds one a warp.
__device__ inline uint64_t block_max(uint64_t key, uint64_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 16; step; step /= 2) key = larger(key, __shfl_xor_sync(all_lanes, key, step));
  if (lane == 0) scratch[warp] = key;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < converge_warps; ++w) key = larger(key, scratch[w]);
  return key;
}

// What a warp keeps of its row. `width` is rounded up, so that the parts stay aligned.
struct RowMemory {
  int64_t *window, *predictions;
  int32_t *kept, *since;

  __device__ RowMemory(unsigned char* memory, int64_t width)
      : window(reinterpret_cast<int64_t*>(memory)),
        predictions(window + width),
        kept(reinterpret_cast<int32_t*>(predictions + width)),
        since(kept + width) {}
};
CLLM_HOST_DEVICE constexpr int64_t row_bytes(int64_t width) { return width * 24; }

// The first i < count for which `holds(i)`, in all lanes; count if there is none.
template <class Condition>
__device__ int first_where(int count, const Condition& holds) {
  for (int begin = 0; begin < count; begin += 32) {
    const int i = begin + threadIdx.x % 32;
    const uint32_t found = __ballot_sync(all_lanes, i < count && holds(i));
    if (found) return begin + __ffs(found) - 1;
  }
  return count;
}

// common/converge_row.h on the lanes of a warp. True if the row goes on.
__device__ inline bool converge_row(const ConvergeArguments& a, int64_t row, unsigned char* memory) {
  const JacobiState& s = a.state;
  const int n = static_cast<int>(s.width), lane = threadIdx.x % 32;
  const RowMemory at(memory, n + n % 2);
  const int produced = s.produced[row], limit = s.limits[row], block_left = s.block_left[row];
  const int forward = s.iterations[row] + 1, front = s.front[row];
  for (int i = lane; i < n; i += 32) {
    at.window[i] = s.window[row * n + i];
    at.kept[i] = s.kept[row * n + i];
    at.since[i] = s.since[row * n + i];
    at.predictions[i] = key_token(a.keys[(row * n + i) * a.splits]);
  }
  __syncwarp();
  const auto agreed = [&](int i) { return i + 1 < n && at.window[i + 1] == at.predictions[i]; };

  const int differs = first_where(n, [&](int i) { return !agreed(i); });
  int accept = differs + 1 < n ? differs + 1 : n;
  if (a.mode == Mode::block && accept > block_left) accept = block_left;
  const int room = limit - produced;
  if (accept > room) accept = room;

  const int end = first_where(accept, [&](int i) {
    for (int64_t e = 0; e < s.eos_count; ++e)
      if (at.predictions[i] == s.eos[e]) return true;
    return false;
  });
  int done = 0;
  if (end < accept) {
    accept = end + 1;
    done = 1;
  } else if (accept == room) {
    done = 2;
  }

  // Of the accepted predictions: the running maximum of the forwards that first made them, and the counts of it.
  int reached = front, stationary = 0, paper_stationary = 0, paper_iterations = 0;
  for (int begin = 0; begin < accept; begin += 32) {
    const int i = begin + lane;
    const bool taken = i < accept;
    if (taken) s.output[row * s.capacity + produced + i] = at.predictions[i];
    const int born = !taken ? INT32_MIN : agreed(i) ? at.since[i + 1] : forward;
    int here = born;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(all_lanes, here, step);  // its own where there is none
      if (other > here) here = other;
    }
    if (here < reached) here = reached;
    int before = __shfl_up_sync(all_lanes, here, 1);
    if (lane == 0) before = reached;
    stationary += __popc(__ballot_sync(all_lanes, taken && i >= 1 && at.kept[i] == 1));
    paper_stationary += __popc(__ballot_sync(all_lanes, taken && born < here));
    paper_iterations += __popc(__ballot_sync(all_lanes, taken && here > before));
    reached = __shfl_sync(all_lanes, here, 31);
  }

  int present = n - accept + 1, left = block_left;
  if (a.mode == Mode::block) {
    left -= accept;
    if (left == 0) {
      left = n;
      present = 1;
    } else if (left < present) {
      present = left;
    }
  }
  if (lane == 0) {
    s.produced[row] = produced + accept;
    s.lengths[row] += accept;
    s.iterations[row] = forward;
    s.front[row] = reached;
    s.stationary[row] += stationary;
    s.paper_stationary[row] += paper_stationary;
    s.paper_iterations[row] += paper_iterations;
    s.accept_histogram[row * (n + 1) + accept] += 1;
    s.done[row] = done;
    if (!done) s.block_left[row] = left;
  }
  if (done) return false;

  const int64_t start = s.context_start[row];
  for (int j = lane; j < n; j += 32) {
    const bool usable = j < present;
    int64_t draft;
    bool stayed = false;
    if (usable) {
      draft = at.predictions[accept - 1 + j];
      stayed = accept + j < n && at.window[accept + j] == draft;
    } else if (a.refill == Refill::last) {
      draft = at.predictions[n - 1];
    } else {
      const uint32_t random = refill_draw(s.seeds[row], produced + accept + j - 1, forward);
      draft = s.context[row * s.context_width + start + random % (s.context_width - start)];
    }
    s.window[row * n + j] = draft;
    s.kept[row * n + j] = stayed && j >= 1;
    s.since[row * n + j] = stayed ? at.since[accept + j] : usable ? forward : forward + 1;
  }
  return true;
}

struct TailCounts {
  int running, counted, nan;  // rows that ran; that go on, or that have NaN if any has; whether any has
};
// Shared memory before the rows: a key of each warp, the counts, and whether the block is the last.
constexpr int64_t converge_head = converge_warps * 8 + 16;
static_assert(converge_head + converge_warps * row_bytes(largest_window) <= 99 * 1024, "any GPU gives a block as much");

// The best key of each position that runs to keys[position][0], by teams of as many lanes as there are splits, so that
// what other blocks wrote is read in few rounds. Returns how many rows run, of those that this thread looked at.
__device__ inline int merge_keys(const ConvergeArguments& a, TailCounts* counts) {
  const JacobiState& s = a.state;
  const int64_t positions = s.rows * s.width;
  int team = 1, running = 0;
  while (team < a.splits && team < 32) team *= 2;
  const int member = threadIdx.x % team;
  for (int64_t begin = 0; begin < positions; begin += converge_threads / team) {
    const int64_t position = begin + threadIdx.x / team;
    const bool runs = position < positions && s.done[position / s.width] == 0;
    uint64_t best = no_key;
    if (runs)
      for (int split = member; split < a.splits; split += team)
        best = larger(best, load_shared_result(a.keys + position * a.splits + split));
    for (int step = team / 2; step; step /= 2) best = larger(best, __shfl_xor_sync(all_lanes, best, step));
    if (!runs || member != 0) continue;
    a.keys[position * a.splits] = best;
    running += position % s.width == 0;
    if (best == nan_key) atomicAdd(&counts->nan, 1);
  }
  return running;
}

// How many running rows have NaN, of those of this warp.
__device__ inline int broken_rows(const ConvergeArguments& a) {
  const JacobiState& s = a.state;
  const int n = static_cast<int>(s.width);
  int broken = 0;
  for (int64_t row = threadIdx.x / 32; row < s.rows; row += converge_warps)
    if (s.done[row] == 0)
      broken += first_where(n, [&](int i) { return a.keys[(row * n + i) * a.splits] == nan_key; }) < n;
  return broken;
}

__device__ inline void converge_tail(const ConvergeArguments& a, TailCounts* counts, unsigned char* memory) {
  const JacobiState& s = a.state;
  const int n = static_cast<int>(s.width), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) *counts = {0, 0, 0};
  __syncthreads();
  const int running = merge_keys(a, counts);
  if (running) atomicAdd(&counts->running, running);
  __syncthreads();
  if (counts->nan) {
    const int broken = broken_rows(a);
    if (lane == 0 && broken) atomicAdd(&counts->counted, broken);
  } else {
    int left = 0;
    for (int64_t row = warp; row < s.rows; row += converge_warps) {
      if (s.done[row] != 0) continue;
      left += converge_row(a, row, memory + warp * row_bytes(n + n % 2));
      __syncwarp();  // the next row takes this one's memory
    }
    if (lane == 0 && left) atomicAdd(&counts->counted, left);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    s.status[0] = counts->nan ? counts->running : counts->counted;
    s.status[1] = counts->nan ? counts->counted : 0;
    *a.ticket = 0;  // for the next launch
  }
}

// Grid: positions x splits.
template <class T, bool Sample>
CLLM_KERNEL(converge_threads, 4) converge_kernel(ConvergeArguments a) {
  unsigned char* memory = shared_memory();
  uint64_t* scratch = reinterpret_cast<uint64_t*>(memory);
  TailCounts* counts = reinterpret_cast<TailCounts*>(scratch + converge_warps);
  int* last = reinterpret_cast<int*>(counts + 1);
  const JacobiState& s = a.state;
  const int64_t position = blockIdx.x, row = position / s.width, i = position % s.width;

  if (s.done[row] == 0) {
    const T* logits = static_cast<const T*>(a.logits.data) + row * a.logits.row_stride + i * a.logits.position_stride;
    const int64_t begin = blockIdx.y * a.split, behind = begin + a.split;
    const int64_t end = behind < a.logits.vocabulary ? behind : a.logits.vocabulary;
    Best best;
    if constexpr (Sample)
      best = sample_of(logits, begin, end, a.inverse_temperature, s.seeds[row],
                       static_cast<uint32_t>(s.produced[row] + i));
    else
      best = best_of(logits, begin, end);
    const uint64_t key = block_max(best.key(), scratch);
    if (threadIdx.x == 0) a.keys[position * a.splits + blockIdx.y] = key;
  }
  if (threadIdx.x == 0) *last = draw_ticket(a.ticket) + 1 == gridDim.x * gridDim.y;
  __syncthreads();
  if (!*last) return;
  converge_tail(a, counts, memory + converge_head);
}

}  // namespace cllm::cuda
