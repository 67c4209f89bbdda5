// Kernels that show what the shim of csrc/ sees, for tests/emulators/test_cuda_shim.py: right ones (variant 0) and wrong ones.
#include "async_copy.cuh"
#include "block_scan.cuh"
#include "numerics.cuh"
#include "tensor_core.cuh"

struct ShimParams {
  const void* in;
  void* out;
  int size;
  int variant;
};

constexpr int THREADS = 256;

HH_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
HH_DEVICE int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x) + thread(); }

// Meetings ------------------------------------------------------------------------------------------------------------

HH_KERNEL(one_has_returned, ShimParams, THREADS) {
  if (thread() == 37 && p.variant != 0) return;
  __syncthreads();  // line: barrier that thread 37 does not reach
}

HH_KERNEL(never_meet, ShimParams, THREADS) {
  if (thread() <= 32 && p.variant != 0) {
    __syncthreads();  // line: barrier of warp 0 and one lane
  } else {
    __syncwarp();  // line: meeting without that lane
  }
}

HH_KERNEL(two_barriers, ShimParams, THREADS) {
  if (thread() < 32 && p.variant != 0) {
    __syncthreads();  // line: barrier of warp 0
  } else {
    __syncthreads();  // line: barrier of warp 1
  }
}

HH_KERNEL(lanes_part, ShimParams, THREADS) {
  if (lane_of_thread() < 16 && p.variant != 0) {
    static_cast<void>(__ballot_sync(ALL_LANES, true));  // line: ballot of half the lanes
  } else {
    static_cast<void>(__shfl_sync(ALL_LANES, 1, 0));  // line: shuffle of half the lanes
  }
}

HH_KERNEL(half_a_mask, ShimParams, THREADS) {
  static_cast<void>(__shfl_sync(p.variant == 0 ? ALL_LANES : 0xffffu, 1, 0));  // line: shuffle with a mask
}

// Shared memory -------------------------------------------------------------------------------------------------------

HH_KERNEL(reverse, ShimParams, THREADS) {
  HH_SHARED_MEMORY(memory);
  int* const shared = reinterpret_cast<int*>(memory);
  shared[thread()] = static_cast<const int*>(p.in)[thread()];
  if (p.variant == 0) __syncthreads();
  static_cast<int*>(p.out)[thread()] = shared[p.size - 1 - thread()];
}

HH_KERNEL(reverse_in_warps, ShimParams, THREADS) {
  HH_SHARED_MEMORY(memory);
  int* const shared = reinterpret_cast<int*>(memory) + warp_of_thread() * WARP;
  shared[lane_of_thread()] = static_cast<const int*>(p.in)[thread()];
  if (p.variant == 0) __syncwarp();
  static_cast<int*>(p.out)[thread()] = shared[WARP - 1 - lane_of_thread()];
}

// Each round overwrites what the one before it has read; with variant 1 before all have read it.
HH_KERNEL(rounds, ShimParams, THREADS) {
  HH_SHARED_MEMORY(memory);
  int* const shared = reinterpret_cast<int*>(memory);
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    shared[thread()] = 1000 * round + thread();
    __syncthreads();
    // Meetings of the warp between the barriers, as in a reduction: they hold no other warp back.
    const int read = __shfl_xor_sync(ALL_LANES, shared[p.size - 1 - thread()], 1);
    sum = 7 * sum + __shfl_xor_sync(ALL_LANES, read, 2);
    if (p.variant == 0) __syncthreads();
  }
  static_cast<int*>(p.out)[thread()] = sum;
}

HH_KERNEL(as_it_comes, ShimParams, THREADS) {
  HH_SHARED_MEMORY(memory);
  u32* const shared = reinterpret_cast<u32*>(memory);
  static_cast<u32*>(p.out)[thread_of_grid()] = shared[thread()];
  shared[thread()] = 0;
}

// out [2, 4] words of the vector that is copied: before the wait and after it. Variant 1 never waits.
HH_KERNEL(copied, ShimParams, 32) {
  HH_SHARED_MEMORY(memory);
  if (thread() != 0) return;
  const u32* const shared = reinterpret_cast<const u32*>(memory);
  u32* const out = static_cast<u32*>(p.out);
  copy_async_16(memory, p.in, p.size);
  for (int i = 0; i < 4; ++i) out[i] = shared[i];
  if (p.variant == 0) wait_for_copies();
  for (int i = 0; i < 4; ++i) out[4 + i] = shared[i];
}

// out: a counter, then who came as the n-th; no atomics, since the shim runs one thread at a time.
HH_KERNEL(who_comes_when, ShimParams, THREADS) {
  int* const out = static_cast<int*>(p.out);
  out[1 + out[0]++] = thread_of_grid();
}

// Variant 1 reads a word past the end, variant 2 a vector off its alignment.
HH_KERNEL(read_vector, ShimParams, THREADS) {
  HH_SHARED_MEMORY(memory);
  u32* const shared = reinterpret_cast<u32*>(memory);
  for (int i = 0; i < p.size; ++i) shared[i] = static_cast<u32>(i);
  __syncthreads();
  const u32* const word = shared + (p.variant == 1 ? p.size : 0);
  const uint4* const vector = reinterpret_cast<const uint4*>(shared + (p.variant == 2 ? 1 : 0));
  static_cast<u32*>(p.out)[thread()] = *word + vector->x;
}

// Exchanges -----------------------------------------------------------------------------------------------------------

// out [6, 32] of in [32].
HH_KERNEL(exchanges, ShimParams, 32) {
  const int lane = lane_of_thread(), x = static_cast<const int*>(p.in)[lane];
  int* const out = static_cast<int*>(p.out) + lane;
  out[0] = __shfl_sync(ALL_LANES, x, 31 - lane);
  out[32] = __shfl_xor_sync(ALL_LANES, x, 5);
  out[64] = static_cast<int>(__ballot_sync(ALL_LANES, x % 3 == 0));
  out[96] = static_cast<int>(__reduce_add_sync(ALL_LANES, static_cast<u32>(x)));
  out[128] = static_cast<int>(__shfl_sync(ALL_LANES, x * (i64{1} << 33), 7) / (i64{1} << 33));
  out[160] = static_cast<int>(count_below(__ballot_sync(ALL_LANES, x % 3 == 0)));
}

// Sums of the lanes up to this one; variant 1 is one lane off.
HH_KERNEL(prefix_sums, ShimParams, THREADS) {
  const int lane = lane_of_thread();
  int x = static_cast<const int*>(p.in)[thread()];
  for (int by = 1; by < WARP; by *= 2) {
    const int below = __shfl_sync(ALL_LANES, x, lane - by);
    if (p.variant == 0 ? lane >= by : lane > by) x += below;
  }
  static_cast<int*>(p.out)[thread()] = x;
}

// out: (sum in 64 bits, sum over the warps below, sum in 32 bits) of every thread.
HH_KERNEL(block_sums, ShimParams, THREADS) {
  HH_SHARED_MEMORY(memory);
  u64* const wide = reinterpret_cast<u64*>(memory);
  u32* const narrow = reinterpret_cast<u32*>(wide + WARP);
  const u64 x = static_cast<const u64*>(p.in)[thread()];
  u64* const out = static_cast<u64*>(p.out) + 3 * thread();
  out[0] = block_total(x, wide);
  const Prefix prefix = prefix_of_warps(warp_sum(static_cast<u32>(x & 0xffffu)), narrow);
  out[1] = prefix.before;
  out[2] = prefix.total;
}

// Tensor cores --------------------------------------------------------------------------------------------------------

// out [16, 16] = out + a . b of in: a [16, 16], then b [16, 16], bf16. Variant 0: fragments as the PTX ISA has them;
// 1: by ldmatrix; 2: the same, without the transposition that b needs.
HH_KERNEL(product, ShimParams, 32) {
  HH_SHARED_MEMORY(memory);
  bf16* const a = reinterpret_cast<bf16*>(memory);
  bf16* const b = a + 256;
  const int lane = lane_of_thread(), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 512; i += WARP) a[i] = static_cast<const bf16*>(p.in)[i];
  __syncwarp();
  u32 left[4], right[4];
  if (p.variant == 0) {
    for (int i = 0; i < 4; ++i) {
      const bf16* const two = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
      const bf16* const column = b + (2 * t + i % 2 * 8) * 16 + g + i / 2 * 8;
      left[i] = static_cast<u32>(two[0].bits) | static_cast<u32>(two[1].bits) << 16;
      right[i] = static_cast<u32>(column[0].bits) | static_cast<u32>(column[16].bits) << 16;
    }
  } else {
    const int row = lane % 16, column = lane / 16 * 8;
    ldmatrix_x4(left, a + row * 16 + column);
    if (p.variant == 1) {
      ldmatrix_x4_trans(right, b + row * 16 + column);
    } else {
      ldmatrix_x4(right, b + row * 16 + column);
    }
  }
  float* const out = static_cast<float*>(p.out);
  for (int half = 0; half < 2; ++half) {
    const u32 columns[2] = {right[2 * half], right[2 * half + 1]};
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = out[(g + i / 2 * 8) * 16 + 8 * half + 2 * t + i % 2];
    mma_m16n8k16_bf16(sums, left, columns);
    for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 16 + 8 * half + 2 * t + i % 2] = sums[i];
  }
}

// A row that starts `size` bytes into shared memory.
HH_KERNEL(load_rows, ShimParams, 32) {
  HH_SHARED_MEMORY(memory);
  u32 loaded[4];
  ldmatrix_x4(loaded, memory + p.size);  // line: ldmatrix
  static_cast<u32*>(p.out)[lane_of_thread()] = loaded[0];
}

// Numbers -------------------------------------------------------------------------------------------------------------

// out = f(in), `size` values; which f, says the variant.
HH_KERNEL(numbers, ShimParams, 32) {
  u16* const half_words = static_cast<u16*>(p.out);
  u32* const words = static_cast<u32*>(p.out);
  for (int i = lane_of_thread(); i < p.size; i += WARP) {
    if (p.variant == 2) words[i] = bits_of(to_float(bf16{static_cast<const u16*>(p.in)[i]}));
    if (p.variant == 3) words[i] = bits_of(to_float(e4m3{static_cast<const u8*>(p.in)[i]}));
    if (p.variant == 2 || p.variant == 3) continue;
    const float x = static_cast<const float*>(p.in)[i];
    if (p.variant == 0) half_words[i] = to_bf16(x).bits;
    if (p.variant == 1) static_cast<u8*>(p.out)[i] = to_e4m3(x).bits;
    if (p.variant == 4) words[i] = bits_of(scale_of(x, E4M3_MAX));
    if (p.variant == 5) words[i] = bits_of(inverse_rms(x, 5120));
    if (p.variant == 6) words[i] = pack_bf16(x, -x);
    if (p.variant == 7) words[i] = pack_e4m3(x, -x, 2.0f * x, 0.5f * x);
    if (p.variant == 9) words[i] = pack_int8(x, -x, 2.0f * x, 0.5f * x);
    if (p.variant == 10) words[i] = bits_of(scale_of(x, INT8_LIMIT));
    if (p.variant == 8) words[i] = bits_of(low_bf16(bits_of(x))) ^ bits_of(high_bf16(bits_of(x)));
  }
}
