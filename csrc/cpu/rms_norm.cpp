// RMSNorm of the rows of a window, which are too few to be shared out over threads.
#include "kernels.h"
#include "ops.h"

namespace cllm::cpu {

void rms_norm(const void* x, const void* weight, float eps, void* out, int64_t rows, int64_t width, DType dtype) {
  const Kernels& run = kernels();
  const int64_t row_bytes = width * element_size(dtype);
  for (int64_t row = 0; row < rows; ++row)
    run.rms_norm(static_cast<const char*>(x) + row * row_bytes, weight, eps, width,
                 static_cast<char*>(out) + row * row_bytes, dtype);
}

}  // namespace cllm::cpu
