// The CUDA backend's face towards plan and info. Compiled with or without nvcc: without, no device is ever usable.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "op/problem.hpp"

namespace flashdelta::cuda {

struct Device {
  std::string name;
  int major = 0, minor = 0, multiprocessors = 0;
  std::size_t memory = 0;  // bytes
};

bool built();                   // nvcc was there at build time
std::vector<Device> devices();  // empty where no driver or device is usable; never throws
std::string problem();          // why devices() is empty, "" otherwise

// Bytes that chunk_forward needs as workspace. Host arithmetic alone: answers without a GPU too.
std::size_t chunk_forward_workspace(const op::Problem& problem);

// Launches on problem.device_id and problem.stream, and returns before the kernels are done. Serves Operation::recurrent_forward too.
// Throws op::Error.
void chunk_forward(const op::Problem& problem);

}  // namespace flashdelta::cuda
