// The activations of docs/OPS.md, for host and device. Clamps are comparisons, so that NaN stays NaN: fminf drops it.
#pragma once

#include "platform.cuh"

// Below -88 exp overflows to infinity, and 1 / (1 + inf) is 0, as it should be.
HH_SHARED_FUNCTION float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// For results that are rounded to bf16 or e4m3. On the device it leaves out the range checks of expf and of division: 4
// instructions a value instead of 20, as Triton's exp and division have. Its relative error is 2^-20 for x above -12.
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

// Computes a sigmoid(1.702 a), where a = min(x, 7).
HH_SHARED_FUNCTION float gelu7(float x) {
  const float a = x > 7.0f ? 7.0f : x;
  return a * quick_sigmoid(1.702f * a);
}

// Computes a sigmoid(1.702 a) (b + 1), where a = min(gate, 7) and b = clamp(linear, -7, 7).
HH_SHARED_FUNCTION float swiglu7(float gate, float linear) {
  const float b = linear > 7.0f ? 7.0f : linear < -7.0f ? -7.0f : linear;
  return gelu7(gate) * (b + 1.0f);
}
