// Normalisation, rotary positions and the gate: one pass over each row, rounding to the model's type where Hugging Face's
// implementation rounds.
#pragma once
#include "attention.h"
#include "vec.h"

// x / rms(x) * weight over `size` channels (a multiple of 16).
template <typename T>
static void rms_norm_row(const T* x, const T* weight, T* out, int size, float eps) {
  v16 squares = {};
  for (int i = 0; i < size; i += LANES) {
    const v16 v = load(x + i);
    squares += v * v;
  }
  const float scale = 1.0f / sqrtf(sum(squares) / (float)size + eps);
  for (int i = 0; i < size; i += LANES) {
    T rounded[LANES];
    store(rounded, load(x + i) * scale);
    store(out + i, load(rounded) * load(weight + i));
  }
}

// residual += x where x is given; out = rms_norm(residual).
template <typename T>
static void add_rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int size, float eps) {
#pragma omp parallel for schedule(static) if (rows > 16)
  for (int64_t r = 0; r < rows; r++) {
    T* row = residual + r * size;
    if (x)
      for (int i = 0; i < size; i += LANES) store(row + i, load(row + i) + load(x + r * size + i));
    rms_norm_row<T>(row, weight, out + r * size, size, eps);
  }
}

// Rotates a head in place; `cosines`: head_dim / 2 cosines, then as many sines, of the row's position.
template <typename T>
static void rotate_head(T* head, const float* cosines, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; i++) {
    const float x = to_float(head[i]), y = to_float(head[i + half]), c = cosines[i], s = cosines[i + half];
    put(head + i, x * c - y * s);
    put(head + i + half, y * c + x * s);
  }
}

// qkv [rows, (heads + 2 kv_heads) head_dim]: queries go rotated to q [rows, heads, head_dim], keys (rotated) and values to
// their slots of the KV pool. `q_norm`, `k_norm`: per-head norms of Qwen3, or null.
template <typename T>
static void rotate_and_keep(const T* qkv, T* q, T* kv, const int64_t* positions, const int64_t* slots,
                            const float* cosines, const T* q_norm, const T* k_norm, int64_t rows, float eps,
                            const AttentionShape& shape) {
  constexpr int P = PAIR<T>;
  const int D = shape.head_dim, bs = shape.block_size, H = shape.heads, K = shape.kv_heads;
#pragma omp parallel for schedule(static) if (rows > 16)
  for (int64_t r = 0; r < rows; r++) {
    const T* row = qkv + r * (H + 2 * K) * D;
    const float* angle = cosines + positions[r] * D;
    const int offset = (int)(slots[r] % bs);
    T* block = kv + slots[r] / bs * 2 * K * bs * D;
    T head[MAX_HEAD];
    for (int h = 0; h < H + K; h++) {
      const T* norm = h < H ? q_norm : k_norm;
      if (norm) rms_norm_row<T>(row + h * D, norm, head, D, eps);
      else memcpy((void*)head, row + h * D, sizeof(T) * D);
      rotate_head<T>(head, angle, D);
      if (h < H) {
        memcpy((void*)(q + (r * H + h) * D), head, sizeof(T) * D);
      } else {
        T* keys = block + (int64_t)(h - H) * bs * D;
        for (int d = 0; d < D; d += P)
          for (int p = 0; p < P; p++) keys[d * bs + offset * P + p] = head[d + p];
      }
    }
    for (int h = 0; h < K; h++)
      memcpy((void*)(block + (int64_t)(K + h) * bs * D + offset * D), row + (H + K + h) * D, sizeof(T) * D);
  }
}

// out = silu(gate) * up, from rows of [gate, up].
template <typename T>
static void silu_multiply(const T* gate_up, T* out, int64_t rows, int size) {
#pragma omp parallel for schedule(static) if (rows > 16)
  for (int64_t r = 0; r < rows; r++)
    for (int i = 0; i < size; i += LANES) {
      const v16 gate = load(gate_up + r * 2 * size + i), up = load(gate_up + (r * 2 + 1) * size + i);
      const v16 e = exp_negative(gate < 0.0f ? gate : -gate);
      T rounded[LANES];
      store(rounded, gate * (gate < 0.0f ? e : splat(1.0f)) / (1.0f + e));
      store(out + r * size + i, load(rounded) * up);
    }
}
