// Shares out the outputs of a linear layer.
#include <algorithm>

#include "kernels.h"
#include "ops.h"
#include "scratch.h"

namespace cllm::cpu {
namespace {

// One core does this many multiply-adds in some ten microseconds, several times what starting threads costs.
constexpr int64_t parallel_work = 500'000;
// Reading a weight takes one row as long as these many rows take to compute.
constexpr int64_t memory_rows = 6;
// Outputs of a task: a multiple of what every register tile holds. Several tasks a thread even out other load.
constexpr int64_t task_outputs = 24, tasks_per_thread = 8;

thread_local Scratch inputs_scratch;

}  // namespace

void linear(const LinearParams& params, int threads) {
  const Kernels& run = kernels();
  LinearParams p = params;
  if (const size_t size = run.linear_row_size(p)) {
    char* memory = reinterpret_cast<char*>(inputs_scratch.reserve(p.rows * size / sizeof(float)));
    for (int64_t row = 0; row < p.rows; ++row) run.linear_inputs(params, row, memory + row * size);
    p.x = memory;
    p.x_bytes = size;
  }
  const int64_t work = p.outputs * p.inputs * std::max(p.rows, memory_rows);
  if (threads == 1 || work < parallel_work) return run.linear(p, 0, p.outputs);
  const int64_t wanted = (p.outputs + threads * tasks_per_thread - 1) / (threads * tasks_per_thread);
  const int64_t size = (wanted + task_outputs - 1) / task_outputs * task_outputs;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t begin = 0; begin < p.outputs; begin += size) run.linear(p, begin, std::min(begin + size, p.outputs));
}

}  // namespace cllm::cpu
