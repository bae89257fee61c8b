// The decoder's forward pass over one flattened step, in one call: all layers, no Python between them.
// Plain C ABI, no torch headers; structs mirror those in runner_cpu.py. All memory belongs to the caller.
#include "attention.h"
#include "elementwise.h"
#include "linear.h"

#include <omp.h>

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
  int64_t rows, logit_rows, copies;
  int32_t layers, sequences, table_width, block_size, threads;
  const int64_t *positions, *slots, *logit_row, *copy_row, *copy_slot;
  const int32_t *starts, *context, *tables;
  void* residual;                       // [rows, hidden]: the embedded tokens on entry
  void *normed, *qkv, *mixed, *gated;   // scratch for every row
  void* kv;                             // [layers, blocks, 2, kv_heads, block_size, head_dim]
  int64_t kv_layer_stride;              // elements
  float* logits;                        // [logit_rows, vocabulary]
};
}

template <typename T>
static void forward(const Decoder& m, const Step& s) {
  const AttentionShape shape{m.heads, m.kv_heads, m.head_dim, s.block_size, m.scale};
  const int64_t rows = s.rows, hidden = m.hidden, inner = m.intermediate, queries = (int64_t)m.heads * m.head_dim;
  T *residual = (T*)s.residual, *normed = (T*)s.normed, *qkv = (T*)s.qkv, *mixed = (T*)s.mixed, *gated = (T*)s.gated;
  for (int i = 0; i < s.layers; i++) {
    const Layer& w = m.layer[i];
    T* kv = (T*)s.kv + i * s.kv_layer_stride;
    rms_norm<T>(residual, (const T*)w.input_norm, normed, rows, hidden, m.eps);
    linear<T>(normed, (const T*)w.qkv, rows, hidden, panels_of(shape.row_size(), 1),
              Store<T>{qkv, shape.row_size(), w.qkv_bias});
    rotate_and_keep<T>(qkv, kv, s.positions, s.slots, m.cosines, (const T*)w.q_norm, (const T*)w.k_norm, rows, m.eps,
                       shape);
    for (int64_t c = 0; c < s.copies; c++)
      keep_row<T>(qkv + s.copy_row[c] * shape.row_size(), kv, s.copy_slot[c], shape);
    attention<T>(qkv, mixed, kv, s.sequences, s.starts, s.context, s.tables, s.table_width, shape);
    linear<T>(mixed, (const T*)w.output, rows, queries, panels_of(hidden, 1),
              AddTo<T>{residual, hidden, w.output_bias});
    rms_norm<T>(residual, (const T*)w.post_norm, normed, rows, hidden, m.eps);
    linear<T>(normed, (const T*)w.gate_up, rows, hidden, panels_of(2 * inner, 2), Gate<T>{gated, inner});
    linear<T>(gated, (const T*)w.down, rows, inner, panels_of(hidden, 1), AddTo<T>{residual, hidden, nullptr});
  }
  for (int64_t r = 0; r < s.logit_rows; r++)  // only rows whose logits are wanted; normed is free by now
    rms_norm_row<T>(residual + s.logit_row[r] * hidden, (const T*)m.final_norm, normed + r * hidden, hidden, m.eps);
  linear<T>(normed, (const T*)m.head, s.logit_rows, hidden, panels_of(m.vocabulary, 1),
            Store<float>{s.logits, m.vocabulary, nullptr});
}

extern "C" {

void decoder_forward(const Decoder* decoder, const Step* step) {
  omp_set_num_threads(step->threads);  // of this thread alone: a new one would take every core
  if (decoder->is_bf16) forward<bf16>(*decoder, *step);
  else forward<float>(*decoder, *step);
}

// Elements of a packed matrix [out, in]. parts = 2 for gates stacked on values, which share panels.
int64_t packed_size(int64_t out, int64_t in, int parts) { return panels_of(out, parts) * PANEL * in; }

void pack(int is_bf16, const void* weight, void* packed, int64_t out, int64_t in, int parts) {
  if (is_bf16) pack_linear((const bf16*)weight, (bf16*)packed, out, in, parts);
  else pack_linear((const float*)weight, (float*)packed, out, in, parts);
}

int64_t panel_columns() { return PANEL; }
}
