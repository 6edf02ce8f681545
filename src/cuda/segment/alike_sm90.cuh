// Device code of the plan that treats every pair of more than a few chunks in the same way: a forced number of segments, or fixed cuts.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/segment/bounds.cuh"
#include "cuda/segment/outline.cuh"

namespace flashdelta::cuda::segment {

struct AlikeShared {
  int segments[kThreads + 1], boundaries[kThreads + 1];  // before each of the pairs at hand
  int scratch[2][kMostSums * kWarps];
};

__device__ __forceinline__ int longest_whole_of(const Arguments& a) { return a.forced > 0 ? 1 : kFixedChunks; }

__device__ __forceinline__ Pair alike_pair(const Arguments& a, int i) {
  const Sequences::Span span = a.sequences.span(i / a.HV);
  return {i / a.HV, i % a.HV, span.chunks(), span.slot};
}

// Numbers the segments and boundaries of pairs first .. first + kThreads - 1. Returns totals (x: segments, y: boundaries).
__device__ __forceinline__ int2 number_tile(const Arguments& a, AlikeShared& s, int first) {
  const int i = first + threadIdx.x;
  int segments = 0;
  if (i < a.sequences.N * a.HV) {
    const int chunks = alike_pair(a, i).chunks;
    if (chunks > longest_whole_of(a)) segments = a.forced > 0 ? min(a.forced, chunks) : (chunks + kFixedChunks - 1) / kFixedChunks;
  }
  int count[2] = {segments, max(0, segments - 1)}, total[2];
  block_sums(count, total, s.scratch[0]);
  s.segments[threadIdx.x] = count[0], s.boundaries[threadIdx.x] = count[1];
  if (threadIdx.x == 0) s.segments[kThreads] = total[0], s.boundaries[kThreads] = total[1];
  __syncthreads();
  return make_int2(total[0], total[1]);
}

__device__ __forceinline__ Segment alike_segment(const Arguments& a, const AlikeShared& s, int first_pair, int first_boundary, int k) {
  int local = 0;
#pragma unroll 1
  for (int size = kThreads; size > 1; size /= 2) {
    if (s.segments[local + size / 2] <= k) local += size / 2;
  }
  Segment x{};
  x.pair = alike_pair(a, first_pair + local);
  x.count = s.segments[local + 1] - s.segments[local], x.j = k - s.segments[local];
  x.boundary = first_boundary + s.boundaries[local] + x.j - 1;
  const auto at = [&](int j) {
    return a.forced > 0 ? static_cast<int>(static_cast<std::int64_t>(j) * x.pair.chunks / x.count) : j * kFixedChunks;
  };
  x.begin = at(x.j), x.end = x.last() ? x.pair.chunks : at(x.j + 1);
  return x;
}

// The states at all boundaries, then how many items there are of each kind; the second time, with those numbers, the items.
__global__ void __launch_bounds__(kThreads, kResident) plan_alike_kernel(const __grid_constant__ Arguments a) {
  __shared__ AlikeShared s;
  device::allow_dependent_launch();
  // Without warm-ups lengths tell all, and the list is there before `prepare` ends.
  const bool reads_bounds = a.mode == Mode::automatic;
  if (reads_bounds) device::wait_for_previous_launch();
  const int pairs = a.sequences.N * a.HV;
  const auto warm_of = [&](int boundary) { return a.plan.warm[boundary]; };
  Tickets t{};
  int warm_boundaries = 0, warm_chunks = 0;
  bool halves = false;  // of all segments' value columns: where there is a multiprocessor for each. Bits are those of whole ones
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    Counts before{};
    int boundaries = 0;
#pragma unroll 1
    for (int first = 0; first < pairs; first += kThreads) {
      const int2 total = number_tile(a, s, first);
      if (first == 0) halves = pairs <= kThreads && kTiles * total.x <= a.multiprocessors;
      if (pass == 0) {
#pragma unroll 1
        for (int k = threadIdx.x; k < total.x; k += kThreads) {
          const Segment x = alike_segment(a, s, first, boundaries, k);
          if (x.first()) continue;
          const signed char* cut = a.forgotten + static_cast<std::int64_t>(x.pair.head) * forgotten_row(a.slots) + x.pair.slot + x.begin;
          a.plan.warm[x.boundary] = reads_bounds ? warm_up(cut, x.begin, a.enough) : 0;
          a.plan.arrived[x.boundary] = a.plan.scanned[x.boundary] = 0;
        }
        __syncthreads();
      }
#pragma unroll 1
      for (int k = threadIdx.x, turn = 0; k < (total.x + kThreads - 1) / kThreads * kThreads; k += kThreads, turn ^= 1) {
        Segment x{};
        Counts mine{};
        if (k < total.x) {
          x = alike_segment(a, s, first, boundaries, k);
          look_around(x, warm_of);
          x.halved = halves;
          mine.add(x);
        }
        int at[5] = {mine.firsts | mine.dependents << 16, mine.parts, mine.scans, x.warm > 0 ? 1 : 0, x.warm}, sum[5];
        block_sums(at, sum, s.scratch[turn ^ 1]);
        if (pass == 0) warm_boundaries += sum[3], warm_chunks += sum[4];
        if (pass == 1 && k < total.x) {
          const Counts next{before.firsts + (at[0] & 0xFFFF), before.parts + at[1], before.scans + at[2],
                            before.dependents + (at[0] >> 16)};
          emit(a.plan.items, x, t, next, warm_of);
        }
        before.firsts += sum[0] & 0xFFFF, before.parts += sum[1], before.scans += sum[2], before.dependents += sum[0] >> 16;
      }
      boundaries += total.y;
      __syncthreads();
    }
    t.firsts = before.firsts, t.parts = before.parts, t.scans = before.scans, t.dependents = before.dependents;
  }
  if (a.plan.initial_read != nullptr) {
    for (int i = threadIdx.x; i < pairs; i += kThreads) a.plan.initial_read[i] = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) hand_out(a.plan.header, PlanHeader::of(t.count(), longest_whole_of(a), halves_fit(pairs, a.multiprocessors)));
  if (!reads_bounds) device::wait_for_previous_launch();  // what waits for this launch waits for `prepare` too
  if (threadIdx.x != 0 || a.counts == nullptr) return;
  const int exact_boundaries = t.exact_boundaries(halves);
  a.counts[0] = pairs + warm_boundaries + exact_boundaries, a.counts[1] = warm_boundaries, a.counts[2] = exact_boundaries;
  a.counts[3] = warm_chunks;
}

}  // namespace flashdelta::cuda::segment
