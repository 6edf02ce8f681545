// Device code of the plan by cost: one block decides how (sequence, head) pairs are cut into work items. docs/context_parallel.md tells
// why, README.md how.
//
// Warm pairs (gates forget within a few chunks wherever one cuts) form one line, cut where the multiprocessors' loads are equal. The
// others are cut in equal segments: each needs the state at its start, which the scan makes from the transitions and local states of
// the segments before. Tickets are taken in order and wait only for lower ones, so a call makes progress on any number of free
// multiprocessors.
//
// It runs once, from instructions that no cache holds, with the machine waiting: loops are not unrolled and few things are done twice.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/segment/bounds.cuh"
#include "cuda/segment/model.cuh"

namespace flashdelta::cuda::segment {

__device__ __forceinline__ const signed char* forgotten_of(const Arguments& a, const Pair& p) {
  return a.forgotten + static_cast<std::int64_t>(p.head) * forgotten_row(a.slots) + p.slot;
}

// Marks pairs that somewhere forget too little within four chunks, or eight. A few neighbouring lanes take a pair, or two at once, a lane
// sixteen chunks of it at a time.
__device__ __forceinline__ void find_windows(const Arguments& a, Shared& s, const Outline& outline, unsigned char (&fails)[2][kMostListed],
                                             bool rehearsing) {
  const int most_groups = outline.longest / kForgottenGroup + 2, shift = min(5, 32 - __clz(most_groups - 1));
  const int lanes = 1 << shift, step = kThreads >> shift;
#pragma unroll 1
  for (int i = threadIdx.x >> shift; i < outline.listed; i += 2 * step) {
    const signed char* at[2];
    int first[2], chunks[2];
    unsigned made_up[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const Pair p = s.pairs[min(i + u * step, outline.listed - 1)];
      first[u] = (static_cast<int>(threadIdx.x) & (lanes - 1)) * kForgottenGroup - p.slot % kForgottenGroup;
      at[u] = forgotten_of(a, p) + first[u];
      chunks[u] = p.chunks, made_up[u] = rehearsing && p.head % 4 == 0 ? kNoneForgotten : kAllForgotten;
    }
#pragma unroll 1
    while (first[0] < chunks[0] || first[1] < chunks[1]) {
      uint2 words[2][3];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        uint4 here = make_uint4(made_up[u], made_up[u], made_up[u], made_up[u]);
        uint2 before = make_uint2(made_up[u], made_up[u]);
        if (!rehearsing && first[u] < chunks[u]) {
          here = __ldcg(reinterpret_cast<const uint4*>(at[u]));
          if (first[u] > 0) before = __ldcg(reinterpret_cast<const uint2*>(at[u] - sizeof(uint2)));
        }
        words[u][0] = before, words[u][1] = make_uint2(here.x, here.y), words[u][2] = make_uint2(here.z, here.w);
      }
      Sums sums[2];
#pragma unroll 1
      for (int c = -8; c < kForgottenGroup; c += 8) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          uint2 word = words[u][0];
          words[u][0] = words[u][1], words[u][1] = words[u][2];
          if (first[u] + c < 0 || first[u] + c + 8 > chunks[u]) {
            word.x = inside(word.x, first[u] + c, chunks[u]), word.y = inside(word.y, first[u] + c + 4, chunks[u]);
          }
          sums[u].add(word.x), sums[u].add(word.y);
        }
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int pair = min(i + u * step, outline.listed - 1);
        if (sums[u].never() || !Sums::enough(sums[u].least4, a.enough)) fails[0][pair] = 1;
        if (sums[u].never() || !Sums::enough(sums[u].least8, a.enough)) fails[1][pair] = 1;
        first[u] += lanes * kForgottenGroup, at[u] += lanes * kForgottenGroup;
      }
    }
  }
}

// The line of warm pairs, and the pairs on it and off it.
struct Line {
  int pairs, exact;
  float length, cut;  // with what beginning items costs; what a cut costs
};

__device__ __forceinline__ Line sort_pairs(const Arguments& a, Shared& s, const Outline& outline, int pass) {
  const int i = threadIdx.x;
  const bool here = i < outline.listed;
  int window = 0;
  if (here && a.mode == Mode::automatic) window = s.fails[pass][0][i] == 0 ? 4 : s.fails[pass][1][i] == 0 ? 8 : 0;
  s.window[i] = static_cast<unsigned char>(window);
  if (here && window == 0) atomicAdd(&s.run_exact[pass][outline.run], 1);
  int at[2] = {window > 0 ? 1 + (window << 16) : 0, window > 0 ? outline.mine.chunks : 0}, all[2];
  block_sums(at, all, s.scratch[0]);
  const int before = at[0] & 0xFFFF;
  if (window > 0) {
    s.warm[before] = static_cast<short>(i), s.line[before] = at[1] + kItem * before;
  } else if (here) {
    s.exact[i - before] = static_cast<short>(i);
  }
  Line line{};
  line.pairs = all[0] & 0xFFFF, line.exact = outline.listed - line.pairs;
  line.length = all[1] + kItem * line.pairs;
  if (line.pairs > 0) line.cut = __fdividef(kStateOnly * (all[0] >> 16), static_cast<float>(line.pairs)) + kItem;
  return line;
}

// Where a piece begins: listed warm pair and chunk; a chunk too near an end moves there.
__device__ __forceinline__ int2 start_of(const Shared& s, const Line& line, float at) {
  int k = 0;
#pragma unroll 1
  for (int size = line.pairs; size > 1;) {
    const int half = size / 2;
    if (s.line[k + half] <= at) k += half;
    size -= half;
  }
  const int pair = s.warm[k], chunks = s.pairs[pair].chunks, chunk = static_cast<int>(rintf(at - s.line[k] - kItem));
  if (chunk < max(kShortest, static_cast<int>(s.window[pair]))) return make_int2(k, 0);
  return chunks - chunk < kShortest ? make_int2(k + 1, 0) : make_int2(k, chunk);
}

// Segment k of the exact pairs: pair, number, count.
__device__ __forceinline__ int locate_segment(const Shared& s, const int* exact_in_run, const Outline& outline, float wanted, int k) {
  int pair = 0;
#pragma unroll 1
  for (int run = 0;; ++run) {
    const int pairs = exact_in_run[run], n = segments_of(s.run_chunks[run], wanted);
    if (k >= pairs * n && run + 1 < outline.runs) {
      k -= pairs * n, pair += pairs;
      continue;
    }
    const int more = static_cast<int>((k + 0.5F) * __fdividef(1.F, static_cast<float>(n)));
    return (pair + more) | (k - more * n) << 8 | n << 16;
  }
}
__device__ __forceinline__ Segment segment_at(const Shared& s, int k) {
  const int where = s.segment[k], pair = where & 0xFF;
  Segment x{};
  x.pair = s.pairs[s.exact[pair]];
  x.j = where >> 8 & 0xFF, x.count = where >> 16, x.boundary = k - pair - 1;
  const float length = segment_length(x.pair.chunks, x.count);
  const auto at = [&](int j) { return static_cast<int>(__fmul_rn(j - 1 + kFirstShare, length)); };
  x.begin = x.first() ? 0 : at(x.j), x.end = x.last() ? x.pair.chunks : at(x.j + 1);
  return x;
}

// Items of this thread's piece of the line.
__device__ __forceinline__ void emit_line(const Arguments& a, Shared& s, const Line& line, const Tickets& t, int2 begin, int2 end, int warm,
                                          bool counting) {
  const int i = threadIdx.x;
  int index = i < t.early_pieces ? t.early() + i : t.late() + i - t.early_pieces;
  Item item{0, 0, 0, 0, 0, From::zero, 0, To::nowhere, 0, 0, -1, 0};
  if (begin.x > end.x || (begin.x == end.x && begin.y >= end.y)) return put(a.plan.items, index, item);
  if (counting && begin.y > 0) atomicAdd(&s.figures[0], 1), atomicAdd(&s.figures[1], warm);
#pragma unroll 1
  for (int k = begin.x; index >= 0; ++k) {
    const Pair p = s.pairs[s.warm[k]];
    const int from = begin.y - warm, to = k == end.x ? end.y : p.chunks;
    item.sequence = p.sequence, item.head = p.head, item.first = from, item.warm = warm, item.chunks = to - from;
    item.from = begin.y > 0 ? From::zero : From::start, item.to = to == p.chunks ? To::final_state : To::nowhere;
    item.more = k + 1 < end.x || (k + 1 == end.x && end.y > 0) ? t.count() + k + 1 : -1;
    put(a.plan.items, index, item);
    index = item.more, begin.y = warm = 0;
  }
}

__device__ __forceinline__ void finish(const Arguments& a, int tickets, int longest_whole, int warm, int exact, int warm_chunks) {
  if (threadIdx.x != 0) return;
  *a.plan.header = {tickets, longest_whole};
  if (a.counts == nullptr) return;
  a.counts[0] = a.sequences.N * a.HV + warm + exact, a.counts[1] = warm, a.counts[2] = exact, a.counts[3] = warm_chunks;
}

__device__ __forceinline__ void plan_by_cost(const Arguments& a, Shared& s, const Outline& outline, int pass) {
  const int i = threadIdx.x, P = a.multiprocessors;
  const bool rehearsing = pass == 0;
  const auto warm_before = [&](const Pair& p, int chunk) {
    return warm_up(forgotten_of(a, p) + chunk, chunk, a.enough, rehearsing, p.head);
  };
  if (a.mode == Mode::automatic) {
    find_windows(a, s, outline, s.fails[pass], rehearsing);
    __syncthreads();
  }
  const Line line = sort_pairs(a, s, outline, pass);
  const float whole_pairs = static_cast<float>(a.sequences.N) * a.HV - outline.listed;
  const float whole = outline.total - outline.in_list + kItem * whole_pairs;
  const Model m = best_model(a, s, s.run_exact[pass], outline, line.exact, line.length + whole + P * line.cut);
  if (m.time > kWorthIt * outline.uncut) {
    if (!rehearsing) finish(a, 0, 1 << 30, 0, 0, 0);
    return;
  }

  // Exact pairs: the states at their boundaries, then how many items there are of each kind.
  const int segments = line.exact + m.dependents, each = (segments + kThreads - 1) / kThreads;
  const int from = i * each, to = min(segments, from + each);
  const auto warm_of = [&](int boundary) { return s.warm_here[boundary]; };
  Counts mine{};
  int warm_chunks = 0;
  if (segments > 0) {
#pragma unroll 1
    for (int k = from; k < to; ++k) {
      s.segment[k] = locate_segment(s, s.run_exact[pass], outline, m.wanted, k);
      const Segment x = segment_at(s, k);
      if (x.first()) continue;
      s.warm_here[x.boundary] = static_cast<signed char>(a.mode == Mode::automatic ? warm_before(x.pair, x.begin) : 0);
      a.plan.arrived[x.boundary] = a.plan.scanned[x.boundary] = 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int k = from; k < to; ++k) {
      Segment x = segment_at(s, k);
      look_around(x, warm_of);
      mine.add(x), warm_chunks += x.warm;
    }
  }

  // The line: a piece for each multiprocessor, so that with its share of everything else each has the same load. Where many pieces would
  // be too short to be worth it, fewer and longer ones. Sums are of sixteenths of a chunk.
  float room = -1.F;
  if (i < P && line.pairs > 0) {
    const float reciprocal = __fdividef(1.F, static_cast<float>(P));
    const auto share = [&](int items, float cost) {  // of piece i, where the last pieces take what is over
      if (items == 0) return 0.F;
      const int even = static_cast<int>((items + 0.5F) * reciprocal);
      return __fdividef((even + (i >= P - (items - even * P) ? 1 : 0)) * cost, static_cast<float>(items));
    };
    room = m.time - share(m.parts, m.parts_cost) - share(m.scans, m.scans_cost) - share(m.dependents, m.dependents_cost) -
           whole * reciprocal - line.cut;
  }
  constexpr float kUnit = 16.F;
  const int lengths[2] = {room >= kShortest ? static_cast<int>(room * kUnit) : 0, room >= 0.F ? static_cast<int>((room + kShortest) * kUnit) : 0};
  int at[5] = {mine.firsts | mine.scans << 16, mine.parts | mine.dependents << 16, warm_chunks, lengths[0], lengths[1]}, all[5];
  block_sums(at, all, s.scratch[1]);
  const int longer = all[3] < line.length * kUnit ? 1 : 0;
  const float line_total = (longer != 0 ? all[4] : all[3]) / kUnit;
  const float stretch = line_total < line.length ? __fdividef(line.length, fmaxf(line_total, 1.F)) : 1.F;
  const float piece = (longer != 0 ? at[4] : at[3]) / kUnit * stretch;
  // Pieces without room are empty and cost a ticket; those behind the line's end are none. Without any room, one piece is the line.
  const bool used = line.pairs > 0 && (line_total > 0.F ? lengths[longer] > 0 && piece < line.length : i == 0);
  int2 begin = make_int2(line.pairs, 0);
  int warm = 0;
  if (used) {
    begin = start_of(s, line, piece);
    if (begin.y > 0) warm = warm_before(s.pairs[s.warm[begin.x]], begin.y);
  }
  s.start[i] = begin;
  const int pieces = __syncthreads_count(used);

  Tickets t{all[0] & 0xFFFF, all[1] & 0xFFFF, 0, all[0] >> 16, 0, all[1] >> 16};
  const int running = t.firsts + t.parts;
  const int over = running - static_cast<int>((running + 0.5F) * __fdividef(1.F, static_cast<float>(P))) * P;
  t.early_pieces = running == 0 ? pieces : min(pieces, over == 0 ? 0 : P - over);
  t.late_pieces = pieces - t.early_pieces;
  Counts next{at[0] & 0xFFFF, at[1] & 0xFFFF, at[0] >> 16, at[1] >> 16};
#pragma unroll 1
  for (int k = from; k < to; ++k) {
    Segment x = segment_at(s, k);
    look_around(x, warm_of);
    emit(a.plan.items, x, t, next, warm_of);
    next.add(x);
  }
  const bool counting = a.counts != nullptr && !rehearsing;
  if (i < pieces) emit_line(a, s, line, t, begin, i + 1 < pieces ? s.start[i + 1] : make_int2(line.pairs, 0), warm, counting);
  if (counting) __syncthreads();
  if (!rehearsing) {
    finish(a, t.count(), outline.longest_whole, t.firsts - line.exact + s.figures[0], t.dependents, all[2] + s.figures[1]);
  }
}

__global__ void __launch_bounds__(kThreads, kResident) plan_kernel(const __grid_constant__ Arguments a) {
  __shared__ Shared s;
  device::allow_dependent_launch();
  Outline outline{};
  if (a.mode != Mode::off) outline = outline_of(a, s);
  if (a.plan.initial_read != nullptr) {
#pragma unroll 1
    for (int i = threadIdx.x; i < a.sequences.N * a.HV; i += kThreads) a.plan.initial_read[i] = 0;
  }
  if (outline.listed == 0) {
    device::wait_for_previous_launch();
    return finish(a, 0, 1 << 30, 0, 0, 0);
  }
#pragma unroll 1
  for (int pass = a.rehearse ? 0 : 1; pass < kPasses; ++pass) {
    if (pass == 1) device::wait_for_previous_launch();
    plan_by_cost(a, s, outline, pass);
  }
}

}  // namespace flashdelta::cuda::segment
