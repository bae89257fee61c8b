// Paged attention. Every row sums over keys in tiles of 64 counted from position 0, with the same arithmetic in the same
// order whether it came alone or with others, as prefill or as decode. Masked keys add exact zeros, and a tile that is
// masked as a whole changes nothing, so rows of one block may need different numbers of tiles.
//
// A KV block holds, for each KV head, keys as [head_dim / PAIR][block_size][PAIR] and values as
// [block_size / PAIR][head_dim][PAIR]: both are operands as they lie, without transposition or horizontal sums.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int TILE = 64;        // keys
constexpr int QUERY_TILE = 16;  // query tokens worked on together
constexpr int MAX_GROUP = 16;   // query heads per KV head
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

// Rows of one KV head: tokens x group, in the order (token, head).
template <typename T>
struct QueryTile {
  alignas(64) T query[QUERY_TILE * MAX_GROUP * MAX_HEAD];
  alignas(64) float out[QUERY_TILE * MAX_GROUP * MAX_HEAD];
  alignas(64) float scores[MAX_ROWS * TILE];
  alignas(64) T weights[MAX_ROWS * TILE];
  int position[QUERY_TILE * MAX_GROUP];
  float maximum[QUERY_TILE * MAX_GROUP], total[QUERY_TILE * MAX_GROUP];
};

// Where a tile's keys and values lie.
template <typename T>
struct KeyTile {
  int first, count;                // positions first..first + count
  const T* keys[TILE / LANES];     // vectors of 16 keys; past the end, the first again
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
    f32x16 acc[R][VECTORS] = {};
    const T* columns[VECTORS];
    for (int c = 0; c < VECTORS; c++) columns[c] = tile.keys[v + c];
    accumulate(acc, query, shape.head_dim, columns, shape.block_size * PAIR<T>, shape.head_dim,
               next ? next->keys + v : nullptr);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < VECTORS; c++) store(scores + r * TILE + (v + c) * LANES, acc[r][c] * scale);
  }
}

// Masks, then turns scores into weights and folds the tile into the row's running maximum and total (online softmax,
// Milakov and Gimelshein 2018). Returns the factor for what was summed before.
template <typename T>
static inline __attribute__((always_inline)) float tile_softmax(float* scores, T* weights, int visible, float* maximum, float* total) {
  for (int i = std::max(visible, 0); i < TILE; i++) scores[i] = MASKED;
  f32x16 s[TILE / LANES];
  for (int v = 0; v < TILE / LANES; v++) s[v] = load(scores + v * LANES);
  const float before = *maximum, now = std::max(before, largest(larger(larger(s[0], s[1]), larger(s[2], s[3]))));
  for (int v = 0; v < TILE / LANES; v++) {
    s[v] = exp2_negative(s[v] - now);
    store(weights + v * LANES, s[v]);
  }
  const float keep = before == now ? 1.0f : exp2_negative(splat(before - now))[0];
  *maximum = now;
  *total = *total * keep + sum((s[0] + s[1]) + (s[2] + s[3]));
  return keep;
}

// out[r] = out[r] * keep[r] + weights[r] . values, over C vectors of channels from `channel` on.
template <typename T, int R, int C>
static inline void tile_values(const T* weights, const KeyTile<T>& tile, const KeyTile<T>* next, const float* keep,
                               const AttentionShape& shape, int channel, float* out) {
  f32x16 acc[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) acc[r][c] = load(out + r * shape.head_dim + channel + c * LANES) * keep[r];
  for (int v = 0; v * LANES < tile.count; v++) {
    const T *columns[C], *ahead[C];
    for (int c = 0; c < C; c++) {
      columns[c] = tile.values[v] + (channel + c * LANES) * PAIR<T>;
      ahead[c] = next ? next->values[v] + (channel + c * LANES) * PAIR<T> : nullptr;
    }
    accumulate(acc, weights + v * LANES, TILE, columns, shape.head_dim * PAIR<T>, std::min(LANES, tile.count - v * LANES),
               next ? ahead : nullptr);
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(out + r * shape.head_dim + channel + c * LANES, acc[r][c]);
}

template <typename T, int R>
static void tile_rows(QueryTile<T>& q, int row, const KeyTile<T>& tile, const KeyTile<T>* next, const AttentionShape& shape) {
  float keep[R];
  tile_scores<T, R>(q.query + (int64_t)row * shape.head_dim, tile, next, shape, q.scores);
  for (int r = 0; r < R; r++)
    keep[r] = tile_softmax(q.scores + r * TILE, q.weights + r * TILE,
                           std::min(tile.count, q.position[row + r] + 1 - tile.first), q.maximum + row + r, q.total + row + r);
  float* out = q.out + (int64_t)row * shape.head_dim;
  int d = 0;
  for (; d + VECTORS * LANES <= shape.head_dim; d += VECTORS * LANES)
    tile_values<T, R, VECTORS>(q.weights, tile, next, keep, shape, d, out);
  for (; d < shape.head_dim; d += LANES) tile_values<T, R, 1>(q.weights, tile, next, keep, shape, d, out);
}

// One KV head of up to QUERY_TILE tokens of one sequence. `qkv` and `out` are rows of the tile's first token.
template <typename T>
static void attention_tile(const T* qkv, T* out, const T* kv, const int32_t* blocks, int first_position, int tokens,
                           int kv_head, const AttentionShape& shape) {
  static thread_local QueryTile<T> q;
  const int group = shape.heads / shape.kv_heads, rows = tokens * group, D = shape.head_dim;
  const int64_t head = (int64_t)kv_head * group * D;
  for (int t = 0; t < tokens; t++)
    memcpy((void*)(q.query + t * group * D), qkv + t * shape.row_size() + head, sizeof(T) * group * D);
  for (int r = 0; r < rows; r++) {
    q.position[r] = first_position + r / group;
    q.maximum[r] = MASKED;
    q.total[r] = 0;
  }
  memset(q.out, 0, sizeof(float) * rows * D);
  const int end = first_position + tokens, row_blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
  const T* head_kv = kv + kv_head * shape.head_stride();
  KeyTile<T> tile = find_keys(head_kv, blocks, 0, end, shape);
  for (int first = 0; first < end; first += TILE) {
    const bool more = first + TILE < end, more_heads = kv_head + 1 < shape.kv_heads;
    const KeyTile<T> next = more ? find_keys(head_kv, blocks, first + TILE, end, shape)
                                 : find_keys(head_kv + (more_heads ? shape.head_stride() : 0), blocks, 0, end, shape);
    for (int b = 0; b < row_blocks; b++) {
      const int row = b * rows / row_blocks, last = (b + 1) * rows / row_blocks;
      const bool fetch = b == 0 && (more || more_heads);
      with_rows(last - row, [&](auto count) {
        tile_rows<T, decltype(count)::value>(q, row, tile, fetch ? &next : nullptr, shape);
      });
    }
    tile = next;
  }
  for (int r = 0; r < rows; r++) {
    T* to = out + (int64_t)(r / group) * shape.heads * D + head + r % group * D;
    for (int d = 0; d < D; d += LANES) store(to + d, load(q.out + r * D + d) * (1.0f / q.total[r]));
  }
}

// All sequences of a step. Rows of sequence b are starts[b]..starts[b + 1], at positions context[b]...; out [rows, heads,
// head_dim].
template <typename T>
static void attention(const T* qkv, T* out, const T* kv, int sequences, const int32_t* starts, const int32_t* context,
                      const int32_t* tables, int table_width, const AttentionShape& shape) {
  const auto tiles_of = [&](int b) { return (starts[b + 1] - starts[b] + QUERY_TILE - 1) / QUERY_TILE; };
  int64_t tiles = 0;
  for (int b = 0; b < sequences; b++) tiles += tiles_of(b);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t work = 0; work < tiles * shape.kv_heads; work++) {
    int64_t tile = work / shape.kv_heads;
    int b = 0;
    for (; tile >= tiles_of(b); b++) tile -= tiles_of(b);
    const int skipped = (int)tile * QUERY_TILE, row = starts[b] + skipped;
    attention_tile<T>(qkv + row * shape.row_size(), out + (int64_t)row * shape.heads * shape.head_dim, kv,
                      tables + (int64_t)b * table_width, context[b] + skipped, std::min(QUERY_TILE, starts[b + 1] - row),
                      (int)(work % shape.kv_heads), shape);
  }
}
