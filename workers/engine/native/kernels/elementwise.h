// Normalisation and rotary positions: one pass over each row, rounding to the model's type where Hugging Face's
// implementation rounds.
#pragma once
#include "attention.h"
#include "vec.h"

// x / rms(x) * weight over `size` channels (a multiple of 16). `out` may be `x`.
template <typename T>
static inline void rms_norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
  vfloat squares = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const vfloat v = load(x + i);
    squares = fma(v, v, squares);
  }
  const float scale = 1.0f / sqrtf(sum(squares) / (float)size + eps);
  for (int64_t i = 0; i < size; i += LANES) store(out + i, rounded<T>(load(x + i) * scale) * load(weight + i));
}

template <typename T>
static void rms_norm(const T* x, const T* weight, T* out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows > 16)
  for (int64_t r = 0; r < rows; r++) rms_norm_row<T>(x + r * size, weight, out + r * size, size, eps);
}

// Rotates a head in place; `cosines`: head_dim / 2 cosines, then as many sines, of the row's position.
template <typename T>
static inline void rotate_head(T* head, const float* cosines, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i += LANES) {
    const int count = std::min(LANES, half - i);
    const vfloat x = load_some(head + i, count), y = load_some(head + half + i, count);
    const vfloat c = load_some(cosines + i, count), s = load_some(cosines + half + i, count);
    store_some(head + i, fma(x, c, -(y * s)), count);
    store_some(head + half + i, fma(y, c, x * s), count);
  }
}

// Writes a row's key and value for one KV head to their places in its block: see attention.h for the layout.
template <typename T>
static inline void keep(const T* key, const T* value, T* keys, T* values, int offset, const AttentionShape& shape) {
  constexpr int P = PAIR<T>;
  for (int d = 0; d < shape.head_dim; d += P)
    memcpy((void*)(keys + (int64_t)d * shape.block_size + offset * P), key + d, sizeof(T) * P);
  values += (int64_t)(offset / P) * shape.head_dim * P + offset % P;
  for (int d = 0; d < shape.head_dim; d++) values[d * P] = value[d];
}

// Writes a rotated row's keys and values of all KV heads to a slot of the pool.
template <typename T>
static inline void keep_row(const T* row, T* kv, int64_t slot, const AttentionShape& shape) {
  const int D = shape.head_dim, H = shape.heads, K = shape.kv_heads;
  T* block = kv + slot / shape.block_size * shape.block_stride();
  const int offset = (int)(slot % shape.block_size);
  for (int h = 0; h < K; h++)
    keep<T>(row + (H + h) * D, row + (H + K + h) * D, block + h * shape.head_stride(),
            block + shape.values_offset() + h * shape.head_stride(), offset, shape);
}

// qkv [rows, (heads + 2 kv_heads) head_dim]: queries are rotated in place; keys, rotated, and values go to their slots
// of the KV pool. `q_norm`, `k_norm`: per-head norms of Qwen3, or null.
template <typename T>
static void rotate_and_keep(T* qkv, T* kv, const int64_t* positions, const int64_t* slots, const float* cosines,
                            const T* q_norm, const T* k_norm, int64_t rows, float eps, const AttentionShape& shape) {
  const int D = shape.head_dim, H = shape.heads, K = shape.kv_heads;
#pragma omp parallel for schedule(static) if (rows > 16)
  for (int64_t r = 0; r < rows; r++) {
    T* row = qkv + r * shape.row_size();
    for (int h = 0; h < H + K; h++) {
      const T* norm = h < H ? q_norm : k_norm;
      if (norm) rms_norm_row<T>(row + h * D, norm, row + h * D, D, eps);
      rotate_head<T>(row + h * D, cosines + positions[r] * D, D);
    }
    keep_row<T>(row, kv, slots[r], shape);
  }
}
