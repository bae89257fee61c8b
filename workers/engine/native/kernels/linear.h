// y = x W^T with packed weights, and what is done with y while it is still in registers.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int PANEL = VECTORS * LANES;  // output columns of a panel
constexpr int64_t CHUNK = 192;          // rows that pass all panels before the next rows do: their x stays in the cache
constexpr int64_t SLICE = 2048;         // channels of a panel that several blocks of rows pass before the next channels

constexpr int64_t LINE = 64;                          // bytes of a cache line
constexpr int64_t PAIR_LINES = PANEL * 4 / LINE;      // of a panel's channel pair, in both types
constexpr int64_t AHEAD = 2048;                       // bytes that a lone block of slow rows fetches ahead of itself

// Panels of a matrix with `out` rows; with parts = 2 each half of a panel comes from one half of the matrix.
static inline int64_t panels_of(int64_t out, int parts) { return (out / parts + PANEL / parts - 1) / (PANEL / parts); }

// Packed: [panels][in / PAIR][PANEL][PAIR]; columns past the end are zeros. `in` is a multiple of PAIR.
template <typename T>
static void pack_linear(const T* w, T* packed, int64_t out, int64_t in, int parts) {
  constexpr int P = PAIR<T>;
  const int64_t part_size = out / parts, width = PANEL / parts;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels_of(out, parts); p++) {
    const T* source[PANEL];  // the row that each column comes from, or null
    for (int64_t j = 0; j < PANEL; j++) {
      const int64_t within = p * width + j % width;
      source[j] = within < part_size ? w + (j / width * part_size + within) * in : nullptr;
    }
    T* to = packed + p * PANEL * in;
    for (int64_t k = 0; k < in; k += P)
      for (int64_t j = 0; j < PANEL; j++, to += P) {
        if (source[j]) memcpy((void*)to, source[j] + k, sizeof(T) * P);
        else memset((void*)to, 0, sizeof(T) * P);
      }
  }
}

// What becomes of the sums of a row and a panel: Store writes them, AddTo adds them to what is there, Gate takes a
// panel of gates and a panel of values. `bias` is padded to whole panels, or null.
template <typename Out>
struct Store {
  Out* y;
  int64_t columns;
  const float* bias;
  void operator()(int64_t row, int64_t panel, const vfloat (&acc)[VECTORS]) const {
    for (int64_t c = 0, column = panel * PANEL; c < VECTORS; c++, column += LANES)
      store_some(y + row * columns + column, bias ? acc[c] + load(bias + column) : acc[c], columns - column);
  }
};

template <typename T>
struct AddTo {
  T* y;
  int64_t columns;
  const float* bias;
  void operator()(int64_t row, int64_t panel, const vfloat (&acc)[VECTORS]) const {
    for (int64_t c = 0, column = panel * PANEL; c < VECTORS; c++, column += LANES) {
      T* at = y + row * columns + column;
      const vfloat update = rounded<T>(bias ? acc[c] + load(bias + column) : acc[c]);
      store_some(at, load_some(at, columns - column) + update, columns - column);
    }
  }
};

template <typename T>
struct Gate {
  T* y;
  int64_t columns;
  void operator()(int64_t row, int64_t panel, const vfloat (&acc)[VECTORS]) const {
    for (int64_t c = 0, column = panel * (PANEL / 2); c < VECTORS / 2; c++, column += LANES) {
      const vfloat gate = rounded<T>(silu(rounded<T>(acc[c]))), value = rounded<T>(acc[c + VECTORS / 2]);
      store_some(y + row * columns + column, gate * value, columns - column);
    }
  }
};

// Rows against `channels` of a panel, on top of `sums` of the channels before, if there are any; the outcome goes to
// `finish` if these are the last channels, else to `sums`. `ahead`: what to fetch meanwhile, `lines` cache lines for each
// channel pair; or null.
template <typename T, int R, typename Finish>
static void linear_block(const T* x, int64_t in, const T* weights, int64_t channels, vfloat (*sums)[VECTORS], bool first,
                         bool last, const char* ahead, int lines, int64_t row, int64_t panel, const Finish& finish) {
  vfloat acc[R][VECTORS] = {};
  const T* columns[VECTORS];
  for (int c = 0; c < VECTORS; c++) columns[c] = weights + c * LANES * PAIR<T>;
  if (!first)
    for (int r = 0; r < R; r++)
      for (int c = 0; c < VECTORS; c++) acc[r][c] = sums[r][c];
  if (ahead)
    accumulate(acc, x, in, columns, PANEL * PAIR<T>, channels, [=](int64_t pair) {
      fetch_line(ahead + pair * lines * LINE);
      if (lines > 1) fetch_line(ahead + (pair * lines + 1) * LINE);
    });
  else
    accumulate(acc, x, in, columns, PANEL * PAIR<T>, channels, fetch_nothing);
  for (int r = 0; r < R; r++) {
    if (last) finish(row + r, panel, acc[r]);
    else
      for (int c = 0; c < VECTORS; c++) sums[r][c] = acc[r][c];
  }
}

// x [rows, in] against `panels` packed panels. Rows go in blocks that fit the registers. Where there are several, a
// panel is cut into slices that fit the cache, so that memory is read once.
template <typename T, typename Finish>
static void linear(const T* x, const T* packed, int64_t rows, int64_t in, int64_t panels, const Finish& finish) {
  for (int64_t chunk = 0; chunk < rows; chunk += CHUNK) {
    const int64_t size = std::min(CHUNK, rows - chunk), blocks = (size + MAX_ROWS - 1) / MAX_ROWS;
    const int64_t slice = blocks > 1 ? SLICE : in;
    const int lines = blocks < PAIR_LINES ? 2 : 1;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
      vfloat sums[CHUNK][VECTORS];
      for (int64_t k = 0; k < in; k += slice) {
        const int64_t channels = std::min(slice, in - k), end = channels * PANEL * (int64_t)sizeof(T);
        const T* weights = packed + (p * in + k) * PANEL;
        for (int64_t b = 0; b < blocks; b++) {  // rows are spread evenly over the blocks
          const int64_t from = b * size / blocks, to = (b + 1) * size / blocks;
          // Of several blocks each fetches a part of the next slice while it computes. A lone one waits for memory, and
          // the processor fetches best by itself, unless narrow vectors take so many instructions for several rows
          // and a line of weights that it does not see far enough.
          const int64_t part = b * channels / PAIR<T> * lines * LINE;
          const char *ahead = nullptr, *here = (const char*)weights;
          if (blocks == 1 && size > 1 && LANES < 16) ahead = here + AHEAD;
          if (blocks > 1 && part < end) ahead = here + end + part;
          with_rows(to - from, [&](auto count) {
            linear_block<T, decltype(count)::value>(x + (chunk + from) * in + k, in, weights, channels, sums + from,
                                                    k == 0, k + slice >= in, ahead, lines, chunk + from, p, finish);
          });
        }
      }
    }
  }
}
