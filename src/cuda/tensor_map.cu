#include "cuda/tensor_map.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/layout.cuh"
#include "cuda/status.hpp"

namespace flashdelta::cuda {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                            const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver that is loaded anyway: the library links to the runtime alone, so that it loads where there is no driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found), "looking up the driver");
  if (found != cudaDriverEntryPointSuccess) {
    throw op::Error(FLASHDELTA_UNAVAILABLE,
                    "backend: the NVIDIA driver does not know tensor maps; the cuda backend needs CUDA 12 or newer");
  }
  return reinterpret_cast<Encode>(function);
}

void expect(CUresult result, const char* name) {
  if (result == CUDA_SUCCESS) return;
  throw op::Error(FLASHDELTA_VALUE_ERROR, std::string(name) + ": the driver refuses a tensor map of it (CUDA driver error " +
                                              std::to_string(static_cast<int>(result)) + ")");
}

const Encode& encoder() {
  static const Encode encode = find_encode();
  return encode;
}

}  // namespace

CUtensorMap make_tensor_map(const op::Tensor& tensor, int tiles, const char* name) {
  const auto bytes = op::size_of(tensor.dtype);
  // The stride of an axis of one place is never used, and may be anything.
  const auto stride = [&](int axis) { return static_cast<cuuint64_t>((tensor.shape[axis] == 1 ? kHead : tensor.stride[axis]) * bytes); };
  const auto size = [&](int axis) { return static_cast<cuuint64_t>(tensor.shape[axis]); };
  const cuuint64_t sizes[5] = {kTile, size(1), kHead / kTile, size(2), size(0)};
  const cuuint64_t strides[4] = {stride(1), static_cast<cuuint64_t>(kTile * bytes), stride(2), stride(0)};
  const cuuint32_t box[5] = {kTile, kChunk, static_cast<cuuint32_t>(tiles), 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  expect(encoder()(&map, tensor.dtype == op::DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
                   tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
         name);
  return map;
}

bool has_state_map(const op::Tensor& t) {
  if (t.data == nullptr || t.dtype != op::DType::f32 || reinterpret_cast<std::uintptr_t>(t.data) % 16 != 0) return false;
  const auto dense = [&](int inner) { return t.stride[inner] == 1 && t.stride[5 - inner] == kHead; };
  const auto strided = [&](int axis) { return t.shape[axis] == 1 || (t.stride[axis] > 0 && t.stride[axis] % 4 == 0); };
  return (dense(2) || dense(3)) && strided(0) && strided(1);
}

CUtensorMap make_state_map(const op::Tensor& tensor, const char* name) {
  const auto stride = [&](int axis) {
    return static_cast<cuuint64_t>(tensor.shape[axis] == 1 ? kHead * kHead : tensor.stride[axis]) * sizeof(float);
  };
  const cuuint64_t sizes[4] = {kHead, kHead, static_cast<cuuint64_t>(tensor.shape[1]), static_cast<cuuint64_t>(tensor.shape[0])};
  const cuuint64_t strides[3] = {kHead * sizeof(float), stride(1), stride(0)};
  const cuuint32_t box[4] = {kPieceColumns, kHead, 1, 1}, steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  expect(encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
         name);
  return map;
}

}  // namespace flashdelta::cuda
