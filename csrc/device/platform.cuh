// The platform of device code, the same for nvcc, NVRTC, and a host compiler with the shim (HH_SHIM).
//
// No header of CUDA or torch is included: NVRTC's wheel has none, and cubins must not depend on torch's version.
#pragma once

#if defined(HH_SHIM)
#include "../shim/cuda.hpp"
#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

static_assert(sizeof(u32) == 4 && sizeof(i64) == 8 && sizeof(void*) == 8, "a 64-bit platform");

#define HH_SHARED_FUNCTION __host__ __device__ __forceinline__  // gives the same bits on host and device
#define HH_DEVICE __device__ __forceinline__

// HH_KERNEL(name, Params, threads) { ... p ... } defines an entry point that takes one struct, `p`, and at most
// `threads` threads a block. HH_KERNEL_OF_BLOCKS also limits registers so that `blocks` blocks fit an SM.
// HH_SHARED_MEMORY(name) is the dynamic shared memory of the launch, 128-byte aligned. Static shared memory is not
// used: the shim poisons only what a launch asks for.
#if defined(HH_SHIM)
#define HH_KERNEL(name, Params, threads)                                                                  \
  static void name##_body(const Params& p);                                                               \
  extern "C" int shim_run_##name(const shim::Launch* launch, char* message, unsigned long long capacity) { \
    return shim::run(*launch, sizeof(Params), threads, message, capacity,                                 \
                     [](const void* p) { name##_body(*static_cast<const Params*>(p)); });                 \
  }                                                                                                       \
  static void name##_body(const Params& p)
#define HH_KERNEL_OF_BLOCKS(name, Params, threads, blocks) HH_KERNEL(name, Params, threads)
#define HH_SHARED_MEMORY(name) unsigned char* const name = shim::shared_memory()
#else
#define HH_KERNEL(name, Params, threads) \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Params p)
#define HH_KERNEL_OF_BLOCKS(name, Params, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p)
#define HH_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

constexpr u32 ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

HH_DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x) % WARP; }
HH_DEVICE int warp_of_thread() { return static_cast<int>(threadIdx.x) / WARP; }

// Returns the larger of two numbers, NaN where one is NaN: fmaxf drops it.
HH_SHARED_FUNCTION float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
  return largest;
#else
  return a > b || a != a ? a : b;
#endif
}

// Return the sum and the maximum over LANES adjacent lanes, a power of two, with the same bits in each of them. All 32
// lanes must call.
template <int LANES>
HH_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
template <int LANES>
HH_DEVICE float lanes_max(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

// Return the sum and the maximum over a block, with the same bits in every thread. `scratch` is 32 floats of shared
// memory, free again after the next barrier.
template <typename T, typename Join>
HH_DEVICE T block_join(T x, T* scratch, T neutral, Join join) {
  const int warps = static_cast<int>(blockDim.x) / WARP;
  x = join(x);
  if (lane_of_thread() == 0) scratch[warp_of_thread()] = x;
  __syncthreads();
  return join(lane_of_thread() < warps ? scratch[lane_of_thread()] : neutral);
}
HH_DEVICE float block_sum(float x, float* scratch) {
  return block_join(x, scratch, 0.0f, [](float y) { return lanes_sum<WARP>(y); });
}
HH_DEVICE float block_max(float x, float* scratch) {
  return block_join(x, scratch, 0.0f, [](float y) { return lanes_max<WARP>(y); });
}
