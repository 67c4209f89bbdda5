// The activations of docs/OPS.md, for host and device. A clamp is written so that NaN stays NaN: fminf would lose it.
#pragma once

#include "platform.cuh"

// exp overflows to infinity below -88: then 1 / (1 + inf) is the right 0.
HH_SHARED_FUNCTION float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// For results of 8 or 4 bits of mantissa: on the device without the range checks of expf and division, 4 instructions
// instead of 20 a value (what Triton's exp and division are as well). Off by 2^-20 of itself above -12.
HH_SHARED_FUNCTION float quick_sigmoid(float x) {
#if defined(__CUDA_ARCH__)
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return inverse;
#else
  return sigmoid(x);
#endif
}

// a sigmoid(1.702 a), a = min(x, 7)
HH_SHARED_FUNCTION float gelu7(float x) {
  const float a = x > 7.0f ? 7.0f : x;
  return a * quick_sigmoid(1.702f * a);
}

// a sigmoid(1.702 a) (b + 1), a = min(gate, 7), b = clamp(linear, -7, 7)
HH_SHARED_FUNCTION float swiglu7(float gate, float linear) {
  const float b = linear > 7.0f ? 7.0f : linear < -7.0f ? -7.0f : linear;
  return gelu7(gate) * (b + 1.0f);
}
