// The decoder's forward pass over one flattened step, in one call: all layers, no Python between them.
// Plain C ABI, no torch headers; structs mirror those in runner_cpu.py. All memory belongs to the caller.
#include "attention.h"
#include "elementwise.h"
#include "linear.h"

extern "C" {

struct Layer {  // matrices packed by pack(); biases float, padded to whole panels, or null
  const void *input_norm, *qkv, *output, *post_norm, *gate_up, *down, *q_norm, *k_norm;
  const float *qkv_bias, *output_bias;
};

struct Decoder {
  int32_t is_bf16, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
  float eps, scale;
  const Layer* layer;
  const void *final_norm, *head;
  const float* cosines;  // [positions, head_dim]: cosines of half the channels, then sines
};

struct Step {
  int64_t rows, logit_rows;
  int32_t sequences, table_width, block_size;
  const int64_t *positions, *slots, *logit_row;
  const int32_t *starts, *context, *tables;
  void *residual;  // [rows, hidden]: the embedded tokens on entry
  void *normed, *qkv, *query, *mixed, *update, *gate_up, *gated;  // scratch for every row
  void* kv;        // [layers, blocks, 2, kv_heads, block_size, head_dim]
  int64_t kv_layer_stride;  // elements
  float* logits;   // [logit_rows, vocabulary]
};
}

template <typename T>
static void forward(const Decoder& m, const Step& s) {
  const AttentionShape shape{m.heads, m.kv_heads, m.head_dim, s.block_size, m.scale};
  const int64_t n = s.rows, width = (int64_t)(m.heads + 2 * m.kv_heads) * m.head_dim, query = (int64_t)m.heads * m.head_dim;
  T *residual = (T*)s.residual, *normed = (T*)s.normed, *qkv = (T*)s.qkv, *q = (T*)s.query, *mixed = (T*)s.mixed;
  T *update = (T*)s.update, *gate_up = (T*)s.gate_up, *gated = (T*)s.gated;
  const T* pending = nullptr;  // what the layer before adds to the residual stream
  for (int i = 0; i < m.layers; i++) {
    const Layer& w = m.layer[i];
    T* kv = (T*)s.kv + i * s.kv_layer_stride;
    add_rms_norm<T>(pending, residual, (const T*)w.input_norm, normed, n, m.hidden, m.eps);
    linear<T, T>(normed, (const T*)w.qkv, w.qkv_bias, qkv, n, m.hidden, width);
    rotate_and_keep<T>(qkv, q, kv, s.positions, s.slots, m.cosines, (const T*)w.q_norm, (const T*)w.k_norm, n, m.eps, shape);
    attention<T>(q, mixed, kv, s.sequences, s.starts, s.context, s.tables, s.table_width, shape);
    linear<T, T>(mixed, (const T*)w.output, w.output_bias, update, n, query, m.hidden);
    add_rms_norm<T>(update, residual, (const T*)w.post_norm, normed, n, m.hidden, m.eps);
    linear<T, T>(normed, (const T*)w.gate_up, nullptr, gate_up, n, m.hidden, 2 * m.intermediate);
    silu_multiply<T>(gate_up, gated, n, m.intermediate);
    linear<T, T>(gated, (const T*)w.down, nullptr, update, n, m.intermediate, m.hidden);
    pending = update;
  }
  for (int64_t r = 0; r < s.logit_rows; r++) {  // only rows whose logits are wanted; normed is free by now
    const int64_t row = s.logit_row[r];
    add_rms_norm<T>(pending + row * m.hidden, residual + row * m.hidden, (const T*)m.final_norm, normed + r * m.hidden, 1,
                    m.hidden, m.eps);
  }
  linear<T, float>(normed, (const T*)m.head, nullptr, s.logits, s.logit_rows, m.hidden, m.vocabulary);
}

extern "C" {

void decoder_forward(const Decoder* decoder, const Step* step) {
  if (decoder->is_bf16) forward<bf16>(*decoder, *step);
  else forward<float>(*decoder, *step);
}

int64_t packed_size(int64_t out, int64_t in) { return (out + PANEL - 1) / PANEL * PANEL * in; }

void pack(int is_bf16, const void* weight, void* packed, int64_t out, int64_t in) {
  if (is_bf16) pack_linear((const bf16*)weight, (bf16*)packed, out, in);
  else pack_linear((const float*)weight, (float*)packed, out, in);
}

int64_t panel_columns() { return PANEL; }
}
