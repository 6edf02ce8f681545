// What a plan is made from: lengths, pairs that may be cut, how far their gates forget, and what cuts would cost.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/segment/config.h"
#include "cuda/segment/segment.hpp"

namespace flashdelta::cuda::segment {

constexpr int kWarps = kThreads / 32;
constexpr int kMostSums = 6;
constexpr int kModelLanes = kThreads / kMostSegments;
constexpr int kMostInShared = 1024;  // boundaries whose warm-ups are kept there rather than in the workspace

struct Pair {
  int sequence, head, chunks;
};

// What a number of segments makes of the exact pairs.
struct Model {
  float time;
  int parts, scans, dependents;  // items: firsts, transitions and local states; column blocks; segments that wait
  float parts_cost, scans_cost, dependents_cost;
};

struct Shared {
  int sequence[kMostListed], head[kMostListed], chunks[kMostListed];  // pairs that may be cut
  short exact[kMostListed], warm[kMostListed];                        // listed pairs of either kind
  unsigned char window[kMostListed];  // chunks within which a pair forgets wherever one looks; 0: it does not
  float line[kMostListed + 1];        // where warm pairs begin on their line
  float piece[kThreads + 1];          // where pieces of the line begin
  int segments[kThreads + 1], boundaries[kThreads + 1];
  Model model[kMostSegments];
  int best;
  bool rehearsing;
  signed char warm_here[kMostInShared];
  float scratch[kMostSums * kWarps];
  int scratch_int[kMostSums * kWarps];
};

// Exclusive sums over the block of several values at once, and their totals; every thread must come. Not inlined: the plan runs once,
// and waits for its instructions more than for anything else.
template <class X>
struct Sums {
  X before[kMostSums], total[kMostSums];
};
template <class X>
__device__ __noinline__ Sums<X> block_sums(X a, X b, X c, X d, X e, X f, X* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const X x[kMostSums] = {a, b, c, d, e, f};
  Sums<X> sums;
#pragma unroll
  for (int v = 0; v < kMostSums; ++v) sums.before[v] = x[v];
#pragma unroll 1
  for (int o = 1; o < 32; o <<= 1) {
#pragma unroll
    for (int v = 0; v < kMostSums; ++v) {
      const X before = __shfl_up_sync(~0U, sums.before[v], o);
      if (lane >= o) sums.before[v] += before;
    }
  }
  __syncthreads();
  if (lane == 31) {
#pragma unroll
    for (int v = 0; v < kMostSums; ++v) scratch[v * kWarps + warp] = sums.before[v];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kMostSums; ++v) sums.total[v] = 0, sums.before[v] -= x[v];
#pragma unroll 1
  for (int i = 0; i < kWarps; ++i) {
#pragma unroll
    for (int v = 0; v < kMostSums; ++v) {
      const X part = scratch[v * kWarps + i];
      if (i < warp) sums.before[v] += part;
      sums.total[v] += part;
    }
  }
  return sums;
}
template <class X, int N>
__device__ __forceinline__ void exclusive_sums(X (&x)[N], X (&total)[N], X* scratch) {
  const Sums<X> sums = block_sums<X>(x[0], N > 1 ? x[1 % N] : 0, N > 2 ? x[2 % N] : 0, N > 3 ? x[3 % N] : 0, N > 4 ? x[4 % N] : 0,
                                     N > 5 ? x[5 % N] : 0, scratch);
#pragma unroll
  for (int v = 0; v < N; ++v) x[v] = sums.before[v], total[v] = sums.total[v];
}
template <class X>
__device__ __forceinline__ X exclusive_sum(X x, X& total, X* scratch) {
  X one[1] = {x}, all[1];
  exclusive_sums(one, all, scratch);
  total = all[0];
  return one[0];
}

// Lengths of a call's sequences, in chunks.
struct Lengths {
  float total;  // over all sequences
  int longest, shortest;
};

__device__ __forceinline__ Lengths measure(const Arguments& a, Shared& s) {
  int sum = 0, longest = 0, shortest = 1 << 30;
  for (int n = threadIdx.x; n < a.sequences.N; n += kThreads) {
    const int chunks = a.sequences.span(n).chunks();
    sum += chunks, longest = max(longest, chunks);
    if (chunks > 0) shortest = min(shortest, chunks);
  }
  Lengths all{};
  exclusive_sum(static_cast<float>(sum), all.total, s.scratch);
  longest = __reduce_max_sync(~0U, longest), shortest = __reduce_min_sync(~0U, shortest);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.scratch_int[threadIdx.x / 32] = longest, s.scratch[threadIdx.x / 32] = static_cast<float>(shortest);
  __syncthreads();
  all.shortest = 1 << 30;
  for (int i = 0; i < kWarps; ++i) {
    all.longest = max(all.longest, s.scratch_int[i]), all.shortest = min(all.shortest, static_cast<int>(s.scratch[i]));
  }
  __syncthreads();
  return all;
}

// Pairs of sequences of more than `longest_whole` chunks, in order. Returns how many, or -1 where they are too many to list.
__device__ __forceinline__ int list_pairs(const Arguments& a, Shared& s, int longest_whole) {
  int count = 0;
  for (int first = 0; first < a.sequences.N; first += kThreads) {
    const int n = first + threadIdx.x;
    const int chunks = n < a.sequences.N ? a.sequences.span(n).chunks() : 0;
    int more = 0;
    const int at = count + exclusive_sum(chunks > longest_whole ? 1 : 0, more, s.scratch_int);
    count += more;
    if (chunks <= longest_whole) continue;
    for (int h = 0, i = at * a.HV; h < a.HV && i < kMostListed; ++h, ++i) s.sequence[i] = n, s.head[i] = h, s.chunks[i] = chunks;
  }
  __syncthreads();
  return count * a.HV <= kMostListed ? count * a.HV : -1;
}

__device__ __forceinline__ const float* bounds_of(const Arguments& a, int sequence, int head) {
  return a.bounds + static_cast<std::int64_t>(head) * a.slots + a.sequences.slot(sequence);
}

// The first of the two times that a plan is made, before there are bounds: its only use is that its instructions are at hand when the
// second one has to be quick. Every fourth head keeps all, so that both kinds of pairs occur.
__device__ __forceinline__ float bound_at(const Shared& s, const Pair& p, const float* bound) {
  return s.rehearsing ? (p.head % 4 == 0 ? 0.F : kLowestGate) : *bound;
}

// Chunks within which a pair forgets wherever one looks: 4, 8, or 0 where neither is enough. One warp.
__device__ __forceinline__ int forgetting_window(const Arguments& a, const Shared& s, const Pair& p, int lane) {
  const float* bounds = bounds_of(a, p.sequence, p.head);
  bool four = true, eight = true;
  float before1 = 0.F, before2 = 0.F, before4 = 0.F;
  const auto shifted = [&](float x, float before, int by) {
    const float here = __shfl_sync(~0U, x, (lane - by) & 31), there = __shfl_sync(~0U, before, (lane - by) & 31);
    return lane >= by ? here : there;
  };
  constexpr int kBatch = 8;  // loads in flight
  for (int first = 0; first < p.chunks; first += 32 * kBatch) {
    float batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int c = first + 32 * i + lane;
      batch[i] = c < p.chunks ? bound_at(s, p, bounds + c) : 0.F;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int c = first + 32 * i + lane;
      if (first + 32 * i >= p.chunks) break;
      const float x = batch[i];
      const float x2 = x + shifted(x, before1, 1), x4 = x2 + shifted(x2, before2, 2), x8 = x4 + shifted(x4, before4, 4);
      before1 = x, before2 = x2, before4 = x4;
      // Negated, so that NaN is never enough.
      if (c >= 3 && c < p.chunks && !(x4 <= a.enough)) four = false;
      if (c >= 7 && c < p.chunks && !(x8 <= a.enough)) eight = false;
    }
  }
  four = __all_sync(~0U, four), eight = __all_sync(~0U, eight);
  return four ? 4 : eight ? 8 : 0;
}

// Chunks of warm-up that reach the state before chunk `cut`, or 0.
__device__ __forceinline__ int warm_up(const Arguments& a, const Shared& s, const Pair& p, int cut) {
  const float* bounds = bounds_of(a, p.sequence, p.head);
  float x[kMostWarmUp];
#pragma unroll
  for (int i = 0; i < kMostWarmUp; ++i) x[i] = cut > i ? bound_at(s, p, bounds + cut - 1 - i) : 0.F;
  int enough = 0;
  float sum = 0.F;
  bool found = false;
#pragma unroll
  for (int i = 0; i < kMostWarmUp; ++i) {
    sum += x[i];
    if (!found && i < cut && sum <= a.enough) enough = i + 1, found = true;
  }
  return enough;
}

// The time of a call with exact pairs in up to `segments` parts, by kModelLanes neighbouring lanes.
__device__ __forceinline__ Model model_of(const Arguments& a, const Shared& s, int segments, int exact, int longest, float others,
                                          bool line, float cut, int lane) {
  const float wanted = ceilf(static_cast<float>(longest) / segments);
  Model m{};
  int boundaries = 0, steps = 0;
  float dependent = 0.F, part = 0.F;  // the longest of each
  for (int i = lane; i < exact; i += kModelLanes) {
    const int chunks = s.chunks[s.exact[i]];
    const int n = max(1, min(static_cast<int>(ceilf(chunks / wanted)), chunks / kShortest));
    const float length = chunks / (n - 1 + kFirstShare), first = n > 1 ? kFirstShare * length : chunks;
    const int middle = max(0, n - 2);
    m.parts += 1 + 2 * middle, m.parts_cost += first + kItem + 2 * middle * (kStateOnly * length + kPart);
    m.scans += middle > 0 ? kScanBlocks : 0, m.scans_cost += kScanBlocks * middle * kScanStep;
    m.dependents += n - 1, m.dependents_cost += (n - 1) * (length + kItem);
    boundaries += n - 1, steps = max(steps, middle), dependent = fmaxf(dependent, n > 1 ? length + kItem : 0.F);
    part = fmaxf(part, first + kItem);
  }
#pragma unroll
  for (int o = 1; o < kModelLanes; o <<= 1) {
    m.parts += __shfl_xor_sync(~0U, m.parts, o), m.scans += __shfl_xor_sync(~0U, m.scans, o);
    m.dependents += __shfl_xor_sync(~0U, m.dependents, o), boundaries += __shfl_xor_sync(~0U, boundaries, o);
    m.parts_cost += __shfl_xor_sync(~0U, m.parts_cost, o), m.scans_cost += __shfl_xor_sync(~0U, m.scans_cost, o);
    m.dependents_cost += __shfl_xor_sync(~0U, m.dependents_cost, o), steps = max(steps, __shfl_xor_sync(~0U, steps, o));
    dependent = fmaxf(dependent, __shfl_xor_sync(~0U, dependent, o)), part = fmaxf(part, __shfl_xor_sync(~0U, part, o));
  }
  const float P = static_cast<float>(a.multiprocessors);
  const float load = (m.parts_cost + m.scans_cost + m.dependents_cost + others + (line ? P * cut : 0.F)) / P;
  const float waves = ceilf(m.parts / P), later_waves = ceilf(m.dependents / P);
  const float chain = fmaxf(part, waves * (m.parts > 0 ? m.parts_cost / m.parts : 0.F)) +
                      (steps > 0 ? 1.F + ceilf(m.scans / P) * steps * kScanStep : 0.F) + later_waves * dependent;
  m.time = boundaries <= a.most_boundaries ? fmaxf(load, chain) : 1e30F;
  return m;
}

}  // namespace flashdelta::cuda::segment
