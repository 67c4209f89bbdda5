// Per-head QK-norm, rotation, gate and quantisation of a given packed qkv product; docs/OPS.md, `qk_norm_rope`. The
// kernel qk_norm_rope computes row by row. quantize_k and quantize_v compute what has a scale per 128 rows, k in int8
// and v in e4m3. Each reads its columns of the product once.
//
// Predicted for 64,256 rows of 40 + 8 + 8 heads of 128 and 40 gates, at the 3.35 TB/s of an H100: float32 to fp8 reads
// 1.85 GB, and 0.03 of cosines and sines, and writes 0.47, 0.70 ms; bf16 to bf16 0.92 + 0.03 + 0.93 GB, 0.56 ms; bf16
// to int8 q and k 0.92 + 0.03 + 0.55 GB, 0.45 ms. About 25 instructions per value (sm_90a) take 0.35 ms of issue slots
// beside that.
#include "activations.cuh"
#include "async_copy.cuh"
#include "product.cuh"

constexpr int THREADS = 256;
constexpr int ROWS = THREADS / WARP;  // of a block of qk_norm_rope, one per warp; divides ROW_TILE
constexpr int IN_FLIGHT = 4;  // loads of a thread
constexpr int STRIP = 32;     // rows of v whose codes a thread stores

struct QkNormRopeParams {
  const void* product;        // [rows, F] bf16, float32 where there are scales; starts with row rows.first
  const float* row_scale;     // [N], or null: bf16
  const float* column_scale;  // [E, F], or null
  const float* qk_norm;       // [E, 2, D]
  const float* cos_sin;       // [N, D]
  const float* qk_scale;      // [E, 2] in FP8
  void* q;                    // [N, Hq, D]
  void* k;                    // [N, Hkv, D]
  void* v;                    // [N, Hkv, D] bf16, or e4m3 [Hkv, D, 128 blocks] with v_scale
  float* q_scale;             // [N, Hq] in INT8, [blocks] in FP8
  float* k_scale;             // [Hkv, blocks] in INT8, [blocks] in FP8
  float* v_scale;             // [Hkv, blocks], or null: v in bf16
  float* gate;                // [N, Hq]
  RowTiles rows;
  i64 product_stride;  // elements between rows
  i64 blocks;          // of 128 rows
  int features;        // F
  int heads_q;
  int heads_kv;
  int head_dim;  // 32, 64 or 128
  int format;    // of q and k
};

// Calls function<D, VALUES>(...) of the launch: its head dim, and the elements in 16 bytes of its product.
#define BY_SHAPE(function, ...)                                                    \
  const bool wide = p.row_scale != nullptr;                                        \
  switch (p.head_dim) {                                                            \
    case 32:                                                                       \
      return wide ? function<32, 4>(__VA_ARGS__) : function<32, 8>(__VA_ARGS__);   \
    case 64:                                                                       \
      return wide ? function<64, 4>(__VA_ARGS__) : function<64, 8>(__VA_ARGS__);   \
    default:                                                                       \
      return wide ? function<128, 4>(__VA_ARGS__) : function<128, 8>(__VA_ARGS__); \
  }

template <int VALUES>
HH_DEVICE const u8* product_row(const QkNormRopeParams& p, i64 row) {
  constexpr i64 ELEMENT = 16 / VALUES;  // bytes
  return static_cast<const u8*>(p.product) + (row - p.rows.first) * p.product_stride * ELEMENT;
}

HH_DEVICE const float* column_scales(const QkNormRopeParams& p, int expert, int column) {
  return p.column_scale + static_cast<i64>(expert) * p.features + column;
}

template <int VALUES>
HH_DEVICE float largest_of(const float (&x)[VALUES]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) largest = larger(largest, fabsf(x[i]));
  return largest;
}

// A lane's cosines, sines and norm weights, the same for all heads of its row, and the arithmetic on VALUES channels of
// a head.
template <int D, int VALUES>
struct RowOfHeads {
  float cosine[VALUES / 2], sine[VALUES / 2];
  float norm[2][VALUES];  // norm weights of q and k, plus 1

  HH_DEVICE RowOfHeads(const QkNormRopeParams& p, int expert, i64 row, int channel) {
    load_floats(p.cos_sin + row * D + channel / 2, cosine);
    load_floats(p.cos_sin + row * D + D / 2 + channel / 2, sine);
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      load_floats(p.qk_norm + (2 * expert + kind) * D + channel, norm[kind]);
#pragma unroll
      for (int i = 0; i < VALUES; ++i) norm[kind][i] += 1.0f;
    }
  }

  HH_DEVICE void normalise_and_rotate(float (&x)[VALUES], float inverse, bool is_k) const {
#pragma unroll
    for (int i = 0; i < VALUES; i += 2) {
      const float a = x[i] * inverse * (is_k ? norm[1][i] : norm[0][i]);
      const float b = x[i + 1] * inverse * (is_k ? norm[1][i + 1] : norm[0][i + 1]);
      x[i] = a * cosine[i / 2] - b * sine[i / 2];
      x[i + 1] = b * cosine[i / 2] + a * sine[i / 2];
    }
  }
};

// Computes one row per warp, D / VALUES lanes per head. A lane has the same channels in every head, so that their norm
// weights, cosines and sines stay in registers.
template <int D, int VALUES>
HH_DEVICE void finish_row(const QkNormRopeParams& p, int expert, i64 row) {
  constexpr int LANES = D / VALUES, TOGETHER = WARP / LANES;
  const int lane = lane_of_thread(), channel = lane % LANES * VALUES;
  const u8* const product = product_row<VALUES>(p, row);
  const float row_scale = VALUES == 4 ? p.row_scale[row] : 1.0f;
  const RowOfHeads<D, VALUES> held(p, expert, row, channel);
  const int heads_qk = p.heads_q + p.heads_kv, heads = p.v_scale ? heads_qk : heads_qk + p.heads_kv;
  // quantize_k makes the codes of k in int8.
  const auto is_mine = [&](int head) {
    return head < heads && !(p.format == INT8 && head >= p.heads_q && head < heads_qk);
  };

  for (int start = lane / LANES; start - lane / LANES < heads; start += TOGETHER * IN_FLIGHT) {
    uint4 raw[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int head = start + i * TOGETHER;
      raw[i] = make_uint4(0, 0, 0, 0);
      if (is_mine(head)) raw[i] = load_vector<VALUES>(product, head * D + channel);
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int head = start + i * TOGETHER;
      float x[VALUES];
      widen(raw[i], x);
      if constexpr (VALUES == 4) {
        float column_scale[VALUES] = {};
        if (is_mine(head)) load_floats(column_scales(p, expert, head * D + channel), column_scale);
        scale_values(x, row_scale, column_scale);
      }
      float squares = 0.0f;
#pragma unroll
      for (int j = 0; j < VALUES; ++j) squares += x[j] * x[j];
      const float inverse = inverse_rms(lanes_sum<LANES>(squares), D);
      const bool is_q = head < p.heads_q, is_v = head >= heads_qk, is_k = !is_q && !is_v;
      if (!is_v) held.normalise_and_rotate(x, inverse, is_k);
      float scale = 1.0f;
      if (p.format == INT8) scale = scale_of(lanes_max<LANES>(largest_of(x)), INT8_LIMIT);
      if (!is_mine(head)) continue;
      // One store serves q, k and v: a separate one for v was compiled to stores of 4 bytes.
      void* const out = is_q ? p.q : is_v ? p.v : p.k;
      const int place = is_q ? head : is_v ? head - heads_qk : head - p.heads_q;
      const i64 at = (row * (is_q ? p.heads_q : p.heads_kv) + place) * D + channel;
      if (p.format == BF16 || is_v) {
        store_bf16(static_cast<bf16*>(out) + at, x);
        continue;
      }
      if (p.format == FP8) scale = p.qk_scale[2 * expert + (is_k ? 1 : 0)];
      const float inverse_scale = 1.0f / scale;
#pragma unroll
      for (int j = 0; j < VALUES; ++j) x[j] *= inverse_scale;
      if (p.format == INT8) {
        if (channel == 0) p.q_scale[row * p.heads_q + head] = scale;
        store_int8(static_cast<int8*>(out) + at, x);
      } else {
        store_e4m3(static_cast<e4m3*>(out) + at, x);
      }
    }
  }

  const int gates = (heads_qk + p.heads_kv) * D;  // nobody reads the columns behind the last gate, which are zero
  for (int head = lane; head < p.heads_q; head += WARP) {
    float x;
    if constexpr (VALUES == 8) {
      x = to_float(reinterpret_cast<const bf16*>(product)[gates + head]);
    } else {
      x = reinterpret_cast<const float*>(product)[gates + head] * row_scale * *column_scales(p, expert, gates + head);
    }
    p.gate[row * p.heads_q + head] = sigmoid(x);
  }
}

// Grid: (16 parts of 8 rows, tiles).
HH_KERNEL(qk_norm_rope, QkNormRopeParams, THREADS) {
  const RowTile tile = row_tile(p.rows, blockIdx.y);
  const int row = tile.first + ROWS * static_cast<int>(blockIdx.x) + warp_of_thread();
  if (row >= tile.end) return;  // the whole warp
  BY_SHAPE(finish_row, p, tile.expert, row)
}

// Quantises 128 rows of k of one head to int8 with one scale. Values stay in registers until the scale is known. Rows
// past the tile's end count as zeros.
template <int D, int VALUES>
HH_DEVICE void finish_k(const QkNormRopeParams& p, const RowTile& tile, float* scratch) {
  constexpr int LANES = D / VALUES, AT_ONCE = THREADS / LANES, MINE = ROW_TILE / AT_ONCE;
  const int thread = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.x);
  const int channel = thread % LANES * VALUES, column = (p.heads_q + head) * D + channel;
  const int first = tile.first + thread / LANES;
  uint4 raw[MINE];
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const int row = first + i * AT_ONCE;
    raw[i] = make_uint4(0, 0, 0, 0);
    if (row < tile.end) raw[i] = load_vector<VALUES>(product_row<VALUES>(p, row), column);
  }
  float column_scale[VALUES] = {};
  if constexpr (VALUES == 4) load_floats(column_scales(p, tile.expert, column), column_scale);

  float held[MINE][VALUES], largest = 0.0f;
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const int row = first + i * AT_ONCE;
    const bool inside = row < tile.end;
    float(&x)[VALUES] = held[i];
    widen(raw[i], x);
    if constexpr (VALUES == 4) scale_values(x, inside ? p.row_scale[row] : 0.0f, column_scale);
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < VALUES; ++j) squares += x[j] * x[j];
    const float inverse = inverse_rms(lanes_sum<LANES>(squares), D);
    if (!inside) continue;
    RowOfHeads<D, VALUES>(p, tile.expert, row, channel).normalise_and_rotate(x, inverse, true);
    largest = larger(largest, largest_of(x));
  }
  const float scale = scale_of(block_max(largest, scratch), INT8_LIMIT), inverse_scale = 1.0f / scale;
  if (thread == 0) p.k_scale[head * p.blocks + tile.first / ROW_TILE] = scale;
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const i64 row = first + i * AT_ONCE;
    if (row >= tile.end) continue;
#pragma unroll
    for (int j = 0; j < VALUES; ++j) held[i][j] *= inverse_scale;
    store_int8(static_cast<int8*>(p.k) + (row * p.heads_kv + head) * D + channel, held[i]);
  }
}

// Tiles start on multiples of 128. Grid: (heads of k, tiles). Shared memory: 32 floats.
HH_KERNEL(quantize_k, QkNormRopeParams, THREADS) {
  HH_SHARED_MEMORY(shared);
  float* const scratch = reinterpret_cast<float*>(shared);
  const RowTile tile = row_tile(p.rows, blockIdx.y);
  BY_SHAPE(finish_k, p, tile, scratch)
}

// Quantises 128 rows of v of one head to e4m3 and transposes them through shared memory. cp.async brings all of them at
// once; loads to registers came one at a time, because ptxas prefers 32 registers to eight loads in flight. A thread
// then stores the codes of 32 rows of a channel, a whole sector of 32 bytes, in fragment order (docs/OPS.md). Neither
// access to shared memory has bank conflicts.
template <int D, int VALUES>
HH_DEVICE void transpose_v(const QkNormRopeParams& p, const RowTile& tile, unsigned char* shared) {
  constexpr int LANES = D / VALUES, VECTORS = ROW_TILE * LANES;
  uint4* const held = reinterpret_cast<uint4*>(shared);
  float* const row_scale = reinterpret_cast<float*>(held + VECTORS);
  float* const warp_largest = row_scale + ROW_TILE;
  const int thread = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.x);
  const int column = (p.heads_q + p.heads_kv + head) * D + thread % LANES * VALUES, rows = tile.end - tile.first;

  for (int at = thread; at < VECTORS; at += THREADS) {
    const int row = min(at / LANES, rows - 1);
    const u8* const from = product_row<VALUES>(p, tile.first + row) + static_cast<i64>(column) * (16 / VALUES);
    copy_async_16(held + at, from, at / LANES < rows ? 16 : 0);  // zeros past the end
  }
  float column_scale[VALUES] = {};
  if constexpr (VALUES == 4) {
    load_floats(column_scales(p, tile.expert, column), column_scale);
    if (thread < ROW_TILE) row_scale[thread] = thread < rows ? p.row_scale[tile.first + thread] : 1.0f;
    __syncthreads();
  }
  wait_for_copies();

  float largest = 0.0f;
  for (int at = thread; at < VECTORS; at += THREADS) {
    float x[VALUES];
    widen(held[at], x);
    if constexpr (VALUES == 4) {
      scale_values(x, row_scale[at / LANES], column_scale);
      held[at] = make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
    }
    largest = larger(largest, largest_of(x));
  }
  const float scale = scale_of(block_max(largest, warp_largest), E4M3_MAX), inverse = 1.0f / scale;
  const int block = tile.first / ROW_TILE;
  if (thread == 0) p.v_scale[head * p.blocks + block] = scale;
  if (thread == 0 && head == 0 && p.format == FP8) {
    p.q_scale[block] = p.qk_scale[2 * tile.expert];
    p.k_scale[block] = p.qk_scale[2 * tile.expert + 1];
  }

  for (int job = thread; job < D * (ROW_TILE / STRIP); job += THREADS) {
    const int channel = job % D, strip = job / D * STRIP;
    u32 words[STRIP / 4];
#pragma unroll
    for (int i = 0; i < STRIP; i += 4) {
      float codes[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int token = i / 16 * 16 + j / 2 * 8 + i % 16 / 2 + j % 2;  // the token at place i + j
        const int at = (strip + token) * D + channel;
        if constexpr (VALUES == 8) {
          codes[j] = to_float(reinterpret_cast<const bf16*>(held)[at]) * inverse;
        } else {
          codes[j] = reinterpret_cast<const float*>(held)[at] * inverse;
        }
      }
      words[i / 4] = pack_e4m3(codes[0], codes[1], codes[2], codes[3]);
    }
    e4m3* const out = static_cast<e4m3*>(p.v) + (static_cast<i64>(head) * D + channel) * ROW_TILE * p.blocks + tile.first + strip;
    reinterpret_cast<uint4*>(out)[0] = make_uint4(words[0], words[1], words[2], words[3]);
    reinterpret_cast<uint4*>(out)[1] = make_uint4(words[4], words[5], words[6], words[7]);
  }
}

// Tiles start on multiples of 128. Grid: (heads of v, tiles). Shared memory: 128 D elements of the product, 136 floats.
HH_KERNEL(quantize_v, QkNormRopeParams, THREADS) {
  HH_SHARED_MEMORY(shared);
  const RowTile tile = row_tile(p.rows, blockIdx.y);
  BY_SHAPE(transpose_v, p, tile, shared)
}
