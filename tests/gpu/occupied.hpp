// A GPU that has few multiprocessors to spare.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/device_memory.hpp"

namespace flashdelta::testing {

// Keeps all multiprocessors but `left` busy, from construction (which returns once it is so) to release(). Meanwhile nothing may wait for
// the whole device; cudaFree does.
class Occupied {
 public:
  explicit Occupied(int left);
  Occupied(const Occupied&) = delete;
  Occupied& operator=(const Occupied&) = delete;
  ~Occupied();
  void release();

 private:
  struct Flags {
    volatile int begun, over;
  };
  Flags* flags_ = nullptr;
  Stream stream_;
};

}  // namespace flashdelta::testing
