// Copies to shared memory that go on while their thread does (cp.async).
#pragma once

#include "block.hpp"

namespace shim {

// Begins to copy 16 bytes, of which only the first `bytes` are read and the others become zeros. Until the thread waits,
// the source is not read and the destination holds poison: a thread that looks too early finds neither the new data nor
// the old. Fails where an address is not aligned to 16 bytes, or `shared` is not shared memory.
void begin_copy(Site site, void* shared, const void* global, int bytes);

// Delivers all that this thread has begun to copy.
void finish_copies();

}  // namespace shim
