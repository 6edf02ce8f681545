// Which instantiation of `prepare` runs: a warp per value head of a key head, up to four.
#pragma once

#include <algorithm>

#include "cuda/prepare/prepare_sm90.cuh"

namespace flashdelta::cuda::prepare {

template <Operand Type, int W, bool Split, bool Early>
cudaError_t launch_split(const Arguments& arguments, const CUtensorMap* maps, int multiprocessors, cudaStream_t stream) {
  const auto kernel = prepare_kernel<Type, W, Split, Early>;
  constexpr int kShared = sizeof(Shared<W, Split>);
  static_assert(ctas_per_multiprocessor(W, Split) * (kShared + 1024) <= 228 * 1024, "more than a multiprocessor's shared memory");
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared); error != cudaSuccess) {
    return error;
  }
  // One less than fit: the plan of segments takes the last place, and waits there. And where there is to be one, a CTA tells of it.
  const int items = arguments.slots * arguments.H, telling = arguments.plan != nullptr ? 1 : 0;
  const auto workers = [&](int each) { return std::max(1, multiprocessors * each - 1 - telling); };
  const auto rounds = [&](int each) { return (items + workers(each) - 1) / workers(each); };
  // And no more on a multiprocessor than take fewer rounds: beside fewer others each is quicker.
  int each = ctas_per_multiprocessor(W, Split);
  while (each > 1 && rounds(each - 1) == rounds(each)) --each;
  const int ctas = std::max(1, std::min(items, workers(each))) + telling;
  kernel<<<ctas, 32 * warps_of(W, Split), kShared, stream>>>(arguments, maps[kMapQ], maps[kMapK], maps[kMapV], maps[kMapO]);
  return cudaGetLastError();
}

template <Operand Type, int W>
cudaError_t launch_warps(const Arguments& arguments, const CUtensorMap* maps, int multiprocessors, cudaStream_t stream) {
  if (arguments.saved_T.data != nullptr) return launch_split<Type, W, true, false>(arguments, maps, multiprocessors, stream);
  return arguments.grown != nullptr ? launch_split<Type, W, false, true>(arguments, maps, multiprocessors, stream)
                                    : launch_split<Type, W, false, false>(arguments, maps, multiprocessors, stream);
}

template <Operand Type>
cudaError_t launch_as(const Arguments& arguments, const CUtensorMap* maps, int multiprocessors, cudaStream_t stream) {
  switch (arguments.group) {
    case 1: return launch_warps<Type, 1>(arguments, maps, multiprocessors, stream);
    case 2: return launch_warps<Type, 2>(arguments, maps, multiprocessors, stream);
    case 3: return launch_warps<Type, 3>(arguments, maps, multiprocessors, stream);
    default: return launch_warps<Type, 4>(arguments, maps, multiprocessors, stream);
  }
}

}  // namespace flashdelta::cuda::prepare
