// Decoder layers in one call, so that what stands around the kernels is paid once a window and not four times a layer.
#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "ops.h"
#include "scratch.h"

namespace cllm::cpu {
namespace {

// Of at most so many tokens, what stands between the kernels is held from call to call.
constexpr int64_t held_tokens = 1024;

thread_local Scratch scratch;

// Neighbouring rows with equal numbers of tokens, which attention takes together.
struct Group {
  int64_t row, batch, width, first;  // first: its first token
};

std::vector<Group> groups_of(const DecoderParams& p) {
  std::vector<Group> groups;
  int64_t first = 0;
  for (int64_t row = 0; row < p.batch; first += p.counts[row++]) {
    if (!groups.empty() && groups.back().width == p.counts[row])
      ++groups.back().batch;
    else
      groups.push_back({row, 1, p.counts[row], first});
  }
  return groups;
}

char* at(void* data, int64_t bytes) { return static_cast<char*>(data) + bytes; }

}  // namespace

void decoder_layers(const DecoderParams& p, int threads) {
  const std::vector<Group> groups = groups_of(p);
  for (const Group& group : groups) check_room(p.lengths + group.row, group.batch, group.width, p.capacity, group.row);
  check_starts(p.starts, p.batch);
  const int64_t tokens = groups.back().first + groups.back().batch * groups.back().width, item = element_size(p.dtype);
  int64_t queries = 0, keys = 0;
  for (size_t i = 0; i < p.layer_count; ++i) {
    queries = std::max(queries, p.layers[i].query.outputs);
    keys = std::max(keys, p.layers[i].key.outputs);
  }
  Pieces pieces;
  const size_t query_at = pieces.add(tokens * queries * item), attended_at = pieces.add(tokens * queries * item);
  const size_t key_at = pieces.add(tokens * keys * item), value_at = pieces.add(tokens * keys * item);
  const size_t lse_at = pieces.add(tokens * queries / p.dim * sizeof(float));
  Scratch own;
  char* memory = pieces.reserve(tokens <= held_tokens ? scratch : own);
  char *query = memory + query_at, *key = memory + key_at, *value = memory + value_at, *attended = memory + attended_at;
  float* lse = reinterpret_cast<float*>(memory + lse_at);
  std::vector<int32_t> last_lengths(p.batch);  // before the tokens that the last layer is asked for
  for (int64_t row = 0; row < p.batch; ++row)
    last_lengths[row] = p.lengths[row] + static_cast<int32_t>(p.counts[row] - p.keep);
  for (size_t i = 0; i < p.layer_count; ++i) {
    const DecoderLayer& layer = p.layers[i];
    const bool last = i + 1 == p.layer_count;
    const int64_t inputs = layer.query.outputs, key_inputs = layer.key.outputs;
    const int64_t heads = inputs / p.dim, kv_heads = key_inputs / p.dim;
    const int32_t* lengths = last ? last_lengths.data() : p.lengths;
    qkv({p.hidden, layer.norm, layer.eps, layer.query, layer.key, layer.value, layer.query_norm, layer.key_norm,
         layer.head_eps, p.cos, p.sin, query, key, value, tokens, p.hidden_size, p.dim, p.dtype},
        threads);
    int64_t done = 0;  // tokens that attention has taken
    for (const Group& group : groups) {
      const auto in_cache = [&](Strided cache) {
        cache.data = at(cache.data, group.row * cache.strides[0] * item);
        return cache;
      };
      // [B, heads, n, dim] of what has the heads of a token side by side.
      const auto by_head = [&](char* data) {
        return Strided{at(data, group.first * key_inputs * item), {group.width * key_inputs, p.dim, key_inputs}};
      };
      const Strided key_cache = in_cache(layer.key_cache), value_cache = in_cache(layer.value_cache);
      append_kv({key_cache, value_cache, by_head(key), by_head(value), Strided{}, Strided{}, p.lengths + group.row,
                 group.batch, kv_heads, p.capacity, group.width, p.dim, p.dim, 0, p.dtype, p.dtype},
                threads);
      const int64_t width = last ? p.keep : group.width, before = group.width - width;
      block_attention({Strided{at(query, (group.first + before) * inputs * item), {group.width * inputs, inputs, p.dim}},
                       key_cache, value_cache, lengths + group.row, p.starts + group.row, nullptr,
                       at(attended, done * inputs * item), lse, group.batch, width, heads, kv_heads, p.capacity, p.dim,
                       p.dim, layer.scale, layer.sliding_window, p.branch ? p.branch : width, 0, p.dtype},
                      threads);
      for (int64_t row = 0; last && row < group.batch; ++row)
        std::memcpy(at(p.out, (done + row * width) * p.hidden_size * item),
                    at(p.hidden, (group.first + row * group.width + before) * p.hidden_size * item),
                    width * p.hidden_size * item);
      done += group.batch * width;
    }
    void* hidden = last ? p.out : p.hidden;
    mlp({hidden, attended, layer.output, layer.mlp_norm, layer.mlp_eps, layer.gate, layer.up, layer.down, hidden, done,
         p.hidden_size, inputs, p.dtype},
        threads);
  }
}

}  // namespace cllm::cpu
