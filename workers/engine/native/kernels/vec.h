// Sixteen floats at a time. GCC/Clang vector extensions, so the same source builds for AVX2, AVX-512 and NEON; intrinsics
// only where the extensions have no word for it. Built with -ffp-contract=off: a multiplication and an addition are fused
// where fma() says so and nowhere else, so no two copies of a loop can round differently.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

constexpr int LANES = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};

// --- loads and stores ---------------------------------------------------------------------------------------------

static inline f32x16 splat(float x) { return f32x16{} + x; }

static inline f32x16 widen(u16x16 half) { return (f32x16)(__builtin_convertvector(half, u32x16) << 16); }

static inline u16x16 narrow(f32x16 v) {  // to bfloat16, nearest even
#ifdef __AVX512BF16__
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32x16 u = (u32x16)v;
  return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, u16x16);
#endif
}

static inline f32x16 load(const float* p) {
  f32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline f32x16 load(const bf16* p) {
  u16x16 half;
  memcpy(&half, p, sizeof half);
  return widen(half);
}

static inline void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }

static inline void store(bf16* p, f32x16 v) {
  const u16x16 half = narrow(v);
  memcpy((void*)p, &half, sizeof half);
}

// The first `count` lanes; loads fill the rest with zeros.
template <typename T>
static inline f32x16 load_some(const T* p, int64_t count) {
  if (count >= LANES) return load(p);
  T lanes[LANES] = {};
  memcpy((void*)lanes, p, sizeof(T) * count);
  return load(lanes);
}

template <typename T>
static inline void store_some(T* p, f32x16 v, int64_t count) {
  if (count >= LANES) return store(p, v);
  T lanes[LANES];
  store(lanes, v);
  if (count > 0) memcpy((void*)p, lanes, sizeof(T) * count);
}

// What `v` becomes when stored as T.
template <typename T>
static inline f32x16 rounded(f32x16 v);
template <>
inline f32x16 rounded<float>(f32x16 v) { return v; }
template <>
inline f32x16 rounded<bf16>(f32x16 v) { return widen(narrow(v)); }

// --- arithmetic ---------------------------------------------------------------------------------------------------

// a * b + c with one rounding where the processor has it.
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  f32x8 x[2], y[2], z[2];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y), memcpy(z, &c, sizeof z);
  for (int i = 0; i < 2; i++) z[i] = (f32x8)_mm256_fmadd_ps((__m256)x[i], (__m256)y[i], (__m256)z[i]);
  memcpy(&c, z, sizeof z);
  return c;
#elif defined(__ARM_NEON)
  float32x4_t x[4], y[4], z[4];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y), memcpy(z, &c, sizeof z);
  for (int i = 0; i < 4; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
  memcpy(&c, z, sizeof z);
  return c;
#else
  return a * b + c;
#endif
}

static inline f32x16 fma(f32x16 a, float b, f32x16 c) { return fma(a, splat(b), c); }

static inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Sum and maximum of the lanes, always in the same order.
static inline float sum(f32x16 v) {
  f32x8 half[2];
  memcpy(half, &v, sizeof v);
  half[0] += half[1];
  f32x4 quarter[2];
  memcpy(quarter, half, sizeof quarter);
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][2]) + (quarter[0][1] + quarter[0][3]);
}

static inline float largest(f32x16 v) {
  f32x8 half[2];
  memcpy(half, &v, sizeof v);
  half[0] = half[0] > half[1] ? half[0] : half[1];
  f32x4 quarter[2];
  memcpy(quarter, half, sizeof quarter);
  quarter[0] = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
  const float even = quarter[0][0] > quarter[0][2] ? quarter[0][0] : quarter[0][2];
  const float odd = quarter[0][1] > quarter[0][3] ? quarter[0][1] : quarter[0][3];
  return even > odd ? even : odd;
}

// 2^x for x <= 0, relative error about 2e-7 (Taylor polynomial on [-1/2, 1/2]); exactly 0 below -126.
static inline f32x16 exp2_negative(f32x16 x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest whole number in the low bits
  const f32x16 shifted = x + shift, f = x - (shifted - shift);
  f32x16 p = splat(1.5403530e-4f);
  p = fma(p, f, splat(1.3333558e-3f));
  p = fma(p, f, splat(9.6181291e-3f));
  p = fma(p, f, splat(5.5504109e-2f));
  p = fma(p, f, splat(2.4022651e-1f));
  p = fma(p, f, splat(6.9314718e-1f));
  p = fma(p, f, splat(1.0f));
  return x < -126.0f ? f32x16{} : (f32x16)((i32x16)p + ((i32x16)shifted << 23));
}

constexpr float LOG2_E = 1.44269504f;

// x * sigmoid(x)
static inline f32x16 silu(f32x16 x) {
  const f32x16 e = exp2_negative((x < 0.0f ? x : -x) * LOG2_E);
  return (x < 0.0f ? x * e : x) / (1.0f + e);
}

// --- products -----------------------------------------------------------------------------------------------------

// Channels one multiply_add takes: processors multiply pairs of bfloat16.
template <typename T>
constexpr int PAIR = 1;
template <>
constexpr int PAIR<bf16> = 2;

// A channel (pair) of sixteen columns, or of one row for all of them.
template <typename T>
struct Operand;
template <>
struct Operand<float> {
  typedef f32x16 type;
  static type columns(const float* p) { return load(p); }
  static type row(const float* p) { return splat(*p); }
};
template <>
struct Operand<bf16> {
  typedef u32x16 type;
  static type columns(const bf16* p) {
    u32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static type row(const bf16* p) {
    uint32_t pair;
    memcpy(&pair, p, sizeof pair);
    return u32x16{} + pair;
  }
};

static inline f32x16 multiply_add(f32x16 acc, f32x16 x, f32x16 w) { return fma(x, w, acc); }

static inline f32x16 multiply_add(f32x16 acc, u32x16 x, u32x16 w) {
#ifdef __AVX512BF16__
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#else
  acc = fma((f32x16)(x << 16), (f32x16)(w << 16), acc);
  return fma((f32x16)(x & 0xffff0000u), (f32x16)(w & 0xffff0000u), acc);
#endif
}

// A block of MAX_ROWS x VECTORS accumulators, the columns and a row of operands fit the register file.
#ifdef __AVX512F__
constexpr int MAX_ROWS = 6, VECTORS = 4;
#else
constexpr int MAX_ROWS = 3, VECTORS = 2;
#endif

// acc[r][c] += x[r] . w[c] over `channels`. Every element has one accumulator and takes the channels in ascending order,
// so a row's result does not depend on R. x: rows of `x_stride`; w[c]: 16 columns x PAIR of a channel pair, the next pair
// `w_stride` further on. `ahead`: like w, what a later call will read, fetched meanwhile; or null.
template <typename T, int R, int C>
static inline __attribute__((always_inline)) void accumulate(f32x16 (&acc)[R][C], const T* x, int64_t x_stride,
                                                             const T* const (&w)[C], int64_t w_stride, int64_t channels,
                                                             const T* const* ahead) {
  typedef Operand<T> Op;
  const auto run = [&](auto fetch) {
    for (int64_t k = 0; k < channels; k += PAIR<T>) {
      typename Op::type columns[C];
      for (int c = 0; c < C; c++) columns[c] = Op::columns(w[c] + k / PAIR<T> * w_stride);
      if constexpr (decltype(fetch)::value)
        for (int c = 0; c < C; c++) __builtin_prefetch(ahead[c] + k / PAIR<T> * w_stride, 0, 2);
      for (int r = 0; r < R; r++) {
        const typename Op::type row = Op::row(x + r * x_stride + k);
        for (int c = 0; c < C; c++) acc[r][c] = multiply_add(acc[r][c], row, columns[c]);
      }
    }
  };
  if (ahead) run(std::true_type{});
  else run(std::false_type{});
}

// Calls f(std::integral_constant<int, rows>) for 1 <= rows <= MAX_ROWS.
template <int R = MAX_ROWS, typename F>
static inline void with_rows(int64_t rows, F f) {
  if constexpr (R > 0) {
    if (rows == R) f(std::integral_constant<int, R>{});
    else with_rows<R - 1>(rows, f);
  }
}
