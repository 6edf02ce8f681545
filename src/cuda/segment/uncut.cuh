// A call without cuts, from lengths alone: how long it takes, and whether cutting anything could be worth it. The host asks where it knows
// the lengths, `prepare` where they are in device memory: if the answer is no, the chunk loop need not wait for a plan.
#pragma once

#include "cuda/device/reciprocal.cuh"
#include "cuda/segment/config.h"
#include "cuda/segment/header.cuh"

namespace flashdelta::cuda::segment {

// Longest, shortest and sum of the lengths of a call's sequences, in chunks; empty ones are not the shortest.
struct Lengths {
  int longest, shortest;
  unsigned sum;

  __device__ __forceinline__ void add(int chunks) {
    sum += chunks, longest = max(longest, chunks);
    if (chunks > 0) shortest = min(shortest, chunks);
  }
  // Of the warp.
  __device__ __forceinline__ Lengths together() const {
    return {__reduce_max_sync(~0U, longest), __reduce_min_sync(~0U, shortest), __reduce_add_sync(~0U, sum)};
  }
};
constexpr Lengths kNoLengths{0, 1 << 30, 0};
// Of a call whose sequences all have as many chunks.
__host__ __device__ __forceinline__ Lengths all_alike(int sequences, int chunks) {
  return {chunks, chunks, static_cast<unsigned>(sequences) * static_cast<unsigned>(chunks)};
}

// items / per, rounded up, with the reciprocal of per. Not a division: half an item is more than what the product errs by.
__host__ __device__ __forceinline__ float rounded_up(float items, float per, float reciprocal) {
  return floorf((items + per - 0.5F) * reciprocal);
}

// Times in chunks.
struct Uncut {
  float time, total;   // of the call; of all its chunks one after another
  float busy;          // time that a multiprocessor is busy of the call's, on average
  float share;         // of a multiprocessor
  int longest_whole;   // pairs of at most as many chunks are never cut
  bool halves;         // pairs are best taken as two halves
  bool worth_cutting;  // at best
};
__host__ __device__ __forceinline__ Uncut uncut(const Lengths& lengths, int N, int HV, int multiprocessors) {
  const float P = static_cast<float>(multiprocessors), reciprocal = device::reciprocal(P), pairs = static_cast<float>(N) * HV;
  Uncut x;
  x.total = static_cast<float>(lengths.sum) * HV;
  x.share = x.total * reciprocal;
  const float begins = kItem * pairs * reciprocal;
  // Of sequences that are not empty.
  const bool alike = lengths.longest == lengths.shortest;
  const float same = alike ? x.total * device::reciprocal(fmaxf(1.F, static_cast<float>(lengths.longest))) : 0.F;
  const auto time = [&](float chunk, float copies) {
    const float longest = chunk * lengths.longest;
    return alike ? rounded_up(copies * same, P, reciprocal) * (longest + kItem)
                 : fmaxf(longest + kItem, copies * (chunk * x.share + begins) + 0.5F * longest);
  };
  const float whole = time(1.F, 1.F), as_halves = time(kHalf, 2.F);
  x.halves = as_halves < whole, x.time = fminf(whole, as_halves);
  x.busy = fminf(x.time, x.halves ? kTiles * (kHalf * x.share + begins) : x.share + begins);
  x.longest_whole = max(static_cast<int>(x.share * kNeverCut), 2 * kShortest - 1);
  const bool listable = same < kMostListed + 0.5F;
  const float even = x.share + begins, at_best = fminf(kAtBest * even + kPlan, kAtBestLong * even + kPlanLong);
  x.worth_cutting = listable && lengths.longest > x.longest_whole && at_best <= x.time;
  return x;
}

// Lets the loop begin without a plan where no cut could be worth it, and says whether. One warp.
__device__ __forceinline__ bool hand_out_uncut(PlanHeader* header, const Sequences& sequences, int HV, int multiprocessors, int lane) {
  Lengths mine = kNoLengths;
#pragma unroll 1
  for (int n = lane; n < sequences.N; n += 32) mine.add(sequences.span(n).chunks());
  const Uncut x = uncut(mine.together(), sequences.N, HV, multiprocessors);
  if (lane == 0 && !x.worth_cutting) hand_out_first(header, PlanHeader::of(0, kAllWhole, x.halves));
  return !x.worth_cutting;
}

}  // namespace flashdelta::cuda::segment
