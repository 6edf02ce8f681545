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
// Of a candidate; late cuts are of large calls alone.
template <bool Large>
__device__ __forceinline__ int segments_of(int chunks, const Model& m) {
  if (Large && m.late > 0) return chunks > m.late_above ? m.late : 1;
  return segments_of(chunks, m.wanted);
}
// How a pair is cut: its first segment has share * base chunks, the next one base, and so has the last; between them each has `slope`
// more than the one beside it that is nearer to an end.
struct Shape {
  float base, slope, share;
  int segments;

  __device__ __forceinline__ Shape(int chunks, int n, bool hill, float first_share) : share(first_share), segments(n) {
    const float all = static_cast<float>(chunks), flat = n - 1 + share;  // of a flat cut: chunks / base
    const int rise = all_rise();
    slope = hill ? kRise : 0.F;
    if (all < kShortest * flat + slope * rise)
      slope = rise == 0 ? 0.F : fmaxf(0.F, __fmul_rn(all - kShortest * flat, device::reciprocal(rise)));
    base = __fmul_rn(all - slope * rise, device::reciprocal(flat));
  }
  // The sum of all segments' steps up from base.
  __device__ __forceinline__ int all_rise() const { return (segments - 2) * (segments - 2) / 4; }
  __device__ __forceinline__ float first() const { return __fmul_rn(share, base); }
  __device__ __forceinline__ int steps_up() const { return max(0, (segments - 2) / 2); }
  __device__ __forceinline__ float longest() const { return base + slope * steps_up(); }
  // Where segment j > 0 begins.
  __device__ __forceinline__ int begin(int j) const {
    const int before = j - 1, behind = segments - j;
    const int rise = before <= behind ? before * (before - 1) / 2 : all_rise() - behind * (behind - 1) / 2;
    return static_cast<int>(__fmaf_rn(slope, static_cast<float>(rise), __fmul_rn(before + share, base)));
  }
};

// What candidate number `segments` is: so many parts of the longest pair; but in a large call the last number stands for uncut pairs, long
// ones as two halves of their value columns, and those in front of it for late cuts.
template <bool Large>
__device__ __forceinline__ Model candidate_of(const Outline& outline, int segments) {
  Model m{};
  m.half_above = kAllWhole, m.share = kFirstShare;
  const int number = segments - (kMostSegments - kLateCuts);  // of late cuts, from 0 on
  if (Large && segments == kMostSegments) {
    m.half_above = outline.half_above, segments = 1;
  } else if (Large && number >= 0) {
    const int behind = 2 + number % kLateCounts;  // segments behind the first
    const bool halves = number / kLateCounts % 2 != 0;
    float share = kLateShare;
#pragma unroll 1
    for (int i = number / (2 * kLateCounts); i > 0; --i) share *= kLateStep;
    const float base = static_cast<float>(outline.longest) * device::reciprocal(share + behind), first = share * base;
    if (base >= kLateShortest) {
      m.share = share, m.late = behind + 1, m.late_above = static_cast<int>(first + base);
      if (halves) m.half_above = static_cast<int>(fminf(kHalfBeside * (first + base), first)) - 1;
    }
  }
  m.wanted =
      rounded_up(static_cast<float>(outline.longest), static_cast<float>(segments), device::reciprocal(static_cast<float>(segments)));
  return m;
}

// The time of a call with exact pairs cut as candidate `segments` says, by kModelLanes neighbouring lanes. others: chunks, and what is like
// them, that the machine has to do besides.
template <bool Large>
__device__ __forceinline__ Model model_of(const Arguments& a, const Shared& s, const int* exact_in_run, const Outline& outline,
                                          int segments, float others, int lane) {
  const float P = static_cast<float>(a.multiprocessors), reciprocal = device::reciprocal(P);
  Model m = candidate_of<Large>(outline, segments);
  unsigned counts = 0;                              // boundaries, and in the upper half those that a scan makes
  int chains = 0, steps = 0, whole = 0;             // whole: items of pairs that are not cut, and first segments
  float parts = 0.F, dependents = 0.F, part = 0.F;  // chunks of all; the longest first part
  constexpr float half = Large ? kHalfBeside : kHalf;
  float last = 0.F, last_half = 0.F;  // what remains to be done when the longest scan has ended, of whole dependents and of halves
#pragma unroll 1
  for (int r = lane; r < outline.runs; r += kModelLanes) {
    const int pairs = exact_in_run[r];
    if (pairs == 0) continue;
    const int chunks = s.run_chunks[r], n = segments_of<Large>(chunks, m), middle = max(0, n - 2);
    const Shape shape(chunks, n, outline.hill, Large ? m.share : kFirstShare);
    const float length = n > 1 ? shape.first() : static_cast<float>(chunks), behind = static_cast<float>(chunks) - length;
    const float first = Large ? m.time_of(length) : length;
    const int firsts = pairs * (Large ? m.copies(length) : 1);
    whole += firsts;
    counts += pairs * (n - 1 + (middle << 16));
    if (middle > 0) chains += pairs;
    steps = max(steps, middle);
    parts += firsts * first + pairs * 2 * kStateOnly * (middle > 0 ? behind - shape.base : 0.F), dependents += pairs * behind;
    const auto left = [&](float chunk) {
      return n > 1 ? fmaxf(chunk * shape.base, chunk * shape.longest() - kScanStep * shape.steps_up()) : 0.F;
    };
    last = fmaxf(last, left(1.F)), last_half = fmaxf(last_half, left(half));
    part = fmaxf(part, first + kItem);
    if (Large && m.late > 0 && middle > 0) part = fmaxf(part, kStateOnly * shape.base + kPart);
  }
#pragma unroll 1
  for (int o = 1; o < kModelLanes; o <<= 1) {
    counts += __shfl_xor_sync(~0U, counts, o), chains += __shfl_xor_sync(~0U, chains, o);
    steps = max(steps, __shfl_xor_sync(~0U, steps, o)), whole += __shfl_xor_sync(~0U, whole, o);
    parts += __shfl_xor_sync(~0U, parts, o), dependents += __shfl_xor_sync(~0U, dependents, o);
    last = fmaxf(last, __shfl_xor_sync(~0U, last, o)), last_half = fmaxf(last_half, __shfl_xor_sync(~0U, last_half, o));
    part = fmaxf(part, __shfl_xor_sync(~0U, part, o));
  }
  const int middles = static_cast<int>(counts >> 16);
  m.boundaries = static_cast<int>(counts & 0xFFFF);
  m.items[kParts] = whole + 2 * middles, m.items[kScans] = kScanBlocks * chains;
  m.costs[kParts] = parts + kItem * whole + 2 * kPart * middles;
  m.costs[kScans] = kScanBlocks * (kScanStep * middles + kScanItem * chains);
  // Multiprocessors that are free when the parts are done: pieces of the line, and whole pairs, take longer.
  const float free = others > 0.F ? fminf(P, static_cast<float>(m.items[kParts])) : P;
  float chain = 0.F;
  if (steps > 0) {
    const float rounds = rounded_up(static_cast<float>(m.items[kScans]), free, device::reciprocal(free));
    chain += 1.F + rounds * (kScanItem + kScanStep * steps);
  }
  // Items of several rounds follow one another; `count` of them cost `all`. The last round of a hill's parts ends in time for the scan.
  const auto mean = [&](int count, float all) { return count == 0 ? 0.F : all * device::reciprocal(static_cast<float>(count)); };
  const auto before_last_round = [&](int count, float all) {
    return (rounded_up(fmaxf(1.F, static_cast<float>(count)), P, reciprocal) - 1.F) * mean(count, all);
  };
  const float parts_mean = mean(m.items[kParts], m.costs[kParts]);
  chain += before_last_round(m.items[kParts], m.costs[kParts]) + (outline.hill ? part : fmaxf(part, parts_mean));
  // Late cuts are for machines that have room for all of their parts at once.
  if (Large && m.late > 0 && (outline.hill || static_cast<float>(m.items[kParts]) > P)) m.boundaries = a.most_boundaries + 1;
  // What waits for a scan ends a call. As halves it ends sooner, and takes more of the machine.
  m.time = 1e30F;
#pragma unroll 1
  for (int copies = 1; copies <= 2 && m.boundaries <= a.most_boundaries; ++copies) {
    const float chunk = copies == 1 ? 1.F : half, cost = copies * (chunk * dependents + kItem * m.boundaries);
    const float load = (m.costs[kParts] + m.costs[kScans] + cost + others) * reciprocal;
    const float time = fmaxf(load, chain + before_last_round(copies * m.boundaries, cost) + (copies == 1 ? last : last_half) + kItem);
    if (time < m.time) m.time = time, m.items[kDependents] = copies * m.boundaries, m.costs[kDependents] = cost, m.halves = copies == 2;
  }
  return m;
}

// The best of all numbers of segments, the smallest such; by the whole block.
template <bool Large>
__device__ __forceinline__ const Model& best_model(const Arguments& a, Shared& s, const int* exact_in_run, const Outline& outline,
                                                   float others) {
  static_assert((kMostSegments & (kMostSegments - 1)) == 0);
  const int lane = threadIdx.x % 32, candidate = threadIdx.x / kModelLanes;
  const Model m = model_of<Large>(a, s, exact_in_run, outline, candidate + 1, others, threadIdx.x % kModelLanes);
  if (threadIdx.x % kModelLanes == 0) s.model[candidate] = m;
  // Times are positive, and so in order as integers; the last bits make room for the number.
  const unsigned mine = (__float_as_uint(m.time) & ~static_cast<unsigned>(kMostSegments - 1)) | candidate;
  const unsigned least = __reduce_min_sync(~0U, mine);
  if (lane == 0) s.least[threadIdx.x / 32] = least;
  __syncthreads();
  return s.model[__reduce_min_sync(~0U, s.least[lane % kWarps]) & (kMostSegments - 1)];
}

}  // namespace flashdelta::cuda::segment
