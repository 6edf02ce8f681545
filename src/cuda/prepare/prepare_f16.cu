#include "cuda/prepare/launch.hpp"
#include "cuda/prepare/launch_sm90.cuh"

namespace flashdelta::cuda::prepare {

cudaError_t launch_f16(const Arguments& arguments, const CUtensorMap* maps, int multiprocessors, cudaStream_t stream) {
  return launch_as<Operand::f16>(arguments, maps, multiprocessors, stream);
}

}  // namespace flashdelta::cuda::prepare
