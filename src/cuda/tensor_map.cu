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

}  // namespace

CUtensorMap make_tensor_map(const op::Tensor& tensor, const char* name) {
  static const Encode encode = find_encode();
  const auto bytes = op::size_of(tensor.dtype);
  // The stride of an axis of one place is never used, and may be anything.
  const auto stride = [&](int axis) { return static_cast<cuuint64_t>((tensor.shape[axis] == 1 ? kHead : tensor.stride[axis]) * bytes); };
  const auto size = [&](int axis) { return static_cast<cuuint64_t>(tensor.shape[axis]); };
  const cuuint64_t sizes[5] = {kTile, size(1), kHead / kTile, size(2), size(0)};
  const cuuint64_t strides[4] = {stride(1), static_cast<cuuint64_t>(kTile * bytes), stride(2), stride(0)};
  const cuuint32_t box[5] = {kTile, kChunk, kHead / kTile, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode(&map, tensor.dtype == op::DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                 5, tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw op::Error(FLASHDELTA_VALUE_ERROR, std::string(name) + ": the driver refuses a tensor map of it (CUDA driver error " +
                                                std::to_string(static_cast<int>(result)) + ")");
  }
  return map;
}

}  // namespace flashdelta::cuda
