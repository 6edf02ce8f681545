// CUDA's error codes as the library's exception.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "op/error.hpp"

namespace flashdelta::cuda {

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  // The runtime remembers the last error for each thread; it has been reported now.
  static_cast<void>(cudaGetLastError());
  throw op::Error(FLASHDELTA_RUNTIME_ERROR,
                  std::string("cuda: ") + doing + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

}  // namespace flashdelta::cuda
