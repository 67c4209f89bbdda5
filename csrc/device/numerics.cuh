// Number formats, written once for host and device, so that tests on the host test what the device runs.
//
// Where the device has an instruction for a cast (bf16 from sm_80, e4m3 from sm_89), it uses that. The instruction
// rounds to nearest even, as the code for the host does, so the bits are the same.
#pragma once

#include "platform.cuh"

struct bf16 {
  u16 bits;
};
struct e4m3 {
  u8 bits;
};
struct int8 {
  u8 bits;
};

enum Format { BF16 = 0, INT8 = 1, FP8 = 2 };  // of operands and results, as ops.quantize.FORMATS numbers them

constexpr float E4M3_MAX = 448.0f;
constexpr float INT8_LIMIT = 127.0f;
constexpr float EPS = 1e-6f;  // of every RMSNorm, as the published model has it

HH_SHARED_FUNCTION u32 bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  u32 bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

HH_SHARED_FUNCTION float float_of(u32 bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

HH_SHARED_FUNCTION float minus_infinity() { return float_of(0xff800000u); }

// bf16 is the upper half of a float32.
HH_SHARED_FUNCTION float to_float(bf16 x) { return float_of(static_cast<u32>(x.bits) << 16); }

HH_SHARED_FUNCTION bf16 to_bf16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bf16{bits};
#else
  const u32 bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};  // NaN, as the instruction gives it
  return bf16{static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}

// Packs two values into a word, the first in the lower half, the order of two in memory.
HH_SHARED_FUNCTION u32 pack_bf16(float low, float high) {
  return static_cast<u32>(to_bf16(low).bits) | static_cast<u32>(to_bf16(high).bits) << 16;
}
HH_SHARED_FUNCTION float low_bf16(u32 pair) { return float_of(pair << 16); }
HH_SHARED_FUNCTION float high_bf16(u32 pair) { return float_of(pair & 0xffff0000u); }

HH_SHARED_FUNCTION float clamp_e4m3(float x) { return x > E4M3_MAX ? E4M3_MAX : x < -E4M3_MAX ? -E4M3_MAX : x; }

// Casts to e4m3: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; no infinity, NaN is 0x7f. It clamps first, so that an
// overflow saturates whatever the instruction would do. NaN stays NaN.
HH_SHARED_FUNCTION e4m3 to_e4m3(float x) {
  x = clamp_e4m3(x);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return e4m3{static_cast<u8>(pair & 0xffu)};
#else
  const u32 bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const u8 sign = static_cast<u8>(bits >> 24 & 0x80u);
  if (magnitude > 0x7f800000u) return e4m3{0x7f};  // NaN, as the instruction gives it
  if (magnitude < 0x3c800000u) {
    // Below 2^-6 codes are multiples of 2^-9. Adding 2^14 leaves that much of the sum's mantissa, rounded to even.
    return e4m3{static_cast<u8>(sign | (bits_of(float_of(magnitude) + 16384.0f) - 0x46800000u))};
  }
  const u32 rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);  // to 3 of 23 mantissa bits
  return e4m3{static_cast<u8>(sign | ((rounded >> 20) - (120u << 3)))};
#endif
}

// A code's exponent and mantissa, shifted to their place in float32, are 2^-120 times its value, for subnormal codes
// too. So one multiplication, which is exact, converts every code without a branch.
HH_SHARED_FUNCTION float to_float(e4m3 x) {
  const u32 magnitude = x.bits & 0x7fu, sign = static_cast<u32>(x.bits & 0x80u) << 24;
  const float value = float_of(sign | magnitude << 20) * 0x1p120f;
  return magnitude == 0x7fu ? float_of(0x7fffffffu) : value;
}

// Packs four codes into a word, the first in the lowest byte.
HH_SHARED_FUNCTION u32 pack_e4m3(float a, float b, float c, float d) {
  return static_cast<u32>(to_e4m3(a).bits) | static_cast<u32>(to_e4m3(b).bits) << 8 |
         static_cast<u32>(to_e4m3(c).bits) << 16 | static_cast<u32>(to_e4m3(d).bits) << 24;
}

// Returns the scale of codes, value = code * scale, the largest of which is E4M3_MAX or INT8_LIMIT. It is at least
// 2^-96, for zeros too: float32 has its reciprocal, and sums of P over it. NaN stays NaN.
HH_SHARED_FUNCTION float scale_of(float amax, float largest) {
  const float scale = amax * (1.0f / largest);
  return scale < 0x1p-96f ? 0x1p-96f : scale;
}

// Rounds to the nearest integer, ties to even, and clamps to +-127. Adding 1.5 * 2^23 leaves the integer in the lowest
// bits of the sum, in two's complement. A conversion would have at most a quarter of an addition's rate.
HH_SHARED_FUNCTION u32 int8_bits(float x) {
  x = x > INT8_LIMIT ? INT8_LIMIT : x < -INT8_LIMIT ? -INT8_LIMIT : x;
  return bits_of(x + 12582912.0f) & 0xffu;
}
HH_SHARED_FUNCTION float to_float(int8 x) { return static_cast<float>(static_cast<signed char>(x.bits)); }

// Packs four codes into a word, the first in the lowest byte.
HH_SHARED_FUNCTION u32 pack_int8(float a, float b, float c, float d) {
  return int8_bits(a) | int8_bits(b) << 8 | int8_bits(c) << 16 | int8_bits(d) << 24;
}

HH_SHARED_FUNCTION float inverse_rms(float sum_of_squares, int channels) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(channels) + EPS);
}
