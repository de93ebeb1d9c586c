// Decoder layers in one call, so that what stands around the kernels is paid once a window and not four times a layer.
#include <algorithm>

#include "check.h"
#include "ops.h"
#include "scratch.h"

namespace cllm::cpu {
namespace {

thread_local Scratch scratch;

}  // namespace

void decoder_layers(const DecoderParams& p, int threads) {
  check_room(p.lengths, p.batch, p.width, p.capacity);
  check_starts(p.starts, p.batch);
  const int64_t rows = p.batch * p.width, item = element_size(p.dtype);
  int64_t queries = 0, keys = 0;
  for (size_t i = 0; i < p.count; ++i) {
    queries = std::max(queries, p.layers[i].query.outputs);
    keys = std::max(keys, p.layers[i].key.outputs);
  }
  Pieces pieces;
  const size_t query_at = pieces.add(rows * queries * item), attended_at = pieces.add(rows * queries * item);
  const size_t key_at = pieces.add(rows * keys * item), value_at = pieces.add(rows * keys * item);
  const size_t lse_at = pieces.add(rows * queries / p.dim * sizeof(float));
  char* memory = pieces.reserve(scratch);
  char *query = memory + query_at, *key = memory + key_at, *value = memory + value_at, *attended = memory + attended_at;
  // [B, n, heads, dim] in this order of its dimensions, and as [B, heads, n, dim].
  const auto by_token = [&](void* data, int64_t width) { return Strided{data, {p.width * width, width, p.dim}}; };
  const auto by_head = [&](void* data, int64_t width) { return Strided{data, {p.width * width, p.dim, width}}; };
  for (size_t i = 0; i < p.count; ++i) {
    const DecoderLayer& layer = p.layers[i];
    const int64_t heads = layer.query.outputs / p.dim, kv_heads = layer.key.outputs / p.dim;
    qkv({p.hidden, layer.norm, layer.eps, layer.query, layer.key, layer.value, layer.query_norm, layer.key_norm,
         layer.head_eps, p.cos, p.sin, query, key, value, rows, p.hidden_size, p.dim, p.dtype},
        threads);
    append_kv({layer.key_cache, layer.value_cache, by_head(key, layer.key.outputs), by_head(value, layer.key.outputs),
               Strided{}, Strided{}, p.lengths, p.batch, kv_heads, p.capacity, p.width, p.dim, p.dim, 0, p.dtype, p.dtype},
              threads);
    block_attention({by_token(query, layer.query.outputs), layer.key_cache, layer.value_cache, p.lengths, p.starts,
                     nullptr, attended, reinterpret_cast<float*>(memory + lse_at), p.batch, p.width, heads, kv_heads,
                     p.capacity, p.dim, p.dim, layer.scale, layer.sliding_window, p.branch, 0, p.dtype},
                    threads);
    mlp({p.hidden, attended, layer.output, layer.mlp_norm, layer.mlp_eps, layer.gate, layer.up, layer.down, p.hidden, rows,
         p.hidden_size, layer.query.outputs, p.dtype},
        threads);
  }
}

}  // namespace cllm::cpu
