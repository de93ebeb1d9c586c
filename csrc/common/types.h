// Plain structs that carry pointers, strides and sizes into the kernels. Strides count elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host_device.h"

namespace cllm {

// The numbers of cllm_kernels/ops/_library.py (DTYPE_CODES).
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

CLLM_HOST_DEVICE inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Storage types without arithmetic.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

// A tensor of four dimensions whose last one is contiguous.
struct Strided {
  void* data;
  int64_t strides[3];
};

struct AttentionParams {
  Strided query;        // [B, n, Hq, D]
  Strided key_cache;    // [B, Hkv, S, D]
  Strided value_cache;  // [B, Hkv, S, Dv]
  const int32_t* lengths;
  const int32_t* starts;
  const float* sinks;  // [Hq] or null
  void* out;           // [B, n, Hq, Dv], contiguous
  float* lse;          // [B, Hq, n], contiguous
  int64_t batch, width, heads, kv_heads, capacity, dim, value_dim;
  float scale;
  int64_t sliding_window;  // 0: none
  int64_t branch;          // rows of a branch, a divisor of width
  float softcap;           // 0: none
  DType dtype;

  CLLM_HOST_DEVICE int64_t group() const { return heads / kv_heads; }
};

struct AppendParams {
  Strided key_cache, value_cache;  // [B, Hkv, S, D | Dv]
  Strided key, value;              // [B, Hkv, n, D | Dv]
  Strided cos, sin;                // [B, n, R], the third stride unused; null: keys are copied
  const int32_t* lengths;
  int64_t batch, kv_heads, capacity, width, dim, value_dim, rotary_dim;
  DType dtype, angle_dtype;  // angle_dtype: dtype or f32
  Strided query{};           // [B, n, Hq, D], rotated in place; null: none
  int64_t heads{};
};

// y = x W^T + b for a few rows of x.
struct LinearParams {
  const void* x;       // [rows, inputs], contiguous in the inputs
  const void* weight;  // [outputs, inputs], contiguous in the inputs
  const void* bias;    // [outputs] or null
  void* out;           // [rows, outputs], contiguous in the outputs
  int64_t x_bytes;  // from one row of x to the next, in bytes, since kernels may read it in another type
  int64_t weight_stride, out_stride, rows, inputs, outputs;
  DType dtype;
};

// The largest logit of each row and its index, without a matrix of logits.
struct HeadParams {
  LinearParams linear;  // from hidden states to logits; `out` is unused
  float scale;          // 1: none
  float softcap;        // 0: none
  int64_t* index;       // [rows]
  float* value;         // [rows]
};

struct LinearWeights {
  const void* weight;  // [outputs, inputs], contiguous in the inputs
  const void* bias;    // [outputs] or null
  int64_t stride, outputs;
};

// RMSNorm, projections to queries, keys and values, RMSNorm of each head, rotary embedding.
struct QkvParams {
  const void* x;  // [rows, hidden]; this and what follows is contiguous
  const void* norm;
  float eps;
  LinearWeights query, key, value;
  const void *query_norm, *key_norm;  // [dim] or null
  float head_eps;
  const void *cos, *sin;  // [rows, dim]
  void *query_out, *key_out, *value_out;
  int64_t rows, hidden, dim;
  DType dtype;
};

// Output projection of the attention, RMSNorm and a gated MLP, with their residuals; `out` may be x.
struct MlpParams {
  const void* x;         // [rows, hidden]; this and what follows is contiguous
  const void* attended;  // [rows, inputs]
  LinearWeights output;
  const void* norm;
  float eps;
  LinearWeights gate, up, down;
  void* out;  // [rows, hidden]
  int64_t rows, hidden, inputs;
  DType dtype;
};

struct DecoderLayer {
  const void* norm;  // [hidden]
  float eps;
  LinearWeights query, key, value;
  const void *query_norm, *key_norm;  // [dim] or null
  float head_eps;
  LinearWeights output;
  const void* mlp_norm;  // [hidden]
  float mlp_eps;
  LinearWeights gate, up, down;
  Strided key_cache, value_cache;  // [B, Hkv, S, dim]
  float scale;
  int64_t sliding_window;  // 0: none
};

// Tokens of a batch's rows through decoder layers.
struct DecoderParams {
  void* hidden;           // [tokens, H], contiguous, row after row: the first layer's input, overwritten
  const void *cos, *sin;  // [tokens, dim], contiguous
  const int32_t *lengths, *starts;
  const int64_t* counts;  // [B], of tokens
  void* out;              // [B, keep, H], contiguous, the last layer's output at the last tokens of each row
  int64_t keep;
  const DecoderLayer* layers;
  size_t layer_count;
  int64_t batch, hidden_size, capacity, dim;
  int64_t branch;  // 0: none; else rows have equal counts, and it divides them
  DType dtype;
};

// One pointer per entry of cllm_kernels/ops/state_fields.py, from which the build generates the list.
struct JacobiState {
#define CLLM_STATE_FIELD(type, name, dtype, shape) type* name;
#include "jacobi_state.inc"
#undef CLLM_STATE_FIELD
  int64_t rows, width, capacity, context_width, eos_count;
};

enum class Mode : int { window = 0, block = 1 };
enum class Refill : int { context = 0, last = 1 };

struct Logits {
  const void* data;  // [B, n, V], contiguous in V
  int64_t row_stride, position_stride, vocabulary;
  DType dtype;
};

}  // namespace cllm
