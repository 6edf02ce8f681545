// What a plan by cost is made from before anything is known of the gates: lengths, and the pairs that may be cut.
#pragma once

#include "cuda/segment/emit.cuh"

namespace flashdelta::cuda::segment {

constexpr int kWarps = kThreads / 32;
constexpr int kMostSums = 5;
constexpr int kModelLanes = kThreads / kMostSegments;
constexpr int kPasses = 2;  // a rehearsal, and the plan

// What a number of segments makes of the exact pairs.
struct alignas(16) Model {
  float time;
  float wanted;                  // chunks of a segment
  int parts, scans, dependents;  // items: firsts, transitions and local states; column blocks; segments that wait
  float parts_cost, scans_cost, dependents_cost;
};

struct Shared {
  Pair sequences[kMostListed];  // whose pairs may be cut; `head` is the number of their run
  Pair pairs[kMostListed];      // of them
  int run_chunks[kMostListed];  // of listed sequences of one length, next to one another
  int run_exact[kPasses][kMostListed];
  unsigned char fails[kPasses][2][kMostListed];  // some four chunks, or eight, forget too little
  unsigned char window[kMostListed];             // chunks within which a pair forgets wherever one looks; 0: it does not
  short exact[kMostListed], warm[kMostListed];   // listed pairs of either kind
  float line[kMostListed];                       // where warm pairs begin on their line
  int2 start[kThreads];                          // of pieces of the line: warm pair and chunk
  Model model[kMostSegments];
  unsigned least[kWarps];
  int segment[kMostListed + kMostBoundaries];  // of exact pairs: pair, its number in it, how many that has, a byte each
  signed char warm_here[kMostBoundaries];
  int figures[2];
  int scratch[2][kMostSums * kWarps];  // used in turn: one barrier a sum is enough
};
static_assert(kMostListed <= 256 && kMostSegments < 256, "a byte each");

// Exclusive sums over the block of several values at once, and their totals; every thread must come.
template <int N>
__device__ __forceinline__ void block_sums(int (&x)[N], int (&total)[N], int* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum[N];
#pragma unroll
  for (int v = 0; v < N; ++v) sum[v] = x[v];
#pragma unroll 1
  for (int o = 1; o < 32; o <<= 1) {
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const int before = __shfl_up_sync(~0U, sum[v], o);
      if (lane >= o) sum[v] += before;
    }
  }
  if (lane == 31) {
#pragma unroll
    for (int v = 0; v < N; ++v) scratch[v * kWarps + warp] = sum[v];
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < N; ++v) {
    const int part = lane < kWarps ? scratch[v * kWarps + lane] : 0;
    total[v] = __reduce_add_sync(~0U, part);
    x[v] = sum[v] - x[v] + __reduce_add_sync(~0U, lane < warp ? part : 0);
  }
}

// items / per, rounded up, with the reciprocal of per. Not a division: half an item is more than what the product errs by.
__device__ __forceinline__ float rounded_up(float items, float per, float reciprocal) { return floorf((items + per - 0.5F) * reciprocal); }

struct Outline {
  int listed, runs, longest, longest_whole;  // listed: 0 where no plan could be worth it
  float total, in_list, uncut;               // chunks of all pairs, and of those listed; time
  Pair mine;                                 // the pair listed at this thread's number, and its run
  int run;
};

__device__ __forceinline__ Outline outline_of(const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = threadIdx.x;
  Outline x{};
  s.run_exact[0][i] = s.run_exact[1][i] = 0;
  reinterpret_cast<int*>(s.fails)[i] = 0;
  static_assert(sizeof(s.fails) == kThreads * sizeof(int) && kMostListed == kThreads);
  if (i < 2) s.figures[i] = 0;

  unsigned sum = 0;
  int longest = 0, shortest = 1 << 30;
#pragma unroll 1
  for (int n = i; n < a.sequences.N; n += kThreads) {
    const int chunks = a.sequences.span(n).chunks();
    sum += chunks, longest = max(longest, chunks);
    if (chunks > 0) shortest = min(shortest, chunks);
  }
  int* scratch = s.scratch[0];
  sum = __reduce_add_sync(~0U, sum), longest = __reduce_max_sync(~0U, longest), shortest = __reduce_min_sync(~0U, shortest);
  if (lane == 0) scratch[warp] = sum, scratch[kWarps + warp] = longest, scratch[2 * kWarps + warp] = shortest;
  __syncthreads();
  sum = __reduce_add_sync(~0U, lane < kWarps ? static_cast<unsigned>(scratch[lane]) : 0U);
  longest = __reduce_max_sync(~0U, scratch[kWarps + lane % kWarps]), shortest = __reduce_min_sync(~0U, scratch[2 * kWarps + lane % kWarps]);

  const float P = static_cast<float>(a.multiprocessors), reciprocal = __fdividef(1.F, P), pairs = static_cast<float>(a.sequences.N) * a.HV;
  x.total = static_cast<float>(sum) * a.HV, x.longest = longest;
  const float share = x.total * reciprocal, begins = kItem * pairs * reciprocal;
  x.uncut = longest == shortest ? rounded_up(pairs, P, reciprocal) * (longest + kItem)
                                : fmaxf(longest + kItem, share + begins + 0.5F * longest);
  x.longest_whole = max(static_cast<int>(share * kNeverCut), 2 * kShortest - 1);
  if (longest <= x.longest_whole || share + begins > kWorthIt * x.uncut) return x;

  int count = 0, turn = 1;
#pragma unroll 1
  for (int first = 0; first < a.sequences.N; first += kThreads, turn ^= 1) {
    const int n = first + i;
    Pair sequence{n, 0, 0, 0};
    if (n < a.sequences.N) {
      const Sequences::Span span = a.sequences.span(n);
      sequence.chunks = span.chunks(), sequence.slot = span.slot;
    }
    const bool may = sequence.chunks > x.longest_whole;
    const unsigned vote = __ballot_sync(~0U, may);
    if (lane == 0) s.scratch[turn][warp] = __popc(vote);
    __syncthreads();
    const int part = lane < kWarps ? s.scratch[turn][lane] : 0;
    const int at = count + __reduce_add_sync(~0U, lane < warp ? part : 0) + __popc(vote & ((1U << lane) - 1));
    if (may && at < kMostListed) s.sequences[at] = sequence;
    count += __reduce_add_sync(~0U, part);
  }
  if (count * a.HV > kMostListed) return x;
  __syncthreads();
  const int chunks = i < count ? s.sequences[i].chunks : 0;
  const bool begins_run = i < count && (i == 0 || s.sequences[i - 1].chunks != chunks);
  int found[2] = {begins_run ? 1 : 0, chunks}, all[2];
  block_sums(found, all, s.scratch[turn]);
  const int run = found[0] + (begins_run ? 1 : 0) - 1;
  if (i < count) s.sequences[i].head = run;
  if (begins_run) s.run_chunks[run] = chunks;
  x.listed = count * a.HV, x.runs = all[0], x.in_list = static_cast<float>(all[1]) * a.HV;
  __syncthreads();
  if (i < x.listed) {
    const unsigned sequence = static_cast<unsigned>(i) / static_cast<unsigned>(a.HV);
    x.mine = s.sequences[sequence];
    x.run = x.mine.head;
    x.mine.head = i - static_cast<int>(sequence) * a.HV;
    s.pairs[i] = x.mine;
  }
  __syncthreads();
  return x;
}

}  // namespace flashdelta::cuda::segment
