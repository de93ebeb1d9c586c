#include "append_kv.cuh"

namespace cllm::cuda {
namespace {

// The largest vector that divides what is copied, wherever it starts.
int64_t common_alignment(const AppendParams& p) {
  int64_t bits = p.dim * p.element_size | p.value_dim * p.element_size | 16;
  for (const Strided* tensor : {&p.key_cache, &p.value_cache, &p.key, &p.value}) {
    bits |= reinterpret_cast<intptr_t>(tensor->data);
    for (int64_t stride : tensor->strides) bits |= stride * p.element_size;
  }
  return bits & -bits;
}

template <class Vector, class T>
void launch_append(const AppendParams& p, const Rotation& rotation, const Stream& stream) {
  const int64_t size = sizeof(Vector), value_items = p.value_dim * p.element_size / size;
  const int64_t key_items = std::is_void_v<T> ? p.dim * p.element_size / size : p.dim;
  const int64_t items = p.width * (key_items + value_items);
  const dim3 grid(static_cast<unsigned>((items + append_threads - 1) / append_threads),
                  static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  const AppendArguments arguments{p, rotation, static_cast<int>(key_items), static_cast<int>(value_items)};
  launch(append_kernel<Vector, T>, grid, append_threads, 0, stream, arguments);
}

template <class Vector>
void launch_type(const AppendParams& p, const Rotation& rotation, DType dtype, const Stream& stream) {
  if (!rotation.cos) return launch_append<Vector, void>(p, rotation, stream);
  if (dtype == DType::f32) return launch_append<Vector, float>(p, rotation, stream);
  if (dtype == DType::bf16) return launch_append<Vector, bf16_t>(p, rotation, stream);
  launch_append<Vector, f16_t>(p, rotation, stream);
}

}  // namespace

void append_kv(const AppendParams& p, const Rotation& rotation, DType dtype, const Stream& stream) {
  if (p.batch * p.kv_heads * p.width == 0) return;
  const int64_t alignment = common_alignment(p);
  if (alignment >= 16) return launch_type<uint4>(p, rotation, dtype, stream);
  if (alignment >= 4) return launch_type<uint32_t>(p, rotation, dtype, stream);
  launch_type<uint16_t>(p, rotation, dtype, stream);
}

}  // namespace cllm::cuda
