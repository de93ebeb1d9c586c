#include "append_kv.cuh"

namespace cllm::cuda {
namespace {

// The largest vector that divides what is copied, wherever it starts.
int64_t common_alignment(const AppendParams& p, int64_t element_size) {
  int64_t bits = p.dim * element_size | p.value_dim * element_size | 16;
  for (const Strided* tensor : {&p.key_cache, &p.value_cache, &p.key, &p.value}) {
    bits |= reinterpret_cast<intptr_t>(tensor->data);
    for (int64_t stride : tensor->strides) bits |= stride * element_size;
  }
  return bits & -bits;
}

template <class Vector, class T, class A>
void launch_append(const AppendParams& p, const Rotation& rotation, int64_t element_size, const Stream& stream) {
  const int64_t size = sizeof(Vector), value_items = p.value_dim * element_size / size;
  const int64_t key_items = std::is_void_v<T> ? p.dim * element_size / size : p.dim;
  const int64_t items = p.width * (key_items + value_items);
  const dim3 grid(static_cast<unsigned>((items + append_threads - 1) / append_threads),
                  static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  const AppendArguments arguments{p, rotation, element_size, static_cast<int>(key_items), static_cast<int>(value_items)};
  launch(append_kernel<Vector, T, A>, grid, append_threads, 0, stream, arguments);
}

template <class Vector>
void launch_type(const AppendParams& p, const Rotation& rotation, DType dtype, const Stream& stream) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  const bool wide = rotation.dtype == DType::f32;
  if (!rotation.cos) return launch_append<Vector, void, void>(p, rotation, size, stream);
  switch (dtype) {
    case DType::f32: return launch_append<Vector, float, float>(p, rotation, size, stream);
    case DType::bf16:
      return wide ? launch_append<Vector, bf16_t, float>(p, rotation, size, stream)
                  : launch_append<Vector, bf16_t, bf16_t>(p, rotation, size, stream);
    case DType::f16:
      return wide ? launch_append<Vector, f16_t, float>(p, rotation, size, stream)
                  : launch_append<Vector, f16_t, f16_t>(p, rotation, size, stream);
  }
}

}  // namespace

void append_kv(const AppendParams& p, const Rotation& rotation, DType dtype, const Stream& stream) {
  if (p.batch * p.kv_heads * p.width == 0) return;
  const int64_t alignment = common_alignment(p, dtype == DType::f32 ? 4 : 2);
  if (alignment >= 16) return launch_type<uint4>(p, rotation, dtype, stream);
  if (alignment >= 4) return launch_type<uint32_t>(p, rotation, dtype, stream);
  launch_type<uint16_t>(p, rotation, dtype, stream);
}

}  // namespace cllm::cuda
