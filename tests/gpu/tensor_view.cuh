// Tensors of any dtype and strides inside the tests' own kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>

#include "gpu/device_memory.hpp"

namespace flashdelta::testing {

enum class Type : int { f64, f32, bf16, f16, i64, i32 };

// Axes beyond the tensor's own have one place.
struct View {
  const void* data;
  Type type;
  std::int64_t shape[4], stride[4];
};

inline Type type_of(const DLDataType& t) {
  if (t.code == kDLInt) return t.bits == 64 ? Type::i64 : Type::i32;
  if (t.code == kDLBfloat) return Type::bf16;
  return t.bits == 64 ? Type::f64 : t.bits == 32 ? Type::f32 : Type::f16;
}

inline View view_of(const DLTensor* tensor) {
  if (tensor == nullptr) return {};
  View view{static_cast<const std::byte*>(tensor->data) + tensor->byte_offset, type_of(tensor->dtype), {1, 1, 1, 1}, {0, 0, 0, 0}};
  std::int64_t inner = 1;
  for (int axis = tensor->ndim - 1; axis >= 0; --axis) {
    view.shape[axis] = tensor->shape[axis];
    view.stride[axis] = tensor->strides != nullptr ? tensor->strides[axis] : inner;
    inner *= tensor->shape[axis];
  }
  return view;
}

inline __device__ double load(const View& x, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0, std::int64_t l = 0) {
  const std::int64_t at = i * x.stride[0] + j * x.stride[1] + k * x.stride[2] + l * x.stride[3];
  switch (x.type) {
    case Type::f64: return static_cast<const double*>(x.data)[at];
    case Type::f32: return static_cast<const float*>(x.data)[at];
    case Type::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(x.data)[at]);
    case Type::f16: return __half2float(static_cast<const __half*>(x.data)[at]);
    case Type::i64: return static_cast<double>(static_cast<const std::int64_t*>(x.data)[at]);
    default: return static_cast<const std::int32_t*>(x.data)[at];
  }
}

inline __device__ void store(const View& x, std::int64_t at, float value) {
  void* data = const_cast<void*>(x.data);
  switch (x.type) {
    case Type::f64: static_cast<double*>(data)[at] = value; return;
    case Type::f32: static_cast<float*>(data)[at] = value; return;
    case Type::bf16: static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16(value); return;
    default: static_cast<__half*>(data)[at] = __float2half(value); return;
  }
}

// A place of a tensor by its number in row-major order.
struct Index {
  std::int64_t i, j, k, l;
};
inline __device__ Index index_at(const View& x, std::int64_t number) {
  const std::int64_t row = number / x.shape[3];
  return {row / x.shape[2] / x.shape[1], row / x.shape[2] % x.shape[1], row % x.shape[2], number % x.shape[3]};
}
inline __host__ __device__ std::int64_t size_of(const View& x) { return x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3]; }

inline void finish(const char* what) {
  check_cuda(cudaGetLastError(), what);
  check_cuda(cudaDeviceSynchronize(), what);
}

}  // namespace flashdelta::testing
