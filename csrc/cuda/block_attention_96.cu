#include "block_attention_launch.cuh"

namespace cllm::cuda {
template void launch_attention<96>(const AttentionPlan&, const AttentionArguments&, const Stream&);
}
