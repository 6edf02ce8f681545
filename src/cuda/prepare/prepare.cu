#include "cuda/prepare/prepare.hpp"

#include <algorithm>

#include "cuda/prepare/config.h"
#include "cuda/prepare/launch.hpp"

namespace flashdelta::cuda::prepare {

cudaError_t launch(const Arguments& arguments, const CUtensorMap* maps, device::Operand operand, int multiprocessors, cudaStream_t stream) {
  return operand == device::Operand::f16 ? launch_f16(arguments, maps, multiprocessors, stream)
                                         : launch_bf16(arguments, maps, multiprocessors, stream);
}

bool may_tell_early(std::int64_t items, int group, int multiprocessors) {
  return items <=
         most_told_early(group) * static_cast<std::int64_t>(multiprocessors * ctas_per_multiprocessor(std::min(group, 4), false) - 2);
}

}  // namespace flashdelta::cuda::prepare
