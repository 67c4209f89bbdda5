// Residual add, RMSNorm and cast of whole rows, one pass over the residual stream; docs/OPS.md, `rmsnorm_quantize`.
//
// A block holds a row in registers: VECTORS vectors of four float32 per thread. Per element it reads 4 bytes and writes
// 1 (e4m3, int8) or 2 (bf16); with a branch it reads 2 bytes more and writes 4 more. 64,256 rows of 5120 with a branch,
// 8 bits, are 3.62 GB, predicted 1.08 ms at the 3.35 TB/s of an H100. Loads of `hidden` are 16 bytes a lane; codes are
// stored 4 bytes a lane, 128 contiguous bytes a warp.
//
// All loads of a row are in flight at once, one trip to memory a row: 128 bytes a thread, 192 with a branch. With 5
// blocks of 160 threads (73 to 80 registers) that is 102 and 154 KB an SM, where 3.35 TB/s at a latency of 0.7 us need
// 14 KB. A form in which each load waited for the use of the one before it made 8 trips, with 15 and 23 KB in flight in
// 6 blocks: predicted 0 to 30 % slower, most without a branch.
#include "numerics.cuh"

constexpr int VECTORS = 8;
constexpr int MAX_THREADS = 256;  // 8192 channels

struct RmsnormQuantizeParams {
  float* hidden;             // [N, C], rows hidden_stride apart
  const bf16* branch;        // [N, C], rows branch_stride apart, or null
  const float* norm_weight;  // [E, C]
  const int* row_tiles;      // [tiles, 3]: expert, first row, end row
  void* x;                   // [N, C] bf16, int8 or e4m3
  float* scale;              // [N] where x is codes
  i64 hidden_stride;
  i64 branch_stride;
  int channels;  // a multiple of 4
  int format;    // of x
};

// Calls use(i, at) for each of this thread's vectors, i, and its place in the row.
template <typename Use>
HH_DEVICE void each(Use use) {
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) use(i, i * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x));
}

// Grid: (128 rows of a tile, tiles). Shared memory: 64 floats.
HH_KERNEL_OF_BLOCKS(rmsnorm_quantize, RmsnormQuantizeParams, MAX_THREADS, 3) {
  HH_SHARED_MEMORY(shared);
  float* const sums = reinterpret_cast<float*>(shared);
  const int* const tile = p.row_tiles + 3 * blockIdx.y;
  const int expert = tile[0];
  const i64 row = static_cast<i64>(tile[1]) + blockIdx.x;
  if (row >= tile[2]) return;  // the whole block

  const int vectors = p.channels / 4;
  float4* const hidden = reinterpret_cast<float4*>(p.hidden + row * p.hidden_stride);
  const float4* const weight = reinterpret_cast<const float4*>(p.norm_weight + static_cast<i64>(expert) * p.channels);

  // All loads come before the first store and the first use of their values. The compiler must assume that a store to
  // `hidden` may change what a later load reads, so a store between them would make eight trips to memory of one.
  float4 held[VECTORS];
  each([&](int i, int at) { held[i] = at < vectors ? hidden[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f); });
  if (p.branch != nullptr) {
    const uint2* const branch = reinterpret_cast<const uint2*>(p.branch + row * p.branch_stride);
    uint2 added[VECTORS];
    each([&](int i, int at) { added[i] = at < vectors ? branch[at] : make_uint2(0, 0); });
    each([&](int i, int at) {
      held[i].x += low_bf16(added[i].x);
      held[i].y += high_bf16(added[i].x);
      held[i].z += low_bf16(added[i].y);
      held[i].w += high_bf16(added[i].y);
      if (at < vectors) hidden[at] = held[i];
    });
  }
  float squares = 0.0f;
  each([&](int i, int) {
    const float4 h = held[i];  // zeros past the end
    squares += h.x * h.x + h.y * h.y + h.z * h.z + h.w * h.w;
  });
  const float inverse = inverse_rms(block_sum(squares, sums), p.channels);

  float largest = 0.0f;
  each([&](int i, int at) {
    if (at >= vectors) return;
    const float4 w = weight[at];
    float4 y = held[i];
    y.x = y.x * inverse * (w.x + 1.0f);
    y.y = y.y * inverse * (w.y + 1.0f);
    y.z = y.z * inverse * (w.z + 1.0f);
    y.w = y.w * inverse * (w.w + 1.0f);
    largest = larger(largest, larger(larger(fabsf(y.x), fabsf(y.y)), larger(fabsf(y.z), fabsf(y.w))));
    held[i] = y;
  });
  if (p.format == BF16) {
    each([&](int i, int at) {
      if (at >= vectors) return;
      const float4 y = held[i];
      reinterpret_cast<uint2*>(static_cast<bf16*>(p.x) + row * p.channels)[at] =
          make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
    });
    return;
  }
  largest = block_max(largest, sums + WARP);
  const float scale = p.format == INT8 ? scale_of(largest, INT8_LIMIT) : scale_of(largest, E4M3_MAX);
  if (threadIdx.x == 0) p.scale[row] = scale;
  u32* const out = reinterpret_cast<u32*>(static_cast<u8*>(p.x) + row * p.channels);
  const float by = 1.0f / scale;
  each([&](int i, int at) {
    if (at >= vectors) return;
    const float4 y = held[i];
    out[at] = p.format == INT8 ? pack_int8(y.x * by, y.y * by, y.z * by, y.w * by)
                               : pack_e4m3(y.x * by, y.y * by, y.z * by, y.w * by);
  });
}
