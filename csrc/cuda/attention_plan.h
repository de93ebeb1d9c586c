// How block_attention is cut up: decided on the host from sizes alone, since the lengths are on the device. It depends
// on neither the batch nor the contents of a row, so that a row's result does not depend on the rows beside it.
#pragma once

#include "ops.h"

namespace cllm::cuda {

// Keys of a split at least.
constexpr int split_keys = 128;

struct AttentionPlan {
  int dim;        // the compiled head size
  int tile_rows;  // rows (token x head) of a block
  int rows, tiles, splits;
  bool merge_in_block;
};

struct AttentionArguments {
  AttentionParams params;
  int rows, tiles, splits;
  bool aligned, merge_in_block;
  float* partial_out;  // [B, Hkv, splits, rows, Dv]
  float* partial_lse;  // [B, Hkv, splits, rows], in base 2
  uint32_t* tickets;   // [B, Hkv, tiles]
};

AttentionPlan attention_plan(const AttentionParams& params);

// Starts attention_kernel for heads of at most `Dim`; one source file each, because they take long to compile.
template <int Dim>
void launch_attention(const AttentionPlan& plan, const AttentionArguments& arguments, const Stream& stream);

}  // namespace cllm::cuda
