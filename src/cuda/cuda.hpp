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

}  // namespace flashdelta::cuda
