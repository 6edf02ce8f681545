// Register fragments: packing two numbers into a 32-bit register, exchanging 8 x 8 matrices with shared memory, exponentials.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashdelta::cuda::device {

// The operand type of the tensor cores: bf16, or fp16 where the inputs are.
enum class Operand : int { bf16, f16 };

__device__ __forceinline__ std::uint32_t pack_f16(float low, float high) {
  std::uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <Operand Type>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  if constexpr (Type == Operand::f16) return pack_f16(low, high);
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// As pack, but stays where it is written: otherwise it may sink below the next wgmma, which then waits for it.
template <Operand Type>
__device__ __forceinline__ std::uint32_t pack_here(float low, float high) {
  std::uint32_t r;
  if constexpr (Type == Operand::f16) {
    asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
}
__device__ __forceinline__ float2 unpack_f16(std::uint32_t x) { return __half22float2(*reinterpret_cast<const __half2*>(&x)); }
template <Operand Type>
__device__ __forceinline__ float2 unpack(std::uint32_t x) {
  if constexpr (Type == Operand::f16) return unpack_f16(x);
  return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000U));
}
// What packing (low, high) into `packed` lost, itself in fp16: the two together hold 22 bits.
__device__ __forceinline__ std::uint32_t pack_rest_f16(float low, float high, std::uint32_t packed) {
  const float2 held = unpack_f16(packed);
  return pack_f16(low - held.x, high - held.y);
}
__device__ __forceinline__ std::uint32_t multiply_f16(std::uint32_t a, std::uint32_t b) {
  std::uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// 2^x; 0 for x below -126.
__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Reads of shared memory that stay behind the waits above them.
__device__ __forceinline__ float load_shared(std::uint32_t address) {
  float r;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(r) : "r"(address) : "memory");
  return r;
}
__device__ __forceinline__ int load_shared_int(const int* p) {
  int r;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(r) : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(p))) : "memory");
  return r;
}
__device__ __forceinline__ float2 load_shared_pair(std::uint32_t address) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(address) : "memory");
  return r;
}
__device__ __forceinline__ float2 load_shared_pair(const float* p) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(r.x), "=f"(r.y)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
  return r;
}
__device__ __forceinline__ float4 load_shared_quad(const float4* p) {
  float4 r;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
  return r;
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(std::uint32_t (&f)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t* f, std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void store_matrices(std::uint32_t address, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// Predicated inside; all threads of a warp alike.
__device__ __forceinline__ void store_matrices_if(std::uint32_t address, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d,
                                                  bool condition) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n@p stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n}" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d), "r"(static_cast<int>(condition))
      : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(std::uint32_t address, const std::uint32_t* f) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(f[0]), "r"(f[1]), "r"(f[2]),
               "r"(f[3])
               : "memory");
}
// An 8 x 8 matrix of 16-bit elements, transposed across the warp.
__device__ __forceinline__ std::uint32_t transpose_matrix(std::uint32_t a) {
  std::uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// Two sums over a warp at once: x's in lanes 0 to 15, y's in lanes 16 to 31.
__device__ __forceinline__ float sum_halves(float x, float y, int lane) {
  const bool upper = lane >= 16;
  float sum = (upper ? y : x) + __shfl_xor_sync(~0U, upper ? x : y, 16);
#pragma unroll
  for (int o = 8; o > 0; o >>= 1) sum += __shfl_xor_sync(~0U, sum, o);
  return sum;
}

// Has a value stay in its register: the compiler would rather compute it again from the thread number in every round of a loop.
__device__ __forceinline__ void keep(std::uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }

// A register whose value is never read: saves the zeroing.
__device__ __forceinline__ void undefined(float& x) { asm("" : "=f"(x)); }

}  // namespace flashdelta::cuda::device
