// Sums and prefix sums of integers over a warp and a block, without atomics. They are exact, so no order changes them.
//
// `scratch` is 32 values of shared memory. A call writes it before its only barrier and reads it after. So the next
// call needs other scratch, and the call after that may use the first again: a loop alternates between two.
#pragma once

#include "platform.cuh"

// Returns the sum of 32 lanes to every lane: one instruction from sm_80 on.
HH_DEVICE u32 warp_sum(u32 x) { return __reduce_add_sync(ALL_LANES, x); }

// Adds values below 2^47 in two parts whose sums fit 32 bits: 2 reductions, where shuffles of 64 bits take 20
// instructions.
HH_DEVICE u64 warp_sum(u64 x) {
  constexpr int LOW_BITS = 20;
  const u32 low = warp_sum(static_cast<u32>(x) & ((1u << LOW_BITS) - 1u));
  const u32 high = warp_sum(static_cast<u32>(x >> LOW_BITS));
  return (static_cast<u64>(high) << LOW_BITS) + low;
}

// Returns the sum over a block to every thread. In 64 bits, the sum over a warp must be below 2^47.
template <typename T>
HH_DEVICE T block_total(T x, T* scratch) {
  return block_join(x, scratch, T{0}, [](T y) { return warp_sum(y); });
}

// Counts the lanes below this one that set their flag in a ballot.
HH_DEVICE u32 count_below(u32 ballot) {
  return static_cast<u32>(__popc(ballot & ((1u << lane_of_thread()) - 1u)));
}

struct Prefix {
  u32 before;  // sum over the warps below this one
  u32 total;   // sum over the block
};

// Computes the prefix sum over warps of one value per warp, which all its lanes pass.
HH_DEVICE Prefix prefix_of_warps(u32 x, u32* scratch) {
  const int lane = lane_of_thread(), warp = warp_of_thread(), warps = static_cast<int>(blockDim.x) / WARP;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  const u32 given = lane < warps ? scratch[lane] : 0u;
  return Prefix{warp_sum(lane < warp ? given : 0u), warp_sum(given)};
}
