#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cllm::cpu {

// Throws unless rows [L, L + width) of every batch row lie in the cache. `first`: number of the first one.
inline void check_room(const int32_t* lengths, int64_t batch, int64_t width, int64_t capacity, int64_t first = 0) {
  for (int64_t row = 0; row < batch; ++row)
    if (lengths[row] < 0 || lengths[row] > capacity - width)
      throw std::invalid_argument("row " + std::to_string(first + row) + " has length " + std::to_string(lengths[row]) +
                                  ": rows [L, L + n) with n = " + std::to_string(width) +
                                  " must lie in a cache of S = " + std::to_string(capacity));
}

// Throws unless every row of a cache begins at one of its rows.
inline void check_starts(const int32_t* starts, int64_t batch) {
  for (int64_t row = 0; row < batch; ++row)
    if (starts[row] < 0)
      throw std::invalid_argument("row " + std::to_string(row) + " has start " + std::to_string(starts[row]) +
                                  "; it must be at least 0");
}

}  // namespace cllm::cpu
