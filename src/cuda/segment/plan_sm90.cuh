// Device code of the plan by cost: one block decides how (sequence, head) pairs are cut into work items. docs/context_parallel.md tells
// why, README.md how.
//
// Warm pairs (gates forget within a few chunks wherever one cuts) form one line, cut where the multiprocessors' loads are equal. The
// others are cut in segments, equal ones or hills: each needs the state at its start, which the scan makes from the transitions and local
// states of the segments before. Tickets are taken in order and wait only for lower ones, so a call makes progress on any number of free
// multiprocessors.
//
// It runs once, from instructions that no cache holds, with the machine waiting: loops are not unrolled and few things are done twice.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/segment/bounds.cuh"
#include "cuda/segment/model.cuh"

namespace flashdelta::cuda::segment {

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
      const int pair = min(i + u * step, outline.listed - 1);
      const signed char* row = s.rows[pair];
      chunks[u] = s.pairs[pair].chunks, made_up[u] = rehearsing && pair % 4 == 0 ? kNoneForgotten : kAllForgotten;
      first[u] = static_cast<int>(threadIdx.x & (lanes - 1)) * kForgottenGroup -
                 static_cast<int>(reinterpret_cast<std::uintptr_t>(row) % kForgottenGroup);
      at[u] = row + first[u];
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

constexpr float kLineUnit = 16.F;  // of a chunk, in sums of pieces' lengths

// The line of warm pairs, and the pairs on it and off it. A gang is as many value heads of one key head, on lines of their own that are cut
// at the same places: pieces beside one another read the same keys and queries at the same time. Warm pairs that are in no gang form one
// more line.
struct Line {
  int pairs, exact;
  float length, cut;  // of all lines, with what beginning items costs; what a cut costs
  int gang, ganged;   // lines of gangs, and pairs on each
  float gang_length;  // of each
  __device__ __forceinline__ int loose() const { return pairs - gang * ganged; }
  __device__ __forceinline__ float loose_length() const { return length - gang * gang_length; }
};

// How many warm pairs of one key head best make a gang, and this thread's place among those of its own.
struct Members {
  int all, before, gang;
};
__device__ __forceinline__ Members find_members(const Shared& s, unsigned group, bool warm, int warm_pairs) {
  Members x{0, 0, 1};
  const int i = threadIdx.x, first = warm ? i - static_cast<int>(static_cast<unsigned>(s.pairs[i].head) % group) : 0;
#pragma unroll 1
  for (int j = first; warm && j < first + static_cast<int>(group); ++j) {
    if (s.window[j] > 0) ++x.all, x.before += j < i ? 1 : 0;
  }
  int most = warm_pairs / kWorthGangs;  // loads of keys and queries that are saved
#pragma unroll 1
  for (int gang = 2; gang <= kMostGang; ++gang) {
    const int saved = (gang - 1) * __syncthreads_count(warm && x.before == 0 && x.all >= gang);
    if (saved > most) most = saved, x.gang = gang;
  }
  return x;
}

// Arranges the lines of gangs, where gangs are worth it.
__device__ __forceinline__ void arrange_gangs(Shared& s, unsigned group, Line& line) {
  const int i = threadIdx.x;
  const bool warm = s.window[i] > 0;
  const Members members = find_members(s, group, warm, line.pairs);
  if (members.gang == 1) return;
  const bool ganged = warm && members.all >= members.gang && members.before < members.gang, leads = ganged && members.before == 0;
  const bool loose = warm && !ganged;
  const int chunks = warm ? s.pairs[i].chunks : 0;
  int at[3] = {(leads ? 1 : 0) | (loose ? 1 << 16 : 0), leads ? chunks : 0, loose ? chunks : 0}, all[3];
  block_sums(at, all, s.scratch[1]);
  line.gang = members.gang, line.ganged = all[0] & 0xFFFF, line.gang_length = all[1] + kItem * line.ganged;
  if (ganged) {
    const int before = (at[0] & 0xFFFF) - (leads ? 0 : 1), where = members.before * line.ganged + before;
    s.warm[where] = static_cast<short>(i), s.line[where] = at[1] - (leads ? 0 : chunks) + kItem * before;
  } else if (loose) {
    const int before = at[0] >> 16, where = line.gang * line.ganged + before;
    s.warm[where] = static_cast<short>(i), s.line[where] = at[2] + kItem * before;
  }
}

template <bool Large>
__device__ __forceinline__ Line sort_pairs(const Arguments& a, Shared& s, const Outline& outline, int pass) {
  const int i = threadIdx.x;
  const bool here = i < outline.listed;
  int window = 0;
  if (here && a.mode == Mode::automatic) window = s.fails[pass][0][i] == 0 ? 4 : s.fails[pass][1][i] == 0 ? 8 : 0;
  s.window[i] = static_cast<unsigned char>(window);
  if (here && window == 0) atomicAdd(&s.run_exact[pass][s.run[i]], 1);
  int at[2] = {window > 0 ? 1 + (window << 16) : 0, window > 0 ? s.pairs[i].chunks : 0}, all[2];
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
  if (line.pairs > 0) line.cut = kStateOnly * (all[0] >> 16) * device::reciprocal(static_cast<float>(line.pairs)) + kItem;
  line.gang = 1, line.ganged = line.pairs, line.gang_length = line.length;
  if constexpr (Large) arrange_gangs(s, a.group, line);
  return line;
}

// Where a piece begins: listed warm pair, of `pairs` from `first` on, and chunk; a chunk too near an end moves there.
__device__ __forceinline__ int2 start_of(const Shared& s, int first, int pairs, float at) {
  int k = first;
#pragma unroll 1
  for (int size = pairs; size > 1;) {
    const int half = size / 2;
    if (s.line[k + half] <= at) k += half;
    size -= half;
  }
  const int pair = s.warm[k], chunks = s.pairs[pair].chunks, chunk = static_cast<int>(rintf(at - s.line[k] - kItem));
  if (chunk < max(kShortest, static_cast<int>(s.window[pair]))) return make_int2(k, 0);
  return chunks - chunk < kShortest ? make_int2(k + 1, 0) : make_int2(k, chunk);
}

// This thread's piece: from `at` on of the `pairs` warm ones from `first` on. The one behind it is thread next's; -1: it has the rest.
struct Piece {
  int first, pairs, next, pieces;  // pieces: of all threads
  float at;
};
// From s.piece, of `used` threads. As many neighbours as a gang has take a turn: one place on each of its lines.
__device__ __forceinline__ Piece find_piece(const Shared& s, const Line& line, int used) {
  const int i = threadIdx.x, gang = line.gang;
  const int member = static_cast<int>(static_cast<unsigned>(i) % gang), most = line.loose() > 0 ? used - 1 : used;
  const auto at = [&](int k) { return k < used ? s.piece[k] : line.length; };
  const bool within = member == 0 && i + gang <= most && 0.5F * (at(i) + at(i + gang)) < gang * line.gang_length;
  const int last = max(1, __syncthreads_count(within)) * gang, pieces = last + (line.loose() > 0 ? max(1, used - last) : 0);
  const float end = at(last);
  if (i < last) {
    return {member * line.ganged, line.ganged, i + gang < last ? i + gang : -1, pieces,
            s.piece[i - member] * line.gang_length * device::reciprocal(end)};
  }
  return {gang * line.ganged, line.loose(), i + 1 < pieces ? i + 1 : -1, pieces,
          i < used ? (s.piece[i] - end) * line.loose_length() * device::reciprocal(fmaxf(line.length - end, 1.F)) : 0.F};
}

// Segment k of the exact pairs: pair, number, count.
template <bool Large>
__device__ __forceinline__ int locate_segment(const Shared& s, const int* exact_in_run, const Outline& outline, const Model& m, int k) {
  int pair = 0;
#pragma unroll 1
  for (int run = 0;; ++run) {
    const int pairs = exact_in_run[run], n = segments_of<Large>(s.run_chunks[run], m);
    if (k >= pairs * n && run + 1 < outline.runs) {
      k -= pairs * n, pair += pairs;
      continue;
    }
    const int more = static_cast<int>((k + 0.5F) * device::reciprocal(static_cast<float>(n)));
    return (pair + more) | (k - more * n) << 8 | n << 16;
  }
}
__device__ __forceinline__ Segment segment_at(const Shared& s, float share, int k) {
  const int where = s.segment[k], pair = where & 0xFF;
  Segment x{};
  x.pair = s.pairs[s.exact[pair]];
  x.j = where >> 8 & 0xFF, x.count = where >> 16, x.boundary = k - pair - 1;
  const Shape shape(x.pair.chunks, x.count, s.outline.hill, share);
  x.begin = x.first() ? 0 : shape.begin(x.j), x.end = x.last() ? x.pair.chunks : shape.begin(x.j + 1);
  return x;
}

// Items of this thread's piece of the line.
__device__ __forceinline__ void emit_line(const Arguments& a, Shared& s, const Line& line, const Tickets& t, int2 begin, int2 end, int warm,
                                          bool counting) {
  const int i = threadIdx.x;
  int index = i < t.early_pieces ? t.early() + i : t.late() + i - t.early_pieces;
  Item item{0, 0, 0, 0, 0, From::zero, To::nowhere, 0, 0, 0, -1, 0, kBothConsumers};
  const bool empty = begin.x > end.x || (begin.x == end.x && begin.y >= end.y);
  if (counting && !empty && warm > 0) atomicAdd(&s.figures[0], 1), atomicAdd(&s.figures[1], warm);
#pragma unroll 1
  for (int k = begin.x; index >= 0; ++k) {
    if (!empty) {
      const Pair p = s.pairs[s.warm[k]];
      const int to = k == end.x ? end.y : p.chunks;
      item.sequence = p.sequence, item.head = p.head, item.first = begin.y - warm, item.warm = warm, item.chunks = to - item.first;
      item.from = begin.y > 0 ? From::zero : From::start, item.to = to == p.chunks ? To::final_state : To::nowhere;
      item.more = k + 1 < end.x || (k + 1 == end.x && end.y > 0) ? t.count() + k + 1 : -1;
    }
    put(a.plan.items, index, item);
    index = item.more, begin.y = warm = 0;
  }
}

// Items of a run's exact pairs that wait for nothing: firsts, or transitions and local states. What one of them takes: wherever it is
// computed, the same number, or two batches would have one rank. So no product may be joined with a sum here and not there.
struct Batch {
  int items;
  float time;
};
__device__ __forceinline__ int batches_of(const Shared& s) { return min(2 * s.outline.runs, kMostListed); }
__device__ __forceinline__ Batch batch_of(const Shared& s, const int* exact_in_run, const Model& m, int k) {
  const int run = k / 2, chunks = s.run_chunks[run], n = segments_of<true>(chunks, m);
  const Shape shape(chunks, n, false, m.share);
  if (k % 2 != 0) return {exact_in_run[run] * 2 * max(0, n - 2), __fmaf_rn(kStateOnly, shape.base, kPart)};
  const float length = n > 1 ? shape.first() : static_cast<float>(chunks);
  return {exact_in_run[run] * m.copies(length), m.time_of(length) + kItem};
}

// Ranks them by time.
__device__ __forceinline__ void rank_batches(Shared& s, const int* exact_in_run, const Model& m) {
  const int i = threadIdx.x, batches = batches_of(s);
  if (i >= batches) return;
  const float mine = batch_of(s, exact_in_run, m, i).time;
  int shorter = 0;
#pragma unroll 1
  for (int k = 0; k < batches; ++k) {
    const Batch x = batch_of(s, exact_in_run, m, k);
    if (x.time < mine || (x.time == mine && k < i)) shorter += x.items;
  }
  s.shorter[i] = shorter;
}

// What the item of this rank takes.
__device__ __forceinline__ float cost_of_rank(const Shared& s, const int* exact_in_run, const Model& m, int rank) {
  float cost = 0.F;
#pragma unroll 1
  for (int k = 0; k < batches_of(s); ++k) {
    const Batch x = batch_of(s, exact_in_run, m, k);
    const int more = rank - s.shorter[k];
    if (more >= 0 && more < x.items) cost = x.time;
  }
  return cost;
}

// Chunks for this thread's piece of the line, so that with its share of everything else each multiprocessor has the same load. Pieces are
// taken in order, so in large calls those behind uncut pairs by the first multiprocessors that have ended one. The later, the less room: a
// gang has as much as its last piece.
template <bool Large>
__device__ __forceinline__ float room_of_piece(const Arguments& a, const Shared& s, const int* exact_in_run, const Model& m,
                                               const Line& line) {
  const int P = a.multiprocessors;
  int i = threadIdx.x;
  if (line.pairs == 0 || i >= P) return -1.F;
  if constexpr (Large) i = min(P - 1, static_cast<int>(static_cast<unsigned>(i) / line.gang) * line.gang + line.gang - 1);
  const float reciprocal = device::reciprocal(static_cast<float>(P));
  float room = m.time - s.outline.whole * reciprocal - line.cut;
#pragma unroll 1
  for (int kind = 0; kind < kModelItems; ++kind) {  // the last pieces take what is over
    const int items = m.items[kind], even = static_cast<int>((items + 0.5F) * reciprocal),
              here = even + (i >= P - (items - even * P) ? 1 : 0);
    if (here == 0) continue;
    float cost = m.costs[kind] * device::reciprocal(static_cast<float>(items));
    if (Large && kind == kParts && m.ranked() && even == 0) {
      cost = cost_of_rank(s, exact_in_run, m, i - (P - items));
    }
    room -= here * cost;
  }
  return room;
}

// What is left to write when the plan is made.
struct Outcome {
  int tickets = 0, longest_whole = kAllWhole, warm = 0, exact = 0, warm_chunks = 0;  // boundaries by kind
  bool halves;                                                                       // pairs that the plan leaves whole are two items
};

// halves: how pairs go out if nothing is cut.
template <bool Large>
__device__ __forceinline__ Outcome plan_by_cost(const Arguments& a, Shared& s, int pass, bool rehearsing, bool halves) {
  const Outline& outline = s.outline;
  const int i = threadIdx.x, P = a.multiprocessors;
  Outcome outcome;
  outcome.halves = halves;
  if (a.mode == Mode::automatic) {
    find_windows(a, s, outline, s.fails[pass], rehearsing);
    __syncthreads();
  }
  const Line line = sort_pairs<Large>(a, s, outline, pass);
  const Model& m = best_model<Large>(a, s, s.run_exact[pass], outline, line.length + outline.whole + P * line.cut);
  const bool even = outline.hill || (line.pairs > 0 && m.boundaries == 0);
  const float imbalance = Large && m.late > 0 ? kLateImbalance : kImbalance;
  if ((even ? kEvenImbalance * m.time + kEvenGain : imbalance * m.time + kGain) > outline.uncut) return outcome;

  // Exact pairs' segments: first the states at their boundaries, then how many items there are of each kind, then the items.
  const int segments = line.exact + m.boundaries, each = (segments + kThreads - 1) / kThreads;
  const int from = i * each, to = min(segments, from + each);
  const auto warm_of = [&](int boundary) { return s.warm_here[boundary]; };
  Counts numbers{};
  Tickets t{};
  Piece mine{};
  int2 begin{};
  int warm = 0;
#pragma unroll 1
  for (int stage = 0; stage < 3; ++stage) {
    if (Large && stage == 0 && m.ranked()) rank_batches(s, s.run_exact[pass], m);
    if (stage == 1) __syncthreads();
    if (stage == 2) {
      const float room = room_of_piece<Large>(a, s, s.run_exact[pass], m, line);
      int at[5] = {numbers.firsts | numbers.scans << 16, numbers.parts | numbers.dependents << 16, warm,
                   room >= kShortest ? static_cast<int>(room * kLineUnit) : 0,
                   room >= 0.F ? static_cast<int>((room + kShortest) * kLineUnit) : 0};
      const bool room3 = at[3] > 0, room4 = at[4] > 0;
      int all[5];
      block_sums(at, all, s.scratch[1]);
      outcome.warm_chunks = all[2];
      // Where many pieces would be too short to be worth it, fewer and longer ones. Rounding takes less than a unit from each.
      const bool longer = all[3] + P < line.length * kLineUnit;
      const float total = (longer ? all[4] : all[3]) / kLineUnit;
      const float piece = (longer ? at[4] : at[3]) / kLineUnit * fmaxf(1.F, line.length * device::reciprocal(fmaxf(total, 1.F)));
      // Pieces without room are empty and cost a ticket; those behind the line's end are none. Without any room, one piece is the line.
      const bool used = line.pairs > 0 && (total > 0.F ? (longer ? room4 : room3) && piece < line.length : i == 0);
      s.piece[i] = piece;
      const int pieces = __syncthreads_count(used);
      mine = {0, line.pairs, i + 1 < pieces ? i + 1 : -1, pieces, piece};
      if (Large && line.gang > 1) mine = find_piece(s, line, pieces);
      warm = 0;
      if (i < mine.pieces) begin = start_of(s, mine.first, mine.pairs, mine.at);
      if (begin.y > 0) {
        warm = warm_up(s.rows[s.warm[begin.x]] + begin.y, begin.y, a.enough);
        if (rehearsing) warm = 1;
      }
      s.start[i] = begin;
      __syncthreads();
      t.firsts = all[0] & 0xFFFF, t.parts = all[1] & 0xFFFF, t.scans = all[0] >> 16, t.dependents = all[1] >> 16;
      const int running = t.firsts + t.parts;
      const int over = running - static_cast<int>((running + 0.5F) * device::reciprocal(static_cast<float>(P))) * P;
      // Scans of late cuts wait for long firsts, while who has ended a short part may have a piece.
      const bool all_early = running == 0 || (Large && m.late > 0);
      t.early_pieces = all_early ? mine.pieces : min(mine.pieces, over == 0 ? 0 : P - over);
      t.late_pieces = mine.pieces - t.early_pieces;
      outcome.exact = t.exact_boundaries(m.halves);
      t.late_last = outcome.exact <= kShortScan * line.exact;
      numbers = {at[0] & 0xFFFF, at[1] & 0xFFFF, at[0] >> 16, at[1] >> 16};
    }
#pragma unroll 1
    for (int k = from; k < to; ++k) {
      if (stage == 0) s.segment[k] = locate_segment<Large>(s, s.run_exact[pass], outline, m, k);
      Segment x = segment_at(s, Large ? m.share : kFirstShare, k);
      if (stage == 0) {
        if (x.first()) continue;
        int enough = 0;
        if (a.mode == Mode::automatic) {
          enough = warm_up(s.rows[s.exact[s.segment[k] & 0xFF]] + x.begin, x.begin, a.enough);
          if (rehearsing) enough = 0;
        }
        s.warm_here[x.boundary] = static_cast<signed char>(enough);
        a.plan.arrived[x.boundary] = a.plan.scanned[x.boundary] = 0;
        continue;
      }
      look_around(x, warm_of);
      x.halved = x.dependent ? m.halves : Large && x.first() && m.copies(x.end - x.begin) > 1;
      if (stage == 2) emit(a.plan.items, x, t, numbers, warm_of);
      numbers.add(x);
      if (stage == 1) warm += x.warm;
    }
  }
  if (i < mine.pieces) {
    const int2 end = mine.next >= 0 ? s.start[mine.next] : make_int2(mine.first + mine.pairs, 0);
    emit_line(a, s, line, t, begin, end, warm, a.counts != nullptr && !rehearsing);
  }
  outcome.tickets = t.count(), outcome.longest_whole = outline.longest_whole;
  outcome.warm = m.boundaries - outcome.exact, outcome.halves = false;
  return outcome;
}

template <bool Large>
__global__ void __launch_bounds__(kThreads, kResident) plan_kernel(const __grid_constant__ Arguments a) {
  __shared__ Shared s;
  device::allow_dependent_launch();
  if (threadIdx.x < 2) s.figures[threadIdx.x] = 0;
  bool halves = halves_fit(a.sequences.N * a.HV, a.multiprocessors);
  // `prepare` may have found that there is nothing to plan, and may say so while this is read: one thread asks for all, since threads that
  // did not agree would not meet at the same barriers.
  const bool told = __syncthreads_or(threadIdx.x == 0 && look_at_header(a.plan.header).ready()) != 0;
  int listed = a.mode == Mode::off || told ? 0 : make_outline(a, s, halves);
  Outcome uncut;
  uncut.halves = halves;
  Outcome outcome = uncut;
  if (a.plan.initial_read != nullptr) {
#pragma unroll 1
    for (int i = threadIdx.x; i < a.sequences.N * a.HV; i += kThreads) a.plan.initial_read[i] = 0;
  }
  const auto hand_it_out = [&] {
    __syncthreads();
    if (threadIdx.x == 0) hand_out_first(a.plan.header, PlanHeader::of(outcome.tickets, outcome.longest_whole, outcome.halves));
  };
  if (listed == 0 && !told) hand_it_out();
  // Once, before `prepare` has ended, where bytes are there or not wanted; else a rehearsal with others. A second time with those that are
  // there in the end, unless none has changed.
  const bool early = a.mode == Mode::exact || a.grown != nullptr;
#pragma unroll 1
  for (int pass = (early || a.rehearse) && listed > 0 ? 0 : 1; pass < kPasses; ++pass) {
    if (pass == 1) {
      device::wait_for_previous_launch();
      if (listed > 0 && look_at_header(a.plan.header).ready()) listed = 0, outcome = uncut;  // `prepare` has told by now, if it was to
      if (listed > 0 && early) {
        if (a.grown == nullptr || __ldcg(a.grown) == 0) break;
        __syncthreads();
        if (threadIdx.x < 2) s.figures[threadIdx.x] = 0;
      }
    }
    if (listed > 0) outcome = plan_by_cost<Large>(a, s, pass, pass == 0 && !early, halves);
  }
  if (listed > 0) hand_it_out();
  if (threadIdx.x != 0 || a.counts == nullptr) return;
  const int warm = outcome.warm + s.figures[0];
  a.counts[0] = a.sequences.N * a.HV + warm + outcome.exact, a.counts[1] = warm, a.counts[2] = outcome.exact;
  a.counts[3] = outcome.warm_chunks + s.figures[1];
}

}  // namespace flashdelta::cuda::segment
