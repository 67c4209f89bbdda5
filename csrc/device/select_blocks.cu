// A dynamic block map on the device, in four launches; docs/OPS.md, `select_blocks`.
//
// pool_blocks sums q and k per block of 128 tokens, score_blocks multiplies the sums, select_blocks chooses and
// compacts every row, and order_rows sorts the rows by length. Predicted for one layer at 1080p in bf16 (40 and 8 heads
// of 128) on an H100 (3.35 TB/s, 67 float32 TFLOP/s, L2 about 5.5 TB/s), for 5 s (502 blocks) and 15 s (1,464 blocks):
//   pool    0.79 and 2.3 GB read, half in fp8                             0.25 and 0.70 ms
//   score   2.6 and 22 GFLOP at two thirds of the peak; 0.13 and 1.1 GB
//           from L2, 8 and 69 MB written                                  0.06 and 0.5 ms
//   select  32 sums over each of 4,016 and 11,712 rows; 24 and 206 MB     0.02 and 0.08 ms
//   order   16 and 137 million comparisons                                2 and 16 us
//
// A thread of `score` loads 6 vectors of 16 bytes per 32 channels, all in flight at once: 49 KB an SM (2 blocks of 256
// threads, at most 128 registers), beside 2048 cycles of fmaf per scheduler. A form in which each load waited for the
// stores of the one before it made 4 + 2 trips to L2, 2000 to 3000 cycles with 8 KB in flight: predicted 20 to 60 %
// slower.
//
// Scores go through memory, which takes one launch more than a program per row that computes its own. At 15 s they are
// 138 MB written and read, half of that from L2; a program per row would read all keys of its head, 8.8 GB in all.
// Scores are float32 products in float32 sums: TF32 would change which blocks are chosen. fmaf rounds once per term
// instead of twice; sums of integers are exact either way.
#include "block_pool.cuh"
#include "block_scan.cuh"
#include "block_select.cuh"
#include "numerics.cuh"

// Pool ----------------------------------------------------------------------------------------------------------------

// Grid: (Hq + Hkv, S), so that blocks that run at once read adjacent heads of the same tokens. Shared memory: the
// float32 sums of each thread's 16 bytes of channels, 4 KB in bf16 and 8 in 8 bits.
HH_KERNEL(pool_blocks, PoolBlocksParams, POOL_THREADS) {
  HH_SHARED_MEMORY(shared);
  float* const partial = reinterpret_cast<float*>(shared);
  const int entry = static_cast<int>(blockIdx.x);
  const bool of_q = entry < p.heads_q;
  const Strided& x = of_q ? p.q : p.k;
  const int head = of_q ? entry : entry - p.heads_q;
  float* const to = p.pooled + (static_cast<i64>(entry) * gridDim.y + blockIdx.y) * p.d;
  if (p.format == INT8) {
    const float* const row_scale = of_q ? p.q_scale + head : nullptr;
    const float block_scale = of_q ? 1.0f : p.k_scale[head * gridDim.y + blockIdx.y];
    pool_block<int8>(p, x, head, row_scale, block_scale, partial, to);
  } else if (p.format == FP8) {
    pool_block<e4m3>(p, x, head, nullptr, 1.0f, partial, to);
  } else {
    pool_block<bf16>(p, x, head, nullptr, 1.0f, partial, to);
  }
}

// Score ---------------------------------------------------------------------------------------------------------------

// A block computes a tile of 128 rows and 64 columns, 8 x 4 per thread: per channel 3 vectors from shared memory serve
// 32 fmaf.
constexpr int SCORE_THREADS = 256;
constexpr int SCORE_ROWS = 128, SCORE_COLUMNS = 64, SCORE_DEPTH = 32;
constexpr int MY_ROWS = 8, MY_COLUMNS = 4;
constexpr int PAD = 4;  // floats: keeps vectors aligned; a warp's stores then meet 4 to a bank instead of 8

struct ScoreBlocksParams {
  const float* pooled;   // [Hq + Hkv, S, D]
  const float* inverse;  // [S]: 1 / tokens of the block
  const float* q_scale;  // [S], or null
  const float* k_scale;  // [S], or null
  float* scores;         // [Hkv, S, score_stride]
  float scale;
  int heads_q;
  int group;  // query heads per key/value head
  int d;      // a multiple of 32
  int blocks;
  int score_stride;  // a multiple of 4, at least `blocks`
  int mean;          // 1 to add up the group's scores, by the sum of its queries; 0 to take their maximum
};

// Loads ROWS rows of SCORE_DEPTH channels, adds up `members` heads, and stores them as [channel][row], zeros past the
// last block. The loads of a member are in flight together: none waits for the stores of another row.
template <int ROWS>
HH_DEVICE void stage(float* to, const float* from, int first, const ScoreBlocksParams& p, int members) {
  constexpr int LANES = SCORE_DEPTH / 4, STRIDE = ROWS + PAD;  // 8 lanes read 128 bytes of a row
  constexpr int AT_ONCE = SCORE_THREADS / LANES, MINE = ROWS / AT_ONCE;
  const int channel = static_cast<int>(threadIdx.x) % LANES * 4, row = static_cast<int>(threadIdx.x) / LANES;
  float4 sums[MINE];
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    const int block = first + row + i * AT_ONCE;
    sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (block < p.blocks) sums[i] = *reinterpret_cast<const float4*>(from + static_cast<i64>(block) * p.d + channel);
  }
  for (int member = 1; member < members; ++member) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const int block = first + row + i * AT_ONCE;
      if (block >= p.blocks) continue;
      const i64 entry = static_cast<i64>(member) * p.blocks + block;
      const float4 x = *reinterpret_cast<const float4*>(from + entry * p.d + channel);
      sums[i].x += x.x;
      sums[i].y += x.y;
      sums[i].z += x.z;
      sums[i].w += x.w;
    }
  }
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    float* const at = to + channel * STRIDE + row + i * AT_ONCE;
    at[0] = sums[i].x;
    at[STRIDE] = sums[i].y;
    at[2 * STRIDE] = sums[i].z;
    at[3 * STRIDE] = sums[i].w;
  }
}

// Grid: (columns / 64, rows / 128, Hkv). Shared memory: 32 * (132 + 68) floats.
HH_KERNEL(score_blocks, ScoreBlocksParams, SCORE_THREADS) {
  HH_SHARED_MEMORY(shared);
  constexpr int Q_STRIDE = SCORE_ROWS + PAD, K_STRIDE = SCORE_COLUMNS + PAD;
  float* const queries = reinterpret_cast<float*>(shared);
  float* const keys = queries + SCORE_DEPTH * Q_STRIDE;
  const int head = static_cast<int>(blockIdx.z);
  const int first_row = static_cast<int>(blockIdx.y) * SCORE_ROWS;
  const int first_column = static_cast<int>(blockIdx.x) * SCORE_COLUMNS;
  const int my_row = (2 * warp_of_thread() + lane_of_thread() / 16) * MY_ROWS;
  const int my_column = lane_of_thread() % 16 * MY_COLUMNS;
  const i64 per_head = static_cast<i64>(p.blocks) * p.d;
  const float* const of_k = p.pooled + (p.heads_q + head) * per_head;

  float best[MY_ROWS][MY_COLUMNS];
#pragma unroll
  for (int r = 0; r < MY_ROWS; ++r) {
#pragma unroll
    for (int c = 0; c < MY_COLUMNS; ++c) best[r][c] = minus_infinity();
  }
  for (int member = 0; member < (p.mean != 0 ? 1 : p.group); ++member) {
    const float* const of_q = p.pooled + (static_cast<i64>(head) * p.group + member) * per_head;
    float sums[MY_ROWS][MY_COLUMNS] = {};
    for (int depth = 0; depth < p.d; depth += SCORE_DEPTH) {
      __syncthreads();  // the tile before this one has been read
      stage<SCORE_ROWS>(queries, of_q + depth, first_row, p, p.mean != 0 ? p.group : 1);
      stage<SCORE_COLUMNS>(keys, of_k + depth, first_column, p, 1);
      __syncthreads();
#pragma unroll 4
      for (int i = 0; i < SCORE_DEPTH; ++i) {
        const float4 low = *reinterpret_cast<const float4*>(queries + i * Q_STRIDE + my_row);
        const float4 high = *reinterpret_cast<const float4*>(queries + i * Q_STRIDE + my_row + 4);
        const float4 key = *reinterpret_cast<const float4*>(keys + i * K_STRIDE + my_column);
        const float left[MY_ROWS] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        const float right[MY_COLUMNS] = {key.x, key.y, key.z, key.w};
#pragma unroll
        for (int r = 0; r < MY_ROWS; ++r) {
#pragma unroll
          for (int c = 0; c < MY_COLUMNS; ++c) sums[r][c] = fmaf(left[r], right[c], sums[r][c]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < MY_ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < MY_COLUMNS; ++c) best[r][c] = fmaxf(best[r][c], sums[r][c]);
    }
  }

  float factor_k[MY_COLUMNS];
#pragma unroll
  for (int c = 0; c < MY_COLUMNS; ++c) {
    const int column = first_column + my_column + c;
    factor_k[c] = column < p.blocks ? p.inverse[column] : 0.0f;
    if (p.k_scale != nullptr && column < p.blocks) factor_k[c] *= p.k_scale[column];
  }
  if (first_column + my_column >= p.score_stride) return;
#pragma unroll
  for (int r = 0; r < MY_ROWS; ++r) {
    const int row = first_row + my_row + r;
    if (row >= p.blocks) break;
    const float factor = (p.q_scale == nullptr ? p.inverse[row] : p.inverse[row] * p.q_scale[row]) * p.scale;
    float* const to = p.scores + (static_cast<i64>(head) * p.blocks + row) * p.score_stride + first_column + my_column;
    *reinterpret_cast<float4*>(to) =
        make_float4(best[r][0] * (factor * factor_k[0]), best[r][1] * (factor * factor_k[1]),
                    best[r][2] * (factor * factor_k[2]), best[r][3] * (factor * factor_k[3]));
  }
}

// Select --------------------------------------------------------------------------------------------------------------

constexpr int SELECT_THREADS = 256;
constexpr int FULL = -1, ABSENT = -2;
constexpr float BEST_WEIGHT = 1073741824.0f;  // 2^30, weight of a row's best block: sums of integer weights are exact
constexpr u64 MASS_STEPS = 1u << 20;          // `mass` counts in steps of 2^-20: 41 bits of a sum times 20 fit 64

struct SelectBlocksParams {
  const float* scores;  // [Hkv, S, score_stride]
  const int* table;     // [S, S]: mask id of a partial block, FULL or ABSENT
  const u8* prefix;     // [S]: 1 for a block that holds audio or text
  int* counts;          // [Hkv, S, 2]: full blocks, all blocks
  int* starts;          // [Hkv, S]
  int* columns;         // [Hkv * S * S]
  int* mask_ids;        // [Hkv * S * S]
  int blocks;
  int score_stride;
  int keep;  // blocks per row, or 0 to choose by mass
  int mass;  // in steps of 2^-20
};

struct SelectScratch {
  u64 sums[2][WARP];
  u32 counts[2][WARP];
  float best[WARP];
};

// Grid: (S rows, Hkv). Shared memory: a SelectScratch.
HH_KERNEL(select_blocks, SelectBlocksParams, SELECT_THREADS) {
  HH_SHARED_MEMORY(shared);
  SelectScratch& scratch = *reinterpret_cast<SelectScratch*>(shared);
  const int row = static_cast<int>(blockIdx.x);
  const int entry = static_cast<int>(blockIdx.y) * p.blocks + row, start = entry * p.blocks;
  const int first = warp_of_thread() * (VALUES * WARP) + lane_of_thread();
  const float* const scores = p.scores + static_cast<i64>(entry) * p.score_stride;
  const bool whole_row = p.prefix[row] != 0;

  float score[VALUES];
  int kind[VALUES];
  u32 rank[VALUES], always = 0;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int column = first + WARP * i;
    const bool inside = column < p.blocks;
    kind[i] = inside ? p.table[static_cast<i64>(row) * p.blocks + column] : ABSENT;
    score[i] = inside ? scores[column] : 0.0f;
    const bool prefix = whole_row || (inside && p.prefix[column] != 0);
    rank[i] = kind[i] != ABSENT && !prefix ? rank_key(score[i]) : 0u;
    always |= static_cast<u32>(kind[i] != ABSENT && prefix) << i;
  }

  u32 weight[VALUES], kept;
  if (p.keep != 0) {
#pragma unroll
    for (int i = 0; i < VALUES; ++i) weight[i] = 1;
    kept = always | choose(rank, weight, static_cast<u32>(p.keep), scratch.counts, scratch.counts[0]);
  } else {
    float best = minus_infinity();
#pragma unroll
    for (int i = 0; i < VALUES; ++i) best = rank[i] != 0 ? fmaxf(best, score[i]) : best;
    best = block_max(best, scratch.best);
    u64 total = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
      // Every weight is at least 1, so that a mass of 1 keeps every candidate.
      const float share = rank[i] != 0 ? expf(score[i] - best) * BEST_WEIGHT : 0.0f;
      weight[i] = rank[i] == 0 ? 0u : share >= 1.0f ? static_cast<u32>(share) : 1u;
      total += weight[i];
    }
    total = block_total(total, scratch.sums[0]);
    const u64 need = (total * static_cast<u64>(p.mass) + (MASS_STEPS - 1)) / MASS_STEPS;
    kept = always | choose(rank, weight, need, scratch.sums, scratch.counts[0]);
  }

  // A word counts full blocks in its lower half and partial ones in its upper: at most 2048 of either.
  u32 below[VALUES], in_warp = 0;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const bool is_kept = (kept >> i & 1u) != 0;
    const u32 full = __ballot_sync(ALL_LANES, is_kept && kind[i] == FULL);
    const u32 partial = __ballot_sync(ALL_LANES, is_kept && kind[i] != FULL);
    below[i] = in_warp + (count_below(full) | count_below(partial) << 16);
    in_warp += static_cast<u32>(__popc(full)) | static_cast<u32>(__popc(partial)) << 16;
  }
  const Prefix prefix = prefix_of_warps(in_warp, scratch.counts[1]);
  const int full_blocks = static_cast<int>(prefix.total & 0xffffu);
  const int all_blocks = full_blocks + static_cast<int>(prefix.total >> 16);
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int column = first + WARP * i;
    if (column >= p.blocks) break;
    const u32 before = prefix.before + below[i];
    const int full_before = static_cast<int>(before & 0xffffu), partial_before = static_cast<int>(before >> 16);
    const bool is_kept = (kept >> i & 1u) != 0;
    const int place = !is_kept         ? all_blocks + column - full_before - partial_before
                      : kind[i] == FULL ? full_before
                                        : full_blocks + partial_before;
    p.columns[start + place] = column;
    p.mask_ids[start + place] = is_kept ? kind[i] : FULL;
  }
  if (threadIdx.x == 0) {
    p.counts[2 * entry] = full_blocks;
    p.counts[2 * entry + 1] = all_blocks;
    p.starts[entry] = start;
  }
}

// Order ---------------------------------------------------------------------------------------------------------------

constexpr int ORDER_THREADS = 256;
constexpr int ORDER_WARPS = ORDER_THREADS / WARP;

struct OrderRowsParams {
  const int* counts;  // [rows, 2]
  int* order;         // [rows]: longest first, rows of equal length in ascending order
  int rows;
};

// Grid: (rows / 32,). A lane per row counts the rows that come before it; each of the 8 warps counts among an eighth of
// all rows. Shared memory: 2 * 8 * 32 words.
HH_KERNEL(order_rows, OrderRowsParams, ORDER_THREADS) {
  HH_SHARED_MEMORY(shared);
  int* const lengths = reinterpret_cast<int*>(shared) + warp_of_thread() * WARP;
  u32* const counted = reinterpret_cast<u32*>(shared) + ORDER_THREADS;
  const int lane = lane_of_thread(), row = static_cast<int>(blockIdx.x) * WARP + lane;
  const int length = row < p.rows ? p.counts[2 * static_cast<i64>(row) + 1] : 0;
  u32 before = 0;
  for (int first = warp_of_thread() * WARP; first < p.rows; first += ORDER_THREADS) {
    const int other = first + lane;
    __syncwarp();  // the lengths before these have been read
    lengths[lane] = other < p.rows ? p.counts[2 * static_cast<i64>(other) + 1] : -1;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < WARP; i += 4) {
      const int4 four = *reinterpret_cast<const int4*>(lengths + i);
      before += static_cast<u32>(four.x + (first + i < row) > length);
      before += static_cast<u32>(four.y + (first + i + 1 < row) > length);
      before += static_cast<u32>(four.z + (first + i + 2 < row) > length);
      before += static_cast<u32>(four.w + (first + i + 3 < row) > length);
    }
  }
  counted[threadIdx.x] = before;
  __syncthreads();
  if (warp_of_thread() != 0 || row >= p.rows) return;
  u32 place = 0;
#pragma unroll
  for (int i = 0; i < ORDER_WARPS; ++i) place += counted[i * WARP + lane];
  p.order[place] = row;
}
