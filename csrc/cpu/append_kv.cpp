#include <cstring>

#include "check.h"
#include "ops.h"

namespace cllm::cpu {
namespace {

// Starting threads pays for prompts, not for windows: one core copies this in a few hundred microseconds.
constexpr int64_t parallel_bytes = 1 << 22;

void copy_rows(const Strided& cache, const Strided& rows, int64_t row, int64_t head, int64_t length, int64_t width,
               int64_t row_bytes, int64_t element_size) {
  char* to = static_cast<char*>(cache.data) +
             (row * cache.strides[0] + head * cache.strides[1] + length * cache.strides[2]) * element_size;
  const char* from =
      static_cast<const char*>(rows.data) + (row * rows.strides[0] + head * rows.strides[1]) * element_size;
  const int64_t to_step = cache.strides[2] * element_size, from_step = rows.strides[2] * element_size;
  if (to_step == row_bytes && from_step == row_bytes) {
    std::memcpy(to, from, width * row_bytes);
    return;
  }
  for (int64_t i = 0; i < width; ++i) std::memcpy(to + i * to_step, from + i * from_step, row_bytes);
}

}  // namespace

void append_kv(const AppendParams& p, int threads) {
  check_room(p.lengths, p.batch, p.width, p.capacity);
  const int64_t tasks = p.batch * p.kv_heads;
  const int64_t key_bytes = p.dim * p.element_size, value_bytes = p.value_dim * p.element_size;
  const bool parallel = tasks * p.width * (key_bytes + value_bytes) >= parallel_bytes;
#pragma omp parallel for num_threads(threads) if (parallel && threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / p.kv_heads, head = task % p.kv_heads;
    copy_rows(p.key_cache, p.key, row, head, p.lengths[row], p.width, key_bytes, p.element_size);
    copy_rows(p.value_cache, p.value, row, head, p.lengths[row], p.width, value_bytes, p.element_size);
  }
}

}  // namespace cllm::cpu
