#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace cllm::cpu {

// Memory that a thread keeps from call to call; fresh pages would cost more than the work on them.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  float* reserve(size_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
      if (!data_) throw std::bad_alloc();
      size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

// Pieces of scratch memory, each at a multiple of 64 bytes.
class Pieces {
 public:
  size_t add(size_t bytes) {
    const size_t at = size_;
    size_ += (bytes + 63) / 64 * 64;
    return at;
  }
  char* reserve(Scratch& scratch) const { return reinterpret_cast<char*>(scratch.reserve(size_ / sizeof(float))); }

 private:
  size_t size_ = 0;
};

}  // namespace cllm::cpu
