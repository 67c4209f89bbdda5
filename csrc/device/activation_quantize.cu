// SwiGLU7 or GELU7 of a given product, rounded to bf16 or, by a static scale, to e4m3; docs/OPS.md,
// `activation_quantize`.
//
// A block computes 1024 columns (float32) or 2048 (bf16) of 16 rows, so that it reads the columns' scales once per 16
// rows. Predicted for 64,256 rows of 27392 columns, SwiGLU7, at the 3.35 TB/s of an H100: float32 to e4m3 reads and
// writes 7.04 + 0.88 GB, 2.36 ms; bf16 to bf16 3.52 + 1.76 GB, 1.58 ms.
#include "activations.cuh"
#include "product.cuh"

constexpr int THREADS = 256;
constexpr int ROWS = 16;      // of a block; divides ROW_TILE
constexpr int IN_FLIGHT = 4;  // loads of a thread

struct ActivationQuantizeParams {
  const void* product;        // [rows, F] bf16, float32 where there are scales; starts with row rows.first
  const float* row_scale;     // [N], or null: bf16
  const float* column_scale;  // [E, F], or null
  void* y;                    // [N, F or F / 2] bf16 or e4m3
  RowTiles rows;
  i64 product_stride;   // elements between rows
  int features;         // F, a multiple of 128
  int gated;            // SwiGLU7 rather than GELU7
  float inverse_scale;  // 1 / scale of an e4m3 y, a power of two; 0 for bf16
};

template <int VALUES, bool GATED>
HH_DEVICE void activate_rows(const ActivationQuantizeParams& p) {
  constexpr int RESULTS = GATED ? VALUES / 2 : VALUES;
  constexpr i64 ELEMENT = 16 / VALUES;  // bytes
  const RowTile tile = row_tile(p.rows, blockIdx.y);
  const int column = static_cast<int>(blockIdx.x * THREADS + threadIdx.x) * VALUES;
  if (column >= p.features) return;
  const i64 columns = GATED ? p.features / 2 : p.features;
  const int result = GATED ? column / 2 : column;

  float column_scale[VALUES] = {};
  if (VALUES == 4) {
    load_floats(p.column_scale + static_cast<i64>(tile.expert) * p.features + column, column_scale);
  }
  const int first = tile.first + ROWS * static_cast<int>(blockIdx.z), end = min(tile.end, first + ROWS);
  for (int start = first; start < end; start += IN_FLIGHT) {
    uint4 raw[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      raw[i] = make_uint4(0, 0, 0, 0);
      if (start + i >= end) continue;
      const i64 offset = static_cast<i64>(start + i - p.rows.first) * p.product_stride * ELEMENT;
      raw[i] = load_vector<VALUES>(static_cast<const u8*>(p.product) + offset, column);
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const i64 row = start + i;
      if (row >= end) break;  // the whole block
      float x[VALUES], y[RESULTS];
      widen(raw[i], x);
      if constexpr (VALUES == 4) scale_values(x, p.row_scale[row], column_scale);
#pragma unroll
      for (int j = 0; j < RESULTS; ++j) {
        if constexpr (GATED) {
          y[j] = swiglu7(x[2 * j], x[2 * j + 1]);
        } else {
          y[j] = gelu7(x[j]);
        }
      }
      if (p.inverse_scale == 0.0f) {
        store_bf16(static_cast<bf16*>(p.y) + row * columns + result, y);
        continue;
      }
#pragma unroll
      for (int j = 0; j < RESULTS; ++j) y[j] *= p.inverse_scale;
      store_e4m3(static_cast<e4m3*>(p.y) + row * columns + result, y);
    }
  }
}

// Grid: (blocks of columns, tiles, 8 parts of 16 rows).
HH_KERNEL(activation_quantize, ActivationQuantizeParams, THREADS) {
  const bool gated = p.gated != 0;
  if (p.row_scale != nullptr) return gated ? activate_rows<4, true>(p) : activate_rows<4, false>(p);
  return gated ? activate_rows<8, true>(p) : activate_rows<8, false>(p);
}
