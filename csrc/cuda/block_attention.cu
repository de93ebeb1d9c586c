#include "block_attention.cuh"

#include "ops.h"

namespace cllm::cuda {
namespace {

// Splits of one row's keys at most, and keys of a split at least: the partial results of a tile's rows take as many
// bytes as 4 keys for each row, so that fewer keys to a split would mean to write about what is read.
constexpr int64_t most_splits = 64;
constexpr int64_t split_keys(int tile_rows) { return tile_rows <= 32 ? 128 : 256; }
// Windows wider than this (prompts) have enough rows to occupy the device.
constexpr int64_t split_width = 128;
// Partial results that one block reads in about the time that a launch takes; not measured.
constexpr int64_t block_merge_bytes = 64 * 1024;

bool is_aligned(const AttentionParams& p) {
  int64_t bits = (p.dim | p.value_dim) * 2;
  for (const Strided* tensor : {&p.query, &p.key_cache, &p.value_cache}) {
    bits |= reinterpret_cast<intptr_t>(tensor->data);
    for (int64_t stride : tensor->strides) bits |= stride * 2;
  }
  return bits % 16 == 0;
}

}  // namespace

AttentionPlan attention_plan(const AttentionParams& p) {
  AttentionPlan plan{};
  const int64_t dim = p.dim > p.value_dim ? p.dim : p.value_dim;
  plan.dim = dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : 256;
  plan.rows = static_cast<int>(p.width * p.group());
  plan.tile_rows = plan.rows <= 16 ? 16 : plan.rows <= 32 ? 32 : 64;
  plan.tiles = (plan.rows + plan.tile_rows - 1) / plan.tile_rows;
  plan.min_keys = static_cast<int>(split_keys(plan.tile_rows));
  const int64_t splits = (p.capacity + plan.min_keys - 1) / plan.min_keys;
  plan.splits = p.width > split_width ? 1 : static_cast<int>(splits < most_splits ? splits : most_splits);
  const int64_t merged_rows = plan.rows < plan.tile_rows ? plan.rows : plan.tile_rows;
  plan.merge_in_block = plan.splits > 1 && plan.splits * merged_rows * p.value_dim * 4 <= block_merge_bytes;
  return plan;
}

AttentionWorkspace attention_workspace(const AttentionParams& p) {
  const AttentionPlan plan = attention_plan(p);
  const int64_t slots = plan.splits > 1 ? p.batch * p.kv_heads * plan.splits * plan.rows : 0;
  return {slots * (p.value_dim + 1), plan.merge_in_block ? p.batch * p.kv_heads * plan.tiles : 0};
}

void block_attention(const AttentionParams& p, float* partial, uint32_t* tickets, const Stream& stream) {
  if (p.batch == 0) return;
  const AttentionPlan plan = attention_plan(p);
  const int64_t slots = p.batch * p.kv_heads * plan.splits * plan.rows;
  const AttentionArguments arguments{p,          plan.rows,       plan.tiles,          plan.splits,
                                     plan.min_keys, is_aligned(p), plan.merge_in_block, partial,
                                     partial + slots * p.value_dim, tickets};
  switch (plan.dim) {
    case 64: launch_attention<64>(plan, arguments, stream); break;
    case 96: launch_attention<96>(plan, arguments, stream); break;
    case 128: launch_attention<128>(plan, arguments, stream); break;
    default: launch_attention<256>(plan, arguments, stream);
  }
  if (plan.splits == 1 || plan.merge_in_block) return;
  const int rows = merge_threads / 32;
  const dim3 grid((plan.rows + rows - 1) / rows, static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  if (p.dtype == DType::bf16)
    launch(merge_kernel<bf16_t>, grid, merge_threads, 0, stream, arguments);
  else
    launch(merge_kernel<f16_t>, grid, merge_threads, 0, stream, arguments);
}

}  // namespace cllm::cuda
