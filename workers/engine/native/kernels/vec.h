// Vectors of the processor's width, in GCC/Clang vector extensions: the same source builds for AVX-512, AVX2 and NEON.
// Intrinsics only where the extensions have no word for it. Built with -ffp-contract=off: a multiplication and an
// addition are fused where fma() says so and nowhere else, so no two copies of a loop can round differently.
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

// A block of MAX_ROWS x VECTORS accumulators, the columns and a row of operands fit the register file.
#if defined(__AVX512F__)
constexpr int LANES = 16, MAX_ROWS = 6, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, MAX_ROWS = 6, VECTORS = 2;
#elif defined(__ARM_NEON)
constexpr int LANES = 4, MAX_ROWS = 6, VECTORS = 4;
#else
constexpr int LANES = 4, MAX_ROWS = 6, VECTORS = 2;
#endif

template <int N>
struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
};
typedef Floats<LANES>::type vfloat;
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

struct bf16 {
  uint16_t bits;
};

// --- loads and stores ---------------------------------------------------------------------------------------------

// Not `vfloat{} + x`, which has to be an addition, since it makes 0 of -0: a number in memory is loaded to every lane.
static inline vfloat splat(float x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vfloat)_mm256_set1_ps(x);
#else
  return vfloat{} + x;
#endif
}

static inline vfloat widen(vhalf half) { return (vfloat)(__builtin_convertvector(half, vuint) << 16); }

static inline vhalf narrow(vfloat v) {  // to bfloat16, nearest even
#ifdef __AVX512BF16__
  return (vhalf)_mm512_cvtneps_pbh((__m512)v);
#else
  const vuint u = (vuint)v;
  return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, vhalf);
#endif
}

static inline vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline vfloat load(const bf16* p) {
  vhalf half;
  memcpy(&half, p, sizeof half);
  return widen(half);
}

static inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }

static inline void store(bf16* p, vfloat v) {
  const vhalf half = narrow(v);
  memcpy((void*)p, &half, sizeof half);
}

// The first `count` lanes, none if it is negative; loads fill the rest with zeros.
template <typename T>
static inline vfloat load_some(const T* p, int64_t count) {
  if (count >= LANES) return load(p);
  T lanes[LANES] = {};
  if (count > 0) memcpy((void*)lanes, p, sizeof(T) * count);
  return load(lanes);
}

template <typename T>
static inline void store_some(T* p, vfloat v, int64_t count) {
  if (count >= LANES) return store(p, v);
  T lanes[LANES];
  store(lanes, v);
  if (count > 0) memcpy((void*)p, lanes, sizeof(T) * count);
}

// What `v` becomes when stored as T.
template <typename T>
static inline vfloat rounded(vfloat v);
template <>
inline vfloat rounded<float>(vfloat v) { return v; }
template <>
inline vfloat rounded<bf16>(vfloat v) { return widen(narrow(v)); }

// --- arithmetic ---------------------------------------------------------------------------------------------------

// a * b + c with one rounding where the processor has it.
static inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

static inline vfloat fma(vfloat a, float b, vfloat c) { return fma(a, splat(b), c); }

static inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }

// The lanes folded into one, halves upon halves: always in the same order.
template <int N, typename F>
static inline float fold(typename Floats<N>::type v, F f) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typename Floats<N / 2>::type half[2];
    memcpy(half, &v, sizeof half);
    return fold<N / 2>(f(half[0], half[1]), f);
  }
}

static inline float sum(vfloat v) {
  return fold<LANES>(v, [](auto a, auto b) { return a + b; });
}

static inline float largest(vfloat v) {
  return fold<LANES>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// 2^x for x <= 0, relative error about 2e-7 (Taylor polynomial on [-1/2, 1/2]); exactly 0 below -126.
static inline vfloat exp2_negative(vfloat x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest whole number in the low bits
  const vfloat shifted = x + shift, f = x - (shifted - shift);
  vfloat p = splat(1.5403530e-4f);
  p = fma(p, f, splat(1.3333558e-3f));
  p = fma(p, f, splat(9.6181291e-3f));
  p = fma(p, f, splat(5.5504109e-2f));
  p = fma(p, f, splat(2.4022651e-1f));
  p = fma(p, f, splat(6.9314718e-1f));
  p = fma(p, f, splat(1.0f));
  return x < -126.0f ? vfloat{} : (vfloat)((vint)p + ((vint)shifted << 23));
}

constexpr float LOG2_E = 1.44269504f;

// x * sigmoid(x)
static inline vfloat silu(vfloat x) {
  const vfloat e = exp2_negative((x < 0.0f ? x : -x) * LOG2_E);
  return (x < 0.0f ? x * e : x) / (1.0f + e);
}

// --- products -----------------------------------------------------------------------------------------------------

// Channels one multiply_add takes: processors multiply pairs of bfloat16.
template <typename T>
constexpr int PAIR = 1;
template <>
constexpr int PAIR<bf16> = 2;

// A channel (pair) of a vector of columns, or of one row for all of them.
template <typename T>
struct Operand;
template <>
struct Operand<float> {
  typedef vfloat type;
  static type columns(const float* p) { return load(p); }
  static type row(const float* p) { return splat(*p); }
};
template <>
struct Operand<bf16> {
  typedef vuint type;
  static type columns(const bf16* p) {
    vuint v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static type row(const bf16* p) {
    uint32_t pair;
    memcpy(&pair, p, sizeof pair);
    vuint v = vuint{} + pair;
#if defined(__AVX2__) && !defined(__AVX512BF16__)
    // A vector from here on: compilers would take the pair apart before it is in every lane, and copying two numbers
    // from general registers to all lanes costs what two multiplications do.
    asm("" : "+v"(v));
#endif
    return v;
  }
};

static inline vfloat multiply_add(vfloat acc, vfloat x, vfloat w) { return fma(x, w, acc); }

static inline vfloat multiply_add(vfloat acc, vuint x, vuint w) {
#ifdef __AVX512BF16__
  return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#else
  acc = fma((vfloat)(x << 16), (vfloat)(w << 16), acc);
  return fma((vfloat)(x & 0xffff0000u), (vfloat)(w & 0xffff0000u), acc);
#endif
}

// acc[r][c] += x[r] . w[c] over `channels`. Every element has one accumulator and takes the channels in ascending
// order, so a row's result does not depend on R. x: rows of `x_stride`; w[c]: a vector of columns x PAIR of a channel
// pair, the next pair `w_stride` further on. `fetch(pair)` is called for each pair, to fetch what later calls will
// read.
template <typename T, int R, int C, typename Fetch>
static inline __attribute__((always_inline)) void accumulate(vfloat (&acc)[R][C], const T* x, int64_t x_stride,
                                                             const T* const (&w)[C], int64_t w_stride, int64_t channels,
                                                             Fetch fetch) {
  typedef Operand<T> Op;
  for (int64_t pair = 0; pair * PAIR<T> < channels; pair++) {
    typename Op::type columns[C];
    for (int c = 0; c < C; c++) columns[c] = Op::columns(w[c] + pair * w_stride);
    fetch(pair);
    for (int r = 0; r < R; r++) {
      const typename Op::type row = Op::row(x + r * x_stride + pair * PAIR<T>);
      for (int c = 0; c < C; c++) acc[r][c] = multiply_add(acc[r][c], row, columns[c]);
    }
  }
}

// To the second-level cache.
static inline void fetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }
static inline void fetch_nothing(int64_t) {}

// Calls f(std::integral_constant<int, rows>) for 1 <= rows <= MAX_ROWS.
template <int R = MAX_ROWS, typename F>
static inline void with_rows(int64_t rows, F f) {
  if constexpr (R > 0) {
    if (rows == R) f(std::integral_constant<int, R>{});
    else with_rows<R - 1>(rows, f);
  }
}
