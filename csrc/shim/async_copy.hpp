// Asynchronous copies from global to shared memory (cp.async).
#pragma once

#include "block.hpp"

namespace shim {

// Begins to copy 16 bytes: only the first `bytes` are read, the others become zeros. Until the thread waits, the source
// is not read and the destination holds poison, so that a thread that reads too early finds neither new nor old data.
// Fails where an address is not aligned to 16 bytes, or `shared` is not in shared memory.
void begin_copy(Site site, void* shared, const void* global, int bytes);

// Delivers all copies that this thread has begun.
void finish_copies();

}  // namespace shim
