// The part of CUDA C++ that the kernels use, for a host compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.hpp"

#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))

#define threadIdx (shim::thread_index())
#define blockIdx (shim::block_index())
#define blockDim (shim::block_size())
#define gridDim (shim::grid_size())

#define __syncthreads() shim::barrier(SHIM_SITE("__syncthreads"))
#define __syncwarp() static_cast<void>(shim::exchange(SHIM_SITE("__syncwarp"), 0xffffffffu, "", 0))
#define __shfl_sync(mask, value, lane) shim::shuffle(SHIM_SITE("__shfl_sync"), mask, value, lane)
#define __shfl_xor_sync(mask, value, bits) \
  shim::shuffle(SHIM_SITE("__shfl_xor_sync"), mask, value, shim::lane() ^ static_cast<int>(bits))
#define __ballot_sync(mask, predicate) shim::ballot(SHIM_SITE("__ballot_sync"), mask, predicate)
#define __reduce_add_sync(mask, value) shim::reduce_add(SHIM_SITE("__reduce_add_sync"), mask, value)

namespace shim {

inline int lane() { return static_cast<int>(thread_index().x) % LANES; }

template <typename T>
T shuffle(Site site, unsigned mask, T value, int lane) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  return read<T>(exchange(site, mask, &value, sizeof value), lane & (LANES - 1));
}

inline unsigned reduce_add(Site site, unsigned mask, unsigned value) {
  const unsigned char* const table = exchange(site, mask, &value, sizeof value);
  unsigned sum = 0;
  for (int i = 0; i < LANES; ++i) sum += read<unsigned>(table, i);
  return sum;
}

inline unsigned ballot(Site site, unsigned mask, bool predicate) {
  return reduce_add(site, mask, static_cast<unsigned>(predicate) << lane());  // a bit of each lane's own
}

// Warp-wide matrix instructions on fragments of 32 lanes, laid out as in device/tensor_core.cuh.

// Computes d += a . b. Products of bf16 are exact in double, their sum nearly so; d is rounded once.
void multiply_bf16(Site site, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

// Loads four 8x8 matrices, as ldmatrix does. Fails where a row is not aligned to 16 bytes or not in shared memory.
void load_matrices(Site site, unsigned (&r)[4], const void* row, bool transposed);

}  // namespace shim

// Vector types have the alignment that a GPU demands; UndefinedBehaviorSanitizer reports a misaligned address.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
