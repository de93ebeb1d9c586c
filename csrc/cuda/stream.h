// A CUDA stream of a device, and what the host asks of the CUDA runtime outside of launches.
#pragma once

#include <cstdint>

namespace cllm::cuda {

struct Stream {
  int device;
  void* handle;  // cudaStream_t; null: the default stream
};

// As CUDA counts: 13000 is 13.0. The driver's is that of the newest CUDA that it runs, 0 without a driver.
int driver_version();
int runtime_version();

// Identifies the capture of a graph that the stream is in; 0 outside of one.
uint64_t capture_id(const Stream& stream);

}  // namespace cllm::cuda
