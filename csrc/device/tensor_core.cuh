// Warp-wide matrix instructions of sm_80 and up: ldmatrix and mma.sync, bf16 with float32 accumulation.
//
// Fragments as the PTX ISA lays them out, with g = lane / 4 and t = lane % 4:
//   A [16, 16]: a[0] (row g, k 2t..2t+1), a[1] (row g + 8), a[2] (row g, k + 8), a[3] (row g + 8, k + 8)
//   B [16, 8]:  b[0] (k 2t..2t+1, column g), b[1] (k + 8)
//   D [16, 8]:  d[0..1] (row g, columns 2t..2t+1), d[2..3] (row g + 8)
#pragma once

#include "platform.cuh"

// mma_m16n8k16_bf16(d, a, b) computes d += a . b.
#if defined(HH_SHIM)
#define mma_m16n8k16_bf16(d, a, b) shim::multiply_bf16(SHIM_SITE("mma_m16n8k16_bf16"), d, a, b)
// ldmatrix_x4(r, row) loads into r[i] of this lane elements 2t..2t+1 of row g of the i-th 8x8 matrix of 16-bit
// elements. Lanes 8i..8i+7 pass the addresses of its rows, 16 bytes each.
#define ldmatrix_x4(r, row) shim::load_matrices(SHIM_SITE("ldmatrix_x4"), r, row, false)
// ldmatrix_x4_trans does so with the matrices transposed: elements (row 2t, column g) and (row 2t + 1, column g).
#define ldmatrix_x4_trans(r, row) shim::load_matrices(SHIM_SITE("ldmatrix_x4_trans"), r, row, true)
#else
HH_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

HH_DEVICE u32 shared_address(const void* shared) { return static_cast<u32>(__cvta_generic_to_shared(shared)); }

HH_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

HH_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
#endif
