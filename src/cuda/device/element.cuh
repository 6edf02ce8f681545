// Elements of the dtypes that small tensors come in (gates, beta, states), read as and written from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flashdelta::cuda::device {

enum class Type : std::int32_t { f32, bf16, f16 };

// One address for all types: the branch is then only around the conversion.
__device__ __forceinline__ float load_element(const void* data, Type type, std::int64_t index) {
  const char* at = static_cast<const char*>(data) + index * (type == Type::f32 ? 4 : 2);
  if (type == Type::f32) return *reinterpret_cast<const float*>(at);
  const unsigned short bits = *reinterpret_cast<const unsigned short*>(at);
  return type == Type::bf16 ? __uint_as_float(static_cast<unsigned>(bits) << 16) : __half2float(__ushort_as_half(bits));
}

// The same in two steps, so that the load does not wait: an element's bits, and their value.
__device__ __forceinline__ std::uint32_t load_bits(const char* at, Type type) {
  return type == Type::f32 ? *reinterpret_cast<const std::uint32_t*>(at) : *reinterpret_cast<const std::uint16_t*>(at);
}
__device__ __forceinline__ float from_bits(std::uint32_t bits, Type type) {
  const float wide = __uint_as_float(type == Type::f32 ? bits : bits << 16);
  return type == Type::f16 ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits))) : wide;
}
__device__ __forceinline__ void store_element(void* data, Type type, std::int64_t index, float x) {
  if (type == Type::f32) {
    static_cast<float*>(data)[index] = x;
  } else if (type == Type::bf16) {
    static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16(x);
  } else {
    static_cast<__half*>(data)[index] = __float2half(x);
  }
}

}  // namespace flashdelta::cuda::device
