// Cuts block_attention into tasks and runs them.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "ops.h"
#include "scratch.h"

namespace cllm::cpu {
namespace {

// Rows (token x head) of a tile: enough to use each key and value often, few enough for the L2 cache.
constexpr int64_t tile_rows = 128;
// A window of decoding has too few rows to occupy the cores, so its keys are split; a prompt has enough.
constexpr int64_t split_width = 64;
// Keys of a split. The cut depends on nothing but the row's own lengths, so that a result depends neither on the
// number of threads nor on the rest of the batch.
constexpr int64_t split_keys = 512;
// One core does this many multiply-adds in a microsecond or two, which is what a thread takes to begin that waits for the
// next call awake, as those of a decode do.
constexpr int64_t parallel_work = 30'000;

thread_local Scratch task_scratch;
thread_local Scratch partial_scratch;

}  // namespace

void block_attention(const AttentionParams& p, int threads) {
  check_room(p.lengths, p.batch, p.width, p.capacity);
  check_starts(p.starts, p.batch);

  const Kernels& run = kernels();
  const int64_t tile = std::min(p.width, std::max<int64_t>(1, tile_rows / p.group()));

  // Tasks [first, first + splits) of a merge differ in their keys only.
  struct Merge {
    int64_t first, splits;
  };
  std::vector<AttentionTask> tasks;
  std::vector<int64_t> merge_of;  // of each task; -1: none
  std::vector<Merge> merges;
  int64_t work = 0;
  const size_t partial = run.partial_size(p, tile);
  size_t partials = 0;
  for (int64_t row = 0; row < p.batch; ++row)
    for (int64_t first = 0; first < p.width; first += tile) {
      const int64_t count = std::min(tile, p.width - first);
      const int64_t end = p.lengths[row] + first + count;
      // of the first query of the tile, or of any one
      const int64_t position = p.lengths[row] + (p.branch == p.width ? first : 0);
      const int64_t far = p.sliding_window ? position - p.sliding_window + 1 : 0;
      const int64_t begin = std::min(end, std::max<int64_t>(p.starts[row], far));
      const int64_t keys = end - begin;
      const int64_t splits = p.width <= split_width ? std::max<int64_t>(1, (keys + split_keys - 1) / split_keys) : 1;
      const int64_t step = std::max<int64_t>(1, (keys + splits - 1) / splits);
      work += keys * count * p.heads * (p.dim + p.value_dim);
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        if (splits > 1) merges.push_back({static_cast<int64_t>(tasks.size()), splits});
        for (int64_t split = 0; split < splits; ++split) {
          tasks.push_back({row, head, first, count, std::min(end, begin + split * step),
                           std::min(end, begin + (split + 1) * step), nullptr});
          merge_of.push_back(splits > 1 ? static_cast<int64_t>(merges.size()) - 1 : -1);
        }
      }
      if (splits > 1) partials += splits * p.kv_heads;
    }
  if (!merges.empty()) {
    float* memory = partial_scratch.reserve(partials * partial);
    for (const Merge& merge : merges) {
      const size_t size = run.partial_size(p, tasks[merge.first].count);
      for (int64_t split = 0; split < merge.splits; ++split, memory += size)
        tasks[merge.first + split].partial = memory;
    }
  }

  const size_t scratch = run.scratch_size(p, tile);
  const int64_t task_count = static_cast<int64_t>(tasks.size());
  const int team = work < parallel_work ? 1 : static_cast<int>(std::min<int64_t>(threads, task_count));
  // The last task of a merge to finish joins the results, in their order, so that there is one barrier only: on a
  // loaded machine each costs a time slice.
  std::vector<std::atomic<int64_t>> finished(merges.size());
  bool out_of_memory = false;
#pragma omp parallel num_threads(team) if (team > 1)
  {
    float* memory = nullptr;
    try {  // an exception must not leave the parallel region
      memory = task_scratch.reserve(scratch);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      out_of_memory = true;
    }
    // Last first: of a prompt, the last queries see the most keys.
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = task_count - 1; i >= 0; --i) {
      if (!memory) continue;
      run.attend(p, tasks[i], memory);
      if (merge_of[i] < 0) continue;
      const Merge& merge = merges[merge_of[i]];
      if (finished[merge_of[i]].fetch_add(1, std::memory_order_acq_rel) + 1 == merge.splits)
        run.merge(p, tasks[merge.first], merge.splits);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace cllm::cpu
