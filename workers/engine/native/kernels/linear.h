// y = x W^T + b with packed weights. A row's result does not depend on how many rows there are: every element of y is
// summed over the channels in ascending order by one accumulator, whatever the blocking of rows.
#pragma once
#include <algorithm>

#include "vec.h"

constexpr int PANEL = 64;     // output columns of a panel: four vectors
constexpr int MAX_ROWS = 6;   // rows computed together: 6 x 4 accumulators fit the register file
constexpr int VECTORS = PANEL / LANES;

// Packed: [panels][in / PAIR][PANEL][PAIR], output columns padded to whole panels with zeros.
template <typename T>
static void pack_linear(const T* w, T* packed, int64_t out, int64_t in) {
  constexpr int P = PAIR<T>;
  const int64_t panels = (out + PANEL - 1) / PANEL;
  memset((void*)packed, 0, sizeof(T) * panels * PANEL * in);
  for (int64_t column = 0; column < out; column++) {
    T* panel = packed + column / PANEL * PANEL * in;
    for (int64_t k = 0; k < in; k++) panel[(k / P * PANEL + column % PANEL) * P + k % P] = w[column * in + k];
  }
}

template <typename T, typename Out, int R>
static void linear_block(const T* x, const T* panel, const float* bias, Out* y, int64_t in, int64_t stride, int columns) {
  constexpr int P = PAIR<T>;
  v16 acc[R][VECTORS] = {};
  for (int64_t k = 0; k < in; k += P) {
    const T* w = panel + k * PANEL;
    for (int r = 0; r < R; r++)
      for (int c = 0; c < VECTORS; c++) acc[r][c] = multiply_pair(acc[r][c], x + r * in + k, w + c * LANES * P);
  }
  for (int r = 0; r < R; r++) {
    if (bias)
      for (int c = 0; c < VECTORS; c++) acc[r][c] += load(bias + c * LANES);
    if (columns == PANEL) {
      for (int c = 0; c < VECTORS; c++) store(y + r * stride + c * LANES, acc[r][c]);
    } else {
      Out edge[PANEL];
      for (int c = 0; c < VECTORS; c++) store(edge + c * LANES, acc[r][c]);
      memcpy((void*)(y + r * stride), edge, sizeof(Out) * columns);
    }
  }
}

template <typename T, typename Out>
static void linear_rows(int rows, const T* x, const T* panel, const float* bias, Out* y, int64_t in, int64_t stride,
                        int columns) {
  switch (rows) {
    case 1: return linear_block<T, Out, 1>(x, panel, bias, y, in, stride, columns);
    case 2: return linear_block<T, Out, 2>(x, panel, bias, y, in, stride, columns);
    case 3: return linear_block<T, Out, 3>(x, panel, bias, y, in, stride, columns);
    case 4: return linear_block<T, Out, 4>(x, panel, bias, y, in, stride, columns);
    case 5: return linear_block<T, Out, 5>(x, panel, bias, y, in, stride, columns);
    default: return linear_block<T, Out, 6>(x, panel, bias, y, in, stride, columns);
  }
}

// x [rows, in], y [rows, out]; `bias` is padded to whole panels or null.
template <typename T, typename Out>
static void linear(const T* x, const T* packed, const float* bias, Out* y, int64_t rows, int64_t in, int64_t out) {
  const int64_t panels = (out + PANEL - 1) / PANEL, blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < panels; p++) {
    const int columns = (int)std::min<int64_t>(PANEL, out - p * PANEL);
    for (int64_t b = 0; b < blocks; b++) {  // rows are spread evenly over the blocks
      const int64_t first = b * rows / blocks, last = (b + 1) * rows / blocks;
      linear_rows<T, Out>((int)(last - first), x + first * in, packed + p * PANEL * in, bias ? bias + p * PANEL : nullptr,
                          y + first * out + p * PANEL, in, out, columns);
    }
  }
}
