// Tensor-core products of one warp (mma.sync): d = a b, or d += a b, float32 sums.
#pragma once

#include <cstdint>

#include "cuda/device/fragment.cuh"

namespace flashdelta::cuda::device {

// 16 x 8 x 16. `a` row-major fragments, (b0, b1) column-major. Fresh: d = a b.
template <Operand Type, bool Fresh>
__device__ __forceinline__ void mma_16x8x16(float* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1) {
  const float c0 = Fresh ? 0.F : d[0], c1 = Fresh ? 0.F : d[1], c2 = Fresh ? 0.F : d[2], c3 = Fresh ? 0.F : d[3];
  if constexpr (Type == Operand::f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
  }
}

// 16 x 8 x 8 in fp16.
template <bool Fresh>
__device__ __forceinline__ void mma_16x8x8(float* d, std::uint32_t a0, std::uint32_t a1, std::uint32_t b) {
  const float c0 = Fresh ? 0.F : d[0], c1 = Fresh ? 0.F : d[1], c2 = Fresh ? 0.F : d[2], c3 = Fresh ? 0.F : d[3];
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

}  // namespace flashdelta::cuda::device
