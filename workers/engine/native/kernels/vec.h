// Sixteen floats at a time, in GCC/Clang vector extensions: the same source builds for AVX2, AVX-512 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t half16 __attribute__((vector_size(32)));

constexpr int LANES = 16;

struct bf16 {
  uint16_t bits;
};

static inline v16 splat(float x) { return v16{} + x; }

static inline v16 load(const float* p) {
  v16 v;
  memcpy(&v, p, sizeof v);
  return v;
}

static inline v16 load(const bf16* p) {
  half16 h;
  memcpy(&h, p, sizeof h);
  return (v16)(__builtin_convertvector(h, u16) << 16);
}

static inline void store(float* p, v16 v) { memcpy(p, &v, sizeof v); }

static inline void store(bf16* p, v16 v) {  // round to nearest even
  u16 u = (u16)v;
  u = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  half16 h = __builtin_convertvector(u, half16);
  memcpy(p, &h, sizeof h);
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  p->bits = (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// Sum of the lanes, always in the same order.
static inline float sum(v16 v) {
  float s[LANES];
  memcpy(s, &v, sizeof s);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) s[i] += s[i + width];
  return s[0];
}

static inline float largest(v16 v) {
  float m = v[0];
  for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x for x <= 0, relative error about 1e-7 (Cephes' polynomial); 0 below -87.
static inline v16 exp_negative(v16 x) {
  const i16 tiny = x < -87.0f;
  x = tiny ? splat(-87.0f) : x;
  const i16 n = __builtin_convertvector(x * 1.44269504f - 0.5f, i16);  // rounds towards zero, so to nearest here
  const v16 fn = __builtin_convertvector(n, v16);
  v16 r = x - fn * 0.693359375f;
  r = r + fn * 2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  p = p * (v16)((n + 127) << 23);
  return tiny ? v16{} : p;
}

// acc += x * w over one pair of channels: `x` holds two consecutive bf16, `w` the same two for 16 columns.
static inline v16 multiply_pair(v16 acc, const bf16* x, const bf16* w) {
  uint32_t pair;
  memcpy(&pair, x, sizeof pair);
#ifdef __AVX512BF16__
  return (v16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)_mm512_loadu_si512(w));
#else
  u16 u;
  memcpy(&u, w, sizeof u);
  const uint32_t low = pair << 16, high = pair & 0xffff0000u;
  float x0, x1;
  memcpy(&x0, &low, sizeof x0);
  memcpy(&x1, &high, sizeof x1);
  acc += (v16)(u << 16) * x0;
  acc += (v16)(u & 0xffff0000u) * x1;
  return acc;
#endif
}

// The same for float, where a "pair" is one channel.
static inline v16 multiply_pair(v16 acc, const float* x, const float* w) { return acc + load(w) * *x; }

// Channels a multiply_pair takes at once.
template <typename T>
constexpr int PAIR = 1;
template <>
constexpr int PAIR<bf16> = 2;
