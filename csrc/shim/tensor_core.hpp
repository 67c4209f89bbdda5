// Warp-wide matrix instructions, from the fragments that the 32 lanes give; layouts as in device/tensor_core.cuh.
#pragma once

#include "block.hpp"

namespace shim {

// d += a . b: products of bf16 are exact in double, and so is nearly their sum; d is rounded once.
void multiply_bf16(Site site, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

// Fails where a row is not aligned to 16 bytes, or does not lie in shared memory.
void load_matrices(Site site, unsigned (&r)[4], const void* row, bool transposed);

}  // namespace shim

// Turns that shared memory took for ldmatrix beyond one for every 8 rows, since the library was loaded.
extern "C" unsigned long long shim_bank_conflicts();
