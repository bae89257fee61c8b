// Paged attention. Every row sums over keys in tiles of 64 counted from position 0, with the same arithmetic in the same
// order whether it came alone or with others, as prefill or as decode. Masked keys add exact zeros, and a tile that is
// masked as a whole changes nothing, so rows of one block may need different numbers of tiles.
//
// A KV block holds, for each KV head, keys as [head_dim / PAIR][block_size][PAIR] (a vector is one channel pair of 16
// keys: scores need neither transposition nor horizontal sums) and values as [block_size][head_dim].
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int TILE = 64;           // keys
constexpr int QUERY_TILE = 16;     // query tokens worked on together
constexpr int MAX_GROUP = 16;      // query heads per KV head
constexpr int ROW_BLOCK = 4;       // rows that share the loads of a tile
constexpr int MAX_HEAD = 256;
constexpr float MASKED = -1e30f;

struct AttentionShape {
  int heads, kv_heads, head_dim, block_size;
  float scale;
};

// Rows of one KV head: queries tokens x group, in the order (token, head).
template <typename T>
struct QueryTile {
  const T* query[QUERY_TILE * MAX_GROUP];
  int position[QUERY_TILE * MAX_GROUP];
  float maximum[QUERY_TILE * MAX_GROUP], total[QUERY_TILE * MAX_GROUP];
  alignas(64) float out[QUERY_TILE * MAX_GROUP * MAX_HEAD];
  alignas(64) float scores[ROW_BLOCK * TILE];
};

// scores[r][i] = query r . key i, for the tile's `vectors` groups of 16 keys.
template <typename T, int R>
static void tile_scores(const T* const* query, const T* const* keys, int vectors, int head_dim, int block_size,
                        float scale, float* scores) {
  constexpr int P = PAIR<T>;
  for (int v = 0; v < vectors; v += 2) {  // two vectors at a time: enough chains to hide the latency, few registers
    const T* second = keys[v + 1 < vectors ? v + 1 : v];
    v16 a[R][2] = {};
    for (int d = 0; d < head_dim; d += P)
      for (int r = 0; r < R; r++) {
        a[r][0] = multiply_pair(a[r][0], query[r] + d, keys[v] + (int64_t)d * block_size);
        a[r][1] = multiply_pair(a[r][1], query[r] + d, second + (int64_t)d * block_size);
      }
    for (int r = 0; r < R; r++) {
      store(scores + r * TILE + v * LANES, a[r][0] * scale);
      if (v + 1 < vectors) store(scores + r * TILE + (v + 1) * LANES, a[r][1] * scale);
    }
  }
}

// Masks, then turns scores into weights and folds the tile into the row's running maximum and total (online softmax,
// Milakov and Gimelshein 2018). Returns the factor for what was summed before.
static float tile_softmax(float* scores, int first_key, int keys, int position, float* maximum, float* total) {
  const int visible = std::min(keys, position + 1 - first_key);
  for (int i = std::max(visible, 0); i < TILE; i++) scores[i] = MASKED;
  v16 m = load(scores);
  for (int i = LANES; i < TILE; i += LANES) {
    const v16 s = load(scores + i);
    m = s > m ? s : m;
  }
  const float before = *maximum, now = std::max(before, largest(m));
  const float keep = before == now ? 1.0f : expf(before - now);
  v16 weight = {};
  for (int i = 0; i < TILE; i += LANES) {
    const v16 s = load(scores + i);
    const v16 e = s <= MASKED ? v16{} : exp_negative(s - now);
    store(scores + i, e);
    weight += e;
  }
  *maximum = now;
  *total = *total * keep + sum(weight);
  return keep;
}

// out[r] = out[r] * keep[r] + weights[r] . values, over 16 * C channels.
template <typename T, int R, int C>
static void tile_values(const float* scores, const T* const* values, int keys, const float* keep, float* out, int64_t stride) {
  v16 a[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) a[r][c] = load(out + r * stride + c * LANES) * keep[r];
  for (int i = 0; i < keys; i++)
    for (int c = 0; c < C; c++) {
      const v16 v = load(values[i] + c * LANES);
      for (int r = 0; r < R; r++) a[r][c] += v * scores[r * TILE + i];
    }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * stride + c * LANES, a[r][c]);
}

template <typename T, int R>
static void tile_rows(QueryTile<T>& q, int row, const T* const* keys, const T* const* values, int first_key, int count,
                      const AttentionShape& shape) {
  float keep[R];
  tile_scores<T, R>(q.query + row, keys, (count + LANES - 1) / LANES, shape.head_dim, shape.block_size, shape.scale, q.scores);
  for (int r = 0; r < R; r++)
    keep[r] = tile_softmax(q.scores + r * TILE, first_key, count, q.position[row + r], q.maximum + row + r, q.total + row + r);
  const T* column[TILE];
  int d = 0;
  for (; d + 64 <= shape.head_dim; d += 64) {
    for (int i = 0; i < count; i++) column[i] = values[i] + d;
    tile_values<T, R, 4>(q.scores, column, count, keep, q.out + (int64_t)row * shape.head_dim + d, shape.head_dim);
  }
  for (; d < shape.head_dim; d += LANES) {
    for (int i = 0; i < count; i++) column[i] = values[i] + d;
    tile_values<T, R, 1>(q.scores, column, count, keep, q.out + (int64_t)row * shape.head_dim + d, shape.head_dim);
  }
}

// One KV head of up to QUERY_TILE tokens of one sequence. `q`, `out`: [tokens, heads, head_dim] of this tile's first token.
template <typename T>
static void attention_tile(const T* q, T* out, const T* kv, const int32_t* blocks, int first_position, int tokens,
                           int kv_head, const AttentionShape& shape) {
  static thread_local QueryTile<T> tile;
  const int group = shape.heads / shape.kv_heads, rows = tokens * group, D = shape.head_dim, bs = shape.block_size;
  const int64_t block_stride = 2ll * shape.kv_heads * bs * D, values_offset = (int64_t)shape.kv_heads * bs * D;
  kv += (int64_t)kv_head * bs * D;
  for (int r = 0; r < rows; r++) {
    tile.query[r] = q + ((int64_t)(r / group) * shape.heads + kv_head * group + r % group) * D;
    tile.position[r] = first_position + r / group;
    tile.maximum[r] = MASKED;
    tile.total[r] = 0;
  }
  memset(tile.out, 0, sizeof(float) * rows * D);
  const int end = first_position + tokens;
  for (int first = 0; first < end; first += TILE) {
    const int count = std::min(TILE, end - first);
    const T *keys[TILE / LANES], *values[TILE];
    for (int i = 0; i < count; i++) {
      const T* block = kv + blocks[(first + i) / bs] * block_stride;
      if (i % LANES == 0) keys[i / LANES] = block + (first + i) % bs * PAIR<T>;
      values[i] = block + values_offset + (int64_t)((first + i) % bs) * D;
    }
    int row = 0;
    for (; row + ROW_BLOCK <= rows; row += ROW_BLOCK) tile_rows<T, ROW_BLOCK>(tile, row, keys, values, first, count, shape);
    for (; row < rows; row++) tile_rows<T, 1>(tile, row, keys, values, first, count, shape);
  }
  for (int r = 0; r < rows; r++) {
    T* to = out + (tile.query[r] - q);
    for (int d = 0; d < D; d += LANES) store(to + d, load(tile.out + r * D + d) * (1.0f / tile.total[r]));
  }
}

// All sequences of a step. Rows of sequence b are starts[b]..starts[b+1], at positions context[b]...
template <typename T>
static void attention(const T* q, T* out, const T* kv, int sequences, const int32_t* starts, const int32_t* context,
                      const int32_t* tables, int table_width, const AttentionShape& shape) {
  int64_t tiles = 0;
  for (int b = 0; b < sequences; b++) tiles += (starts[b + 1] - starts[b] + QUERY_TILE - 1) / QUERY_TILE;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t work = 0; work < tiles * shape.kv_heads; work++) {
    int64_t tile = work / shape.kv_heads;
    int b = 0;
    for (int64_t here; tile >= (here = (starts[b + 1] - starts[b] + QUERY_TILE - 1) / QUERY_TILE); b++) tile -= here;
    const int skipped = (int)tile * QUERY_TILE, tokens = std::min(QUERY_TILE, starts[b + 1] - starts[b] - skipped);
    const int64_t offset = (int64_t)(starts[b] + skipped) * shape.heads * shape.head_dim;
    attention_tile<T>(q + offset, out + offset, kv, tables + (int64_t)b * table_width, context[b] + skipped, tokens,
                      (int)(work % shape.kv_heads), shape);
  }
}
