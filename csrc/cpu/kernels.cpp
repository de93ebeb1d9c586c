// Compiled once per instruction set, with CLLM_ISA naming it.
#include <type_traits>

#include "argmax.h"
#include "attention_tile.h"
#include "linear_amx.h"
#include "linear_split.h"
#include "linear_tile.h"
#include "rotary.h"
#include "row_ops.h"
#include "sample.h"

#define CLLM_JOIN_(a, b) a##b
#define CLLM_JOIN(a, b) CLLM_JOIN_(a, b)

namespace cllm::cpu {
namespace {

size_t scratch_size(const AttentionParams& p, int64_t count) { return Layout(p, count).size; }

size_t partial_size(const AttentionParams& p, int64_t count) {
  const Layout at(p, count);
  return at.padded_rows * at.padded_value_dim + 2 * at.padded_rows;
}

void attend_any(const AttentionParams& p, const AttentionTask& task, float* scratch) {
  switch (p.dtype) {
    case DType::f32: return attend<float>(p, task, scratch);
    case DType::bf16: return attend<bf16_t>(p, task, scratch);
    case DType::f16: return attend<f16_t>(p, task, scratch);
  }
}

void merge_any(const AttentionParams& p, const AttentionTask& first, int64_t splits) {
  switch (p.dtype) {
    case DType::f32: return merge<float>(p, first, splits);
    case DType::bf16: return merge<bf16_t>(p, first, splits);
    case DType::f16: return merge<f16_t>(p, first, splits);
  }
}

#if defined(__AMX_BF16__)
constexpr auto bf16_layout = amx_layout;
constexpr auto bf16_inputs = amx_inputs;
constexpr auto bf16_linear = amx_linear;
constexpr auto gated_linear = amx_gated;

LinearLayout f32_layout(const LinearParams& p) { return is_split(p) ? split_layout(p) : linear_layout<float>(p); }

void f32_inputs(const LinearParams& p, int64_t row, void* to) {
  is_split(p) ? split_inputs(p, row, to) : linear_inputs<float>(p, row, to);
}

void f32_linear(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  is_split(p) ? split_linear(p, begin, end, next) : linear<float>(p, begin, end, next);
}

bool on_tiles(const LinearParams& p) { return p.dtype == DType::bf16 || is_split(p); }

void linear_begin(const LinearParams& p) {
  if (on_tiles(p)) amx_begin(p);
}

void linear_end(const LinearParams& p) {
  if (on_tiles(p)) amx_end(p);
}
#else
constexpr auto bf16_layout = linear_layout<bf16_t>;
constexpr auto bf16_inputs = linear_inputs<bf16_t>;
constexpr auto bf16_linear = linear<bf16_t>;
constexpr decltype(Kernels::gated_linear) gated_linear = nullptr;  // no layout asks for it
constexpr auto f32_layout = linear_layout<float>;
constexpr auto f32_inputs = linear_inputs<float>;
constexpr auto f32_linear = linear<float>;
void linear_begin(const LinearParams&) {}
void linear_end(const LinearParams&) {}
#endif

LinearLayout linear_layout_any(const LinearParams& p) {
  return p.dtype == DType::f32 ? f32_layout(p) : bf16_layout(p);
}

void linear_inputs_any(const LinearParams& p, int64_t row, void* to) {
  return p.dtype == DType::f32 ? f32_inputs(p, row, to) : bf16_inputs(p, row, to);
}

void linear_any(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  return p.dtype == DType::f32 ? f32_linear(p, begin, end, next) : bf16_linear(p, begin, end, next);
}

// Calls `body` with a null pointer of the type that `dtype` names, float32 or bfloat16.
template <class Body>
void with_type(DType dtype, const Body& body) {
  if (dtype == DType::f32) return body(static_cast<float*>(nullptr));
  body(static_cast<bf16_t*>(nullptr));
}

void rms_norm_any(const void* x, const void* weight, float eps, int64_t count, void* out, DType dtype) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rms_norm(static_cast<const T*>(x), static_cast<const T*>(weight), eps, count, static_cast<T*>(out));
  });
}

void silu_multiply_any(void* gate, const void* up, int64_t rows, int64_t count, int64_t stride, DType dtype) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < rows; ++i)
      silu_multiply(static_cast<T*>(gate) + i * stride, static_cast<const T*>(up) + i * stride, count);
  });
}

void add_any(const void* a, const void* b, int64_t count, void* out, DType dtype) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    add_rows(static_cast<const T*>(a), static_cast<const T*>(b), count, static_cast<T*>(out));
  });
}

void scale_logits_any(void* logits, int64_t count, float scale, float softcap, DType dtype) {
  with_type(dtype, [&](auto* type) {
    scale_logits(static_cast<decltype(type)>(logits), count, scale, softcap);
  });
}

Best argmax_any(const void* values, int64_t count, DType dtype) {
  switch (dtype) {
    case DType::bf16: return argmax(static_cast<const bf16_t*>(values), count);
    case DType::f16: return argmax(static_cast<const f16_t*>(values), count);
    default: return argmax(static_cast<const float*>(values), count);
  }
}

Best sample_any(const void* values, int64_t first, int64_t count, DType dtype, const Noise& noise) {
  switch (dtype) {
    case DType::bf16: return sample(static_cast<const bf16_t*>(values), first, count, noise);
    case DType::f16: return sample(static_cast<const f16_t*>(values), first, count, noise);
    default: return sample(static_cast<const float*>(values), first, count, noise);
  }
}

template <class T, class Angle>
void rotate_all(const void* key, const void* cos, const void* sin, void* to, int64_t rotary, int64_t count,
                int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    rotate(static_cast<const T*>(key) + i * stride, static_cast<const Angle*>(cos), static_cast<const Angle*>(sin),
           static_cast<T*>(to) + i * stride, rotary);
}

void rotate_any(const void* key, const void* cos, const void* sin, void* to, int64_t rotary, int64_t count,
                int64_t stride, DType dtype, DType angle_dtype) {
  const auto run = [&](auto rotate) { rotate(key, cos, sin, to, rotary, count, stride); };
  const bool wide = angle_dtype == DType::f32;
  switch (dtype) {
    case DType::f32: return run(rotate_all<float, float>);
    case DType::bf16: return wide ? run(rotate_all<bf16_t, float>) : run(rotate_all<bf16_t, bf16_t>);
    case DType::f16: return wide ? run(rotate_all<f16_t, float>) : run(rotate_all<f16_t, f16_t>);
  }
}

}  // namespace

const Kernels CLLM_JOIN(kernels_, CLLM_ISA) = {
    scratch_size, partial_size, attend_any,   merge_any,    linear_layout_any, linear_inputs_any, linear_begin,
    linear_end,   linear_any,   gated_linear, rms_norm_any, silu_multiply_any, add_any,           scale_logits_any,
    argmax_any,   sample_any,   rotate_any,
};

}  // namespace cllm::cpu
