// Block-sparse attention over a block map, in bf16, with FlashAttention's online softmax or, where scores are bounded,
// without a maximum; docs/OPS.md. It is the simple form, with mma.sync and cp.async of sm_80: a second, independent
// implementation that the Triton kernel can be compared with.
//
// A block computes 128 queries of one head, 16 in each of 8 warps, over 128 keys at a time. k and v have one buffer
// each: one is copied while the other is multiplied. Scores and output take 128 of at most 255 registers a thread at
// head dim 128. 32 queries a warp would halve the reads of shared memory, but spill.
//
// There is one block per row of the map and head, not a persistent grid. The hardware starts blocks in order as SMs
// become free, so rows that come longest first balance the load; a fixed stride would ignore how long each row takes.
// Heads that share keys are consecutive blocks and read them from L2.
//
// Predicted for 64,256 rows, 40 heads of 128 and every block on an H100: 84.6 TFLOP, 1.6 GB from and to memory, 661 GB
// of k and v from L2. Per block of keys an SM takes 4900 cycles of shared memory (608 KiB), 3300 of tensor cores
// (mma.sync reaches 62 % of wgmma's rate) and 1024 of exponents. They overlap in part: 6500 cycles, 300 TFLOP/s, 0.28
// s. The mask of a partial block adds one trip to memory behind the products, 500 to 750 cycles; it would be two if the
// mask's id were not read before the products.
#include "async_copy.cuh"
#include "numerics.cuh"
#include "tensor_core.cuh"

constexpr int BLOCK = 128;  // queries and keys of a block of the map
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = BLOCK / WARPS;  // of a warp, and of a fragment of mma.sync
constexpr int CHUNK = 8;             // bf16 values in 16 bytes
constexpr int WORDS = BLOCK / 32;    // mask words of one query in a partial block
constexpr float LOG_2 = 0.6931471805599453f;

struct BlockSparseAttentionParams {
  const bf16* q;           // [N, Hq, D], tokens and heads strided
  const bf16* k;           // [M, Hkv, D]
  const bf16* v;           // [M, Hkv, D]
  void* out;               // [N, Hq, D] bf16, or e4m3 with out_scale
  const float* out_scale;  // [1] or null
  float* lse;              // [Hq, N] or null
  const int* counts;       // [Hm, R, 2]: full blocks, all blocks
  const int* starts;       // [Hm, R]
  const int* columns;      // of a row, full blocks first
  const int* mask_ids;     // beside columns
  const uint4* mask_bits;  // [masks, 128]
  const int* order;        // [Hm * R], longest first
  const float* gate;       // [N, Hq] or null
  const int* flag;         // null, or 0 to run the form with a maximum, other than 0 to run the bounded form
  i64 q_token, q_head;     // strides, in elements
  i64 k_token, k_head;
  i64 v_token, v_head;
  float scale;  // of the softmax, times log2(e); positive
  int queries, keys, map_rows, heads_q, heads_kv, map_heads;
};

// Returns 2^x, and 0 for results below 2^-126: one instruction, where exp2f() takes three to keep subnormal results.
HH_DEVICE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Returns the first of the two adjacent columns, of every 8, that a lane holds in a fragment. Its rows are lane / 4 and
// lane / 4 + 8.
HH_DEVICE int first_column() { return lane_of_thread() % 4 * 2; }

// Return the sum and the maximum over the 4 lanes that hold a row of a fragment, with the same bits in each of them.
HH_DEVICE float quad_sum(float x) {
  for (int step = 1; step < 4; step *= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
HH_DEVICE float quad_max(float x) {
  for (int step = 1; step < 4; step *= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

// Returns the byte offset of a chunk, 16 bytes, of a row of [rows, D] in shared memory. Chunks are swizzled within 128
// bytes from row to row, so that the eight rows that ldmatrix reads at once lie in different banks. For a constant c,
// byte_of(row + 8 * c, chunk) is byte_of(row, chunk) + 16 * D * c, and byte_of(row, chunk ^ c) is byte_of(row, chunk) ^
// 16 * c.
template <int D>
HH_DEVICE int byte_of(int row, int chunk) {
  constexpr int CHUNKS = D / CHUNK, PLACES = CHUNKS < 8 ? CHUNKS : 8;
  return row * (2 * D) + (chunk ^ row / (8 / PLACES) % PLACES) * 16;
}

// Begins to copy [128, D] of a head from token `first` on. Rows from `end` on become zeros and are not read.
template <int D>
HH_DEVICE void copy_block(u8* tile, const bf16* head, i64 stride, int first, int end) {
  constexpr int CHUNKS = D / CHUNK, ROWS_AT_ONCE = THREADS / CHUNKS;
  static_assert(ROWS_AT_ONCE % 8 == 0 && BLOCK % ROWS_AT_ONCE == 0, "every thread copies as many chunks");
  const int row = static_cast<int>(threadIdx.x) / CHUNKS, chunk = static_cast<int>(threadIdx.x) % CHUNKS;
  u8* const to = tile + byte_of<D>(row, chunk);
  const bf16* from = head + (first + row) * stride + chunk * CHUNK;
#pragma unroll
  for (int i = 0; i < BLOCK / ROWS_AT_ONCE; ++i) {
    copy_async_16(to + i * ROWS_AT_ONCE * 2 * D, from, first + row + i * ROWS_AT_ONCE < end ? 16 : 0);
    from += ROWS_AT_ONCE * stride;
  }
}

// Computes columns 8 * j .. 8 * j + 15 of d += a . b.
template <int COLUMNS>
HH_DEVICE void multiply_pair(float (&d)[COLUMNS / 8][4], const u32 (&a)[4], const u32 (&b)[4], int j) {
  const u32 left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
  mma_m16n8k16_bf16(d[j], a, left);
  mma_m16n8k16_bf16(d[j + 1], a, right);
}

// Computes s = q . k, not scaled.
template <int D>
HH_DEVICE void multiply_qk(float (&s)[BLOCK / 8][4], const u8* q_tile, const u8* k_tile) {
  const int lane = lane_of_thread(), at = byte_of<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < BLOCK / 8; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
  for (int depth = 0; depth < D / 16; ++depth) {
    u32 a[4];  // of this warp's queries
    ldmatrix_x4(a, q_tile + (byte_of<D>(warp_of_thread() * ROWS + lane % 16, lane / 16) ^ 32 * depth));
#pragma unroll
    for (int j = 0; j < BLOCK / 8; j += 2) {
      u32 b[4];  // 8 keys and the next 8
      ldmatrix_x4(b, k_tile + (at ^ 32 * depth) + j * 16 * D);
      multiply_pair<BLOCK>(s, a, b, j);
    }
  }
}

// Computes acc += p . v. p is pairs of bf16; fragments of a result have the layout of a left operand's, so p stays in
// its registers.
template <int D>
HH_DEVICE void multiply_pv(float (&acc)[D / 8][4], const u32 (&p)[BLOCK / 8][2], const u8* v_tile) {
  const int lane = lane_of_thread(), at = byte_of<D>(lane % 16, lane / 16);
#pragma unroll
  for (int depth = 0; depth < BLOCK / 16; ++depth) {
    const u32 a[4] = {p[2 * depth][0], p[2 * depth][1], p[2 * depth + 1][0], p[2 * depth + 1][1]};
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      u32 b[4];  // 8 channels and the next 8
      ldmatrix_x4_trans(b, v_tile + (at ^ 16 * j) + depth * 32 * D);
      multiply_pair<D>(acc, a, b, j);
    }
  }
}

// Sets the scores of keys whose bit is 0 to -inf. `mask` points at the bits of the warp's first query.
HH_DEVICE void hide(float (&s)[BLOCK / 8][4], const uint4* mask) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 bits = mask[lane_of_thread() / 4 + 8 * half];
    const u32 words[WORDS] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int j = 0; j < BLOCK / 8; ++j) {
      const u32 pair = words[j / 4] >> (j % 4 * 8 + first_column());
      if ((pair & 1u) == 0) s[j][2 * half] = minus_infinity();
      if ((pair & 2u) == 0) s[j][2 * half + 1] = minus_infinity();
    }
  }
}

// A lane's state of its two rows. Sums are over the lane's own keys; the maximum is the same in all lanes of a row.
struct Rows {
  float sum[2];    // sum of p: before rounding with a maximum, after rounding without
  float other[2];  // the maximum; without one the sum of p before rounding, for the LSE
};

// Runs one step without a maximum: p = 2^(scale * s). Sums are of p after rounding to bf16, as PV multiplies it.
HH_DEVICE void soften_bounded(u32 (&p)[BLOCK / 8][2], const float (&s)[BLOCK / 8][4], Rows& rows, float scale,
                              bool lse) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float before = 0.0f, after = 0.0f;
#pragma unroll
    for (int j = 0; j < BLOCK / 8; ++j) {
      const float left = power_of_two(s[j][2 * half] * scale), right = power_of_two(s[j][2 * half + 1] * scale);
      p[j][half] = pack_bf16(left, right);
      if (lse) before += left + right;
      after += low_bf16(p[j][half]) + high_bf16(p[j][half]);
    }
    rows.sum[half] += after;
    rows.other[half] += before;
  }
}

// Runs one step of the online softmax in base 2: p = 2^(scale * s - maximum). Sums and output so far are rescaled to
// the new maximum.
template <int D>
HH_DEVICE void soften(u32 (&p)[BLOCK / 8][2], const float (&s)[BLOCK / 8][4], float (&acc)[D / 8][4], Rows& rows,
                      float scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float largest = minus_infinity();
#pragma unroll
    for (int j = 0; j < BLOCK / 8; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
    const float maximum = fmaxf(rows.other[half], quad_max(largest) * scale);
    const float shift = maximum == minus_infinity() ? 0.0f : maximum;  // without a key so far -inf - -inf is NaN
    const float factor = power_of_two(rows.other[half] - shift);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < BLOCK / 8; ++j) {
      const float left = power_of_two(fmaf(s[j][2 * half], scale, -shift));
      const float right = power_of_two(fmaf(s[j][2 * half + 1], scale, -shift));
      sum = sum + left + right;
      p[j][half] = pack_bf16(left, right);
    }
    rows.other[half] = maximum;
    rows.sum[half] = fmaf(rows.sum[half], factor, sum);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      acc[j][2 * half] *= factor;
      acc[j][2 * half + 1] *= factor;
    }
  }
}

// Stores a warp's rows from shared memory, 16 bytes a lane. `out` points at the block's first query; a row is BYTES
// long.
template <int D, int BYTES>
HH_DEVICE void store_rows(u8* out, i64 stride, const u8* tile, int rows) {
  constexpr int CHUNKS = BYTES / 16;
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / WARP; ++i) {
    const int at = i * WARP + lane_of_thread(), row = warp_of_thread() * ROWS + at / CHUNKS, chunk = at % CHUNKS;
    if (row >= rows) continue;
    *reinterpret_cast<uint4*>(out + row * stride + chunk * 16) =
        *reinterpret_cast<const uint4*>(tile + byte_of<D>(row, chunk));
  }
}

// Normalises, gates, rounds and stores the output.
template <int D, bool BOUNDED>
HH_DEVICE void finish(const BlockSparseAttentionParams& p, float (&acc)[D / 8][4], const Rows& rows, u8* q_tile,
                      int head, int first_query) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_of_thread() * ROWS + 8 * half + lane_of_thread() / 4, query = first_query + row;
    const bool live = query < p.queries;
    const i64 token = static_cast<i64>(query) * p.heads_q + head;
    float sum = quad_sum(rows.sum[half]);
    if (sum == 0.0f) sum = 1.0f;  // no key: 0 / 1, and an LSE of -inf
    const float log_sum = BOUNDED ? log2f(quad_sum(rows.other[half])) : rows.other[half] + log2f(sum);
    if (p.lse != nullptr && live && first_column() == 0) {
      p.lse[static_cast<i64>(head) * p.queries + query] = log_sum * LOG_2;
    }
    float factor = 1.0f / sum;
    if (p.gate != nullptr && live) factor *= p.gate[token];
    if (p.out_scale != nullptr) factor *= 1.0f / *p.out_scale;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      acc[j][2 * half] *= factor;
      acc[j][2 * half + 1] *= factor;
    }
    // The output goes to this warp's rows of q, which no other warp reads, and from there to memory in whole rows.
    if (p.out_scale == nullptr) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        *reinterpret_cast<u32*>(q_tile + byte_of<D>(row, j) + 2 * first_column()) =
            pack_bf16(acc[j][2 * half], acc[j][2 * half + 1]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        const u32 low = to_e4m3(acc[j][2 * half]).bits, high = to_e4m3(acc[j][2 * half + 1]).bits;
        *reinterpret_cast<u16*>(q_tile + byte_of<D>(row, j / 2) + j % 2 * 8 + first_column()) =
            static_cast<u16>(low | high << 8);
      }
    }
  }
  __syncwarp();
  const i64 first = (static_cast<i64>(first_query) * p.heads_q + head) * D, stride = static_cast<i64>(p.heads_q) * D;
  u8* const out = static_cast<u8*>(p.out);
  if (p.out_scale == nullptr) {
    store_rows<D, 2 * D>(out + 2 * first, 2 * stride, q_tile, p.queries - first_query);
  } else {
    store_rows<D, D>(out + first, stride, q_tile, p.queries - first_query);
  }
}

template <int D, bool BOUNDED>
HH_DEVICE void attend(const BlockSparseAttentionParams& p) {
  if (p.flag != nullptr && (*p.flag != 0) != BOUNDED) return;  // the other form's turn
  HH_SHARED_MEMORY(q_tile);
  u8* const k_tile = q_tile + BLOCK * 2 * D;
  u8* const v_tile = k_tile + BLOCK * 2 * D;

  const int sharing = p.heads_q / p.map_heads;  // query heads that walk the same row of the map
  const int entry = p.order[blockIdx.x / sharing];
  const int head = entry / p.map_rows * sharing + static_cast<int>(blockIdx.x) % sharing;
  const int kv_head = head / (p.heads_q / p.heads_kv);
  const int first_query = entry % p.map_rows * BLOCK;
  const int start = p.starts[entry], n_full = p.counts[2 * entry], n_all = p.counts[2 * entry + 1];
  const bf16* const k_head = p.k + kv_head * p.k_head;
  const bf16* const v_head = p.v + kv_head * p.v_head;

  float acc[D / 8][4] = {};
  Rows rows = {};
  if (!BOUNDED) rows.other[0] = rows.other[1] = minus_infinity();

  copy_block<D>(q_tile, p.q + head * p.q_head, p.q_token, first_query, p.queries);
  int column = n_all > 0 ? p.columns[start] : 0;
  if (n_all > 0) copy_block<D>(k_tile, k_head, p.k_token, column * BLOCK, p.keys);
  for (int i = 0; i < n_all; ++i) {
    // Both are read before the products, so that neither the copy of the next k nor the mask waits for its address.
    const int next = i + 1 < n_all ? p.columns[start + i + 1] : 0;
    const int mask = i >= n_full ? p.mask_ids[start + i] : 0;
    wait_for_copies();
    __syncthreads();  // k is there, and every warp has read the last v
    copy_block<D>(v_tile, v_head, p.v_token, column * BLOCK, p.keys);
    float s[BLOCK / 8][4];
    multiply_qk<D>(s, q_tile, k_tile);
    wait_for_copies();
    __syncthreads();  // v is there, and every warp has read k
    if (i + 1 < n_all) copy_block<D>(k_tile, k_head, p.k_token, next * BLOCK, p.keys);
    if (i >= n_full) hide(s, p.mask_bits + static_cast<i64>(mask) * BLOCK + warp_of_thread() * ROWS);
    u32 weights[BLOCK / 8][2];
    if (BOUNDED) {
      soften_bounded(weights, s, rows, p.scale, p.lse != nullptr);
    } else {
      soften<D>(weights, s, acc, rows, p.scale);
    }
    multiply_pv<D>(acc, weights, v_tile);
    column = next;
  }
  if (n_all == 0) {
    wait_for_copies();
    __syncthreads();  // q is there
  }

  finish<D, BOUNDED>(p, acc, rows, q_tile, head, first_query);
}

// Grid: (R * Hq). Shared memory: 768 * D bytes, for one block each of q, k and v.
HH_KERNEL(block_sparse_attention_d32, BlockSparseAttentionParams, THREADS) { attend<32, false>(p); }
HH_KERNEL(block_sparse_attention_d32_bounded, BlockSparseAttentionParams, THREADS) { attend<32, true>(p); }
HH_KERNEL(block_sparse_attention_d64, BlockSparseAttentionParams, THREADS) { attend<64, false>(p); }
HH_KERNEL(block_sparse_attention_d64_bounded, BlockSparseAttentionParams, THREADS) { attend<64, true>(p); }
HH_KERNEL(block_sparse_attention_d128, BlockSparseAttentionParams, THREADS) { attend<128, false>(p); }
HH_KERNEL(block_sparse_attention_d128_bounded, BlockSparseAttentionParams, THREADS) { attend<128, true>(p); }
