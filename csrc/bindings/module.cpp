// The Python module cllm_kernels._C: integers in (pointers, strides, sizes), no logic but in tensor_linear.cpp. What the
// arguments mean and the checks on them are in cllm_kernels/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/ops.h"
#include "arguments.h"
#include "build_info.inc"
#include "cuda_module.h"
#include "tensor_linear.h"

namespace py = pybind11;
using namespace cllm;

namespace {

void block_attention(uintptr_t query, int64_t q0, int64_t q1, int64_t q2, uintptr_t key_cache, int64_t k0, int64_t k1,
                     int64_t k2, uintptr_t value_cache, int64_t v0, int64_t v1, int64_t v2, uintptr_t lengths,
                     uintptr_t starts, uintptr_t sinks, uintptr_t out, uintptr_t lse, int64_t batch, int64_t width,
                     int64_t heads, int64_t kv_heads, int64_t capacity, int64_t dim, int64_t value_dim, float scale,
                     int64_t sliding_window, int64_t branch, float softcap, int dtype, int threads) {
  cpu::block_attention(
      {strided(query, q0, q1, q2), strided(key_cache, k0, k1, k2), strided(value_cache, v0, v1, v2),
       pointer<const int32_t>(lengths), pointer<const int32_t>(starts), pointer<const float>(sinks),
       pointer<void>(out), pointer<float>(lse), batch, width, heads, kv_heads, capacity, dim, value_dim, scale,
       sliding_window, branch, softcap, static_cast<DType>(dtype)},
      threads);
}

void append_kv(uintptr_t key_cache, int64_t kc0, int64_t kc1, int64_t kc2, uintptr_t value_cache, int64_t vc0,
               int64_t vc1, int64_t vc2, uintptr_t key, int64_t k0, int64_t k1, int64_t k2, uintptr_t value, int64_t v0,
               int64_t v1, int64_t v2, uintptr_t cos, int64_t c0, int64_t c1, uintptr_t sin, int64_t s0, int64_t s1,
               uintptr_t lengths, int64_t batch, int64_t kv_heads, int64_t capacity, int64_t width, int64_t dim,
               int64_t value_dim, int64_t rotary_dim, int dtype, int angle_dtype, int threads) {
  cpu::append_kv({strided(key_cache, kc0, kc1, kc2), strided(value_cache, vc0, vc1, vc2), strided(key, k0, k1, k2),
                  strided(value, v0, v1, v2), strided(cos, c0, c1, 1), strided(sin, s0, s1, 1),
                  pointer<const int32_t>(lengths), batch, kv_heads, capacity, width, dim, value_dim, rotary_dim,
                  static_cast<DType>(dtype), static_cast<DType>(angle_dtype)},
                 threads);
}

void linear(uintptr_t x, int64_t x_bytes, uintptr_t weight, int64_t weight_stride, uintptr_t bias, uintptr_t out,
            int64_t rows, int64_t inputs, int64_t outputs, int dtype, int threads) {
  cpu::linear({pointer<const void>(x), pointer<const void>(weight), pointer<const void>(bias), pointer<void>(out),
               x_bytes, weight_stride, outputs, rows, inputs, outputs, static_cast<DType>(dtype)},
              threads);
}

void lm_head_argmax(uintptr_t hidden, uintptr_t weight, int64_t weight_stride, uintptr_t bias, float scale,
                    float softcap, uintptr_t index, uintptr_t value, int64_t rows, int64_t inputs, int64_t outputs,
                    int dtype, int threads) {
  const DType type = static_cast<DType>(dtype);
  cpu::lm_head_argmax({{pointer<const void>(hidden), pointer<const void>(weight), pointer<const void>(bias), nullptr,
                        inputs * element_size(type), weight_stride, outputs, rows, inputs, outputs, type},
                       scale, softcap, pointer<int64_t>(index), pointer<float>(value)},
                      threads);
}

// Weight, bias, stride and number of outputs.
using Layer = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t>;

LinearWeights weights(const Layer& layer) {
  const auto [weight, bias, stride, outputs] = layer;
  return {pointer<const void>(weight), pointer<const void>(bias), stride, outputs};
}

void qkv(uintptr_t x, uintptr_t norm, float eps, const Layer& query, const Layer& key, const Layer& value,
         uintptr_t query_norm, uintptr_t key_norm, float head_eps, uintptr_t cos, uintptr_t sin, uintptr_t query_out,
         uintptr_t key_out, uintptr_t value_out, int64_t rows, int64_t hidden, int64_t dim, int dtype, int threads) {
  cpu::qkv({pointer<const void>(x), pointer<const void>(norm), eps, weights(query), weights(key), weights(value),
            pointer<const void>(query_norm), pointer<const void>(key_norm), head_eps, pointer<const void>(cos),
            pointer<const void>(sin), pointer<void>(query_out), pointer<void>(key_out), pointer<void>(value_out), rows,
            hidden, dim, static_cast<DType>(dtype)},
           threads);
}

void mlp(uintptr_t x, uintptr_t attended, const Layer& output, uintptr_t norm, float eps, const Layer& gate,
         const Layer& up, const Layer& down, uintptr_t out, int64_t rows, int64_t hidden, int64_t inputs, int dtype,
         int threads) {
  cpu::mlp({pointer<const void>(x), pointer<const void>(attended), weights(output), pointer<const void>(norm), eps,
            weights(gate), weights(up), weights(down), pointer<void>(out), rows, hidden, inputs,
            static_cast<DType>(dtype)},
           threads);
}

// A tensor [B, Hkv, S, D] and its strides.
using Cache = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

// In the order of `DecoderLayer`.
using LayerFields = std::tuple<uintptr_t, float, Layer, Layer, Layer, uintptr_t, uintptr_t, float, Layer, uintptr_t,
                               float, Layer, Layer, Layer, Cache, Cache, float, int64_t>;

DecoderLayer decoder_layer(const LayerFields& fields) {
  const auto& [norm, eps, query, key, value, query_norm, key_norm, head_eps, output, mlp_norm, mlp_eps, gate, up, down,
               key_cache, value_cache, scale, sliding_window] = fields;
  const auto cache = [](const Cache& c) { return std::apply(strided, c); };
  return {pointer<const void>(norm), eps, weights(query), weights(key), weights(value), pointer<const void>(query_norm),
          pointer<const void>(key_norm), head_eps, weights(output), pointer<const void>(mlp_norm), mlp_eps, weights(gate),
          weights(up), weights(down), cache(key_cache), cache(value_cache), scale, sliding_window};
}

// Layers that Python holds from call to call.
struct DecoderLayers {
  explicit DecoderLayers(const std::vector<LayerFields>& fields) {
    for (const LayerFields& layer : fields) layers.push_back(decoder_layer(layer));
  }

  void run(uintptr_t hidden, uintptr_t cos, uintptr_t sin, uintptr_t lengths, uintptr_t starts,
           const std::vector<int64_t>& counts, uintptr_t out, int64_t keep, int64_t hidden_size, int64_t capacity,
           int64_t dim, int64_t branch, int dtype, int threads) const {
    cpu::decoder_layers({pointer<void>(hidden), pointer<const void>(cos), pointer<const void>(sin),
                         pointer<const int32_t>(lengths), pointer<const int32_t>(starts), counts.data(), pointer<void>(out),
                         keep, layers.data(), layers.size(), static_cast<int64_t>(counts.size()), hidden_size, capacity,
                         dim, branch, static_cast<DType>(dtype)},
                        threads);
  }

  std::vector<DecoderLayer> layers;
};

void rms_norm(uintptr_t x, uintptr_t weight, float eps, uintptr_t out, int64_t rows, int64_t width, int dtype) {
  cpu::rms_norm(pointer<const void>(x), pointer<const void>(weight), eps, pointer<void>(out), rows, width,
                static_cast<DType>(dtype));
}

void converge(uintptr_t logits, int64_t row_stride, int64_t position_stride, int dtype, const StateFields& fields,
              int64_t rows, int64_t width, int64_t vocabulary, int64_t capacity, int64_t context_width,
              int64_t eos_count, int mode, int refill, float inverse_temperature, int threads) {
  cpu::converge({pointer<const void>(logits), row_stride, position_stride, vocabulary, static_cast<DType>(dtype)},
                jacobi_state(fields, rows, width, capacity, context_width, eos_count), static_cast<Mode>(mode),
                static_cast<Refill>(refill), inverse_temperature, threads);
}

void context_drafts(const StateFields& fields, int64_t rows, int64_t width, int64_t context_width) {
  cpu::context_drafts(jacobi_state(fields, rows, width, 0, context_width, 0));
}

// tensors: pointers and bytes of a row.
void exchange_rows(const std::vector<std::tuple<uintptr_t, int64_t>>& tensors, const std::vector<int64_t>& first,
                   const std::vector<int64_t>& second) {
  std::vector<cpu::RowTensor> rows;
  for (const auto& [data, row_bytes] : tensors) rows.push_back({pointer<void>(data), row_bytes});
  cpu::exchange_rows(rows, first, second);
}

std::vector<std::tuple<std::string, std::string, std::string>> state_fields() {
  return {
#define CLLM_STATE_FIELD(type, name, dtype, shape) {#name, dtype, shape},
#include "jacobi_state.inc"
#undef CLLM_STATE_FIELD
  };
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = CLLM_COMPILER;
  info["compiler_version"] = __VERSION__;
  info["flags"] = CLLM_FLAGS;
  info["isas"] = cpu::compiled_isas();
  info["openmp"] = _OPENMP;
#ifdef CLLM_CUDA
  py::dict cuda;
  cuda["compiler"] = CLLM_CUDA_COMPILER;
  cuda["flags"] = CLLM_CUDA_FLAGS;
  cuda["archs"] = std::vector<int>{CLLM_CUDA_ARCHS};
  cuda["ptx"] = CLLM_CUDA_PTX;
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("block_attention", &block_attention, unlocked());
  module.def("append_kv", &append_kv, unlocked());
  module.def("linear", &linear, unlocked());
  define_tensor_linear(module);
  module.def("lm_head_argmax", &lm_head_argmax, unlocked());
  module.def("context_drafts", &context_drafts, unlocked());
  module.def("exchange_rows", &exchange_rows, unlocked());
  module.def("qkv", &qkv, unlocked());
  module.def("mlp", &mlp, unlocked());
  module.def("rms_norm", &rms_norm, unlocked());
  module.def("converge", &converge, unlocked());
  py::class_<DecoderLayers>(module, "DecoderLayers")
      .def(py::init<const std::vector<LayerFields>&>())
      .def("run", &DecoderLayers::run, unlocked());
  module.def("state_fields", &state_fields, "Fields of JacobiState that were compiled in: (name, dtype, shape).");
  module.def("build_info", &build_info, "How this module was built.");
  module.def("cpu_isa", &cpu::selected_isa, "The instruction set whose kernels run.");
  module.def("cpu_isas", &cpu::supported_isas, "The instruction sets that can run here, worst first.");
  module.def("select_cpu_isa", &cpu::select_isa, "Switches to another of cpu_isas().");
#ifdef CLLM_CUDA
  py::module_ cuda = module.def_submodule("cuda", "The ops on a GPU.");
  define_cuda(cuda);
#endif
}
