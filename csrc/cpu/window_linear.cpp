// Linear layers of a window, alone and with what stands around them in a decoder layer, shared out over threads.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "scratch.h"

namespace cllm::cpu {
namespace {

// One core does this many multiply-adds in a few microseconds, as many as sharing out one layer costs where the other
// core is slow to answer. The MLP has several layers, with a barrier behind each; on a machine that does other work a
// barrier waits for a time slice.
constexpr int64_t parallel_work = 600'000, parallel_mlp_work = 1'500'000;
// Reading a weight takes one row as long as these many rows take to compute.
constexpr int64_t memory_rows = 6;
// Several tasks a thread even out other load.
constexpr int64_t tasks_per_thread = 8;

// Bytes of logits that a thread holds until it has looked for the largest, and how many outputs that are at most: few
// enough for the L2 cache, and enough that starting a search costs nothing.
constexpr int64_t head_bytes = 256 << 10, head_outputs = 480;

// Bytes of x that each thread writes again.
constexpr size_t own_bytes = 256 << 10;

// Rows for which the results between the linear layers of a decoder layer are held.
constexpr int64_t held_rows = 512;

thread_local Scratch scratch;

int64_t work_of(const LinearParams& p) { return p.outputs * p.inputs * std::max(p.rows, memory_rows); }

// The team that runs `work` multiply-adds.
int team_size(int64_t work, int threads, int64_t least = parallel_work) { return work < least ? 1 : threads; }

int64_t outputs_per_task(int64_t outputs, int64_t multiple, int team) {
  const int64_t wanted = team == 1 ? outputs : (outputs + team * tasks_per_thread - 1) / (team * tasks_per_thread);
  return (wanted + multiple - 1) / multiple * multiple;
}

LinearParams layer(const LinearWeights& w, const void* x, int64_t inputs, void* out, int64_t rows, DType dtype) {
  return {x, w.weight, w.bias, out, inputs * element_size(dtype), w.stride, w.outputs, rows, inputs, w.outputs, dtype};
}

const void* row_at(const void* x, int64_t row, int64_t width, DType dtype) {
  return static_cast<const char*>(x) + row * width * element_size(dtype);
}
void* row_at(void* x, int64_t row, int64_t width, DType dtype) {
  return static_cast<char*>(x) + row * width * element_size(dtype);
}

QkvParams rows_of(QkvParams p, int64_t row, int64_t count) {
  p.x = row_at(p.x, row, p.hidden, p.dtype);
  p.cos = row_at(p.cos, row, p.dim, p.dtype);
  p.sin = row_at(p.sin, row, p.dim, p.dtype);
  p.query_out = row_at(p.query_out, row, p.query.outputs, p.dtype);
  p.key_out = row_at(p.key_out, row, p.key.outputs, p.dtype);
  p.value_out = row_at(p.value_out, row, p.value.outputs, p.dtype);
  p.rows = count;
  return p;
}

MlpParams rows_of(MlpParams p, int64_t row, int64_t count) {
  p.x = row_at(p.x, row, p.hidden, p.dtype);
  p.attended = row_at(p.attended, row, p.inputs, p.dtype);
  p.out = row_at(p.out, row, p.hidden, p.dtype);
  p.rows = count;
  return p;
}

// x as the kernel reads it: where it lies, or in memory of its own, written by groups of rows.
struct Inputs {
  Inputs(const Kernels& run, const LinearParams& p) : run(run), params(p), layout(run.linear_layout(p)) {}

  int64_t groups() const { return (params.rows + layout.rows - 1) / layout.rows; }
  size_t size() const { return groups() * layout.rows * layout.row_bytes; }

  // All groups, shared out over the threads of a parallel region; `each_row` makes a row of x first.
  template <class EachRow>
  void prepare(char* memory, const EachRow& each_row) const {
#pragma omp for schedule(static)
    for (int64_t group = 0; group < groups(); ++group) {
      const int64_t row = group * layout.rows;
      for (int64_t i = row; i < std::min(row + layout.rows, params.rows); ++i) each_row(i);
      if (layout.row_bytes) run.linear_inputs(params, row, memory + row * layout.row_bytes);
    }
  }

  // A small single group each thread writes for itself, which takes less than waiting for the one that does.
  bool by_each() const { return groups() == 1 && size() <= own_bytes; }
  size_t size(int team) const { return by_each() ? team * size() : size(); }

  // x as it is, by all threads of a parallel region. Returns `p` with it.
  LinearParams prepare(LinearParams p, char* memory) const {
    if (!layout.row_bytes) return p;
    if (by_each()) {
      memory += omp_get_thread_num() * size();
      run.linear_inputs(params, 0, memory);
    } else {
      prepare(memory, [](int64_t) {});
    }
    return prepared(p, memory);
  }

  LinearParams prepared(LinearParams p, const char* memory) const {
    if (layout.row_bytes) {
      p.x = memory;
      p.x_bytes = layout.row_bytes;
    }
    return p;
  }

  const Kernels& run;
  LinearParams params;
  LinearLayout layout;
};

// Stands around a thread's part of linear layers.
class LinearScope {
 public:
  LinearScope(const Kernels& run, const LinearParams& p) : run_(run), params_(p) { run.linear_begin(p); }
  LinearScope(const LinearScope&) = delete;
  LinearScope& operator=(const LinearScope&) = delete;
  ~LinearScope() { run_.linear_end(params_); }

 private:
  const Kernels& run_;
  const LinearParams& params_;
};

// The better one of two parts of a row, whatever their order: NaN before numbers, then the lower index on ties.
void keep_best(const Best& next, Best& best) {
  const bool more = next.nan != best.nan ? next.nan : !next.nan && next.value != best.value ? next.value > best.value
                                                                                            : next.index < best.index;
  if (more) best = next;
}

// Tasks of a team's threads. Each has a range of its own, which it takes in order: while the kernel computes it fetches
// the weights that come next, and weights that fit in a core's cache are there in the next call. A thread that is done
// takes from the ends of the others' ranges.
class Tasks {
 public:
  Tasks(int64_t count, int team) : team_(team), shares_(team) {
    for (int thread = 0; thread < team; ++thread)
      shares_[thread].range = range(count * thread / team, count * (thread + 1) / team);
  }

  // The next task of a thread, or -1 when all are taken.
  int64_t take(int thread) {
    for (int i = 0; i < team_; ++i) {
      std::atomic<uint64_t>& share = shares_[(thread + i) % team_].range;
      uint64_t old = share.load(std::memory_order_relaxed);
      while (old >> 32 < (old & 0xffffffff)) {
        const uint64_t begin = old >> 32, end = old & 0xffffffff;
        if (share.compare_exchange_weak(old, i ? range(begin, end - 1) : range(begin + 1, end),
                                        std::memory_order_relaxed))
          return i ? end - 1 : begin;
      }
    }
    return -1;
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> range;  // first task, and behind the last one
  };

  static uint64_t range(uint64_t begin, uint64_t end) { return begin << 32 | end; }

  int team_;
  std::vector<Share> shares_;
};

// A layer's outputs as tasks. Inside a parallel region `run` computes this thread's part of them.
class LayerTasks {
 public:
  LayerTasks(int64_t outputs, int64_t multiple, int team)
      : step_(outputs_per_task(outputs, multiple, team)), tasks_((outputs + step_ - 1) / step_, team) {}

  void run(const Kernels& kernels, const LinearParams& p, int thread) {
    for (int64_t task; (task = tasks_.take(thread)) >= 0;)
      kernels.linear(p, task * step_, std::min((task + 1) * step_, p.outputs), nullptr);
  }

 private:
  int64_t step_;
  Tasks tasks_;
};

}  // namespace

void linear(const LinearParams& params, int threads) {
  const Kernels& run = kernels();
  const Inputs inputs(run, params);
  const int team = team_size(work_of(params), threads);
  Pieces pieces;
  pieces.add(inputs.size(team));
  char* memory = pieces.reserve(scratch);
  if (team == 1) {
    const LinearParams p = inputs.prepare(params, memory);
    const LinearScope scope(run, p);
    return run.linear(p, 0, p.outputs, nullptr);
  }
  LayerTasks tasks(params.outputs, inputs.layout.outputs, team);
#pragma omp parallel num_threads(team)
  {
    const LinearParams p = inputs.prepare(params, memory);
    const LinearScope scope(run, p);
    tasks.run(run, p, omp_get_thread_num());
  }
}

void lm_head_argmax(const HeadParams& p, int threads) {
  const Kernels& run = kernels();
  const LinearParams& whole = p.linear;
  const int64_t item = element_size(whole.dtype), rows = whole.rows;
  const Inputs inputs(run, whole);
  const int team = team_size(work_of(whole), threads);
  const int64_t multiple = inputs.layout.outputs;
  const int64_t most = std::clamp(head_bytes / (rows * item), multiple, head_outputs) / multiple * multiple;
  const int64_t step = std::min(most, outputs_per_task(whole.outputs, multiple, team));
  Pieces pieces;
  pieces.add(inputs.size(team));
  const size_t logits_at = pieces.add(0), logits_size = (rows * step * item + 63) / 64 * 64;
  pieces.add(team * logits_size);
  char* memory = pieces.reserve(scratch);
  std::vector<Best> found(team * rows, Best{-INFINITY, whole.outputs, false});
  Tasks tasks((whole.outputs + step - 1) / step, team);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const LinearParams prepared = inputs.prepare(whole, memory);
    const LinearScope scope(run, prepared);
    const int thread = omp_get_thread_num();
    char* logits = memory + logits_at + thread * logits_size;
    for (int64_t task; (task = tasks.take(thread)) >= 0;) {
      const int64_t begin = task * step;
      const int64_t count = std::min(step, whole.outputs - begin);
      LinearParams part = prepared;
      // whose first output is number `begin`
      part.out = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(logits) - begin * item);
      part.out_stride = step;
      run.linear(part, begin, begin + count, nullptr);
      for (int64_t row = 0; row < rows; ++row) {
        char* here = logits + row * step * item;
        if (p.scale != 1 || p.softcap != 0) run.scale_logits(here, count, p.scale, p.softcap, whole.dtype);
        Best best = run.argmax(here, count, whole.dtype);
        best.index += begin;
        keep_best(best, found[thread * rows + row]);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    Best best = found[row];
    for (int thread = 1; thread < team; ++thread) keep_best(found[thread * rows + row], best);
    p.index[row] = best.index;
    p.value[row] = best.nan ? NAN : best.value;
  }
}

namespace {

// At most `held_rows` rows.
void qkv_rows(const QkvParams& p, int threads) {
  const Kernels& run = kernels();
  const int64_t item = element_size(p.dtype), row_bytes = p.hidden * item;
  Pieces pieces;
  const size_t normed_at = pieces.add(p.rows * row_bytes);
  // Sizes do not depend on where x lies, so that the layers can be made before the memory is there.
  const Inputs sizes(run, layer(p.query, nullptr, p.hidden, nullptr, p.rows, p.dtype));
  const size_t inputs_at = pieces.add(sizes.size());
  char* memory = pieces.reserve(scratch);
  char *normed = memory + normed_at, *prepared = memory + inputs_at;
  const Inputs inputs(run, layer(p.query, normed, p.hidden, nullptr, p.rows, p.dtype));
  const LinearParams layers[] = {
      inputs.prepared(layer(p.query, normed, p.hidden, p.query_out, p.rows, p.dtype), prepared),
      inputs.prepared(layer(p.key, normed, p.hidden, p.key_out, p.rows, p.dtype), prepared),
      inputs.prepared(layer(p.value, normed, p.hidden, p.value_out, p.rows, p.dtype), prepared)};
  int64_t work = 0, outputs = 0;
  for (const LinearParams& layer : layers) {
    work += work_of(layer);
    outputs += layer.outputs;
  }
  const int team = team_size(work, threads);
  const int64_t step = outputs_per_task(outputs, inputs.layout.outputs, team);
  int64_t first[4] = {};  // task of each layer
  for (int i = 0; i < 3; ++i) first[i + 1] = first[i] + (layers[i].outputs + step - 1) / step;
  Tasks tasks(first[3], team);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    inputs.prepare(prepared, [&](int64_t row) {
      run.rms_norm(static_cast<const char*>(p.x) + row * row_bytes, p.norm, p.eps, p.hidden, normed + row * row_bytes,
                   p.dtype);
    });
    const LinearScope scope(run, layers[0]);
    for (int64_t task; (task = tasks.take(omp_get_thread_num())) >= 0;) {
      const int i = task >= first[2] ? 2 : task >= first[1] ? 1 : 0;
      const int64_t begin = (task - first[i]) * step;
      const void* next = i < 2 && task + 1 == first[i + 1] ? layers[i + 1].weight : nullptr;
      run.linear(layers[i], begin, std::min(begin + step, layers[i].outputs), next);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t task = 0; task < 2 * p.rows; ++task) {
      const int64_t row = task / 2;
      const bool query = task % 2 == 0;
      const int64_t width = query ? p.query.outputs : p.key.outputs, angles = row * p.dim * item;
      char* x = static_cast<char*>(query ? p.query_out : p.key_out) + row * width * item;
      if (const void* norm = query ? p.query_norm : p.key_norm)
        for (int64_t at = 0; at < width; at += p.dim)
          run.rms_norm(x + at * item, norm, p.head_eps, p.dim, x + at * item, p.dtype);
      run.rotate(x, static_cast<const char*>(p.cos) + angles, static_cast<const char*>(p.sin) + angles, x, p.dim,
                 width / p.dim, p.dim, p.dtype, p.dtype);
    }
  }
}

void mlp_rows(const MlpParams& p, int threads) {
  const Kernels& run = kernels();
  const int64_t item = element_size(p.dtype), row_bytes = p.hidden * item, inner = p.gate.outputs;
  const auto alone = [&](const LinearWeights& w, int64_t inputs) {
    return layer(w, nullptr, inputs, nullptr, p.rows, p.dtype);
  };
  const auto inputs_of = [&](const LinearWeights& w, int64_t inputs) { return Inputs(run, alone(w, inputs)); };
  const Inputs sizes = inputs_of(p.gate, p.hidden);  // as in `qkv_rows`
  const bool gated = sizes.layout.gated && p.gate.stride == p.up.stride && !p.gate.bias && !p.up.bias;
  const int64_t work =
      work_of(alone(p.output, p.inputs)) + 2 * work_of(alone(p.gate, p.hidden)) + work_of(alone(p.down, inner));
  const int team = team_size(work, threads, parallel_mlp_work);
  Pieces pieces;
  const size_t attended_at = pieces.add(inputs_of(p.output, p.inputs).size(team));
  const size_t sum_at = pieces.add(p.rows * row_bytes);
  const size_t normed_at = pieces.add(p.rows * row_bytes), gate_inputs_at = pieces.add(sizes.size());
  const size_t between = gated ? 0 : p.rows * inner * item;
  const size_t gate_at = pieces.add(between), up_at = pieces.add(between);
  const size_t down_inputs_at = pieces.add(inputs_of(p.down, inner).size(team));
  char* memory = pieces.reserve(scratch);
  char *sum = memory + sum_at, *normed = memory + normed_at, *gate = memory + gate_at, *up = memory + up_at;
  char* out = static_cast<char*>(p.out);
  const Inputs attended(run, layer(p.output, p.attended, p.inputs, sum, p.rows, p.dtype));
  const Inputs gate_inputs(run, layer(p.gate, normed, p.hidden, gate, p.rows, p.dtype));
  const Inputs down_inputs(run, layer(p.down, gate, inner, sum, p.rows, p.dtype));
  const LinearParams gates = gate_inputs.prepared(gate_inputs.params, memory + gate_inputs_at);
  const LinearParams ups =
      gate_inputs.prepared(layer(p.up, normed, p.hidden, up, p.rows, p.dtype), memory + gate_inputs_at);
  const int64_t multiple = attended.layout.outputs, step = gated ? multiple : outputs_per_task(inner, multiple, team);
  LayerTasks output_tasks(p.output.outputs, multiple, team), down_tasks(p.down.outputs, multiple, team);
  Tasks tasks((inner + step - 1) / step, team);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int thread = omp_get_thread_num();
    const LinearScope scope(run, gates);
    output_tasks.run(run, attended.prepare(attended.params, memory + attended_at), thread);
#pragma omp barrier
    gate_inputs.prepare(memory + gate_inputs_at, [&](int64_t row) {
      char* here = out + row * row_bytes;
      run.add(static_cast<const char*>(p.x) + row * row_bytes, sum + row * row_bytes, p.hidden, here, p.dtype);
      run.rms_norm(here, p.norm, p.eps, p.hidden, normed + row * row_bytes, p.dtype);
    });
    for (int64_t task; (task = tasks.take(thread)) >= 0;) {
      const int64_t begin = task * step, end = std::min(begin + step, inner);
      if (gated) {
        run.gated_linear(gates, ups, begin, end, memory + down_inputs_at);
        continue;
      }
      const auto row_of = [&](const LinearParams& layer, int64_t output) {
        return static_cast<const char*>(layer.weight) + output * layer.weight_stride * item;
      };
      run.linear(gates, begin, end, row_of(ups, begin));
      run.linear(ups, begin, end, row_of(gates, end));
      run.silu_multiply(gate + begin * item, up + begin * item, p.rows, end - begin, inner, p.dtype);
    }
#pragma omp barrier
    const LinearParams& down = down_inputs.params;
    down_tasks.run(run, gated ? down_inputs.prepared(down, memory + down_inputs_at)
                              : down_inputs.prepare(down, memory + down_inputs_at), thread);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row)
      run.add(out + row * row_bytes, sum + row * row_bytes, p.hidden, out + row * row_bytes, p.dtype);
  }
}

// p.rows rows, by as many as are held at once.
template <class Params>
void in_parts(const Params& p, int threads, void (*run)(const Params&, int)) {
  // Equal parts, since how a row is rounded may depend on how many there are.
  const int64_t parts = (p.rows + held_rows - 1) / held_rows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t row = p.rows * i / parts;
    run(rows_of(p, row, p.rows * (i + 1) / parts - row), threads);
  }
}

}  // namespace

void qkv(const QkvParams& p, int threads) { in_parts(p, threads, qkv_rows); }

void mlp(const MlpParams& p, int threads) { in_parts(p, threads, mlp_rows); }

}  // namespace cllm::cpu
