// The producer threads: one hands out work and loads keys, queries and records, the other loads values and stores outputs.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/forward/shared.cuh"

namespace flashdelta::cuda::forward {

// The chunk of an item that wants bounded maps, being a packed sequence's last and not full, or -1.
__device__ __forceinline__ int tail_of(const Arguments& a, const Work& work) {
  const int end = work.item.first + work.item.chunks;
  return a.bounded_maps != nullptr && end * kChunk > work.length ? work.item.chunks - 1 : -1;
}

// Hands out work: a plan's items ticket by ticket, then the (sequence, head) pairs that the plan leaves whole.
struct Claims {
  int tickets = 0, longest_whole = 1 << 30, more = -1, first;
  bool halves;  // pairs go out as two items of 64 value columns each

  __device__ __forceinline__ explicit Claims(const Arguments& a) {
    // Without a plan no item waits for another, and the first ticket may be the block's own.
    first = a.plan.header == nullptr ? static_cast<int>(blockIdx.x) : -1;
    halves = a.halves;
    if (a.plan.header != nullptr) {
      segment::wait_for_count(&a.plan.header->ready, 1);
      tickets = a.plan.header->tickets, longest_whole = a.plan.header->longest_whole, halves = a.plan.header->halves != 0;
    }
  }
  // Where pairs are cut, L2 has states at boundaries to keep; else the value heads of a key head read its queries one soon after another.
  __device__ __forceinline__ std::uint64_t query_policy() const { return tickets > 0 ? device::kEvictFirst : device::kEvictNormally; }
  __device__ __forceinline__ int ticket(const Arguments& a) {
    if (first >= 0) {
      const int mine = first;
      first = -1;
      return mine;
    }
    return atomicAdd(a.counter, 1) + (a.plan.header == nullptr ? static_cast<int>(gridDim.x) : 0);
  }
  __device__ __forceinline__ void next(const Arguments& a, Work& to) {
    int index = more, pair = 0, consumers = kBothConsumers;
    more = -1;
    if (index < 0) {
      do {
        const int mine = ticket(a);
        if (mine < tickets) index = mine;
        pair = mine - tickets;
        if (halves) consumers = 1 << (pair & 1), pair >>= 1;
      } while (index < 0 && pair < a.sequences.N * a.HV && a.sequences.span(pair / a.HV).chunks() > longest_whole);
    }
    if (index >= 0) {
      to.item = a.plan.items[index];
      more = to.item.more;
    } else if (pair < a.sequences.N * a.HV) {
      const int chunks = a.sequences.span(pair / a.HV).chunks();
      to.item = {pair / a.HV, pair % a.HV, 0, 0, chunks, From::start, To::final_state, 0, 0, 0, -1, 0, consumers};
    } else {
      to.item.chunks = -1, to.item.scan_steps = 0, to.staged = Staged::no;
      return;
    }
    to.staged = to.item.scan_steps > 0                            ? Staged::no
                : to.item.from == From::boundary                  ? Staged::boundary
                : to.item.from == From::start && a.initial_staged ? Staged::initial
                                                                  : Staged::no;
    const Sequences::Span span = a.sequences.span(to.item.sequence);
    to.row = span.row, to.token = span.begin, to.length = span.length, to.slot = span.slot;
  }
};

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

// What a scan's steps need, half a transition a stage, as soon as it is there.
__device__ __forceinline__ void load_transitions(const Arguments& a, Shared& s, const Item& item, Place<kStages>& stage) {
  const auto* states =
      reinterpret_cast<const unsigned char*>(a.plan.states + static_cast<std::int64_t>(item.from_boundary) * kHead * kHead) +
      item.first * segment::kBlockBytes;
  const auto* transitions =
      reinterpret_cast<const unsigned char*>(a.plan.transitions + static_cast<std::int64_t>(item.from_boundary) * kHead * kHead);
  segment::wait_for_count(&a.plan.arrived[item.from_boundary], kArrivalsWhole);
  int known = 0;  // steps whose transition and local state are there
#pragma unroll 1
  for (int step = 1; step <= item.scan_steps; ++step) {
    if (step > known) {
      known += segment::wait_for_counts(&a.plan.arrived[item.from_boundary + step], item.scan_steps + 1 - step, kArrivalsParts);
      device::fence_global_to_async();
    }
    states += kHead * kHead * 4, transitions += kHead * kHead * 4;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      Barrier& loaded = s.loaded[stage.at];
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      device::barrier_arrive_expect(loaded, 2 * segment::kHalfBytes + 2 * segment::kRunBytes);
      device::load_shared_bytes(s.k[stage.at], transitions + half * segment::kHalfBytes, segment::kHalfBytes, loaded);
      device::load_shared_bytes(s.q[stage.at], transitions + (2 + half) * segment::kHalfBytes, segment::kHalfBytes, loaded);
#pragma unroll 1
      for (int run = 0; run < 2; ++run) {
        device::load_shared_bytes(s.p[stage.at] + run * segment::kRunStep, states + (2 * half + run) * segment::kRunBytes,
                                  segment::kRunBytes, loaded);
      }
      stage.next();
    }
  }
}

__device__ __forceinline__ void produce_keys(const Arguments& a, Shared& s, const CUtensorMap* map_q, const CUtensorMap* map_k,
                                             const CUtensorMap* map_state) {
  Place<kWorkRing> ring;
  Place<kStages> stage;
  Claims claims(a);
  const int bytes = record_bytes(a.l2norm), record_step = a.HV * bytes;
  const auto claim = [&] {
    Work& to = s.work[ring.at];
    device::barrier_wait(s.item_empty[ring.at], ring.parity ^ 1);
    claims.next(a, to);
    device::barrier_arrive(s.item_full[ring.at]);
    ring.next();
  };
  bool first_item = true;
  int ahead = -1;  // chunk at which the next item is claimed; -1: now
#pragma unroll 1
  for (int at = 0;; at = (at + 1) % kWorkRing) {
    if (ahead < 0) claim();
    const Work& work = s.work[at];
    const int chunks = work.item.chunks;
    if (chunks < 0) break;
    const int key_head = work.item.head / (a.HV / a.H), row = work.row, warm = work.item.warm, first = work.item.first;
    const int tail = tail_of(a, work);
    int token = work.token + first * kChunk;
    const unsigned char* record = a.records + (static_cast<std::int64_t>(work.slot + first) * a.HV + work.item.head) * bytes;
    // Late enough that free multiprocessors take what is left, early enough that the next item's state and tiles are there in time.
    ahead = chunks == 0 ? -1 : max(0, chunks - kClaimAhead);
    if (work.item.scan_steps > 0) load_transitions(a, s, work.item, stage);
    if (work.staged != Staged::no) {
      if (work.staged == Staged::boundary) wait_for_boundary(a.plan, work.item);
      Barrier& loaded = s.loaded[stage.at];
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      if (wants_pieces(a, work, 0)) {
        device::barrier_arrive_expect(loaded, 2 * kPieceBytes);
        load_piece(a, work, map_state, 0, s.k[stage.at], loaded);
        load_piece(a, work, map_state, 1, s.q[stage.at], loaded);
      } else {
        device::barrier_arrive(loaded);
      }
      stage.next();
    }
    const auto load_record = [&](int to) {
      unsigned char* t = s.t[to].panels;
      device::load_bytes(t, record, panel_offset(1), s.loaded[to]);
      device::load_bytes(t + staged_panel(1) + 512, record + panel_offset(1), panel_offset(3) - panel_offset(1), s.loaded[to]);
      device::load_bytes(t + staged_panel(3) + 48 * 32, record + panel_offset(3), bytes - panel_offset(3), s.loaded[to]);
      record += record_step;
    };
    const auto load_tiles = [&](int c, int to, const CUtensorMap* k, const CUtensorMap* q) {
      Barrier& loaded = s.loaded[to];
      device::barrier_arrive_expect(loaded, (c >= warm ? 2 : 1) * kChunk * kHead * 2 + bytes);
      device::load_box(s.k[to], k, loaded, 0, key_head, token, row);
      if (c >= warm) device::load_box(s.q[to], q, loaded, 0, key_head, token, row, claims.query_policy());
      token += kChunk;
    };
    int c = 0;
    if (first_item) {  // its tiles do not wait for `prepare`
      first_item = false;
      const int early = min(tail >= 0 ? tail : chunks, kStages - stage.at);
#pragma unroll 1
      for (int i = 0; i < early; ++i) {
        device::barrier_wait(s.released[stage.at + i], stage.parity ^ 1);
        load_tiles(i, stage.at + i, map_k, map_q);
      }
      device::wait_for_previous_launch();
#pragma unroll 1
      for (; c < early; ++c) {
        if (c == ahead) claim();
        load_record(stage.at);
        stage.next();
      }
    }
#pragma unroll 1
    for (; c < chunks; ++c) {
      if (c == ahead) claim();
      const CUtensorMap *k = map_k, *q = map_q;
      if (c == tail) {
        k = bounded(a, work.item.sequence, kMapK), q = bounded(a, work.item.sequence, kMapQ);
        device::acquire_map(k), device::acquire_map(q);
      }
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      load_tiles(c, stage.at, k, q);
      load_record(stage.at);
      stage.next();
    }
  }
  device::wait_for_previous_launch();  // a launch must not end before those that it follows
}

// In the scanning consumers' place: a release to the whole device takes longer than a step.
__device__ __forceinline__ void announce_steps(const Arguments& a, Shared& s, const Item& item) {
#pragma unroll 1
  for (int step = 1; step <= item.scan_steps; ++step) {
    while (device::count(s.scanned) == s.announced) __nanosleep(20);
    device::fence_global_to_async();  // copies read what it tells of
    segment::add_to_count(&a.plan.scanned[item.from_boundary + step]);
    s.announced = s.announced + 1;
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
    if (to.map == nullptr) return;
    device::fence_shared_to_async();  // in the consumers' place, whose time it would take
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
