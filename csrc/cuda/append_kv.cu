#include "append_kv.cuh"

namespace cllm::cuda {
namespace {

// The largest vector that divides what is copied, wherever it starts.
int64_t common_alignment(const AppendParams& p) {
  const int64_t bytes = element_size(p.dtype);
  int64_t bits = p.dim * bytes | p.value_dim * bytes | 16;
  for (const Strided* tensor : {&p.key_cache, &p.value_cache, &p.key, &p.value}) {
    bits |= reinterpret_cast<intptr_t>(tensor->data);
    for (int64_t stride : tensor->strides) bits |= stride * bytes;
  }
  return bits & -bits;
}

template <class Vector, class T, class A>
void launch_append(const AppendParams& p, const Stream& stream) {
  const int64_t vectors = sizeof(Vector) / element_size(p.dtype), value_items = p.value_dim / vectors;
  const int64_t key_items = std::is_void_v<T> ? p.dim / vectors : p.dim;
  const int64_t items = p.width * (key_items + value_items);
  const dim3 grid(static_cast<unsigned>((items + append_threads - 1) / append_threads),
                  static_cast<unsigned>(p.kv_heads + p.heads), static_cast<unsigned>(p.batch));
  const AppendArguments arguments{p, static_cast<int>(key_items), static_cast<int>(value_items)};
  launch(append_kernel<Vector, T, A>, grid, append_threads, 0, stream, arguments);
}

template <class Vector>
void launch_type(const AppendParams& p, const Stream& stream) {
  const bool wide = p.angle_dtype == DType::f32;
  if (!p.cos.data) return launch_append<Vector, void, void>(p, stream);
  switch (p.dtype) {
    case DType::f32: return launch_append<Vector, float, float>(p, stream);
    case DType::bf16:
      return wide ? launch_append<Vector, bf16_t, float>(p, stream) : launch_append<Vector, bf16_t, bf16_t>(p, stream);
    case DType::f16:
      return wide ? launch_append<Vector, f16_t, float>(p, stream) : launch_append<Vector, f16_t, f16_t>(p, stream);
  }
}

}  // namespace

void append_kv(const AppendParams& p, const Stream& stream) {
  if (p.batch * p.kv_heads * p.width == 0) return;
  const int64_t alignment = common_alignment(p);
  if (alignment >= 16) return launch_type<uint4>(p, stream);
  if (alignment >= 4) return launch_type<uint32_t>(p, stream);
  launch_type<uint16_t>(p, stream);
}

}  // namespace cllm::cuda
