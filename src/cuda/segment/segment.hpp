// Host face of the plan of segments.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/segment/items.cuh"

namespace flashdelta::cuda::segment {

enum class Mode : std::int32_t { off, automatic, exact };

struct Arguments {
  Sequences sequences;
  int HV, slots, multiprocessors;
  int group;   // value heads of a key head
  bool large;  // what L2 does not keep matters, and the plan may take longer
  Mode mode;
  bool fixed;           // batch_invariant
  int forced;           // segments of every pair; 0: planned
  const int* grown;     // null: what chunks forget is there when `prepare` has ended; else from the start, and if not 0 some forget less
  bool rehearse;        // make the plan once beforehand, for its instructions: where `prepare` takes long enough to hide that
  int most_boundaries;  // what the workspace holds
  int enough;           // minus the log of the tolerance, in kForgottenUnit, rounded up
  const signed char* forgotten;  // [HV][forgotten_row(slots)], of each chunk (layout.cuh)
  Plan plan;
  std::int32_t* counts;  // null, or where the caller wants the figures: segments, warm-ups, exact boundaries, chunks of warm-up
};

// Room that the plan of a call may need, from shapes alone.
struct Room {
  std::int64_t items = 0, boundaries = 0;
};
Room room_of(std::int64_t pairs, std::int64_t chunk_numbers, std::int64_t heads, Mode mode, bool fixed, int forced);

cudaError_t launch(const Arguments& arguments, cudaStream_t stream);

}  // namespace flashdelta::cuda::segment
