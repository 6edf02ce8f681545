// Which GPUs can run this build's kernels. The CUDA runtime is linked statically and looks for the driver itself at the first call, so
// all of this answers on machines without a GPU or a driver too.
#include <cuda_runtime_api.h>

#include "cuda/cuda.hpp"

namespace flashdelta::cuda {
namespace {

// Does nothing; a device on which its code can be looked up has code for its architecture in this build.
__global__ void probe() {}

struct Found {
  std::vector<Device> devices;
  std::string problem;
};

std::string text_of(cudaError_t error) {
  switch (error) {
    case cudaErrorNoDevice: return "no NVIDIA GPU is visible to this process";
    case cudaErrorInsufficientDriver: {
      int version = 0;
      // A driver version of 0 is how the runtime reports that libcuda.so.1 could not be loaded.
      if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "no NVIDIA driver is installed";
      return "the NVIDIA driver is too old: it serves CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) +
             ", this build needs " + std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    }
    default: return std::string("CUDA error ") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
  }
}

bool runs_here(int index) {
  cudaFuncAttributes attributes;
  const bool found = cudaSetDevice(index) == cudaSuccess && cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  // The runtime remembers the last error for each thread; it is not the caller's.
  static_cast<void>(cudaGetLastError());
  return found;
}

void query(Found& found) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    found.problem = text_of(error);
    return;
  }
  int current = 0;
  const bool has_current = cudaGetDevice(&current) == cudaSuccess;
  std::string refused;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (const cudaError_t error = cudaGetDeviceProperties(&properties, index); error != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      refused = text_of(error);
      continue;
    }
    if (!runs_here(index)) {
      refused = std::string(properties.name) + " (compute capability " + std::to_string(properties.major) + "." +
                std::to_string(properties.minor) + "): this build holds no code for it";
      continue;
    }
    found.devices.push_back(
        {properties.name, properties.major, properties.minor, properties.multiProcessorCount, properties.totalGlobalMem});
  }
  if (has_current) static_cast<void>(cudaSetDevice(current));
  if (found.devices.empty()) found.problem = refused.empty() ? "no NVIDIA GPU is visible to this process" : refused;
}

Found find() {
  Found found;
  try {
    query(found);
  } catch (...) {
    found.devices.clear();
    found.problem = "out of memory";
  }
  return found;
}

}  // namespace

bool built() { return true; }

std::vector<Device> devices() { return find().devices; }

std::string problem() { return find().problem; }

}  // namespace flashdelta::cuda
