#pragma once

#include <pybind11/pybind11.h>

namespace cllm {

// Adds the CUDA ops to a module.
void define_cuda(pybind11::module_& module);

}  // namespace cllm
