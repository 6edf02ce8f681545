// What cuts of the exact pairs would cost.
#pragma once

#include "cuda/segment/outline.cuh"

namespace flashdelta::cuda::segment {

// Segments of about `wanted` chunks that a pair of `chunks` is cut in.
__device__ __forceinline__ int segments_of(int chunks, float wanted) {
  const float all = static_cast<float>(chunks);
  return max(1, min(static_cast<int>(rounded_up(all, wanted, device::reciprocal(wanted))),
                    static_cast<int>(static_cast<unsigned>(chunks) / kShortest)));
}
// Chunks of each but the first, which has kFirstShare of them.
__device__ __forceinline__ float segment_length(int chunks, int segments) {
  return __fmul_rn(static_cast<float>(chunks), device::reciprocal(segments - 1 + kFirstShare));
}

// The time of a call with exact pairs in up to `segments` parts, by kModelLanes neighbouring lanes. others: chunks, and what is like them,
// that the machine has to do besides.
__device__ __forceinline__ Model model_of(const Arguments& a, const Shared& s, const int* exact_in_run, const Outline& outline,
                                          int segments, int exact, float others, int lane) {
  const float P = static_cast<float>(a.multiprocessors), reciprocal = device::reciprocal(P);
  Model m{};
  m.wanted =
      rounded_up(static_cast<float>(outline.longest), static_cast<float>(segments), device::reciprocal(static_cast<float>(segments)));
  unsigned counts = 0;  // boundaries, and in the upper half those that a scan makes
  int chains = 0, steps = 0;
  float parts = 0.F, dependents = 0.F, dependent = 0.F, part = 0.F;  // chunks of all; of the longest dependent; the longest part
#pragma unroll 1
  for (int r = lane; r < outline.runs; r += kModelLanes) {
    const int pairs = exact_in_run[r];
    if (pairs == 0) continue;
    const int chunks = s.run_chunks[r], n = segments_of(chunks, m.wanted), middle = max(0, n - 2);
    const float length = segment_length(chunks, n), first = n > 1 ? kFirstShare * length : static_cast<float>(chunks);
    counts += pairs * (n - 1 + (middle << 16));
    if (middle > 0) chains += pairs;
    steps = max(steps, middle);
    parts += pairs * (first + 2 * kStateOnly * middle * length), dependents += pairs * (n - 1) * length;
    if (n > 1) dependent = fmaxf(dependent, length);
    part = fmaxf(part, first + kItem);
  }
#pragma unroll 1
  for (int o = 1; o < kModelLanes; o <<= 1) {
    counts += __shfl_xor_sync(~0U, counts, o), chains += __shfl_xor_sync(~0U, chains, o);
    steps = max(steps, __shfl_xor_sync(~0U, steps, o));
    parts += __shfl_xor_sync(~0U, parts, o), dependents += __shfl_xor_sync(~0U, dependents, o);
    dependent = fmaxf(dependent, __shfl_xor_sync(~0U, dependent, o)), part = fmaxf(part, __shfl_xor_sync(~0U, part, o));
  }
  const int middles = static_cast<int>(counts >> 16);
  m.boundaries = static_cast<int>(counts & 0xFFFF);
  m.items[kParts] = exact + 2 * middles, m.items[kScans] = kScanBlocks * chains;
  m.costs[kParts] = parts + kItem * exact + 2 * kPart * middles;
  m.costs[kScans] = kScanBlocks * (kScanStep * middles + kScanItem * chains);
  const auto waves = [&](int items) { return rounded_up(static_cast<float>(items), P, reciprocal); };
  // Multiprocessors that are free when the parts are done: pieces of the line, and whole pairs, take longer.
  const float free = others > 0.F ? fminf(P, static_cast<float>(m.items[kParts])) : P;
  float chain = 0.F;
  if (steps > 0) {
    const float rounds = rounded_up(static_cast<float>(m.items[kScans]), free, device::reciprocal(free));
    chain += 1.F + rounds * (kScanItem + kScanStep * steps);
  }
  if (exact > 0) chain += fmaxf(part, waves(m.items[kParts]) * m.costs[kParts] * device::reciprocal(static_cast<float>(m.items[kParts])));
  // What waits for a scan ends a call. As halves it ends sooner, and takes more of the machine.
  m.time = 1e30F;
#pragma unroll 1
  for (int copies = 1; copies <= 2 && m.boundaries <= a.most_boundaries; ++copies) {
    const float chunk = copies == 1 ? 1.F : kHalf, cost = copies * (chunk * dependents + kItem * m.boundaries);
    const float load = (m.costs[kParts] + m.costs[kScans] + cost + others) * reciprocal;
    const float time = fmaxf(load, chain + waves(copies * m.boundaries) * (chunk * dependent + kItem));
    if (time < m.time) m.time = time, m.items[kDependents] = copies * m.boundaries, m.costs[kDependents] = cost, m.halves = copies == 2;
  }
  return m;
}

// The best of all numbers of segments, the smallest such; by the whole block.
__device__ __forceinline__ const Model& best_model(const Arguments& a, Shared& s, const int* exact_in_run, const Outline& outline,
                                                   int exact, float others) {
  static_assert((kMostSegments & (kMostSegments - 1)) == 0);
  const int lane = threadIdx.x % 32, candidate = threadIdx.x / kModelLanes;
  const Model m = model_of(a, s, exact_in_run, outline, candidate + 1, exact, others, threadIdx.x % kModelLanes);
  if (threadIdx.x % kModelLanes == 0) s.model[candidate] = m;
  // Times are positive, and so in order as integers; the last bits make room for the number.
  const unsigned mine = (__float_as_uint(m.time) & ~static_cast<unsigned>(kMostSegments - 1)) | candidate;
  const unsigned least = __reduce_min_sync(~0U, mine);
  if (lane == 0) s.least[threadIdx.x / 32] = least;
  __syncthreads();
  return s.model[__reduce_min_sync(~0U, s.least[lane % kWarps]) & (kMostSegments - 1)];
}

}  // namespace flashdelta::cuda::segment
