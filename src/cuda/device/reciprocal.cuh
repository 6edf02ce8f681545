// A reciprocal in one instruction.
#pragma once

namespace flashdelta::cuda::device {

// 1 / x to a unit in the last place. Even __fdividef spends four more instructions on numbers near the ends of float32's range.
__host__ __device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y = 0.F;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.F / x;
#endif
}

}  // namespace flashdelta::cuda::device
