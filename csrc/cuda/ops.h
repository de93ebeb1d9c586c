// The ops as functions of the host that launch their kernels on a stream, and neither wait nor allocate. Errors of CUDA
// are std::runtime_error.
#pragma once

#include "../common/types.h"
#include "stream.h"

namespace cllm::cuda {

// Of what is compiled: the largest head size, and the widest window of converge.
constexpr int64_t largest_dim = 256;
constexpr int64_t largest_window = 256;

void append_kv(const AppendParams& params, const Stream& stream);

// `keys` has converge_keys(...) entries and may hold anything; `ticket` is 0 before and after.
int64_t converge_keys(int64_t rows, int64_t width, int64_t vocabulary);
void converge(const Logits& logits, const JacobiState& state, Mode mode, Refill refill, float inverse_temperature,
              uint64_t* keys, uint32_t* ticket, const Stream& stream);

// `partial` has partial_floats entries and may hold anything; `tickets` are 0 before and after.
struct AttentionWorkspace {
  int64_t partial_floats, tickets;
};
AttentionWorkspace attention_workspace(const AttentionParams& params);
void block_attention(const AttentionParams& params, float* partial, uint32_t* tickets, const Stream& stream);

}  // namespace cllm::cuda
