#include "cuda/forward/forward.hpp"

#include <algorithm>

#include "cuda/forward/forward_sm90.cuh"

namespace flashdelta::cuda::forward {
namespace {

template <Operand Type>
cudaError_t launch_as(const Arguments& arguments, const CUtensorMap* maps, const CUtensorMap& state_map, int multiprocessors,
                      cudaStream_t stream) {
  const auto kernel = forward_kernel<Type>;
  const int items = arguments.sequences.N * arguments.HV * (arguments.halves ? kTiles : 1);
  if (items == 0) return cudaSuccess;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
      error != cudaSuccess) {
    return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(arguments.plan.header == nullptr ? std::min(items, multiprocessors) : multiprocessors);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments, maps[kMapQ], maps[kMapK], maps[kMapV], maps[kMapO], state_map);
}

}  // namespace

cudaError_t launch(const Arguments& arguments, const CUtensorMap* maps, const CUtensorMap& state_map, Operand operand, int multiprocessors,
                   cudaStream_t stream) {
  return operand == Operand::f16 ? launch_as<Operand::f16>(arguments, maps, state_map, multiprocessors, stream)
                                 : launch_as<Operand::bf16>(arguments, maps, state_map, multiprocessors, stream);
}

}  // namespace flashdelta::cuda::forward
