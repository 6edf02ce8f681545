// The two halves of prepare's launch, one per operand type so that they compile side by side.
#pragma once

#include "cuda/prepare/prepare.hpp"

namespace flashdelta::cuda::prepare {

cudaError_t launch_bf16(const Arguments& arguments, const CUtensorMap* maps, int multiprocessors, cudaStream_t stream);
cudaError_t launch_f16(const Arguments& arguments, const CUtensorMap* maps, int multiprocessors, cudaStream_t stream);

}  // namespace flashdelta::cuda::prepare
