// The kernels that exist once per instruction set, and the choice among them at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../common/types.h"

namespace cllm::cpu {

// Queries [first, first + count) of batch row `row` and cache head `head` against cache rows
// [key_begin, key_end).
struct AttentionTask {
  int64_t row, head, first, count, key_begin, key_end;
  // Null: the task sees all its keys and writes the result. Else unnormalised output [rows, padded Dv],
  // then maxima and sums [padded rows] each, for `merge`.
  float* partial;
};

struct Best {
  float value;  // of the numbers, without NaN
  int64_t index;
  bool nan;
};

// What a sample of one position takes: see converge.py.
struct Noise {
  float inverse_temperature;
  int64_t seed;
  int32_t token;
};

constexpr int64_t page_bytes = 4096;

// How `linear` takes a layer.
struct LinearLayout {
  int64_t outputs;     // those of a task are a multiple of these
  int64_t rows;        // x is written in groups of so many rows, the last one as if it were whole
  size_t row_bytes;    // of x then; 0: it is read where it lies
  bool gated = false;  // `gated_linear` takes it
};

struct Kernels {
  // Floats of scratch memory, 64-byte aligned, that `attend` and `merge` need.
  size_t (*scratch_size)(const AttentionParams&, int64_t count);
  size_t (*partial_size)(const AttentionParams&, int64_t count);
  void (*attend)(const AttentionParams&, const AttentionTask&, float* scratch);
  // Joins the partial results of `splits` tasks that differ in their keys only and stand one behind the other.
  void (*merge)(const AttentionParams&, const AttentionTask& first, int64_t splits);
  LinearLayout (*linear_layout)(const LinearParams&);
  // Writes the group of rows of x that begins with `row`, unless `linear` reads x where it lies.
  void (*linear_inputs)(const LinearParams&, int64_t row, void* to);
  // What a thread calls before and after `linear` and `gated_linear`, for layers of one type and number of rows.
  void (*linear_begin)(const LinearParams&);
  void (*linear_end)(const LinearParams&);
  // Outputs [begin, end) of all rows; x and its stride are those that `linear_inputs` wrote. `next`: weights that are
  // read after these, or null where they lie behind them.
  void (*linear)(const LinearParams&, int64_t begin, int64_t end, const void* next);
  // silu(gate) * up of outputs [begin, end), two layers of the same x and shape without a bias, where their layout says so.
  // Written as `linear_inputs` writes it for the layer behind them; `out` of both is not used.
  void (*gated_linear)(const LinearParams& gate, const LinearParams& up, int64_t begin, int64_t end, void* to);
  // Of one row of fp32 or bf16; see row_ops.h.
  void (*rms_norm)(const void* x, const void* weight, float eps, int64_t count, void* out, DType dtype);
  // gate = silu(gate) * up: `count` values of each of `rows` rows, which stand `stride` values apart.
  void (*silu_multiply)(void* gate, const void* up, int64_t rows, int64_t count, int64_t stride, DType dtype);
  void (*add)(const void* a, const void* b, int64_t count, void* out, DType dtype);
  // Logits after the head's linear layer: times `scale` unless that is 1, and softcap * tanh(x / softcap) unless it is 0,
  // each operation rounded to `dtype`, float32 or bfloat16.
  void (*scale_logits)(void* logits, int64_t count, float scale, float softcap, DType dtype);
  // The largest of `count` values and its lowest index; where there is NaN, that of the first one.
  Best (*argmax)(const void* values, int64_t count, DType dtype);
  // The same of values / temperature + noise; the values are entries [first, first + count) of the vocabulary, `first`
  // a multiple of 64.
  Best (*sample)(const void* values, int64_t first, int64_t count, DType dtype, const Noise& noise);
  // Rotates the first `rotary` values of a key, which have type `dtype`, by angles of type `dtype` or float; `to` may be
  // `key`. So it does with each of `count` keys, `stride` values apart in both.
  void (*rotate)(const void* key, const void* cos, const void* sin, void* to, int64_t rotary, int64_t count,
                 int64_t stride, DType dtype, DType angle_dtype);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;

// Instruction sets that were compiled, worst first, and those among them that this CPU has.
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

// The best supported one, or the one that the environment variable CLLM_CPU_ISA or `select` names.
const Kernels& kernels();
const std::string& selected_isa();

// Throws std::invalid_argument on a name that is not supported.
void select_isa(const std::string& name);

}  // namespace cllm::cpu
