// The CUDA backend's face in a build that found no nvcc.
#include "cuda/cuda.hpp"

#include "op/error.hpp"

namespace flashdelta::cuda {

bool built() { return false; }

std::vector<Device> devices() { return {}; }

std::string problem() { return "this build holds no CUDA code (nvcc was not found when it was made, or FLASHDELTA_CUDA=OFF)"; }

std::size_t chunk_forward_workspace(const op::Problem&) { throw op::Error(FLASHDELTA_UNAVAILABLE, problem()); }

void chunk_forward(const op::Problem&) { throw op::Error(FLASHDELTA_UNAVAILABLE, problem()); }

}  // namespace flashdelta::cuda
