#pragma once

#include <pybind11/pybind11.h>

namespace cllm {

// linear_of_tensors(x, weight, bias | None, most_rows, threads) -> tensor | None
void define_tensor_linear(pybind11::module_& module);

}  // namespace cllm
