#include <algorithm>

#include "cuda/segment/alike_sm90.cuh"
#include "cuda/segment/plan_sm90.cuh"

namespace flashdelta::cuda::segment {

Room room_of(std::int64_t pairs, std::int64_t chunk_numbers, std::int64_t heads, Mode mode, bool fixed, int forced) {
  if (mode == Mode::off) return {0, 0};
  // A boundary has chunks of its pair on both sides.
  const std::int64_t most = chunk_numbers * heads;
  Room room;
  if (forced > 0) {
    room.boundaries = std::min(pairs * (forced - 1), most);
  } else if (fixed) {
    room.boundaries = chunk_numbers / kFixedChunks * heads;
  } else {
    room.boundaries = std::min<std::int64_t>(kMostBoundaries, most / kShortest);
  }
  const std::int64_t listed = forced > 0 || fixed ? pairs : std::min<std::int64_t>(kMostListed, pairs);
  // By kind: firsts or halves of whole pairs, transitions and local states, scans of two boundaries or more, dependents in halves; pieces
  // of the line and what goes on in them.
  room.items = kTiles * listed + room.boundaries * (1 + 2 + kScanBlocks / 2 + kTiles) + kThreads + listed + 1;
  return room;
}

cudaError_t launch(const Arguments& arguments, cudaStream_t stream) {
  if (arguments.multiprocessors > kThreads) return cudaErrorInvalidConfiguration;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  const bool alike = arguments.mode != Mode::off && (arguments.forced > 0 || arguments.fixed);
  return cudaLaunchKernelEx(&config, alike ? plan_alike_kernel : arguments.large ? plan_kernel<true> : plan_kernel<false>, arguments);
}

}  // namespace flashdelta::cuda::segment
