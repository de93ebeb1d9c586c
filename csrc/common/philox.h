// Philox4x32-10, counter-based random numbers: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011. cllm_kernels/ops/philox.py is the same function in PyTorch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace cllm {

struct Philox4x32 {
  uint32_t word[4];
};

CLLM_HOST_DEVICE inline Philox4x32 philox4x32(Philox4x32 counter, uint32_t key0, uint32_t key1) {
  uint32_t* c = counter.word;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c[1] = static_cast<uint32_t>(product1);
    c[2] = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Third counter word of the noise of sampling ("JG").
constexpr uint32_t noise_stream = 0x4A47;

// The random word of a refilled draft: new token `token` of a row, draw number `draw`.
CLLM_HOST_DEVICE inline uint32_t refill_draw(int64_t seed, int64_t token, int32_t draw) {
  constexpr uint32_t stream = 0x4A43;  // "JC", apart from other uses of the same key
  const Philox4x32 counter{{static_cast<uint32_t>(token), 0, stream, static_cast<uint32_t>(draw)}};
  const uint64_t key = static_cast<uint64_t>(seed);
  return philox4x32(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)).word[0];
}

}  // namespace cllm
