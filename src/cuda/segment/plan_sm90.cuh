// Device code of the plan: one block decides how (sequence, head) pairs are cut into work items. docs/context_parallel.md tells why.
//
// Warm pairs (gates forget within a few chunks wherever one cuts) form one line, cut where the multiprocessors' loads are equal. The
// others are cut in equal segments: each needs the state at its start, which the scan makes from the transitions and local states of
// the segments before. Tickets are taken in order and wait only for lower ones, so a call makes progress on any number of free
// multiprocessors.
#pragma once

#include "cuda/segment/outline.cuh"

namespace flashdelta::cuda::segment {

// Tickets: firsts, parts, pieces of the line for multiprocessors without a part, scans, the other pieces, dependents.
struct Tickets {
  int firsts, parts, early_pieces, scans, late_pieces, dependents;
  __device__ int part() const { return firsts; }
  __device__ int early() const { return part() + parts; }
  __device__ int scan() const { return early() + early_pieces; }
  __device__ int late() const { return scan() + scans; }
  __device__ int dependent() const { return late() + late_pieces; }
  __device__ int count() const { return dependent() + dependents; }
};

// Pairs that are cut in segments of their own, `count` of them, and into how many.
template <class PairAt, class SegmentsOf>
struct Cut {
  PairAt pair_at;
  SegmentsOf segments_of;
  int count;
  bool may_warm;
};

// Numbers the segments and boundaries of pairs first .. first + kThreads - 1. Returns totals (x: segments, y: boundaries).
template <class C>
__device__ __forceinline__ int2 number_tile(const C& cut, Shared& s, int first) {
  const int i = first + threadIdx.x;
  const int segments = i < cut.count ? cut.segments_of(cut.pair_at(i)) : 0;
  int count[2] = {segments, max(0, segments - 1)}, total[2];
  exclusive_sums(count, total, s.scratch_int);
  s.segments[threadIdx.x] = count[0], s.boundaries[threadIdx.x] = count[1];
  if (threadIdx.x == 0) s.segments[kThreads] = total[0], s.boundaries[kThreads] = total[1];
  __syncthreads();
  return make_int2(total[0], total[1]);
}
// The last i with first[i] <= at.
template <class X, class Y>
__device__ __forceinline__ int last_not_above(const X* first, int count, Y at) {
  int low = 0;
  for (int size = count; size > 1;) {
    const int half = size / 2;
    if (first[low + half] <= at) low += half;
    size -= half;
  }
  return low;
}

// One segment of a pair with its surroundings.
struct Segment {
  Pair pair;
  int j, count, begin, end, boundary;  // boundary: number of the one at its start; the next one's is one more
  int warm;                            // of its start; 0: it depends on the segment before (or is the first)
  bool first, last, dependent, next_dependent, after_dependent, starts_chain;
};
__device__ __forceinline__ int warm_of(const Arguments& a, const Shared& s, int boundary) {
  return boundary < kMostInShared ? s.warm_here[boundary] : a.plan.warm[boundary];
}
template <class C>
__device__ __forceinline__ Segment segment_at(const Arguments& a, const C& cut, const Shared& s, int first_pair, int first_boundary,
                                              int k) {
  const int local = last_not_above(s.segments, kThreads, k);
  Segment x{};
  x.pair = cut.pair_at(first_pair + local);
  x.count = s.segments[local + 1] - s.segments[local], x.j = k - s.segments[local];
  x.boundary = first_boundary + s.boundaries[local] + x.j - 1;
  const auto at = [&](int j) {
    if (a.forced > 0) return static_cast<int>(static_cast<std::int64_t>(j) * x.pair.chunks / x.count);
    if (a.fixed) return j * kFixedChunks;
    return j == 0 ? 0 : static_cast<int>((j - 1 + kFirstShare) * x.pair.chunks / (x.count - 1 + kFirstShare));
  };
  x.begin = at(x.j), x.end = x.j + 1 == x.count ? x.pair.chunks : at(x.j + 1);
  x.first = x.j == 0, x.last = x.j + 1 == x.count;
  return x;
}
__device__ __forceinline__ void look_around(const Arguments& a, const Shared& s, Segment& x) {
  x.warm = x.first ? 0 : warm_of(a, s, x.boundary);
  x.dependent = !x.first && x.warm == 0;
  x.next_dependent = !x.last && warm_of(a, s, x.boundary + 1) == 0;
  x.after_dependent = x.j > 1 && warm_of(a, s, x.boundary - 1) == 0;
  x.starts_chain = x.dependent && x.next_dependent && !x.after_dependent;
}

struct Counts {
  int firsts, parts, scans, dependents;
};
__device__ __forceinline__ Counts counts_of(const Segment& x) {
  return {x.dependent ? 0 : 1, x.dependent && x.next_dependent ? 2 : 0, x.starts_chain ? kScanBlocks : 0, x.dependent ? 1 : 0};
}

// Items of one segment, at its numbers within each kind.
__device__ __forceinline__ void emit(const Arguments& a, const Shared& s, const Segment& x, const Tickets& t, const Counts& at) {
  Item item{x.pair.sequence, x.pair.head, x.begin, 0, x.end - x.begin, From::start, 0, To::nowhere, 0, 0, -1, 0};
  item.to_boundary = x.boundary + 1;
  item.to = x.last ? To::final_state : x.next_dependent ? To::boundary : To::nowhere;
  if (!x.dependent) {
    item.from = x.first ? From::start : From::zero;
    item.first -= x.warm, item.chunks += x.warm, item.warm = x.warm;
    a.plan.items[at.firsts] = item;
    return;
  }
  item.from = From::boundary, item.from_boundary = x.boundary, item.from_scan = x.after_dependent ? 1 : 0;
  // Its end is the scan's to write, unless no one waits for it.
  if (!x.last) item.to = To::nowhere;
  a.plan.items[t.dependent() + at.dependents] = item;
  if (!x.next_dependent) return;
  item.warm = item.chunks;
  item.from = From::identity, item.to = To::transition;
  a.plan.items[t.part() + at.parts] = item;
  item.from = From::zero, item.to = To::boundary;
  a.plan.items[t.part() + at.parts + 1] = item;
  if (!x.starts_chain) return;
  int steps = 0;
  for (int j = x.j + 1; j < x.count && warm_of(a, s, x.boundary + j - x.j) == 0; ++j) ++steps;
  Item scan{x.pair.sequence, x.pair.head, 0, 1 << 30, 0, From::boundary, x.boundary, To::boundary, x.boundary + 1, steps, -1, 0};
  for (int block = 0; block < kScanBlocks; ++block) {
    scan.first = block;
    a.plan.items[t.scan() + at.scans + block] = scan;
  }
}

// Decides for every boundary of the cut pairs; totals by kind, and in `figures` what callers may ask for. one_round: a thread has one
// segment at most, `only`, whose items are numbered from only_at on.
template <class C>
__device__ __forceinline__ Tickets decide(const Arguments& a, const C& cut, Shared& s, int (&figures)[3], bool& one_round, Segment& only,
                                          Counts& only_at) {
  Tickets t{};
  int boundaries = 0;
  only.count = 0;
  for (int first = 0; first < cut.count; first += kThreads) {
    const int2 total = number_tile(cut, s, first);
    one_round = cut.count <= kThreads && total.x <= kThreads;
    for (int k = threadIdx.x; k < total.x; k += kThreads) {
      const Segment x = segment_at(a, cut, s, first, boundaries, k);
      if (x.first) continue;
      const int warm = cut.may_warm ? warm_up(a, s, x.pair, x.begin) : 0;
      if (x.boundary < kMostInShared) {
        s.warm_here[x.boundary] = static_cast<signed char>(warm);
      } else {
        a.plan.warm[x.boundary] = warm;
      }
      a.plan.arrived[x.boundary] = a.plan.scanned[x.boundary] = 0;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < (total.x + kThreads - 1) / kThreads * kThreads; k += kThreads) {
      Segment x{};
      Counts c{};
      int warm = 0;
      if (k < total.x) {
        x = segment_at(a, cut, s, first, boundaries, k);
        look_around(a, s, x);
        c = counts_of(x), warm = x.warm;
      }
      int count[6] = {c.firsts, c.parts, c.scans, c.dependents, warm > 0 ? 1 : 0, warm}, sum[6];
      exclusive_sums(count, sum, s.scratch_int);
      t.firsts += sum[0], t.parts += sum[1], t.scans += sum[2], t.dependents += sum[3];
      figures[0] += sum[4], figures[1] += sum[3], figures[2] += sum[5];
      if (one_round) only = x, only_at = {count[0], count[1], count[2], count[3]};
    }
    boundaries += total.y;
    __syncthreads();
  }
  return t;
}

// What decide numbered, in case it took more than one round.
template <class C>
__device__ __forceinline__ void emit_all(const Arguments& a, const C& cut, Shared& s, const Tickets& t) {
  Counts before{};
  int boundaries = 0;
  for (int first = 0; first < cut.count; first += kThreads) {
    const int2 total = number_tile(cut, s, first);
    for (int k = threadIdx.x; k < (total.x + kThreads - 1) / kThreads * kThreads; k += kThreads) {
      Segment x{};
      Counts c{};
      if (k < total.x) {
        x = segment_at(a, cut, s, first, boundaries, k);
        look_around(a, s, x);
        c = counts_of(x);
      }
      Counts sum{}, at{};
      at.firsts = before.firsts + exclusive_sum(c.firsts, sum.firsts, s.scratch_int);
      at.parts = before.parts + exclusive_sum(c.parts, sum.parts, s.scratch_int);
      at.scans = before.scans + exclusive_sum(c.scans, sum.scans, s.scratch_int);
      at.dependents = before.dependents + exclusive_sum(c.dependents, sum.dependents, s.scratch_int);
      before.firsts += sum.firsts, before.parts += sum.parts, before.scans += sum.scans, before.dependents += sum.dependents;
      if (k < total.x) emit(a, s, x, t, at);
    }
    boundaries += total.y;
    __syncthreads();
  }
}

// The line of warm pairs.
struct Line {
  int pairs;
  float length, cut;  // with what beginning items costs; what a cut costs
};

// Where a piece begins: listed warm pair and chunk; a chunk too near an end moves there.
__device__ __forceinline__ int2 start_of(const Arguments& a, const Shared& s, const Line& line, float at) {
  if (at >= line.length) return make_int2(line.pairs, 0);
  const int k = last_not_above(s.line, line.pairs, at);
  const int chunks = s.chunks[s.warm[k]];
  const int chunk = static_cast<int>(rintf(at - s.line[k] - kItem));
  if (chunk < max(kShortest, static_cast<int>(s.window[s.warm[k]]))) return make_int2(k, 0);
  return chunks - chunk < kShortest ? make_int2(k + 1, 0) : make_int2(k, chunk);
}

// Sets where pieces of the line begin, so that with its share of everything else each multiprocessor has the same load.
__device__ __forceinline__ int cut_line(const Arguments& a, Shared& s, const Model& m, const Line& line, float load, float whole) {
  const int P = a.multiprocessors, i = threadIdx.x;
  const auto share = [&](int items, float cost) {  // of piece i, where the last pieces take what is over
    if (items == 0) return 0.F;
    return (items / P + (i >= P - items % P ? 1 : 0)) * cost / items;
  };
  const float room =
      load - share(m.parts, m.parts_cost) - share(m.scans, m.scans_cost) - share(m.dependents, m.dependents_cost) - whole / P - line.cut;
  float total = 0.F;
  float mine = i < P && room >= kShortest ? room : 0.F;
  float at = exclusive_sum(mine, total, s.scratch);
  if (total < line.length) {  // many pieces would be too short to be worth it: fewer and longer
    mine = i < P && room >= 0.F ? room + kShortest : 0.F;
    at = exclusive_sum(mine, total, s.scratch);
  }
  if (total == 0.F) {
    if (i == 0) s.piece[0] = 0.F;
    __syncthreads();
    return 1;
  }
  const float stretch = total < line.length ? line.length / total : 1.F;
  __syncthreads();
  if (i < kThreads) s.piece[i] = at * stretch;
  __syncthreads();
  // Pieces without room are empty and cost a ticket; those behind the line's end are none.
  const int used = i < P && mine > 0.F && at * stretch < line.length ? i + 1 : 0;
  int last = 0;
  last = __reduce_max_sync(~0U, used);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.scratch_int[threadIdx.x / 32] = last;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) last = max(last, s.scratch_int[w]);
  __syncthreads();
  return last;
}

__device__ __forceinline__ void emit_line(const Arguments& a, const Shared& s, const Line& line, const Tickets& t, int (&mine)[2]) {
  const int i = threadIdx.x, pieces = t.early_pieces + t.late_pieces;
  if (i >= pieces) return;
  const int2 begin = start_of(a, s, line, s.piece[i]),
             end = i + 1 == pieces ? make_int2(line.pairs, 0) : start_of(a, s, line, s.piece[i + 1]);
  int index = i < t.early_pieces ? t.early() + i : t.late() + i - t.early_pieces;
  Item empty{};
  empty.from = From::zero, empty.more = -1;
  if (begin.x > end.x || (begin.x == end.x && begin.y >= end.y)) {
    a.plan.items[index] = empty;
    return;
  }
  for (int k = begin.x; k < end.x || (k == end.x && end.y > 0); ++k) {
    const int pair = s.warm[k];
    const Pair p{s.sequence[pair], s.head[pair], s.chunks[pair]};
    const int from = k == begin.x ? begin.y : 0, to = k == end.x ? end.y : p.chunks;
    Item item{p.sequence, p.head, from, 0, to - from, From::start, 0, To::nowhere, 0, 0, -1, 0};
    if (to == p.chunks) item.to = To::final_state;
    if (from > 0) {
      const int warm = warm_up(a, s, p, from);
      // Where rounding hides it (the windows were summed in another order), the longest warm-up it is.
      item.warm = warm > 0 ? warm : min(from, kMostWarmUp);
      item.from = From::zero;
      item.first -= item.warm, item.chunks += item.warm;
      mine[0] += 1, mine[1] += item.warm;
    }
    const bool on = k + 1 < end.x || (k + 1 == end.x && end.y > 0);
    item.more = on ? t.count() + k + 1 : -1;
    a.plan.items[index] = item;
    index = item.more;
  }
}

__device__ __forceinline__ void finish(const Arguments& a, const Shared& s, int tickets, int longest_whole, const int (&figures)[3]) {
  if (s.rehearsing) return;
  if (a.plan.initial_read != nullptr) {
    for (int i = threadIdx.x; i < a.sequences.N * a.HV; i += kThreads) a.plan.initial_read[i] = 0;
  }
  if (threadIdx.x != 0) return;
  *a.plan.header = {tickets, longest_whole};
  if (a.counts == nullptr) return;
  a.counts[0] = a.sequences.N * a.HV + figures[0] + figures[1], a.counts[1] = figures[0], a.counts[2] = figures[1],
  a.counts[3] = figures[2];
}

// Every pair of more than a few chunks in the same way: forced counts, or fixed cuts.
__device__ __forceinline__ void plan_alike(const Arguments& a, Shared& s) {
  const int longest_whole = a.forced > 0 ? 1 : kFixedChunks;
  const auto pair_at = [&](int i) { return Pair{i / a.HV, i % a.HV, a.sequences.span(i / a.HV).chunks()}; };
  const auto segments_of = [&](const Pair& p) {
    if (p.chunks <= longest_whole) return 0;
    return a.forced > 0 ? min(a.forced, p.chunks) : (p.chunks + kFixedChunks - 1) / kFixedChunks;
  };
  const Cut<decltype(pair_at), decltype(segments_of)> cut{pair_at, segments_of, a.sequences.N * a.HV, a.mode == Mode::automatic};
  int figures[3] = {};
  bool one_round = true;
  Segment only{};
  Counts only_at{};
  const Tickets t = decide(a, cut, s, figures, one_round, only, only_at);
  if (!one_round) {
    emit_all(a, cut, s, t);
  } else if (only.count > 0) {
    emit(a, s, only, t, only_at);
  }
  finish(a, s, t.count(), longest_whole, figures);
}

// Where the pairs of long sequences are listed, and what the others and an uncut call cost.
struct Outline {
  int listed, longest, longest_whole;
  float total, uncut;  // chunks of all pairs; time
};

// Before anything is known of the gates. listed: 0 where no plan could be worth it.
__device__ __forceinline__ Outline outline_of(const Arguments& a, Shared& s) {
  const Lengths lengths = measure(a, s);
  const float P = static_cast<float>(a.multiprocessors), pairs = static_cast<float>(a.sequences.N) * a.HV;
  Outline x{};
  x.total = lengths.total * a.HV, x.longest = lengths.longest;
  const float share = x.total / P, begins = kItem * pairs / P;
  x.uncut = lengths.longest == lengths.shortest ? ceilf(pairs / P) * (lengths.longest + kItem)
                                                : fmaxf(lengths.longest + kItem, share + begins + lengths.longest / 2);
  x.longest_whole = max(static_cast<int>(share * kNeverCut), 2 * kShortest - 1);
  if (lengths.longest <= x.longest_whole || share + begins > kWorthIt * x.uncut) return x;
  x.listed = max(0, list_pairs(a, s, x.longest_whole));
  return x;
}

__device__ __forceinline__ void plan_by_cost(const Arguments& a, Shared& s, const Outline& outline) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, P = a.multiprocessors, listed = outline.listed;
  const int none[3] = {};
  for (int i = warp; i < listed; i += kWarps) {
    const Pair p{s.sequence[i], s.head[i], s.chunks[i]};
    const int window = a.mode == Mode::automatic ? forgetting_window(a, s, p, lane) : 0;
    if (lane == 0) s.window[i] = static_cast<unsigned char>(window);
  }
  __syncthreads();
  const int i = threadIdx.x;
  const bool here = i < listed, warm = here && s.window[i] > 0;
  const int chunks = here ? s.chunks[i] : 0;
  Line line{};
  int kind[2] = {here && !warm ? 1 : 0, warm ? 1 : 0}, kinds[2];
  exclusive_sums(kind, kinds, s.scratch_int);
  const int exact_at = kind[0], warm_at = kind[1], exact_pairs = kinds[0];
  line.pairs = kinds[1];
  float size[3] = {warm ? chunks + kItem : 0.F, warm ? static_cast<float>(s.window[i]) : 0.F, static_cast<float>(chunks)}, sizes[3];
  exclusive_sums(size, sizes, s.scratch);
  const float line_at = size[0], windows = sizes[1], in_list = sizes[2];
  line.length = sizes[0];
  if (here && !warm) s.exact[exact_at] = static_cast<short>(i);
  if (warm) s.warm[warm_at] = static_cast<short>(i), s.line[warm_at] = line_at;
  __syncthreads();
  line.cut = line.pairs > 0 ? kStateOnly * windows / line.pairs + kItem : 0.F;
  const float whole_pairs = static_cast<float>(a.sequences.N) * a.HV - listed;
  const float whole = outline.total - in_list + kItem * whole_pairs;

  {
    const int candidate = threadIdx.x / kModelLanes;
    const Model m = model_of(a, s, candidate + 1, exact_pairs, outline.longest, line.length + whole, line.pairs > 0, line.cut,
                             threadIdx.x % kModelLanes);
    if (threadIdx.x % kModelLanes == 0) s.model[candidate] = m;
  }
  __syncthreads();
  if (warp == 0) {
    float time = s.model[lane].time;
    int best = lane;
    if (s.model[lane + 32].time < time) time = s.model[lane + 32].time, best = lane + 32;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
      const float other = __shfl_xor_sync(~0U, time, o);
      const int which = __shfl_xor_sync(~0U, best, o);
      if (other < time || (other == time && which < best)) time = other, best = which;
    }
    if (lane == 0) s.best = best;
  }
  __syncthreads();
  const Model& m = s.model[s.best];
  if (m.time > kWorthIt * outline.uncut) return finish(a, s, 0, 1 << 30, none);

  const float wanted = ceilf(static_cast<float>(outline.longest) / (s.best + 1));
  const auto pair_at = [&](int k) {
    const int l = s.exact[k];
    return Pair{s.sequence[l], s.head[l], s.chunks[l]};
  };
  const auto segments_of = [&](const Pair& p) { return max(1, min(static_cast<int>(ceilf(p.chunks / wanted)), p.chunks / kShortest)); };
  const Cut<decltype(pair_at), decltype(segments_of)> cut{pair_at, segments_of, exact_pairs, a.mode == Mode::automatic};
  int figures[3] = {};
  bool one_round = true;
  Segment only{};
  Counts only_at{};
  Tickets t = decide(a, cut, s, figures, one_round, only, only_at);
  const int pieces = line.pairs > 0 ? cut_line(a, s, m, line, m.time, whole) : 0;
  const int parts = (t.firsts + t.parts) % P;
  t.early_pieces = t.firsts + t.parts == 0 ? pieces : min(pieces, parts == 0 ? 0 : P - parts);
  t.late_pieces = pieces - t.early_pieces;
  if (!one_round) {
    emit_all(a, cut, s, t);
  } else if (only.count > 0) {
    emit(a, s, only, t, only_at);
  }
  int mine[2] = {}, sum[2];
  emit_line(a, s, line, t, mine);
  if (a.counts != nullptr) {
    exclusive_sums(mine, sum, s.scratch_int);
    figures[0] += sum[0], figures[2] += sum[1];
  }
  finish(a, s, t.count(), outline.longest_whole, figures);
}

__global__ void __launch_bounds__(kThreads, kResident) plan_kernel(const __grid_constant__ Arguments a) {
  __shared__ Shared s;
  device::allow_dependent_launch();
  s.rehearsing = false;
  const int none[3] = {};
  if (a.mode != Mode::off && (a.forced > 0 || a.fixed)) {
    device::wait_for_previous_launch();
    __syncthreads();
    return plan_alike(a, s);
  }
  Outline outline{};
  if (a.mode != Mode::off) outline = outline_of(a, s);
  if (outline.listed == 0) {
    device::wait_for_previous_launch();
    __syncthreads();
    return finish(a, s, 0, 1 << 30, none);
  }
#pragma unroll 1
  for (int pass = a.rehearse ? 0 : 1; pass < 2; ++pass) {
    __syncthreads();
    s.rehearsing = pass == 0;
    if (pass == 1) device::wait_for_previous_launch();
    __syncthreads();
    plan_by_cost(a, s, outline);
  }
}

}  // namespace flashdelta::cuda::segment
