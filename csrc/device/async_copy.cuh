// cp.async of sm_80 and up: copies from global to shared memory that go on while their thread does.
#pragma once

#include "platform.cuh"

// copy_async_16(shared, global, bytes): 16 bytes, both addresses aligned to as many; only the first `bytes` of them are
// read, the others become zeros, and with 0 bytes `global` is not read at all.
// wait_for_copies(): until all copies that this thread began are there for it; a barrier shows them to other threads.
#if defined(HH_SHIM)
#define copy_async_16(shared, global, bytes) shim::begin_copy(SHIM_SITE("copy_async_16"), shared, global, bytes)
#define wait_for_copies() shim::finish_copies()
#else
HH_DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
  // .cg: through L2 alone, since a block reads what it copies from shared memory.
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<u32>(__cvta_generic_to_shared(shared))), "l"(global), "r"(bytes)
               : "memory");
}

HH_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }
#endif
