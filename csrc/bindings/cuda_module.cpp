// The module cllm_kernels._C.cuda: the ops on a GPU. Every call names its device and stream. What the other arguments
// mean and the checks on them are in cllm_kernels/ops.
#include "cuda_module.h"

#include <pybind11/stl.h>

#include <utility>

#include "../cuda/ops.h"
#include "arguments.h"

namespace py = pybind11;
using namespace cllm;

namespace {

// Sizes of the floats and of the tickets that block_attention takes along.
std::pair<int64_t, int64_t> attention_workspace(int64_t batch, int64_t width, int64_t heads, int64_t kv_heads,
                                                int64_t capacity, int64_t dim, int64_t value_dim) {
  AttentionParams params{};
  params.batch = batch;
  params.width = width;
  params.heads = heads;
  params.kv_heads = kv_heads;
  params.capacity = capacity;
  params.dim = dim;
  params.value_dim = value_dim;
  const cuda::AttentionWorkspace workspace = cuda::attention_workspace(params);
  return {workspace.partial_floats, workspace.tickets};
}

void block_attention(uintptr_t query, int64_t q0, int64_t q1, int64_t q2, uintptr_t key_cache, int64_t k0, int64_t k1,
                     int64_t k2, uintptr_t value_cache, int64_t v0, int64_t v1, int64_t v2, uintptr_t lengths,
                     uintptr_t starts, uintptr_t sinks, uintptr_t out, uintptr_t lse, int64_t batch, int64_t width,
                     int64_t heads, int64_t kv_heads, int64_t capacity, int64_t dim, int64_t value_dim, float scale,
                     int64_t sliding_window, int64_t branch, float softcap, int dtype, uintptr_t partial,
                     uintptr_t tickets, int device, uintptr_t stream) {
  cuda::block_attention(
      {strided(query, q0, q1, q2), strided(key_cache, k0, k1, k2), strided(value_cache, v0, v1, v2),
       pointer<const int32_t>(lengths), pointer<const int32_t>(starts), pointer<const float>(sinks),
       pointer<void>(out), pointer<float>(lse), batch, width, heads, kv_heads, capacity, dim, value_dim, scale,
       sliding_window, branch, softcap, static_cast<DType>(dtype)},
      pointer<float>(partial), pointer<uint32_t>(tickets), {device, pointer<void>(stream)});
}

void append_kv(uintptr_t key_cache, int64_t kc0, int64_t kc1, int64_t kc2, uintptr_t value_cache, int64_t vc0,
               int64_t vc1, int64_t vc2, uintptr_t key, int64_t k0, int64_t k1, int64_t k2, uintptr_t value, int64_t v0,
               int64_t v1, int64_t v2, uintptr_t cos, int64_t c0, int64_t c1, uintptr_t sin, int64_t s0, int64_t s1,
               uintptr_t lengths, int64_t batch, int64_t kv_heads, int64_t capacity, int64_t width, int64_t dim,
               int64_t value_dim, int64_t rotary_dim, int dtype, int angle_dtype, uintptr_t query, int64_t q0, int64_t q1,
               int64_t q2, int64_t heads, int device, uintptr_t stream) {
  cuda::append_kv({strided(key_cache, kc0, kc1, kc2), strided(value_cache, vc0, vc1, vc2), strided(key, k0, k1, k2),
                   strided(value, v0, v1, v2), strided(cos, c0, c1, 1), strided(sin, s0, s1, 1),
                   pointer<const int32_t>(lengths), batch, kv_heads, capacity, width, dim, value_dim, rotary_dim,
                   static_cast<DType>(dtype), static_cast<DType>(angle_dtype), strided(query, q0, q1, q2), heads},
                  {device, pointer<void>(stream)});
}

// Entries of `keys` that converge takes along.
int64_t converge_keys(int64_t rows, int64_t width, int64_t vocabulary) {
  return cuda::converge_keys(rows, width, vocabulary);
}

void converge(uintptr_t logits, int64_t row_stride, int64_t position_stride, int dtype, const StateFields& fields,
              int64_t rows, int64_t width, int64_t vocabulary, int64_t capacity, int64_t context_width,
              int64_t eos_count, int mode, int refill, float inverse_temperature, uintptr_t keys, uintptr_t ticket,
              int device, uintptr_t stream) {
  cuda::converge({pointer<const void>(logits), row_stride, position_stride, vocabulary, static_cast<DType>(dtype)},
                 jacobi_state(fields, rows, width, capacity, context_width, eos_count), static_cast<Mode>(mode),
                 static_cast<Refill>(refill), inverse_temperature, pointer<uint64_t>(keys), pointer<uint32_t>(ticket),
                 {device, pointer<void>(stream)});
}

uint64_t capture_id(int device, uintptr_t stream) { return cuda::capture_id({device, pointer<void>(stream)}); }

}  // namespace

void cllm::define_cuda(py::module_& module) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("attention_workspace", &attention_workspace);
  module.def("block_attention", &block_attention, unlocked());
  module.def("append_kv", &append_kv, unlocked());
  module.def("converge_keys", &converge_keys);
  module.def("converge", &converge, unlocked());
  module.def("capture_id", &capture_id, "Identifies the capture of a graph that a stream is in; 0 outside of one.");
  module.def("driver_version", &cuda::driver_version, "The newest CUDA that the driver runs, 13000 for 13.0; 0: none.");
  module.def("runtime_version", &cuda::runtime_version, "The CUDA of the build.");
  module.attr("LARGEST_HEAD_DIM") = cuda::largest_dim;
  module.attr("LARGEST_WINDOW") = cuda::largest_window;
}
