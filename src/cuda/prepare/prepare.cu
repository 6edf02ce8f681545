#include "cuda/prepare/prepare.hpp"

#include "cuda/prepare/launch.hpp"

namespace flashdelta::cuda::prepare {

cudaError_t launch(const Arguments& arguments, const CUtensorMap* maps, device::Operand operand, int multiprocessors, cudaStream_t stream) {
  return operand == device::Operand::f16 ? launch_f16(arguments, maps, multiprocessors, stream)
                                         : launch_bf16(arguments, maps, multiprocessors, stream);
}

}  // namespace flashdelta::cuda::prepare
