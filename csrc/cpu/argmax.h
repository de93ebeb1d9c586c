// Argmax of one row in one pass over memory. Included only by kernels.cpp.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace cllm::cpu {
namespace {

// The maximum of each block is found first; only the first block that holds the overall maximum is read again
// for the index. 1024 values stay in the L1 cache and make the horizontal step rare.
constexpr int64_t argmax_block = 1024;

template <class T>
Best argmax(const T* values, int64_t count) {
  constexpr int chains = 4;  // independent maxima, which hide the latency
  Best best{-INFINITY, 0, false};
  int64_t best_block = 0;
  vint broken = {};
  for (int64_t begin = 0; begin < count; begin += argmax_block) {
    const int64_t end = begin + argmax_block < count ? begin + argmax_block : count;
    vfloat top[chains];
    for (int c = 0; c < chains; ++c) top[c] = splat(-INFINITY);
    int64_t i = begin;
    for (; i + chains * native <= end; i += chains * native)
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) {
        const vfloat x = load(values + i + c * native);
        top[c] = max(x, top[c]);
        broken |= x != x;
      }
    float largest = -INFINITY;
    for (; i < end; ++i) {
      const float x = widen(values[i]);
      best.nan |= x != x;
      if (x > largest) largest = x;
    }
    const vfloat joined = max(max(top[0], top[1]), max(top[2], top[3]));
    for (int lane = 0; lane < native; ++lane)
      if (joined[lane] > largest) largest = joined[lane];
    if (largest > best.value) {
      best.value = largest;
      best_block = begin;
    }
  }
  best.nan |= any(broken);
  if (best.nan) {
    while (widen(values[best.index]) == widen(values[best.index])) ++best.index;
    return best;
  }
  best.index = best_block;
  while (widen(values[best.index]) != best.value) ++best.index;
  return best;
}

}  // namespace
}  // namespace cllm::cpu
