// A linear layer in float32 on AMX tiles of bfloat16, for rows that take the FMA longer. Included only by kernels.cpp.
//
// The 24 bits of a number are three bfloat16 numbers of 8 bits: a high, a middle and a low part, whose sum it is. Of the nine
// products of the parts of two numbers six are added up; the other three are below 2^-21 of the whole and average to 2^-24,
// so that a sum is about as close as one of float32 products (Henry, Tang and Heinecke 2019, arXiv 1904.06376). Parts of
// weights are made beside the products of those before, since vectors and tiles have units of their own, and are read from
// the L1 cache.
//
// A panel of x holds three tiles of parts for every 32 inputs. A sum goes through one element of an accumulator in the order
// of the inputs: its bits depend on its own row of x and its own weights alone. Parts below float32's normal range count as
// 0, and a number that is not finite gives NaN.
#pragma once

#include "amx.h"
#include "kernels.h"
#include "linear_amx.h"
#include "quad.h"

#if defined(__AMX_BF16__)

namespace cllm::cpu {
namespace {

// Where splitting the weights costs less than the products of so many rows.
constexpr int64_t split_rows = 16;
constexpr int64_t parts_bytes = 3 * tile_bytes;
// Products of parts that are added up for two numbers, and steps of `add_part_products`.
constexpr int part_products = 6;
template <int G, int P>
constexpr int part_steps = part_products * (P > 1 ? G : 1);
// Weights are fetched so many inputs ahead, at most a row: what hardware fetches on its own comes late for long rows.
constexpr int64_t split_ahead = 256;

struct Parts {
  __m512i high, middle, low;
};

// The upper halves of a's values in the lower halves of b's, whose upper ones stay.
CLLM_INLINE __m512i upper_halves(vfloat a, vfloat b) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15));
  return _mm512_mask_shuffle_epi8((__m512i)b, 0x3333333333333333, (__m512i)a, order);
}

CLLM_INLINE Parts parts_of(vfloat a, vfloat b) {
  const auto rest = [](vfloat x) { return x - (vfloat)_mm512_and_si512((__m512i)x, _mm512_set1_epi32(~0xffff)); };
  Parts parts;
  parts.high = upper_halves(a, b);
  a = rest(a);
  b = rest(b);
  parts.middle = upper_halves(a, b);
  parts.low = upper_halves(rest(a), rest(b));
  return parts;
}

// To the tiles of the three parts, which are `next` bytes from each other.
CLLM_INLINE void store_parts(const Parts& parts, char* to, int64_t next) {
  _mm512_storeu_si512(to, parts.high);
  _mm512_storeu_si512(to + next, parts.middle);
  _mm512_storeu_si512(to + 2 * next, parts.low);
}

// Adds the products of the parts of weights, of which two tiles of each stand side by side, and of P panels of x, which are
// `panel_bytes` apart, to G times P sums. Two tiles of weights go together by one panel, one after the other by two. After each
// of `part_steps<G, P>` steps `beside` is called with its number.
template <int G, int P, class Beside>
CLLM_INLINE void add_part_products(const char* weights, const char* x, int64_t panel_bytes, const Beside& beside) {
  const auto tile = [&](auto which) {
    constexpr int g = decltype(which)::value;
    const auto step = [&](auto load_weights, int part, auto load_x, int x_part, auto number) {
      // Panels change their order from step to step, so that the last one often is there already.
      constexpr int done = decltype(number)::value, panel = P > 1 ? done % 2 : 0;
      const char *w = weights + (2 * part + g) * tile_bytes, *columns = x + x_part * tile_bytes;
      tile_barrier();
      if constexpr (decltype(load_weights)::value) _tile_loadd(4, w, 64);
      if constexpr (decltype(load_x)::value) _tile_loadd(6, columns + panel * panel_bytes, 64);
      add_tile_product<2 * g + panel>();
      if constexpr (P > 1) {
        _tile_loadd(6, columns + (1 - panel) * panel_bytes, 64);
        add_tile_product<2 * g + 1 - panel>();
      } else if constexpr (G > 1) {
        if constexpr (decltype(load_weights)::value) _tile_loadd(5, w + tile_bytes, 64);
        _tile_dpbf16ps(2, 5, 6);
      }
      tile_barrier();
      beside(constant<part_products * g + done>);
    };
    constexpr std::true_type load;
    constexpr std::false_type keep;
    constexpr int high = 0, middle = 1, low = 2;
    step(load, high, load, low, constant<0>);
    step(keep, high, load, middle, constant<1>);
    step(keep, high, load, high, constant<2>);
    step(load, low, keep, high, constant<3>);
    step(load, middle, keep, high, constant<4>);
    step(keep, middle, load, middle, constant<5>);
  };
  tile(constant<0>);
  if constexpr (G > 1 && P > 1) tile(constant<1>);
}

// 16 numbers of a row from `k` on, with zeros behind the last.
CLLM_INLINE vfloat numbers_from(const float* row, int64_t k, int64_t inputs) {
  return k + native <= inputs ? load(row + k) : load_register<vfloat, true>(row + k, maximum(inputs - k, 0));
}

// Whether a layer in float32 is computed like this.
bool is_split(const LinearParams& p) { return p.rows >= split_rows; }

LinearLayout split_layout(const LinearParams& p) {
  return {2 * tile_rows, tile_rows, 3 * round_up(p.inputs, tile_inputs) * sizeof(bf16_t)};
}

// A panel of x from `row` on.
void split_inputs(const LinearParams& p, int64_t row, void* to) {
  const char* x = static_cast<const char*>(p.x) + row * p.x_bytes;
  const int64_t rows = minimum(p.rows - row, tile_rows);
  char* tiles = static_cast<char*>(to);
  for (int64_t k = 0; k < p.inputs; k += tile_inputs, tiles += parts_bytes) {
    __m512i numbers[2][tile_rows];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
      for (int i = 0; i < tile_rows; ++i)
        numbers[half][i] = i < rows ? (__m512i)numbers_from(reinterpret_cast<const float*>(x + i * p.x_bytes),
                                                            k + half * native, p.inputs)
                                    : __m512i{};
      transpose(numbers[half]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i)
      store_parts(parts_of((vfloat)numbers[0][i], (vfloat)numbers[1][i]), tiles + 64 * i, tile_bytes);
  }
}

// Up to 32 rows of weights.
struct Strip {
  const float* first;
  int64_t count;
};

// Makes the parts of 32 inputs of a strip from `k` on, some rows at a time. Each part is two tiles. Meanwhile the lines at
// `fetched` and in the rows behind it go to the L2 cache, unless it is null.
class Splitting {
 public:
  CLLM_METHOD Splitting(const LinearParams& p, const Strip& strip, int64_t k, char* to, const float* fetched)
      : stride_(p.weight_stride),
        count_(strip.count),
        inputs_(p.inputs - k),
        row_(strip.first + k),
        fetched_(fetched),
        to_(to) {}

  // Rows [Begin, End).
  template <int Begin, int End>
  CLLM_METHOD void rows() const {
    if (count_ < End || inputs_ < tile_inputs) {
      for (int64_t i = Begin; i < minimum(End, count_); ++i) split<true>(i);
    } else if (fetched_) {
#pragma GCC unroll 16
      for (int64_t i = Begin; i < End; ++i) {
        split<false>(i);
        __builtin_prefetch(fetched_ + i * stride_, 0, 2);
        __builtin_prefetch(fetched_ + i * stride_ + native, 0, 2);
      }
    } else {
#pragma GCC unroll 16
      for (int64_t i = Begin; i < End; ++i) split<false>(i);
    }
  }

 private:
  template <bool Tail>
  CLLM_METHOD void split(int64_t i) const {
    const float* row = row_ + i * stride_;
    const vfloat a = Tail ? numbers_from(row, 0, inputs_) : load(row);
    const vfloat b = Tail ? numbers_from(row, native, inputs_) : load(row + native);
    store_parts(parts_of(a, b), to_ + 64 * i, 2 * tile_bytes);
  }

  const int64_t stride_, count_, inputs_;
  const float *const row_, *const fetched_;
  char* const to_;
};

// Sums of strips by pairs of panels, one pair after the other. Beside its last products the parts of the next strip are begun
// and the sums before are written, so that the tiles do not wait. What the parts hold behind a strip's last row reaches no
// result.
class SplitSums {
 public:
  SplitSums(const LinearParams& p, const Strip& first) : p_(p) {
    Splitting(p, first, 0, parts_[0], nullptr).rows<0, 2 * tile_rows>();
  }

  // Of a strip, the outputs from `output` on, in G tiles, and of P panels from `row` on. After it comes `next`. Meanwhile its
  // weights and those at `following` are fetched, unless that is null.
  template <int G, int P>
  void add(int64_t row, int64_t output, const Strip& strip, const Strip& next, const float* following) {
    const int64_t panel_bytes = tile_rows * p_.x_bytes, ahead = minimum(split_ahead, p_.inputs);
    const char* x = static_cast<const char*>(p_.x) + row * p_.x_bytes;
    zero_sums<G, P>();
    for (int64_t k = 0; k < p_.inputs; k += tile_inputs, x += parts_bytes) {
      const char* high = parts_[odd_];
      odd_ = !odd_;
      const bool last = k + tile_inputs >= p_.inputs;
      const int64_t over = k + ahead - p_.inputs;
      const float* fetched = !following ? nullptr : over < 0 ? strip.first + k + ahead : following + over;
      const Splitting splitting(p_, last ? next : strip, last ? 0 : k + tile_inputs, parts_[odd_], fetched);
      add_part_products<G, P>(high, x, panel_bytes, [&](auto done) {
        constexpr int count = 2 * tile_rows, i = decltype(done)::value, steps = part_steps<G, P>;
        splitting.template rows<count * i / steps, count * (i + 1) / steps>();
      });
      write_tile();
    }
    finish();
    tile_barrier();
    store_sums<G, P>(sums_[0], tile_rows, P * tile_rows * tile_rows, tile_rows * tile_rows);
    tile_barrier();
    row_ = row;
    output_ = output;
    count_ = strip.count;
    panels_ = P;
    tiles_ = G * P;
    written_ = 0;
  }

  // Writes what is still to be written.
  void finish() {
    while (written_ < tiles_) write_tile();
  }

 private:
  void write_tile() {
    if (written_ == tiles_) return;
    const int64_t row = row_ + written_ % panels_ * tile_rows, before = written_ / panels_ * tile_rows;
    const int64_t output = output_ + before, rows = minimum(p_.rows - row, tile_rows);
    const __mmask16 mask = static_cast<__mmask16>((1u << minimum(count_ - before, tile_rows)) - 1);
    const vfloat bias = p_.bias ? _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p_.bias) + output) : vfloat{};
    __m512i by_row[tile_rows];
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) by_row[i] = (__m512i)load(sums_[written_] + i * tile_rows);
    transpose(by_row);
    float* out = static_cast<float*>(p_.out) + row * p_.out_stride + output;
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i)
      if (i < rows) _mm512_mask_storeu_ps(out + i * p_.out_stride, mask, (vfloat)by_row[i] + bias);
    ++written_;
  }

  const LinearParams& p_;
  alignas(64) char parts_[2][2 * parts_bytes];
  bool odd_ = false;
  alignas(64) float sums_[4][tile_rows * tile_rows];
  int64_t row_ = 0, output_ = 0, count_ = 0;
  int panels_ = 1, tiles_ = 0, written_ = 0;
};

// Blocks of rows stay in the L2 cache.
void split_linear(const LinearParams& p, int64_t begin, int64_t end, const void* next) {
  constexpr int64_t most = 2 * tile_rows;
  const auto weights = [&](int64_t output) { return static_cast<const float*>(p.weight) + output * p.weight_stride; };
  const auto strip_at = [&](int64_t output) { return Strip{weights(output), maximum(minimum(most, end - output), 0)}; };
  const float* after = next ? static_cast<const float*>(next) : weights(end);
  const int64_t block = amx_block_rows(p);
  for (int64_t first = 0; first < p.rows; first += block) {
    const int64_t behind = minimum(first + block, p.rows);
    SplitSums sums(p, strip_at(begin));
    for (int64_t output = begin; output < end; output += most) {
      const Strip strip = strip_at(output), later = strip_at(output + most);
      const float* following = later.count ? later.first : behind < p.rows ? weights(begin) : after;
      for (int64_t row = first; row < behind; row += 2 * tile_rows) {
        const Strip& then = row + 2 * tile_rows < behind ? strip : later;
        const float* fetched = row == first ? following : nullptr;
        with_block<2>(tiles_of(strip.count), [&](auto tiles) {
          with_block<2>(minimum(tiles_of(behind - row), 2), [&](auto panels) {
            sums.add<decltype(tiles)::value, decltype(panels)::value>(row, output, strip, then, fetched);
          });
        });
      }
    }
    sums.finish();
  }
}

}  // namespace
}  // namespace cllm::cpu
#endif
