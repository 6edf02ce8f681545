#include "gpu/device_memory.hpp"
#include "gpu/shared_memory.hpp"

namespace flashdelta::testing {
namespace {

constexpr unsigned kPoison = 0x7FFF7FFF;

// A block takes a multiprocessor's whole shared memory.
__global__ void fill_shared_memory(int words) {
  extern __shared__ unsigned memory[];
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x))
    static_cast<volatile unsigned*>(memory)[i] = kPoison;
}

}  // namespace

void poison_shared_memory(cudaStream_t stream) {
  int device = 0, multiprocessors = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  check_cuda(cudaFuncSetAttribute(fill_shared_memory, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  fill_shared_memory<<<multiprocessors, 1024, bytes, stream>>>(bytes / static_cast<int>(sizeof(unsigned)));
  check_cuda(cudaGetLastError(), "launching the kernel that fills shared memory");
}

}  // namespace flashdelta::testing
