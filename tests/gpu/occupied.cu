#include <chrono>
#include <stdexcept>
#include <thread>

#include "gpu/occupied.hpp"

namespace flashdelta::testing {
namespace {

// A block takes a multiprocessor's whole shared memory.
__global__ void occupy(volatile int* begun, const volatile int* over) {
  atomicAdd_system(const_cast<int*>(begun), 1);
  while (*over == 0) __nanosleep(1000);
}

}  // namespace

Occupied::Occupied(int left) {
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  check_cuda(cudaFuncSetAttribute(occupy, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "cudaFuncSetAttribute");
  void* host = nullptr;
  void* mapped = nullptr;
  check_cuda(cudaHostAlloc(&host, sizeof(Flags), cudaHostAllocMapped), "cudaHostAlloc");
  flags_ = new (host) Flags{0, 0};
  check_cuda(cudaHostGetDevicePointer(&mapped, host, 0), "cudaHostGetDevicePointer");
  auto* flags = static_cast<Flags*>(mapped);
  const int blocks = multiprocessors - left;
  occupy<<<blocks, 1, shared_bytes, stream_.get()>>>(&flags->begun, &flags->over);
  check_cuda(cudaGetLastError(), "launching the kernel that occupies multiprocessors");
  const auto start = std::chrono::steady_clock::now();
  while (flags_->begun < blocks) {
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(10)) {
      release();
      throw std::runtime_error("the GPU's multiprocessors are not free to be occupied");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void Occupied::release() { flags_->over = 1; }

Occupied::~Occupied() {
  release();
  cudaStreamSynchronize(stream_.get());
  cudaFreeHost(flags_);
}

}  // namespace flashdelta::testing
