// append_kv_: a thread copies one vector of a key or a value; with a rotation, one element of a key, or a pair of a query.
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

// x cos + other sin, where both products and the sum are rounded to the type of the angles.
template <class A>
__device__ float turned(float x, float other, A cos, A sin) {
  return rounded<A>(__fadd_rn(rounded<A>(__fmul_rn(x, widen(cos))), rounded<A>(__fmul_rn(other, widen(sin)))));
}

template <class A>
__device__ const A* angles(const Strided& of, int64_t batch, int64_t token) {
  return static_cast<const A*>(of.data) + batch * of.strides[0] + token * of.strides[1];
}

// Writes element d of a key k: k[d] cos[d] + k'[d] sin[d], where k' is k with its halves swapped, the first negated.
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
  const A *cos = angles<A>(p.cos, batch, token), *sin = angles<A>(p.sin, batch, token);
  narrow(turned(widen(from[d]), other, cos[d], sin[d]), to + d);
}

// Both elements of a pair of a query, in place.
template <class T, class A>
__device__ void rotate_query(const AppendParams& p, int64_t batch, int64_t head, int64_t index) {
  const int half = static_cast<int>(p.rotary_dim) / 2, d = static_cast<int>(index % half);
  const int64_t token = index / half;
  if (token >= p.width) return;
  T* at = static_cast<T*>(p.query.data) + batch * p.query.strides[0] + token * p.query.strides[1] +
          head * p.query.strides[2] + d;
  const A *cos = angles<A>(p.cos, batch, token) + d, *sin = angles<A>(p.sin, batch, token) + d;
  const float first = widen(at[0]), second = widen(at[half]);
  narrow(turned(first, -second, cos[0], sin[0]), at);
  narrow(turned(second, first, cos[half], sin[half]), at + half);
}

// Grid: items of all tokens x heads, behind those of the cache those of the queries, x rows. `T` is the element type where
// keys are rotated, else void; `A` that of the angles.
template <class Vector, class T, class A>
CLLM_KERNEL(append_threads, 4) append_kernel(AppendArguments a) {
  const AppendParams& p = a.params;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * append_threads + threadIdx.x;
  if (blockIdx.y >= p.kv_heads) {
    if constexpr (!std::is_void_v<T>) rotate_query<T, A>(p, blockIdx.z, blockIdx.y - p.kv_heads, index);
    return;
  }
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
