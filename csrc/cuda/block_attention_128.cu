#include "block_attention_launch.cuh"

namespace cllm::cuda {
template void launch_attention<128>(const AttentionPlan&, const AttentionArguments&, const Stream&);
}
