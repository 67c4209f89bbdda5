// Sums of q and k per block of 128 tokens; a thread block computes one block of one head.
#pragma once

#include "numerics.cuh"

constexpr int BLOCK = 128;  // tokens
constexpr int POOL_THREADS = 128;
constexpr int POOL_BATCH = 4;  // loads in flight per thread, 16 bytes each

struct Strided {
  const void* data;
  i64 row, head, channel;  // strides, in elements
  int vectors;             // 1 where 16 bytes of channels are one aligned load, 0 where channels are read one by one
};

struct PoolBlocksParams {
  Strided q;             // [N, Hq, D]
  Strided k;             // [N, Hkv, D]
  const float* q_scale;  // [N, Hq] in INT8, whose values are summed; in FP8 codes are
  const float* k_scale;  // [Hkv, S] in INT8
  const u8* live;        // [S * 128]: 1 for a slot that holds a token; the rows of others are not read
  float* pooled;         // [Hq + Hkv, S, D]: sums, heads of q first
  int heads_q;
  int d;       // 32, 64 or 128
  int format;  // of q and k
};

template <typename T>
HH_DEVICE uint4 load_channels(const T* from, i64 stride, bool vectors) {
  if (vectors) return *reinterpret_cast<const uint4*>(from);
  constexpr int PER_WORD = 4 / sizeof(T), BITS = 8 * sizeof(T);
  u32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4 * PER_WORD; ++i) {
    words[i / PER_WORD] |= static_cast<u32>(from[i * stride].bits) << (i % PER_WORD * BITS);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Adds a word's values to sums; codes are multiplied by their row's scale, which e4m3 has none of: 1.
HH_DEVICE void add_word(float* sums, u32 word, float, bf16) {
  sums[0] += low_bf16(word);
  sums[1] += high_bf16(word);
}
template <typename Code>
HH_DEVICE void add_word(float* sums, u32 word, float scale, Code) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += to_float(Code{static_cast<u8>(word >> 8 * i & 0xffu)}) * scale;
}

// Sums one block of a head. row_scale points at the scale of the head's token 0, tokens p.heads_q apart, or is null.
// block_scale multiplies the sums.
template <typename T>
HH_DEVICE void pool_block(const PoolBlocksParams& p, const Strided& x, int head, const float* row_scale,
                          float block_scale, float* partial, float* to) {
  constexpr int PER_WORD = 4 / sizeof(T), CHANNELS = 4 * PER_WORD;
  const int thread = static_cast<int>(threadIdx.x), lanes = p.d / CHANNELS, groups = POOL_THREADS / lanes;
  const int group = thread / lanes, channel = thread % lanes * CHANNELS;
  const T* const from = static_cast<const T*>(x.data) + head * x.head + channel * x.channel;
  const i64 slot = static_cast<i64>(blockIdx.y) * BLOCK;

  float sums[CHANNELS] = {};
  for (int first = group; first < BLOCK; first += POOL_BATCH * groups) {
    uint4 held[POOL_BATCH];
    float scale[POOL_BATCH];
#pragma unroll
    for (int i = 0; i < POOL_BATCH; ++i) {
      const int row = first + i * groups;
      held[i] = make_uint4(0, 0, 0, 0);
      scale[i] = 1.0f;
      if (row < BLOCK && p.live[slot + row] != 0) {
        held[i] = load_channels(from + (slot + row) * x.row, x.channel, x.vectors != 0);
        if (row_scale != nullptr) scale[i] = row_scale[(slot + row) * p.heads_q];
      }
    }
#pragma unroll
    for (int i = 0; i < POOL_BATCH; ++i) {
      add_word(sums, held[i].x, scale[i], T{});
      add_word(sums + PER_WORD, held[i].y, scale[i], T{});
      add_word(sums + 2 * PER_WORD, held[i].z, scale[i], T{});
      add_word(sums + 3 * PER_WORD, held[i].w, scale[i], T{});
    }
  }
#pragma unroll
  for (int i = 0; i < CHANNELS; ++i) partial[group * p.d + channel + i] = sums[i];
  __syncthreads();
  if (thread >= p.d) return;
  float total = 0.0f;
  for (int i = 0; i < groups; ++i) total += partial[i * p.d + thread];
  to[thread] = total * block_scale;
}
