#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/converge_row.h"
#include "kernels.h"
#include "ops.h"

namespace cllm::cpu {
namespace {

// Logits of a task. Enough to hide what a task costs, few enough to share out one row of logits.
constexpr int64_t split_logits = 32768;
// One core reads this many logits in some fifty microseconds, ten times what starting threads costs.
constexpr int64_t parallel_logits = 1 << 18;

void check_row(const JacobiState& state, int64_t row) {
  const int64_t produced = state.produced[row], limit = state.limits[row], left = state.block_left[row];
  const int64_t start = state.context_start[row];
  const std::string name = "row " + std::to_string(row) + " has ";
  if (produced < 0 || produced > limit || limit > state.capacity)
    throw std::invalid_argument(name + "produced = " + std::to_string(produced) +
                                " and limit = " + std::to_string(limit) +
                                "; 0 <= produced <= limit <= " + std::to_string(state.capacity) + " must hold");
  if (left < 1 || left > state.width)
    throw std::invalid_argument(name + "block_left = " + std::to_string(left) + "; it must be in [1, " +
                                std::to_string(state.width) + "]");
  if (start < 0 || start >= state.context_width)
    throw std::invalid_argument(name + "context_start = " + std::to_string(start) + "; it must be in [0, " +
                                std::to_string(state.context_width) + ")");
}

}  // namespace

void context_drafts(const JacobiState& state) {
  for (int64_t row = 0; row < state.rows; ++row) {
    // Rows that are done may hold anything.
    const int64_t start = std::clamp<int64_t>(state.context_start[row], 0, state.context_width - 1);
    const int64_t* context = state.context + row * state.context_width + start;
    for (int64_t j = 1; j < state.width; ++j) {
      const uint32_t random = refill_draw(state.seeds[row], state.produced[row] + j - 1, 0);
      state.window[row * state.width + j] = context[random % (state.context_width - start)];
    }
  }
}

void converge(const Logits& logits, const JacobiState& state, Mode mode, Refill refill, float inverse_temperature,
              int threads) {
  std::vector<int64_t> running;
  for (int64_t row = 0; row < state.rows; ++row)
    if (state.done[row] == 0) {
      check_row(state, row);
      running.push_back(row);
    }

  const Kernels& run = kernels();
  const int64_t n = state.width, splits = (logits.vocabulary + split_logits - 1) / split_logits;
  const int64_t positions = static_cast<int64_t>(running.size()) * n, tasks = positions * splits;
  const int64_t bytes = element_size(logits.dtype);
  const bool parallel = positions * logits.vocabulary >= parallel_logits;
  std::vector<Best> found(tasks);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (parallel && threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t position = task / splits, begin = task % splits * split_logits;
    const int64_t row = running[position / n], i = position % n;
    const int64_t offset = row * logits.row_stride + i * logits.position_stride + begin;
    const char* values = static_cast<const char*>(logits.data) + offset * bytes;
    const int64_t count = std::min(split_logits, logits.vocabulary - begin);
    if (inverse_temperature == 0) {
      found[task] = run.argmax(values, count, logits.dtype);
      found[task].index += begin;
    } else {
      const Noise noise{inverse_temperature, state.seeds[row], static_cast<int32_t>(state.produced[row] + i)};
      found[task] = run.sample(values, begin, count, logits.dtype, noise);
    }
  }

  int64_t first_broken = -1;
  int32_t broken_rows = 0;
  std::vector<int64_t> predictions(positions);
  for (size_t r = 0; r < running.size(); ++r) {
    bool broken = false;
    for (int64_t position = r * n; position < static_cast<int64_t>(r + 1) * n; ++position) {
      Best best = found[position * splits];
      for (int64_t split = 1; split < splits; ++split) {
        const Best& next = found[position * splits + split];
        best.nan |= next.nan;
        if (next.value > best.value) {
          best.value = next.value;
          best.index = next.index;
        }
      }
      predictions[position] = best.index;
      if (best.nan && first_broken < 0) first_broken = position;
      broken |= best.nan;
    }
    broken_rows += broken;
  }
  state.status[0] = static_cast<int32_t>(running.size());
  state.status[1] = broken_rows;
  if (broken_rows)
    throw std::invalid_argument("logits of row " + std::to_string(running[first_broken / n]) + " at window position " +
                                std::to_string(first_broken % n) + " hold NaN; they must not");

  for (size_t r = 0; r < running.size(); ++r) {
    converge_row(state, running[r], predictions.data() + r * n, mode, refill);
    state.status[0] -= state.done[running[r]] != 0;
  }
}

}  // namespace cllm::cpu
