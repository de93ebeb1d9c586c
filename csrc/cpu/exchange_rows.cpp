// Rows of a batch change places, in all that is kept by rows.
#include <algorithm>

#include "ops.h"

namespace cllm::cpu {

void exchange_rows(const std::vector<RowTensor>& tensors, const std::vector<int64_t>& first,
                   const std::vector<int64_t>& second) {
  for (const auto& [data, row_bytes] : tensors)
    for (size_t i = 0; i < first.size(); ++i) {
      char* row = static_cast<char*>(data) + first[i] * row_bytes;
      std::swap_ranges(row, row + row_bytes, static_cast<char*>(data) + second[i] * row_bytes);
    }
}

}  // namespace cllm::cpu
