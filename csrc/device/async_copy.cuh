// Asynchronous copies from global to shared memory, cp.async of sm_80 and up.
#pragma once

#include "platform.cuh"

// copy_async_16(shared, global, bytes) begins to copy 16 bytes between addresses aligned to 16. Only the first `bytes`
// are read, the others become zeros; with 0 bytes `global` is not read at all.
// wait_for_copies() waits until this thread sees all copies that it began; other threads see them after a barrier.
#if defined(HH_SHIM)
#define copy_async_16(shared, global, bytes) shim::begin_copy(SHIM_SITE("copy_async_16"), shared, global, bytes)
#define wait_for_copies() shim::finish_copies()
#else
HH_DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
  // .cg caches in L2 only: a block reads the copied bytes again from shared memory, not from L1.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<u32>(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes)
               : "memory");
}

HH_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }
#endif
