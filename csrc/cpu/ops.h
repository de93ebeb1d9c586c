// The ops as C++ functions. Each takes the number of threads it may use, and throws std::invalid_argument
// before it writes anything if a row's numbers do not fit.
#pragma once

#include <vector>

#include "../common/types.h"

namespace cllm::cpu {

void block_attention(const AttentionParams& params, int threads);
void append_kv(const AppendParams& params, int threads);
// inverse_temperature 0: greedy.
void converge(const Logits& logits, const JacobiState& state, Mode mode, Refill refill, float inverse_temperature,
              int threads);
// Drafts for the whole window of every row, of refill `context` and draw number 0.
void context_drafts(const JacobiState& state);
// Row first[i] of each tensor and its row second[i] change places; no row is named twice.
struct RowTensor {
  void* data;
  int64_t row_bytes;
};
void exchange_rows(const std::vector<RowTensor>& tensors, const std::vector<int64_t>& first,
                   const std::vector<int64_t>& second);
void linear(const LinearParams& params, int threads);
void lm_head_argmax(const HeadParams& params, int threads);
void qkv(const QkvParams& params, int threads);
void mlp(const MlpParams& params, int threads);
// Layers one after the other: what `qkv`, `append_kv`, `block_attention` and `mlp` do.
void decoder_layers(const DecoderParams& params, int threads);
// Of float32 or bfloat16 rows, contiguous.
void rms_norm(const void* x, const void* weight, float eps, void* out, int64_t rows, int64_t width, DType dtype);

}  // namespace cllm::cpu
