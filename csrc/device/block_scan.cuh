// Sums and prefixes of integers over a warp and a block: exact, so the same in any order, and without atomics.
//
// `scratch` holds 32 values of shared memory. It is written before the one barrier of a call and read after it, so the
// next call needs other scratch, and the one after that may have this again: two that take turns serve a loop.
#pragma once

#include "platform.cuh"

// Sum of 32 lanes, the same in every lane: one instruction from sm_80 on.
HH_DEVICE u32 warp_sum(u32 x) { return __reduce_add_sync(ALL_LANES, x); }

// Of values below 2^47, in two parts whose sums fit 32 bits: 2 instructions, where shuffles of 64 bits take 20.
HH_DEVICE u64 warp_sum(u64 x) {
  constexpr int LOW_BITS = 20;
  const u32 low = warp_sum(static_cast<u32>(x) & ((1u << LOW_BITS) - 1u));
  const u32 high = warp_sum(static_cast<u32>(x >> LOW_BITS));
  return (static_cast<u64>(high) << LOW_BITS) + low;
}

// Sum over a block, the same in every thread; in 64 bits of values whose sums over a warp are below 2^47.
template <typename T>
HH_DEVICE T block_total(T x, T* scratch) {
  const int lane = lane_of_thread(), warps = static_cast<int>(blockDim.x) / WARP;
  x = warp_sum(x);
  if (lane == 0) scratch[warp_of_thread()] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : T{0});
}

// How many lanes below this one set their flag, from the ballot over it.
HH_DEVICE u32 count_below(u32 ballot) {
  return static_cast<u32>(__popc(ballot & ((1u << lane_of_thread()) - 1u)));
}

struct Prefix {
  u32 before;  // sum over the warps below this one
  u32 total;   // sum over the block
};

// Over one value per warp, which all its lanes give.
HH_DEVICE Prefix prefix_of_warps(u32 x, u32* scratch) {
  const int lane = lane_of_thread(), warp = warp_of_thread(), warps = static_cast<int>(blockDim.x) / WARP;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  const u32 given = lane < warps ? scratch[lane] : 0u;
  return Prefix{warp_sum(lane < warp ? given : 0u), warp_sum(given)};
}
