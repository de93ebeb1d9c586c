// What we use of DLPack's exchange of tensors between C libraries, version 1 (https://github.com/dmlc/dlpack): Python's
// tensors looked at, and made, without a call of Python. Only the standard's layout, so that the build needs no torch.
#pragma once

#include <cstdint>

namespace cllm::dlpack {

constexpr uint32_t major_version = 1;
constexpr int32_t cpu = 1;                          // Device.type
constexpr uint8_t float_code = 2, bfloat_code = 4;  // DataType.code

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // elements
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// Each returns 0, or -1 with an exception of Python set (`allocate`: with `set_error` called).
struct ExchangeApi {
  Version version;
  void* previous;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_python)(void* object, ManagedTensor** out);
  int (*to_python)(ManagedTensor* tensor, void** out);  // takes the tensor over
  int (*from_python)(void* object, Tensor* out);        // lives as long as the object and is not owned
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace cllm::dlpack
