// A CUDA build without forward kernels. Weak, so that the kernels' own definitions take over wherever they are linked.
#include "cuda/cuda.hpp"
#include "op/error.hpp"

namespace flashdelta::cuda {

__attribute__((weak)) std::size_t chunk_forward_workspace(const op::Problem&) {
  throw op::Error(FLASHDELTA_UNAVAILABLE, "backend: this build holds no CUDA kernels of the forward pass");
}

__attribute__((weak)) void chunk_forward(const op::Problem& problem) { chunk_forward_workspace(problem); }

}  // namespace flashdelta::cuda
