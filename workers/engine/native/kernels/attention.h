// Paged attention. Every row sums over keys in tiles of 64 counted from position 0, with the same arithmetic in the
// same order whether it came alone or with others, as prefill or as decode. Masked keys add exact zeros, and a tile
// that is masked as a whole changes nothing, so rows of one block may need different numbers of tiles.
//
// A KV block holds, for each KV head, keys as [head_dim / PAIR][block_size][PAIR] and values as [block_size /
// PAIR][head_dim][PAIR]: both are operands as they lie, without transposition or horizontal sums.
#pragma once
#include <algorithm>
#include <utility>

#include "vec.h"

constexpr int TILE = 64;         // keys
constexpr int QUERY_ROWS = 128;  // (token, head) rows worked on together, so also the most heads
constexpr int MAX_HEAD = 256;
constexpr float MASKED = -1e30f;

struct AttentionShape {
  int heads, kv_heads, head_dim, block_size;
  float scale;
  int64_t row_size() const { return (int64_t)(heads + 2 * kv_heads) * head_dim; }  // of qkv
  int64_t head_stride() const { return (int64_t)block_size * head_dim; }           // inside a block
  int64_t values_offset() const { return kv_heads * head_stride(); }
  int64_t block_stride() const { return 2 * values_offset(); }
};

// What is kept of each row while its keys pass by. Rows lie in the order (KV head, token, head of the group).
template <typename T>
struct QueryRows {
  alignas(64) T query[QUERY_ROWS * MAX_HEAD];
  alignas(64) float out[QUERY_ROWS * MAX_HEAD];
  alignas(64) float scores[MAX_ROWS * TILE];
  alignas(64) T weights[MAX_ROWS * TILE];
  alignas(64) T tail[PAIR<T> * MAX_HEAD];
  int position[QUERY_ROWS];
  float maximum[QUERY_ROWS], total[QUERY_ROWS];
};

// Where a tile's keys and values lie.
template <typename T>
struct KeyTile {
  int first, count;                // positions first..first + count
  const T* keys[TILE / LANES];     // vectors of keys; past the end, the first again
  const T* values[TILE / LANES];   // likewise
};

template <typename T>
static KeyTile<T> find_keys(const T* kv, const int32_t* blocks, int first, int end, const AttentionShape& shape) {
  KeyTile<T> tile{first, std::min(TILE, end - first), {}, {}};
  for (int v = 0; v < TILE / LANES; v++) {
    const int position = v * LANES < tile.count ? first + v * LANES : first;
    const T* block = kv + blocks[position / shape.block_size] * shape.block_stride();
    const int offset = position % shape.block_size;
    tile.keys[v] = block + offset * PAIR<T>;
    tile.values[v] = block + shape.values_offset() + (int64_t)offset * shape.head_dim;
  }
  return tile;
}

// scores[r][i] = query r . key i * scale, in units of ln 2
template <typename T, int R>
static void tile_scores(const T* query, const KeyTile<T>& tile, const KeyTile<T>* next, const AttentionShape& shape,
                        float* scores) {
  const float scale = shape.scale * LOG2_E;
  for (int v = 0; v < TILE / LANES; v += VECTORS) {
    vfloat acc[R][VECTORS] = {};
    const T* columns[VECTORS];
    for (int c = 0; c < VECTORS; c++) columns[c] = tile.keys[v + c];
    const int64_t stride = shape.block_size * PAIR<T>;
    if (next)
      accumulate(acc, query, shape.head_dim, columns, stride, shape.head_dim, [=](int64_t pair) {
        for (int c = 0; c < VECTORS; c++) fetch_line(next->keys[v + c] + pair * stride);
      });
    else
      accumulate(acc, query, shape.head_dim, columns, stride, shape.head_dim, fetch_nothing);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < VECTORS; c++) store(scores + r * TILE + (v + c) * LANES, acc[r][c] * scale);
  }
}

// Masks, then turns scores into weights and folds the tile into the row's running maximum and total (online softmax,
// Milakov and Gimelshein 2018). Returns the factor for what was summed before.
template <typename T>
static inline __attribute__((always_inline)) float tile_softmax(float* scores, T* weights, int visible, float* maximum,
                                                                float* total) {
  for (int i = std::max(visible, 0); i < TILE; i++) scores[i] = MASKED;
  vfloat top = load(scores);
  for (int v = 1; v < TILE / LANES; v++) top = larger(top, load(scores + v * LANES));
  const float before = *maximum, now = std::max(before, largest(top));
  vfloat added = {};
  for (int v = 0; v < TILE / LANES; v++) {
    const vfloat weight = exp2_negative(load(scores + v * LANES) - now);
    store(weights + v * LANES, weight);
    added += weight;
  }
  const float keep = before == now ? 1.0f : exp2_negative(splat(before - now))[0];
  *maximum = now;
  *total = *total * keep + sum(added);
  return keep;
}

// out[r] = out[r] * keep[r] + weights[r] . values, over C vectors of channels from `channel` on.
template <typename T, int R, int C>
static inline void tile_values(const T* weights, const KeyTile<T>& tile, const KeyTile<T>* next, const float* keep,
                               const AttentionShape& shape, int channel, float* out) {
  const int paired = tile.count / PAIR<T> * PAIR<T>;
  vfloat acc[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) acc[r][c] = load(out + r * shape.head_dim + channel + c * LANES) * keep[r];
  const int64_t stride = shape.head_dim * PAIR<T>;
  for (int v = 0; v * LANES < paired; v++) {
    const int keys = std::min(LANES, paired - v * LANES);
    const T* columns[C];
    for (int c = 0; c < C; c++) columns[c] = tile.values[v] + (channel + c * LANES) * PAIR<T>;
    if (next)
      accumulate(acc, weights + v * LANES, TILE, columns, stride, keys, [=](int64_t pair) {
        for (int c = 0; c < C; c++) fetch_line(next->values[v] + (channel + c * LANES) * PAIR<T> + pair * stride);
      });
    else
      accumulate(acc, weights + v * LANES, TILE, columns, stride, keys, fetch_nothing);
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * shape.head_dim + channel + c * LANES, acc[r][c]);
}

// A last key whose pair holds no other. The other half is cleared in a copy, since what an earlier owner of the block
// left there may be infinite, and would show even if multiplied by zero.
template <typename T>
static void copy_tail(const KeyTile<T>& tile, const AttentionShape& shape, T* tail) {
  constexpr int P = PAIR<T>;
  const int last = tile.count - 1;
  const T* pair = tile.values[last / LANES] + (int64_t)(last % LANES / P) * P * shape.head_dim;
  for (int d = 0; d < shape.head_dim; d++) {
    tail[d * P] = pair[d * P];
    for (int p = 1; p < P; p++) tail[d * P + p] = T{};
  }
}

// out += the last key's weight * its value, for a row.
template <typename T>
static void add_tail(const T* weight, const T* tail, const AttentionShape& shape, float* out) {
  const auto row = Operand<T>::row(weight);
  for (int d = 0; d < shape.head_dim; d += LANES)
    store(out + d, multiply_add(load(out + d), row, Operand<T>::columns(tail + d * PAIR<T>)));
}

template <typename T, int R>
static void tile_rows(QueryRows<T>& q, int row, const KeyTile<T>& tile, const KeyTile<T>* next,
                      const AttentionShape& shape) {
  float keep[R];
  tile_scores<T, R>(q.query + (int64_t)row * shape.head_dim, tile, next, shape, q.scores);
  for (int r = 0; r < R; r++) {
    const int visible = std::min(tile.count, q.position[row + r] + 1 - tile.first);
    keep[r] = tile_softmax(q.scores + r * TILE, q.weights + r * TILE, visible, q.maximum + row + r, q.total + row + r);
  }
  float* out = q.out + (int64_t)row * shape.head_dim;
  int d = 0;
  for (; d + VECTORS * LANES <= shape.head_dim; d += VECTORS * LANES)
    tile_values<T, R, VECTORS>(q.weights, tile, next, keep, shape, d, out);
  for (; d < shape.head_dim; d += LANES) tile_values<T, R, 1>(q.weights, tile, next, keep, shape, d, out);
  if (tile.count % PAIR<T>)
    for (int r = 0; r < R; r++)
      add_tail(q.weights + r * TILE + tile.count - 1, q.tail, shape, out + (int64_t)r * shape.head_dim);
}

// All heads of a few tokens of one sequence. `qkv` and `out` are rows of the first of them. A tile of keys passes all
// KV heads before the next does, because that is the order in which they lie in memory.
template <typename T>
static void attention_tokens(const T* qkv, T* out, const T* kv, const int32_t* blocks, int first_position, int tokens,
                             const AttentionShape& shape) {
  static thread_local QueryRows<T> q;
  const int group = shape.heads / shape.kv_heads, D = shape.head_dim, rows = tokens * group, all = tokens * shape.heads;
  const auto source = [&](int row) {  // of a row's query in qkv and of its result in out: its token, then its head
    return std::pair<int64_t, int64_t>{row % rows / group, (int64_t)(row / rows * group + row % group) * D};
  };
  for (int r = 0; r < all; r++) {
    const auto [token, head] = source(r);
    memcpy((void*)(q.query + r * D), qkv + token * shape.row_size() + head, sizeof(T) * D);
    q.position[r] = first_position + (int)token;
    q.maximum[r] = MASKED;
    q.total[r] = 0;
  }
  memset(q.out, 0, sizeof(float) * all * D);
  const int end = first_position + tokens, row_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
  const auto keys_of = [&](int first, int head) {
    return find_keys(kv + head * shape.head_stride(), blocks, first, end, shape);
  };
  KeyTile<T> tile = keys_of(0, 0);
  for (int first = 0; first < end; first += TILE)
    for (int head = 0; head < shape.kv_heads; head++) {
      const bool last_head = head + 1 == shape.kv_heads, last = last_head && first + TILE >= end;
      const KeyTile<T> next = last ? tile : last_head ? keys_of(first + TILE, 0) : keys_of(first, head + 1);
      if (tile.count % PAIR<T>) copy_tail(tile, shape, q.tail);
      for (int b = 0; b < row_blocks; b++) {  // the first block of rows fetches the next tile
        const int row = b * rows / row_blocks, stop = (b + 1) * rows / row_blocks;
        with_rows(stop - row, [&](auto count) {
          tile_rows<T, decltype(count)::value>(q, head * rows + row, tile, b == 0 && !last ? &next : nullptr, shape);
        });
      }
      tile = next;
    }
  for (int r = 0; r < all; r++) {
    const auto [token, head] = source(r);
    T* to = out + token * shape.heads * D + head;
    for (int d = 0; d < D; d += LANES) store(to + d, load(q.out + r * D + d) * (1.0f / q.total[r]));
  }
}

// All sequences of a step. Rows of sequence b are starts[b]..starts[b + 1], at positions context[b]...; out [rows,
// heads, head_dim].
template <typename T>
static void attention(const T* qkv, T* out, const T* kv, int sequences, const int32_t* starts, const int32_t* context,
                      const int32_t* tables, int table_width, const AttentionShape& shape) {
  const int most = std::max(1, QUERY_ROWS / shape.heads);  // tokens worked on together
  const auto pieces_of = [&](int b) { return (starts[b + 1] - starts[b] + most - 1) / most; };
  int pieces = 0;
  for (int b = 0; b < sequences; b++) pieces += pieces_of(b);
#pragma omp parallel for schedule(dynamic, 1)
  for (int work = 0; work < pieces; work++) {
    int b = 0, piece = work;
    for (; piece >= pieces_of(b); b++) piece -= pieces_of(b);
    const int skipped = piece * most, row = starts[b] + skipped;
    attention_tokens<T>(qkv + row * shape.row_size(), out + (int64_t)row * shape.heads * shape.head_dim, kv,
                        tables + (int64_t)b * table_width, context[b] + skipped, std::min(most, starts[b + 1] - row),
                        shape);
  }
}
