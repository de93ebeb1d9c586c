#include "stream.h"

#include "platform.h"

namespace cllm::cuda {

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version));
  return version;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version));
  return version;
}

uint64_t capture_id(const Stream& stream) {
  const DeviceGuard guard(stream.device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream.handle), &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace cllm::cuda
