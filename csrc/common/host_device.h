#pragma once

// Functions that kernels on a GPU use as well.
#ifdef __CUDACC__
#define CLLM_HOST_DEVICE __host__ __device__
#else
#define CLLM_HOST_DEVICE
#endif
