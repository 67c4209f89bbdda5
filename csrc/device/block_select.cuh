// Chooses the largest values of a row that a block holds in registers: it finds a threshold bit by bit, without a sort.
//
// Value i of lane l in warp w is column (VALUES w + i) 32 + l. So loads are contiguous, and ballots have columns'
// order.
#pragma once

#include "block_scan.cuh"
#include "numerics.cuh"

constexpr int VALUES = 8;  // per thread: 2048 columns in 256 threads

// Maps a float32 other than NaN to an integer above 0 of the same order; -0.0 counts as 0.0.
HH_DEVICE u32 rank_key(float score) {
  const u32 bits = bits_of(score == 0.0f ? 0.0f : score);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

// Returns the bits of the values to keep. The threshold is the largest rank whose values, with all of higher rank, have
// weights that reach `need`. Values above it are kept, and of those at it as many as are needed, lowest column first.
// All are kept where their weights never reach `need`. Equal ranks have equal weights; rank 0 cannot be chosen.
template <typename Sum>
HH_DEVICE u32 choose(const u32 (&rank)[VALUES], const u32 (&weight)[VALUES], Sum need, Sum (*sums)[WARP],
                     u32* counts) {
  u32 threshold = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const u32 trial = threshold | 1u << bit;
    Sum reached = 0;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) reached += rank[i] >= trial ? weight[i] : 0u;
    if (block_total(reached, sums[bit % 2]) >= need) threshold = trial;
  }
  u32 above = 0, tied = 0, tied_below[VALUES], tied_in_warp = 0;
  Sum weight_above = 0;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const bool is_above = rank[i] > threshold, is_tied = rank[i] == threshold && rank[i] != 0;
    above |= static_cast<u32>(is_above) << i;
    tied |= static_cast<u32>(is_tied) << i;
    weight_above += is_above ? weight[i] : 0u;
    const u32 ballot = __ballot_sync(ALL_LANES, is_tied);
    tied_below[i] = tied_in_warp + count_below(ballot);
    tied_in_warp += static_cast<u32>(__popc(ballot));
  }
  weight_above = block_total(weight_above, sums[1]);
  const u32 tied_before = prefix_of_warps(tied_in_warp, counts).before;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const Sum before = weight_above + static_cast<Sum>(tied_before + tied_below[i]) * weight[i];
    if ((tied >> i & 1u) != 0 && before < need) above |= 1u << i;
  }
  return above;
}
