// append_kv_: a thread copies one vector of a key or a value; with a rotation, one element of a key.
#pragma once

#include <type_traits>

#include "ops.h"
#include "platform.h"

namespace cllm::cuda {

constexpr int append_threads = 256;

struct AppendArguments {
  AppendParams params;
  int key_items, value_items;  // of a token
};

template <class Vector>
__device__ void copy_item(const Strided& cache, const Strided& rows, int64_t batch, int64_t head, int64_t token,
                          int64_t position, int64_t bytes, int item) {
  const char* from = static_cast<const char*>(rows.data) +
                     (batch * rows.strides[0] + head * rows.strides[1] + token * rows.strides[2]) * bytes;
  char* to = static_cast<char*>(cache.data) +
             (batch * cache.strides[0] + head * cache.strides[1] + position * cache.strides[2]) * bytes;
  reinterpret_cast<Vector*>(to)[item] = reinterpret_cast<const Vector*>(from)[item];
}

// x rounded to a type, for products and sums that must be rounded as transformers does.
template <class A>
__device__ float rounded(float x) {
  A narrowed;
  narrow(x, &narrowed);
  return widen(narrowed);
}

// Writes element d of a key k: k[d] cos[d] + k'[d] sin[d], where k' is k with its halves swapped, the first negated.
// Both products and the sum are rounded to the type of the angles.
template <class T, class A>
__device__ void rotate_item(const AppendArguments& a, int64_t batch, int64_t head, int64_t token, int64_t position,
                            int d) {
  const AppendParams& p = a.params;
  const Strided &cache = p.key_cache, &rows = p.key;
  const T* from = static_cast<const T*>(rows.data) + batch * rows.strides[0] + head * rows.strides[1] +
                  token * rows.strides[2];
  T* to = static_cast<T*>(cache.data) + batch * cache.strides[0] + head * cache.strides[1] +
          position * cache.strides[2];
  const int dim = static_cast<int>(p.rotary_dim), half = dim / 2;
  if (d >= dim) {
    to[d] = from[d];
    return;
  }
  const float other = d < half ? -widen(from[d + half]) : widen(from[d - half]);
  const float cos = widen(static_cast<const A*>(p.cos.data)[batch * p.cos.strides[0] + token * p.cos.strides[1] + d]);
  const float sin = widen(static_cast<const A*>(p.sin.data)[batch * p.sin.strides[0] + token * p.sin.strides[1] + d]);
  const float sum = __fadd_rn(rounded<A>(__fmul_rn(widen(from[d]), cos)), rounded<A>(__fmul_rn(other, sin)));
  narrow(rounded<A>(sum), to + d);
}

// Grid: items of all tokens x heads x rows. `T` is the element type where keys are rotated, else void; `A` that of the
// angles.
template <class Vector, class T, class A>
CLLM_KERNEL(append_threads, 4) append_kernel(AppendArguments a) {
  const AppendParams& p = a.params;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * append_threads + threadIdx.x;
  const int items = a.key_items + a.value_items;
  const int64_t token = index / items, head = blockIdx.y, batch = blockIdx.z;
  const int item = static_cast<int>(index % items);
  if (token >= p.width) return;
  // Lengths on a device are not checked by the host; what does not fit is not written.
  const int64_t position = p.lengths[batch] + token;
  if (position < 0 || position >= p.capacity) return;
  if (item >= a.key_items)
    copy_item<Vector>(p.value_cache, p.value, batch, head, token, position, element_size(p.dtype), item - a.key_items);
  else if constexpr (std::is_void_v<T>)
    copy_item<Vector>(p.key_cache, p.key, batch, head, token, position, element_size(p.dtype), item);
  else
    rotate_item<T, A>(a, batch, head, token, position, item);
}

}  // namespace cllm::cuda
