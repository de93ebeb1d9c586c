// The tiles of each head size; their shared memory fits into 99 KiB, what a block can have from sm_86 on.
// Those for heads of 128 were measured on an H100: eight warps are faster than four for 64 rows.
#pragma once

#include "block_attention.cuh"

namespace cllm::cuda {

template <int Dim>
struct Tiles;
template <>
struct Tiles<64> {
  using Few = Tile<64, 1, 4, 64, 3>;
  using Some = Tile<64, 2, 2, 64, 3>;
  using Many = Tile<64, 4, 2, 64, 3>;
};
template <>
struct Tiles<96> {
  using Few = Tile<96, 1, 4, 64, 3>;
  using Some = Tile<96, 2, 2, 64, 2>;
  using Many = Tile<96, 4, 2, 64, 2>;
};
template <>
struct Tiles<128> {
  using Few = Tile<128, 1, 4, 64, 2>;
  using Some = Tile<128, 2, 2, 64, 2>;
  using Many = Tile<128, 4, 2, 64, 2>;
};
template <>
struct Tiles<256> {
  using Few = Tile<256, 1, 2, 32, 2>;
  using Some = Tile<256, 2, 2, 32, 2>;
  using Many = Tile<256, 4, 1, 32, 2>;
};

template <class T, class Tile>
void launch_tile(const AttentionArguments& a, const Stream& stream) {
  static_assert(Tile::shared_bytes <= 99 * 1024);
  const dim3 grid(static_cast<unsigned>(a.tiles) * a.splits, static_cast<unsigned>(a.params.kv_heads),
                  static_cast<unsigned>(a.params.batch));
  launch(attention_kernel<T, Tile>, grid, Tile::threads, Tile::shared_bytes, stream, a);
}

template <class T, int Dim>
void launch_type(const AttentionPlan& plan, const AttentionArguments& a, const Stream& stream) {
  if (plan.tile_rows == 16) return launch_tile<T, typename Tiles<Dim>::Few>(a, stream);
  if (plan.tile_rows == 32) return launch_tile<T, typename Tiles<Dim>::Some>(a, stream);
  launch_tile<T, typename Tiles<Dim>::Many>(a, stream);
}

template <int Dim>
void launch_attention(const AttentionPlan& plan, const AttentionArguments& a, const Stream& stream) {
  a.params.dtype == DType::bf16 ? launch_type<bf16_t, Dim>(plan, a, stream) : launch_type<f16_t, Dim>(plan, a, stream);
}

}  // namespace cllm::cuda
