// Vectors of 16 float lanes, made of as many native registers as the instruction set needs, so that one
// source serves them all. Included only by kernels.cpp, once per instruction set; everything here has internal
// linkage, lest the linker hand AVX-512 code to another instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/types.h"

namespace cllm::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int native = 16;
constexpr int block_rows = 12;  // rows whose accumulators fit in 32 registers and hide the FMA latency
#elif defined(__AVX2__)
constexpr int native = 8;
constexpr int block_rows = 6;  // 12 of 16 registers
#elif defined(__x86_64__)
constexpr int native = 4;
constexpr int block_rows = 2;  // 8 of 16 registers
#else
constexpr int native = 4;
constexpr int block_rows = 6;  // 24 of 32 registers (NEON)
#endif
constexpr int lanes = 16;
constexpr int parts = lanes / native;

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// Inlined everywhere: CLLM_INLINE for functions and static methods, CLLM_METHOD for other methods.
#define CLLM_INLINE static inline __attribute__((always_inline))
#define CLLM_METHOD inline __attribute__((always_inline))

// A number that a generic lambda takes as a type.
template <int Value>
constexpr std::integral_constant<int, Value> constant;

// Calls `body<N>` with N equal to the run-time `count`, 1 <= count <= R.
template <int R, class Body>
CLLM_INLINE void with_block(int64_t count, const Body& body) {
  if constexpr (R > 1) {
    if (count < R) return with_block<R - 1>(count, body);
  }
  body(constant<R>);
}

typedef float vfloat __attribute__((vector_size(native * 4)));
typedef int32_t vint __attribute__((vector_size(native * 4)));
typedef uint16_t vhalf __attribute__((vector_size(native * 2)));
typedef uint32_t vuint __attribute__((vector_size(native * 4)));

CLLM_INLINE vfloat splat(float x) { return x - vfloat{}; }  // x - 0 is x, also for -0

CLLM_INLINE vfloat load(const float* from) {
  vfloat x;
  memcpy(&x, from, sizeof x);
  return x;
}

CLLM_INLINE void store(float* to, vfloat x) { memcpy(to, &x, sizeof x); }

// The second operand if either is NaN.
CLLM_INLINE vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The second operand if either is NaN.
CLLM_INLINE vfloat min(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

CLLM_INLINE bool any(vint mask) {
  bool found = false;
  for (int i = 0; i < native; ++i) found |= mask[i] != 0;
  return found;
}

// --- storage types ---

CLLM_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

CLLM_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

CLLM_INLINE float widen(float x) { return x; }
CLLM_INLINE float widen(bf16_t x) { return bits_to_float(uint32_t{x.bits} << 16); }

CLLM_INLINE float widen(f16_t x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  return bits_to_float(sign | float_to_bits(subnormal));
}

CLLM_INLINE void narrow(float x, float* to) { *to = x; }

// Round to nearest, ties to even.
CLLM_INLINE void narrow(float x, bf16_t* to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7fff + ((bits >> 16) & 1);
  to->bits = static_cast<uint16_t>(rounded >> 16);
}

CLLM_INLINE void narrow(float x, f16_t* to) {
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 2^-1 leaves multiples of 2^-24 in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

// GCC widens vectors by halves.
#if defined(__AVX512F__)
CLLM_INLINE vfloat widen(__m256i x) {
  return reinterpret_cast<vfloat>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
#endif

CLLM_INLINE vfloat load(const bf16_t* from) {
#if defined(__AVX512F__)
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return reinterpret_cast<vfloat>(_mm256_slli_epi32(wide, 16));
#else
  vhalf x;
  memcpy(&x, from, sizeof x);
  const vuint wide = __builtin_convertvector(x, vuint) << 16;
  return reinterpret_cast<vfloat>(wide);
#endif
}

CLLM_INLINE vfloat load(const f16_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  vfloat x;
  for (int i = 0; i < native; ++i) x[i] = widen(from[i]);
  return x;
#endif
}

// Bits whose upper half is x in bfloat16, rounded to nearest, ties to even.
CLLM_INLINE vuint round_to_half(vfloat x) {
  const vuint bits = reinterpret_cast<vuint>(x);
  return x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Like `narrow`; with AVX-512 BF16, numbers below float32's normal range count as 0.
CLLM_INLINE void store(bf16_t* to, vfloat x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
#else
  const vhalf high = __builtin_convertvector(round_to_half(x) >> 16, vhalf);
  memcpy(to, &high, sizeof high);
#endif
}

CLLM_INLINE void store(f16_t* to, vfloat x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < native; ++i) narrow(x[i], to + i);
#endif
}

// `count` values to float.
template <class T>
CLLM_INLINE void widen_row(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + native <= count; i += native) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
}

// --- functions ---

// 2^x for x < 128, 0 below -126.5, NaN for NaN; relative error about 1e-7. The polynomial is the minimax one of 2^r on
// [-0.5, 0.5] (Remez), exact at 0.
CLLM_INLINE vfloat exp2(vfloat x) {
  // Adding it rounds to an integer, which is left in the low bits with the bias of an exponent.
  constexpr float magic = 0x1.8p23f + 127;
  x = max(splat(-127), x);  // whose exponent is that of 0; a NaN stays
  const vfloat shifted = x + magic;
  const vfloat r = x - (shifted - magic);
  vfloat y = splat(1.5345812e-4f);
  y = y * r + 1.3399931e-3f;
  y = y * r + 9.6184890e-3f;
  y = y * r + 5.5503288e-2f;
  y = y * r + 2.4022647e-1f;
  y = y * r + 6.9314721e-1f;
  y = y * r + 1.0f;
  return y * reinterpret_cast<vfloat>(reinterpret_cast<vint>(shifted) << 23);
}

// Natural logarithm of positive normal numbers, relative error about 1e-7 (Cephes' logf).
CLLM_INLINE vfloat log(vfloat x) {
  vint bits = reinterpret_cast<vint>(x);
  // The exponent e that leaves a mantissa in [sqrt(1/2), sqrt(2)); 0x3f3504f3 is sqrt(1/2).
  const vint e = (bits - 0x3f3504f3) >> 23;
  const vfloat m = reinterpret_cast<vfloat>(bits - (e << 23)) - 1.0f;
  const vfloat exponent = __builtin_convertvector(e, vfloat);
  vfloat y = splat(7.0376836292e-2f);
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  const vfloat square = m * m;
  // ln 2 in two parts
  return m + (y * m * square - 0.5f * square + exponent * -2.12194440e-4f) + exponent * 0.693359375f;
}

constexpr float log2e = 1.44269504088896341f, ln2 = 0.69314718055994531f;

// Cephes' tanhf: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
CLLM_INLINE vfloat tanh(vfloat x) {
  const vint sign = reinterpret_cast<vint>(x) & INT32_MIN;
  const vfloat size = reinterpret_cast<vfloat>(reinterpret_cast<vint>(x) ^ sign);
  const vfloat z = x * x;
  vfloat near = splat(-5.70498872745e-3f);
  near = near * z + 2.06390887954e-2f;
  near = near * z - 5.37397155531e-2f;
  near = near * z + 1.33314422036e-1f;
  near = near * z - 3.33332819422e-1f;
  near = near * z * x + x;
  const vfloat doubled = size + size;
  const vfloat far = 1.0f - 2.0f / (exp2((doubled > 40.0f ? splat(40.0f) : doubled) * log2e) + 1.0f);
  return size < 0.625f ? near : reinterpret_cast<vfloat>(reinterpret_cast<vint>(far) | sign);
}

}  // namespace
}  // namespace cllm::cpu
