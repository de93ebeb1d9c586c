#include "block_attention.cuh"

#include <algorithm>

#include "ops.h"

namespace cllm::cuda {
namespace {

// Chosen by what an H100 took for 13 tiles and up to 7 sizes of a split, with 4, 8 and 32 cache heads, windows of 1 to 64
// and caches of 1,024 to 32,768 rows: one batch row wants few blocks, and few splits to be merged.
// Splits of one row's keys at most.
constexpr int64_t most_splits = 32;
// Blocks that one batch row should be cut into: two for each multiprocessor where they are small, else one. GPUs that are
// as large differ little in their number (A100 108, H100 and H200 132, B200 148).
constexpr int64_t wanted_blocks(int tile_rows) { return tile_rows <= 16 ? 264 : 132; }
// Windows wider than this (prompts) have enough rows to occupy the device.
constexpr int64_t split_width = 128;
// Rows up to which the last block of their tile merges the splits, since its warps then have one each.
constexpr int64_t block_merge_rows = 4;

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
  const int64_t filled = (p.capacity + split_keys - 1) / split_keys;
  const int64_t wanted = wanted_blocks(plan.tile_rows) / (p.kv_heads * plan.tiles);
  const int64_t splits = std::min({filled, most_splits, std::max<int64_t>(1, wanted)});
  plan.splits = p.width > split_width ? 1 : static_cast<int>(splits);
  plan.merge_in_block = plan.splits > 1 && plan.rows <= block_merge_rows;
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
  const AttentionArguments arguments{p, plan.rows, plan.tiles, plan.splits,
                                     is_aligned(p), plan.merge_in_block, partial,
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
