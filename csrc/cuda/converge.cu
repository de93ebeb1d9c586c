#include "converge.cuh"

namespace cllm::cuda {
namespace {

// Enough blocks to occupy the largest GPU of today a few times; not measured.
constexpr int64_t target_blocks = 528;
// Logits of a block at least: four vectors of a 16-bit type for each thread.
constexpr int64_t smallest_split = 4 * 8 * converge_threads;

// A multiple of 64, so that counters of the noise are not shared between blocks.
int64_t split_size(int64_t positions, int64_t vocabulary) {
  const int64_t wanted = (target_blocks + positions - 1) / positions;
  const int64_t size = (vocabulary + wanted - 1) / wanted;
  return (size < smallest_split ? smallest_split : size + 63) / 64 * 64;
}

template <class T>
void launch_converge(const ConvergeArguments& arguments, const Stream& stream) {
  const JacobiState& s = arguments.state;
  const dim3 grid(static_cast<unsigned>(s.rows * s.width), static_cast<unsigned>(arguments.splits));
  const size_t shared = converge_head + converge_warps * row_bytes(s.width + s.width % 2);
  if (arguments.inverse_temperature > 0)
    launch(converge_kernel<T, true>, grid, converge_threads, shared, stream, arguments);
  else
    launch(converge_kernel<T, false>, grid, converge_threads, shared, stream, arguments);
}

}  // namespace

int64_t converge_keys(int64_t rows, int64_t width, int64_t vocabulary) {
  const int64_t split = split_size(rows * width, vocabulary);
  return rows * width * ((vocabulary + split - 1) / split);
}

void converge(const Logits& logits, const JacobiState& state, Mode mode, Refill refill, float inverse_temperature,
              uint64_t* keys, uint32_t* ticket, const Stream& stream) {
  const int64_t split = split_size(state.rows * state.width, logits.vocabulary);
  const ConvergeArguments arguments{logits, state, mode, refill, inverse_temperature, split,
                                    static_cast<int>((logits.vocabulary + split - 1) / split), keys, ticket};
  if (logits.dtype == DType::f32) return launch_converge<float>(arguments, stream);
  if (logits.dtype == DType::bf16) return launch_converge<bf16_t>(arguments, stream);
  launch_converge<f16_t>(arguments, stream);
}

}  // namespace cllm::cuda
