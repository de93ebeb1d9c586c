// `window_linear` on tensors instead of pointers: looking at tensors in Python takes longer than a small layer does.
#include "tensor_linear.h"

#include <cstdlib>
#include <optional>

#include "../cpu/ops.h"
#include "dlpack.h"

namespace py = pybind11;

namespace cllm {
namespace {

constexpr int most_dims = 8;

// Of a version of torch that has it, else null.
const dlpack::ExchangeApi* exchange_api() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return api->version.major == dlpack::major_version ? api : nullptr;
}

std::optional<DType> dtype_of(const dlpack::Tensor& tensor) {
  const auto [code, bits, lanes] = tensor.dtype;
  if (tensor.device.type != dlpack::cpu || lanes != 1) return std::nullopt;
  if (code == dlpack::float_code && bits == 32) return DType::f32;
  if (code == dlpack::bfloat_code && bits == 16) return DType::bf16;
  return std::nullopt;
}

const void* data(const dlpack::Tensor& tensor) { return static_cast<const char*>(tensor.data) + tensor.byte_offset; }

bool contiguous(const dlpack::Tensor& tensor) {
  int64_t stride = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

// The product, or None where something is not as it mostly is: `window_linear` then looks at it in detail.
py::object linear_of_tensors(py::handle x_object, py::handle weight_object, py::handle bias_object, int64_t most_rows,
                             int threads) {
  static const dlpack::ExchangeApi* const api = exchange_api();
  const char* backend = std::getenv("CLLM_BACKEND");
  if (api == nullptr || (backend != nullptr && *backend != '\0')) return py::none();

  dlpack::Tensor x, weight, bias{};
  const bool biased = !bias_object.is_none();
  if (api->from_python(x_object.ptr(), &x) || api->from_python(weight_object.ptr(), &weight) ||
      (biased && api->from_python(bias_object.ptr(), &bias))) {
    PyErr_Clear();
    return py::none();
  }
  const std::optional<DType> dtype = dtype_of(x);
  if (!dtype || dtype_of(weight) != dtype || x.ndim < 1 || x.ndim > most_dims || weight.ndim != 2) return py::none();
  const int64_t inputs = x.shape[x.ndim - 1], outputs = weight.shape[0];
  if (inputs < 1 || outputs < 1 || weight.shape[1] != inputs || weight.strides[1] != 1 || !contiguous(x)) {
    return py::none();
  }
  if (biased && (dtype_of(bias) != dtype || bias.ndim != 1 || bias.shape[0] != outputs || !contiguous(bias))) {
    return py::none();
  }
  int64_t shape[most_dims], rows = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) rows *= shape[i] = x.shape[i];
  shape[x.ndim - 1] = outputs;
  if (rows < 1 || rows > most_rows) return py::none();

  dlpack::Tensor prototype = x;
  prototype.shape = shape;
  prototype.strides = nullptr;
  dlpack::ManagedTensor* made = nullptr;
  const auto fail = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  if (api->allocate(&prototype, &made, nullptr, fail)) throw py::error_already_set();
  void* out = const_cast<void*>(data(made->tensor));
  void* object = nullptr;
  if (api->to_python(made, &object)) throw py::error_already_set();
  const py::object result = py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  {
    const py::gil_scoped_release unlocked;
    cpu::linear({data(x), data(weight), biased ? data(bias) : nullptr, out, inputs * element_size(*dtype),
                 weight.strides[0], outputs, rows, inputs, outputs, *dtype},
                threads);
  }
  return result;
}

}  // namespace

void define_tensor_linear(py::module_& module) { module.def("linear_of_tensors", &linear_of_tensors); }

}  // namespace cllm
