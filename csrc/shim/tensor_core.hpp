// Warp-wide matrix instructions on fragments of 32 lanes, laid out as in device/tensor_core.cuh.
#pragma once

#include "block.hpp"

namespace shim {

// Computes d += a . b. Products of bf16 are exact in double, their sum nearly so; d is rounded once.
void multiply_bf16(Site site, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

// Loads four 8x8 matrices, as ldmatrix does. Fails where a row is not aligned to 16 bytes or not in shared memory.
void load_matrices(Site site, unsigned (&r)[4], const void* row, bool transposed);

}  // namespace shim
