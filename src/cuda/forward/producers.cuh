// The producer threads: one hands out work and loads keys, queries and records, the other loads values and stores outputs.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/forward/shared.cuh"
#include "cuda/segment/header.cuh"

namespace flashdelta::cuda::forward {

// The chunk of an item that wants bounded maps, being a packed sequence's last and not full, or -1.
__device__ __forceinline__ int tail_of(const Arguments& a, const Work& work) {
  const int end = work.item.first + work.item.chunks;
  return a.bounded_maps != nullptr && end * kChunk > work.length ? work.item.chunks - 1 : -1;
}

// Hands out work: a plan's items ticket by ticket, then the (sequence, head) pairs that the plan leaves whole.
struct Claims {
  PlanHeader plan;
  int drawn;      // the first ticket; -1 once it is used
  int more = -1;  // the item to go on with

  // The first ticket is drawn before it is known what it stands for. Without a plan no item waits for another, and it may be the block's
  // own.
  __device__ __forceinline__ explicit Claims(const Arguments& a)
      : plan(PlanHeader::of(0, kAllWhole, a.halves)),
        drawn(a.plan.header == nullptr ? static_cast<int>(blockIdx.x) : atomicAdd(a.counter, 1)) {}
  __device__ __forceinline__ void wait_for_plan(const Arguments& a) {
    if (!plan.ready()) plan = segment::wait_for_header(a.plan.header);
  }
  // The value heads of a key head read its queries one soon after another. Where pairs of a short call are cut, they had better leave L2 to
  // states and code.
  __device__ __forceinline__ std::uint64_t query_policy(const Arguments& a) const {
    return plan.tickets() > 0 && !a.keep_queries ? device::kEvictFirst : device::kEvictNormally;
  }
  __device__ __forceinline__ int ticket(const Arguments& a) {
    const int mine = drawn;
    drawn = -1;
    return mine >= 0 ? mine : atomicAdd(a.counter, 1) + (a.plan.header == nullptr ? static_cast<int>(gridDim.x) : 0);
  }
  // rehearsing: before there is a plan, the first chunk of all, for the state alone, which no one keeps.
  __device__ __forceinline__ void next(const Arguments& a, Work& to, bool rehearsing) {
    int index = more, sequence, head, consumers = kBothConsumers;
    Sequences::Span span;
    more = -1;
#pragma unroll 1
    for (;;) {
      if (index < 0) {
        const int mine = rehearsing ? 0 : ticket(a);
        if (mine < plan.tickets()) {
          index = mine;
        } else {
          int pair = mine - plan.tickets();
          if (plan.halves()) consumers = 1 << (pair & 1), pair >>= 1;
          sequence = pair / a.HV, head = pair - sequence * a.HV;
        }
      }
      if (index >= 0) {
        to.item = a.plan.items[index];
        sequence = to.item.sequence, more = to.item.more;
      } else if (sequence >= a.sequences.N) {
        to.item.chunks = -1, to.item.scan_steps = 0, to.staged = Staged::no;
        return;
      }
      span = a.sequences.span(sequence);
      if (index >= 0) break;
      to.item = {sequence, head, 0, 0, span.chunks(), From::start, To::final_state, 0, 0, 0, -1, 0, consumers};
      if (rehearsing) {
        to.item.chunks = to.item.warm = 1, to.item.from = From::identity, to.item.to = To::nowhere, span.length = kChunk;
        break;
      }
      if (to.item.chunks <= plan.longest_whole()) break;  // else it is in the items
    }
    to.staged = to.item.scan_steps > 0                            ? Staged::no
                : to.item.from == From::boundary                  ? Staged::boundary
                : to.item.from == From::start && a.initial_staged ? Staged::initial
                                                                  : Staged::no;
    to.row = span.row, to.token = span.begin, to.length = span.length, to.slot = span.slot;
  }
};

// An item of no sequence and one chunk, in front of all others. Its only use is that the consumers and those who make factors and P have
// their instructions at hand when there is work: they come from far, and the first chunk would take three times as long as the next.
// Nothing is loaded (the records' tails are zero, and whatever else lies there will do) and nothing is stored. By one thread.
__device__ __forceinline__ bool rehearses(const Arguments& a) { return a.saved_states.data == nullptr; }  // it would store one
__device__ __forceinline__ void rehearse(Shared& s) {
  Work& work = s.work[0];
  work.item = {kNoSequence, 0, 0, 0, 1, From::zero, To::nowhere, 0, 0, 0, -1, 0, kBothConsumers};
  work.staged = Staged::no;  // where its sequence lies no one asks
  device::barrier_arrive(s.item_full[0]), device::barrier_arrive(s.loaded[0]);
}

// A boundary's state may be read by copies from here on.
__device__ __forceinline__ void wait_for_boundary(const Plan& plan, const Item& item) {
  if (item.from_scan != 0) {
    segment::wait_for_count(&plan.scanned[item.from_boundary], kScanBlocks);
  } else {
    segment::wait_for_count(&plan.arrived[item.from_boundary], kArrivalsWhole);
  }
  device::fence_global_to_async();
}

// Whether the pieces beside k and q (0), or beside v (1), are wanted: a consumer has its own where they are of value columns.
__device__ __forceinline__ bool wants_pieces(const Arguments& a, const Work& work, int half) {
  return work.takes_part(half) || (work.staged == Staged::initial && a.initial_state.rows == StateRows::v);
}

// Piece of the state that an item begins with.
__device__ __forceinline__ void load_piece(const Arguments& a, const Work& work, const CUtensorMap* map, int piece, void* to,
                                           Barrier& loaded) {
  if (work.staged == Staged::boundary) {
    const float* from = a.plan.states + static_cast<std::int64_t>(work.item.from_boundary) * kHead * kHead + piece * (kPieceBytes / 4);
    device::load_shared_bytes(to, from, kPieceBytes, loaded);
  } else {
    device::load_columns(to, map, loaded, piece * kPieceColumns, 0, work.item.head, work.item.sequence);
  }
}

// What a scan's steps need, as soon as it is there: a transition's low parts in one stage, its high parts and the local state in the next.
// The first stage also brings the state to begin with.
__device__ __forceinline__ void load_transitions(const Arguments& a, Shared& s, const Item& item, Place<kStages>& stage) {
  constexpr int kStateBytes = kHead * kHead * 4;  // of a transition too
  const std::int64_t first = static_cast<std::int64_t>(item.from_boundary) * kHead * kHead;
  const auto* states = reinterpret_cast<const unsigned char*>(a.plan.states + first) + item.first * segment::kBlockBytes;
  const auto* transitions = reinterpret_cast<const unsigned char*>(a.plan.transitions + first);
  segment::wait_for_count(&a.plan.arrived[item.from_boundary], kArrivalsWhole);
  int known = 0;  // steps whose transition and local state are there
#pragma unroll 1
  for (int step = 1; step <= item.scan_steps; ++step) {
    if (step > known) {
      known += segment::wait_for_counts(&a.plan.arrived[item.from_boundary + step], item.scan_steps + 1 - step, kArrivalsParts);
      device::fence_global_to_async();
    }
    transitions += kStateBytes;
#pragma unroll 1
    for (int low = 1; low >= 0; --low) {
      Barrier& loaded = s.loaded[stage.at];
      const bool brings_state = low == 0 || step == 1;
      if (low == 0) states += kStateBytes;
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      device::barrier_arrive_expect(loaded, 2 * segment::kHalfBytes + (brings_state ? segment::kBlockBytes : 0));
      const unsigned char* from = transitions + low * 2 * segment::kHalfBytes;
      device::load_shared_bytes(s.k[stage.at], from, segment::kHalfBytes, loaded);
      device::load_shared_bytes(s.q[stage.at], from + segment::kHalfBytes, segment::kHalfBytes, loaded);
#pragma unroll 1
      for (int run = brings_state ? 0 : 4; run < 4; ++run) {
        device::load_shared_bytes((run < 2 ? s.p[stage.at] : s.t[stage.at].panels) + run % 2 * segment::kRunStep,
                                  states + run * segment::kRunBytes, segment::kRunBytes, loaded);
      }
      stage.next();
    }
  }
}

__device__ __forceinline__ void produce_keys(const Arguments& a, Shared& s, const CUtensorMap* map_q, const CUtensorMap* map_k,
                                             const CUtensorMap* map_state) {
  Claims claims(a);
  const int bytes = record_bytes(a.l2norm), record_step = a.HV * bytes;
  int at = rehearses(a) ? 1 : 0;  // items and stages so far
  if (a.plan.header != nullptr) claims.plan = segment::look_at_header(a.plan.header);
  // Where it has to wait for the plan, this thread rehearses too: it claims an item and loads its keys, but not a record, of which there
  // may be none yet.
  bool rehearsing = !claims.plan.ready() && at > 0 && a.sequences.T > 0;
  Place<kWorkRing> ring{at};
  Place<kStages> stage{at};
  // Everything once in the code: it comes from far, and each line of it is waited for the first time that it runs.
  int sequence = 0, key_head = 0, row = 0, token = 0, warm = 0, tail = -1, c = 0, stop = 0, chunks = 0;
  const unsigned char* record = nullptr;
  bool claimed = false, waited = false, rehearsed = false;
#pragma unroll 1
  for (;;) {
#pragma unroll 1
    for (; c < stop; ++c) {
      const CUtensorMap *k = map_k, *q = map_q;
      if (c == tail) {
        device::wait_for_previous_launch();  // `prepare` makes them
        k = bounded(a, sequence, kMapK), q = bounded(a, sequence, kMapQ);
        device::acquire_map(k), device::acquire_map(q);
      }
      Barrier& loaded = s.loaded[stage.at];
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      device::barrier_arrive_expect(loaded, (c >= warm ? 2 : 1) * kChunk * kHead * 2 + (rehearsing ? 0 : bytes));
      device::load_box(s.k[stage.at], k, loaded, 0, key_head, token, row);
      if (c >= warm) device::load_box(s.q[stage.at], q, loaded, 0, key_head, token, row, claims.query_policy(a));
      token += kChunk;
      if (!rehearsing) {
        if (!waited) device::wait_for_previous_launch(), waited = true;  // for the records
        unsigned char* t = s.t[stage.at].panels;
        device::load_bytes(t, record, panel_offset(1), loaded);
        device::load_bytes(t + staged_panel(1) + 512, record + panel_offset(1), panel_offset(3) - panel_offset(1), loaded);
        device::load_bytes(t + staged_panel(3) + 48 * 32, record + panel_offset(3), bytes - panel_offset(3), loaded);
        record += record_step;
      }
      stage.next();
    }
    if (!claimed) {
      Work& to = s.work[ring.at];
      device::barrier_wait(s.item_empty[ring.at], ring.parity ^ 1);
      if (rehearsed || !rehearsing) rehearsing = false, claims.wait_for_plan(a);
      claims.next(a, to, rehearsing);
      rehearsed = true;
      device::barrier_arrive(s.item_full[ring.at]);
      ring.next();
      claimed = true, stop = chunks;
      continue;
    }
    const Work& work = s.work[at];
    at = (at + 1) % kWorkRing;
    chunks = work.item.chunks;
    if (chunks < 0) break;
    sequence = work.item.sequence, key_head = work.item.head / a.group, row = work.row, warm = work.item.warm;
    tail = tail_of(a, work);
    token = work.token + work.item.first * kChunk;
    record = a.records + (static_cast<std::int64_t>(work.slot + work.item.first) * a.HV + work.item.head) * bytes;
    if (work.item.scan_steps > 0) load_transitions(a, s, work.item, stage);
    if (work.staged != Staged::no) {
      if (work.staged == Staged::boundary) wait_for_boundary(a.plan, work.item);
      Barrier& loaded = s.loaded[stage.at];
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      if (wants_pieces(a, work, 0)) {
        device::barrier_arrive_expect(loaded, 2 * kPieceBytes);
#pragma unroll 1
        for (int piece = 0; piece < 2; ++piece) {
          load_piece(a, work, map_state, piece, piece == 0 ? s.k[stage.at] : s.q[stage.at], loaded);
        }
      } else {
        device::barrier_arrive(loaded);
      }
      stage.next();
    }
    // The next item is claimed late enough that free multiprocessors take what is left, early enough that its state and tiles are there in
    // time.
    c = 0, stop = chunks > kClaimAhead ? chunks - kClaimAhead : min(chunks, 1), claimed = false;
  }
  device::wait_for_previous_launch();  // a launch must not end before those that it follows
}

// In the scanning consumers' place: a release to the whole device takes longer than a step. So it is one for all steps that have been
// written when it begins.
__device__ __forceinline__ void announce_steps(const Arguments& a, Shared& s, const Item& item) {
  std::int32_t* next = &a.plan.scanned[item.from_boundary + 1];
  int left = item.scan_steps;
#pragma unroll 1
  while (left > 0) {
    const int written = min(device::count(s.scanned) - s.announced, left);  // consumers may be at the next scan already
    if (written == 0) {
      __nanosleep(20);
      continue;
    }
    s.announced = s.announced + written, left -= written;
    device::fence_global_to_async();  // copies read what it tells of
    segment::fence_device();
#pragma unroll 1
    for (int i = 0; i < written; ++i) segment::add_behind_fence(next++);
  }
}

// Values come in and outputs leave through the same tiles: before a tile is loaded again, what it has become is stored.
__device__ __forceinline__ void produce_values(const Arguments& a, Shared& s, const CUtensorMap* map_v, const CUtensorMap* map_o,
                                               const CUtensorMap* map_state) {
  WorkReader works;
  Place<kValueStages> stage;
  const auto store_output = [&] {
    device::barrier_wait(s.v_replaced[stage.at], stage.parity ^ 1);
    Output& to = s.output[stage.at];
    // In the consumers' place, whose time it would take. Also behind a rehearsal, whose output is not stored: a copy comes into the tile.
    device::fence_shared_to_async();
    if (to.map == nullptr) return;
#pragma unroll
    for (int w = 0; w < kTiles; ++w) {
      if ((to.consumers >> w & 1) != 0) device::store_box(to.map, s.v[stage.at][w], w, to.head, to.token, to.row);
    }
    to.map = nullptr;
    device::wait_stores_read();
  };
#pragma unroll 1
  for (;; works.done(s)) {
    const Work& work = works.next(s);
    const int chunks = work.item.chunks;
    if (chunks < 0) break;
    if (work.item.scan_steps > 0) announce_steps(a, s, work.item);
    if (!work.values()) continue;
    if (work.item.sequence == kNoSequence) {
#pragma unroll 1
      for (int c = 0; c < chunks; ++c, stage.next()) device::barrier_arrive(s.v_loaded[stage.at]);
      continue;
    }
    if (work.staged == Staged::boundary) wait_for_boundary(a.plan, work.item);
#pragma unroll 1
    for (int piece = 2; piece < 4 && work.staged != Staged::no; ++piece) {
      store_output();
      if (wants_pieces(a, work, 1)) {
        device::barrier_arrive_expect(s.v_loaded[stage.at], kPieceBytes);
        load_piece(a, work, map_state, piece, s.v[stage.at], s.v_loaded[stage.at]);
      } else {
        device::barrier_arrive(s.v_loaded[stage.at]);
      }
      stage.next();
    }
    const int head = work.item.head, row = work.row, warm = work.item.warm, consumers = work.item.consumers, tail = tail_of(a, work);
    const int bytes = consumers == kBothConsumers ? kTiles * kTileBytes : kTileBytes;
    int token = work.token + work.item.first * kChunk;
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      store_output();
      device::barrier_arrive_expect(s.v_loaded[stage.at], bytes);
      const CUtensorMap *v = map_v, *o = map_o;
      if (c == tail) {
        v = bounded(a, work.item.sequence, kMapV), o = bounded(a, work.item.sequence, kMapO);
        device::wait_for_previous_launch();  // `prepare` makes them
        device::acquire_map(v), device::acquire_map(o);
      }
#pragma unroll
      for (int w = 0; w < kTiles; ++w) {
        if ((consumers >> w & 1) != 0)
          device::load_box(s.v[stage.at][w], v, s.v_loaded[stage.at], w, head, token, row, device::kEvictFirst);
      }
      if (c >= warm) s.output[stage.at] = {o, consumers, head, token, row};
      token += kChunk;
      stage.next();
    }
  }
#pragma unroll 1
  for (int i = 0; i < kValueStages; ++i) store_output(), stage.next();
  device::wait_stores_done();
}

}  // namespace flashdelta::cuda::forward
