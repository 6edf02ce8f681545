// What a plan by cost is made from before anything is known of the gates: lengths, and the pairs that may be cut.
#pragma once

#include "cuda/segment/emit.cuh"
#include "cuda/segment/uncut.cuh"

namespace flashdelta::cuda::segment {

constexpr int kWarps = kThreads / 32;
constexpr int kMostSums = 5;
constexpr int kModelLanes = kThreads / kMostSegments;
constexpr int kPasses = 2;  // a rehearsal or a plan from gates alone, and the plan from everything

// What a number of segments makes of the exact pairs.
struct alignas(16) Model {
  float time;
  float wanted;    // chunks of a segment
  int items[3];    // firsts, transitions and local states; column blocks of scans; segments that wait, or their halves
  float costs[3];  // of all of each
  int boundaries;  // segments that wait
  int half_above;  // firsts of more chunks go out as two halves of their value columns
  int late_above;  // of a late cut: pairs of more chunks are cut, in `late` segments
  int late;        // 0: no late cut
  float share;     // a first segment's length over that of the next
  bool halves;     // segments that wait go out as halves

  // Pieces of the line begin behind uncut pairs, or long firsts, in the order in which these end.
  __device__ __forceinline__ bool ranked() const { return late > 0 || boundaries == 0; }
  // Of a first segment, or an exact pair that is not cut: its items, and what one of them takes.
  __device__ __forceinline__ int copies(float chunks) const { return chunks > static_cast<float>(half_above) ? kTiles : 1; }
  __device__ __forceinline__ float time_of(float chunks) const { return __fmul_rn(copies(chunks) > 1 ? kHalfBeside : 1.F, chunks); }
};
enum ModelItem { kParts, kScans, kDependents, kModelItems };

struct Outline {
  int listed, runs, longest, longest_whole;  // listed: 0 where no plan could be worth it
  int half_above;                            // exact pairs of more chunks take longer than the call has to, if neither cut nor in halves
  float whole, uncut;                        // chunks, and what beginning costs, of pairs that are not listed; time of a call without cuts
  bool hill;                                 // middle segments are the longest
};

struct Shared {
  Pair sequences[kMostListed];           // whose pairs may be cut; `head` is the number of their run
  Pair pairs[kMostListed];               // of them
  const signed char* rows[kMostListed];  // where their chunks' bytes lie
  int run_chunks[kMostListed];           // of listed sequences of one length, next to one another
  int run_exact[kPasses][kMostListed];
  unsigned char run[kMostListed];                // of a pair
  unsigned char fails[kPasses][2][kMostListed];  // some four chunks, or eight, forget too little
  unsigned char window[kMostListed];             // chunks within which a pair forgets wherever one looks; 0: it does not
  short exact[kMostListed], warm[kMostListed];   // listed pairs of either kind
  float line[kMostListed];                       // where warm pairs begin on their line
  float piece[kThreads];                         // where pieces begin, all lines laid end to end
  int2 start[kThreads];                          // of pieces of the line: warm pair and chunk
  Outline outline;
  Model model[kMostSegments];
  unsigned least[kWarps];
  int segment[kMostListed + kMostBoundaries];  // of exact pairs: pair, its number in it, how many that has, a byte each
  signed char warm_here[kMostBoundaries];
  int shorter[kMostListed];  // of items that wait for nothing: those that take less time than this batch's
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

// Of a packed call's sequences, by the block.
__device__ __forceinline__ Lengths measure(const Arguments& a, Shared& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Lengths x = kNoLengths;
#pragma unroll 1
  for (int n = threadIdx.x; n < a.sequences.N; n += kThreads) x.add(a.sequences.span(n).chunks());
  x = x.together();
  int* scratch = s.scratch[0];
  if (lane == 0) scratch[warp] = x.longest, scratch[kWarps + warp] = x.shortest, scratch[2 * kWarps + warp] = static_cast<int>(x.sum);
  __syncthreads();
  const int at = lane % kWarps;
  const auto sum = static_cast<unsigned>(scratch[2 * kWarps + at]);
  return {__reduce_max_sync(~0U, scratch[at]), __reduce_min_sync(~0U, scratch[kWarps + at]),
          __reduce_add_sync(~0U, lane < kWarps ? sum : 0U)};
}

// Lists a packed call's sequences of more than outline.longest_whole chunks, and which of them are of one length; false where their pairs
// are too many.
__device__ __forceinline__ bool list_sequences(const Arguments& a, Shared& s, Outline& outline) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = threadIdx.x;
  int count = 0, turn = 1;
#pragma unroll 1
  for (int first = 0; first < a.sequences.N; first += kThreads, turn ^= 1) {
    const int n = first + i;
    Pair sequence{n, 0, 0, 0};
    if (n < a.sequences.N) {
      const Sequences::Span span = a.sequences.span(n);
      sequence.chunks = span.chunks(), sequence.slot = span.slot;
    }
    const bool may = sequence.chunks > outline.longest_whole;
    const unsigned vote = __ballot_sync(~0U, may);
    if (lane == 0) s.scratch[turn][warp] = __popc(vote);
    __syncthreads();
    const int part = lane < kWarps ? s.scratch[turn][lane] : 0;
    const int at = count + __reduce_add_sync(~0U, lane < warp ? part : 0) + __popc(vote & ((1U << lane) - 1));
    if (may && at < kMostListed) s.sequences[at] = sequence;
    count += __reduce_add_sync(~0U, part);
  }
  if (count * a.HV > kMostListed) return false;
  __syncthreads();
  const int chunks = i < count ? s.sequences[i].chunks : 0;
  const bool begins_run = i < count && (i == 0 || s.sequences[i - 1].chunks != chunks);
  int found[2] = {begins_run ? 1 : 0, chunks}, all[2];
  block_sums(found, all, s.scratch[turn]);
  const int run = found[0] + (begins_run ? 1 : 0) - 1;
  if (i < count) s.sequences[i].head = run;
  if (begins_run) s.run_chunks[run] = chunks;
  outline.listed = count * a.HV, outline.runs = all[0], outline.whole -= static_cast<float>(all[1]) * a.HV + kItem * outline.listed;
  __syncthreads();
  return true;
}

// Leaves s.outline, pairs and runs. Returns how many pairs are listed; 0: there is nothing to plan. halves: whether pairs are best taken so
// where nothing is cut.
__device__ __forceinline__ int make_outline(const Arguments& a, Shared& s, bool& halves) {
  const int i = threadIdx.x;
  const bool packed = a.sequences.cu_seqlens != nullptr;
  Outline x{};
  s.run_exact[0][i] = s.run_exact[1][i] = 0;
  reinterpret_cast<int*>(s.fails)[i] = 0;
  static_assert(sizeof(s.fails) == kThreads * sizeof(int) && kMostListed == kThreads);

  const int row = (a.sequences.T + kChunk - 1) / kChunk;  // of a call that is not packed
  const Lengths lengths = packed ? measure(a, s) : all_alike(a.sequences.N, row);
  const Uncut uncut_call = uncut(lengths, a.sequences.N, a.HV, a.multiprocessors);
  x.longest = lengths.longest, x.longest_whole = uncut_call.longest_whole;
  x.hill = uncut_call.share * uncut_call.share < static_cast<float>(x.longest);
  x.uncut = x.hill ? uncut_call.time : kIdle * uncut_call.time + (1.F - kIdle) * uncut_call.busy;
  halves = uncut_call.halves;
  if (!uncut_call.worth_cutting) return 0;

  x.whole = uncut_call.total + kItem * static_cast<float>(a.sequences.N) * a.HV;
  if (packed) {
    // Where too many pairs are as long as that, longer ones alone.
#pragma unroll 1
    for (int share = 1; !list_sequences(a, s, x); ++share) {
      if (share == 2) return 0;
      x.longest_whole *= 2;
      __syncthreads();
    }
  } else {
    if (a.sequences.N * a.HV > kMostListed) return 0;
    x.listed = a.sequences.N * a.HV, x.runs = 1, x.whole = 0.F;
    if (i == 0) s.run_chunks[0] = row;
  }
  if (i < x.listed) {
    const int sequence = static_cast<int>(static_cast<unsigned>(i) / static_cast<unsigned>(a.HV));
    Pair mine{sequence, 0, row, sequence * row};
    if (packed) mine = s.sequences[sequence];
    s.run[i] = static_cast<unsigned char>(mine.head);
    mine.head = i - sequence * a.HV;
    s.pairs[i] = mine;
    s.rows[i] = a.forgotten + static_cast<std::int64_t>(mine.head) * forgotten_row(a.slots) + mine.slot;
  }
  x.half_above = static_cast<int>(fmaxf(uncut_call.share, kHalf * static_cast<float>(x.longest)));
  if (i == 0) s.outline = x;
  __syncthreads();
  return x.listed;
}

}  // namespace flashdelta::cuda::segment
