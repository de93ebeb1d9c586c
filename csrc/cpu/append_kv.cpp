#include <cstring>

#include "check.h"
#include "kernels.h"
#include "ops.h"

namespace cllm::cpu {
namespace {

// Starting threads pays for prompts, not for windows: one core copies this in a few hundred microseconds.
constexpr int64_t parallel_bytes = 1 << 22;

constexpr int64_t line = 64;  // bytes

char* at(const Strided& tensor, int64_t i, int64_t j, int64_t k, int64_t bytes) {
  return static_cast<char*>(tensor.data) +
         (i * tensor.strides[0] + j * tensor.strides[1] + k * tensor.strides[2]) * bytes;
}

void copy_rows(const Strided& cache, const Strided& rows, int64_t row, int64_t head, int64_t length, int64_t width,
               int64_t row_bytes, int64_t bytes) {
  char* to = at(cache, row, head, length, bytes);
  const char* from = at(rows, row, head, 0, bytes);
  const int64_t to_step = cache.strides[2] * bytes, from_step = rows.strides[2] * bytes;
  if (to_step == row_bytes && from_step == row_bytes) {
    std::memcpy(to, from, width * row_bytes);
    return;
  }
  // Calls of memcpy with a size that is not known would take longer than the copies themselves.
  const int64_t lines = row_bytes % line ? 0 : row_bytes / line;
  for (int64_t i = 0; i < width; ++i, to += to_step, from += from_step) {
    if (!lines) std::memcpy(to, from, row_bytes);
    for (int64_t j = 0; j < lines; ++j) std::memcpy(to + j * line, from + j * line, line);
  }
}

void rotate_rows(const AppendParams& p, const Kernels& run, int64_t row, int64_t head, int64_t bytes) {
  const int64_t angle_bytes = element_size(p.angle_dtype), rotated = p.rotary_dim * bytes;
  for (int64_t i = 0; i < p.width; ++i) {
    const char* from = at(p.key, row, head, i, bytes);
    char* to = at(p.key_cache, row, head, p.lengths[row] + i, bytes);
    run.rotate(from, at(p.cos, row, i, 0, angle_bytes), at(p.sin, row, i, 0, angle_bytes), to, p.rotary_dim, 1, 0,
               p.dtype, p.angle_dtype);
    std::memcpy(to + rotated, from + rotated, p.dim * bytes - rotated);
  }
}

}  // namespace

void append_kv(const AppendParams& p, int threads) {
  check_room(p.lengths, p.batch, p.width, p.capacity);
  const int64_t tasks = p.batch * p.kv_heads;
  const int64_t bytes = element_size(p.dtype), key_bytes = p.dim * bytes, value_bytes = p.value_dim * bytes;
  const Kernels& run = kernels();
  const bool parallel = tasks * p.width * (key_bytes + value_bytes) >= parallel_bytes;
#pragma omp parallel for num_threads(threads) if (parallel && threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / p.kv_heads, head = task % p.kv_heads;
    if (p.cos.data)
      rotate_rows(p, run, row, head, bytes);
    else
      copy_rows(p.key_cache, p.key, row, head, p.lengths[row], p.width, key_bytes, bytes);
    copy_rows(p.value_cache, p.value, row, head, p.lengths[row], p.width, value_bytes, bytes);
  }
}

}  // namespace cllm::cpu
