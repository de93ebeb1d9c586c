// What converge_ does to one running row once its predictions are known; cllm_kernels/ops/converge.py
// specifies it.
#pragma once

#include <cstdint>

#include "philox.h"
#include "types.h"

namespace cllm {

// `predictions` are the row's n argmaxes.
inline void converge_row(const JacobiState& state, int64_t row, const int64_t* predictions, Mode mode, Refill refill) {
  const int64_t n = state.width;
  int64_t* window = state.window + row * n;
  int32_t* kept = state.kept + row * n;
  int32_t* since = state.since + row * n;

  int64_t accept = 1;
  while (accept < n && window[accept] == predictions[accept - 1]) ++accept;
  if (mode == Mode::block && accept > state.block_left[row]) accept = state.block_left[row];
  const int64_t room = state.limits[row] - state.produced[row];
  if (accept > room) accept = room;

  int32_t done = 0;
  for (int64_t i = 0; i < accept && !done; ++i)
    for (int64_t e = 0; e < state.eos_count; ++e)
      if (predictions[i] == state.eos[e]) {
        accept = i + 1;
        done = 1;
        break;
      }
  if (!done && accept == room) done = 2;

  int64_t* output = state.output + row * state.capacity + state.produced[row];
  for (int64_t i = 0; i < accept; ++i) output[i] = predictions[i];
  for (int64_t i = 1; i < accept; ++i) state.stationary[row] += kept[i] == 1;
  state.produced[row] += static_cast<int32_t>(accept);
  state.lengths[row] += static_cast<int32_t>(accept);
  const int32_t forward = ++state.iterations[row];
  for (int64_t i = 0; i < accept; ++i) {
    const int32_t born = i + 1 < n && window[i + 1] == predictions[i] ? since[i + 1] : forward;
    if (born > state.front[row]) {
      state.front[row] = born;
      state.paper_iterations[row] += 1;
    }
    state.paper_stationary[row] += born < state.front[row];
  }
  state.accept_histogram[row * (n + 1) + accept] += 1;
  state.done[row] = done;
  if (done) return;

  // Slots from `present` on have no usable prediction.
  int64_t present = n - accept + 1;
  if (mode == Mode::block) {
    int32_t left = state.block_left[row] - static_cast<int32_t>(accept);
    if (left == 0) {
      left = static_cast<int32_t>(n);
      present = 1;
    } else if (left < present) {
      present = left;
    }
    state.block_left[row] = left;
  }
  // Slot j is read from accept + j > j, so the shift may run in place.
  for (int64_t j = 0; j < present; ++j) {
    const int64_t draft = predictions[accept - 1 + j];
    const bool stayed = accept + j < n && window[accept + j] == draft;
    kept[j] = j >= 1 && stayed;
    since[j] = stayed ? since[accept + j] : forward;
    window[j] = draft;
  }
  const int64_t* context = state.context + row * state.context_width;
  const int64_t start = state.context_start[row];
  for (int64_t j = present; j < n; ++j) {
    kept[j] = 0;
    since[j] = forward + 1;
    if (refill == Refill::last) {
      window[j] = predictions[n - 1];
    } else {
      const uint32_t random = refill_draw(state.seeds[row], state.produced[row] + j - 1, forward);
      window[j] = context[start + random % (state.context_width - start)];
    }
  }
}

}  // namespace cllm
