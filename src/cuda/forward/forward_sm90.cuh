// Device code of the chunk loop. Formulas: algebra.md ("Forward, one chunk"); timeline and budgets: README.md beside this file.
//
// The state is held transposed: consumer w has rows 64 w .. 64 w + 63 of S^T (its value columns) in registers for a whole item, so that
// every product has the state, or a function of it, as its A operand from registers, and the two consumers exchange nothing.
#pragma once

#include <type_traits>

#include "cuda/device/barrier.cuh"
#include "cuda/device/copy.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/forward/config.h"
#include "cuda/forward/forward.hpp"
#include "cuda/layout.cuh"
#include "cuda/segment/scan_sm90.cuh"

namespace flashdelta::cuda::forward {

using device::Barrier;
using device::Operand;
using std::uint32_t;
using std::uint64_t;

// An item and where its sequence lies: batch row, first token, tokens, number of the first chunk. chunks < 0: no more work.
struct Work {
  Item item;
  int row, token, length, slot;

  __device__ __forceinline__ bool full(int c) const { return c >= item.warm; }  // else the chunk only moves the state on
  __device__ __forceinline__ bool values() const { return item.from != From::identity; }
  __device__ __forceinline__ bool ragged() const { return length % kChunk != 0; }
};

// Where the chunk of o that a tile of v becomes goes.
struct Output {
  const CUtensorMap* map;  // null: nowhere
  int head, token, row;
};

struct alignas(1024) Shared {
  unsigned char k[kStages][2][kChunk * 128], q[kStages][2][kChunk * 128];  // 128-byte swizzled halves
  unsigned char v[kValueStages][2][kChunk * 128];
  struct alignas(256) Record {
    unsigned char panels[kStagedPanelBytes];
    RecordTail tail;
  } t[kStages];  // T as the products want it
  alignas(1024) unsigned char p[kStages][kStagedPanelBytes];     // P in the same panels
  // Per token; 1 / |k| and 1 / |q| with the l2-norm only, or else 2^-e for 1 / |k|.
  float4 solve[kStages][kChunk / 2];  // of two tokens: -beta gam / |k|, what k S is scaled by; then beta
  float write[kStages][kChunk];  // exp(c_last - c) / |k|: what U is scaled by on its way into the state
  float out[kStages][kChunk];    // gam * scale / |q|
  float query[kStages][kChunk];  // scale / |q|
  float key[kStages][kChunk];    // 1 / |k|
  float decay[kStages];          // exp(c_last)
  Work work[kWorkRing];
  Output output[kValueStages];
  segment::ScanShared scan;
  Barrier loaded[kStages], normed[kStages], made[kStages], released[kStages];
  Barrier v_loaded[kValueStages], v_replaced[kValueStages];  // replaced: by o, or read where there is none
  Barrier item_full[kWorkRing], item_empty[kWorkRing];
  int scanned, announced;  // steps of scans: written to global memory so far, and made known to other multiprocessors
};
static_assert(sizeof(Shared) <= 227 * 1024, "more than a multiprocessor's shared memory");

// A ring's place: index and phase parity.
template <int N>
struct Place {
  int at = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == N) at = 0, parity ^= 1;
  }
};

// Work comes through a ring: the producer is up to three chunks ahead of the others. It is read where it lies (the consumers have no
// registers for it) and given back when done.
struct WorkReader {
  Place<kWorkRing> place;
  __device__ __forceinline__ const Work& next(Shared& s) {
    device::barrier_wait(s.item_full[place.at], place.parity);
    return s.work[place.at];
  }
  __device__ __forceinline__ void done(Shared& s) {
    device::barrier_arrive(s.item_empty[place.at]);
    place.next();
  }
};

__device__ __forceinline__ const CUtensorMap* bounded(const Arguments& a, int sequence, MapIndex which) {
  return a.bounded_maps + sequence * kMaps + which;
}

// --- the producer threads: one hands out items and loads keys, queries and records, the other loads values

// The chunk of an item that wants bounded maps, being a packed sequence's last and not full, or -1.
__device__ __forceinline__ int tail_of(const Arguments& a, const Work& work) {
  const int end = work.item.first + work.item.chunks;
  return a.bounded_maps != nullptr && end * kChunk > work.length ? work.item.chunks - 1 : -1;
}

// Hands out work: a plan's items ticket by ticket, then the (sequence, head) pairs that the plan leaves whole.
struct Claims {
  int tickets = 0, longest_whole = 1 << 30, more = -1, first;

  __device__ __forceinline__ explicit Claims(const Arguments& a) {
    // Without a plan no item waits for another, and the first ticket may be the block's own.
    first = a.plan.header == nullptr ? static_cast<int>(blockIdx.x) : -1;
    if (a.plan.header != nullptr) tickets = a.plan.header->tickets, longest_whole = a.plan.header->longest_whole;
  }
  __device__ __forceinline__ int ticket(const Arguments& a) {
    if (first >= 0) {
      const int mine = first;
      first = -1;
      return mine;
    }
    return atomicAdd(a.counter, 1) + (a.plan.header == nullptr ? static_cast<int>(gridDim.x) : 0);
  }
  __device__ __forceinline__ void next(const Arguments& a, Work& to) {
    int index = more, pair = 0;
    more = -1;
    if (index < 0) {
      do {
        const int mine = ticket(a);
        if (mine < tickets) index = mine;
        pair = mine - tickets;
      } while (index < 0 && pair < a.sequences.N * a.HV && a.sequences.span(pair / a.HV).chunks() > longest_whole);
    }
    if (index >= 0) {
      to.item = a.plan.items[index];
      more = to.item.more;
    } else if (pair < a.sequences.N * a.HV) {
      to.item = {pair / a.HV, pair % a.HV, 0, 0, a.sequences.span(pair / a.HV).chunks(), From::start, 0, To::final_state, 0, 0, -1, 0};
    } else {
      to.item.chunks = -1;
      return;
    }
    const Sequences::Span span = a.sequences.span(to.item.sequence);
    to.row = span.row, to.token = span.begin, to.length = span.length, to.slot = span.slot;
  }
};

__device__ __forceinline__ void produce_keys(const Arguments& a, Shared& s, const CUtensorMap* map_q, const CUtensorMap* map_k) {
  Place<kWorkRing> ring;
  Place<kStages> stage;
  Claims claims(a);
  const int bytes = record_bytes(a.l2norm), record_step = a.HV * bytes;
  const auto claim = [&] {
    Work& to = s.work[ring.at];
    device::barrier_wait(s.item_empty[ring.at], ring.parity ^ 1);
    claims.next(a, to);
    device::barrier_arrive(s.item_full[ring.at]);
    // Its initial state, where that lies in one piece, is in L2 by the time the consumers want it.
    if (to.item.chunks > 0 && to.item.from == From::start && a.initial_state_bytes > 0) {
      device::prefetch_bytes(static_cast<const char*>(a.initial_state.data) +
                                 (to.item.sequence * a.initial_state.sequence + to.item.head * a.initial_state.head) *
                                     (a.initial_state_bytes / (kHead * kHead)),
                             a.initial_state_bytes);
    }
    ring.next();
  };
  int ahead = -1;  // chunk at which the next item is claimed; -1: now
#pragma unroll 1
  for (int at = 0, parity = 0;; at = (at + 1) % kWorkRing, parity ^= at == 0 ? 1 : 0) {
    if (ahead < 0) claim();
    const Work& work = s.work[at];
    const int chunks = work.item.chunks;
    if (chunks < 0) return;
    if (a.bounded_maps != nullptr && work.ragged()) {
      device::acquire_map(bounded(a, work.item.sequence, kMapQ));
      device::acquire_map(bounded(a, work.item.sequence, kMapK));
    }
    const int key_head = work.item.head / (a.HV / a.H), row = work.row, warm = work.item.warm, first = work.item.first;
    const int tail = tail_of(a, work);
    int token = work.token + first * kChunk;
    const unsigned char* record = a.records + (static_cast<std::int64_t>(work.slot + first) * a.HV + work.item.head) * bytes;
    // Late enough that free multiprocessors take what is left, early enough that the next item's state and tiles are there in time.
    ahead = chunks == 0 ? -1 : max(0, chunks - kClaimAhead);
    if (work.item.scan_steps > 0) device::barrier_wait(s.item_empty[at], parity);  // others shall have the next scan
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      if (c == ahead) claim();
      Barrier& loaded = s.loaded[stage.at];
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      device::barrier_arrive_expect(loaded, (c >= warm ? 2 : 1) * kChunk * kHead * 2 + bytes);
      device::load_box(s.k[stage.at], c == tail ? bounded(a, work.item.sequence, kMapK) : map_k, loaded, key_head, token, row);
      unsigned char* t = s.t[stage.at].panels;
      device::load_bytes(t, record, panel_offset(1), loaded);
      device::load_bytes(t + staged_panel(1) + 512, record + panel_offset(1), panel_offset(3) - panel_offset(1), loaded);
      device::load_bytes(t + staged_panel(3) + 48 * 32, record + panel_offset(3), bytes - panel_offset(3), loaded);
      if (c >= warm) {
        device::load_box(s.q[stage.at], c == tail ? bounded(a, work.item.sequence, kMapQ) : map_q, loaded, key_head, token, row);
      }
      record += record_step, token += kChunk;
      stage.next();
    }
  }
}

// Values come in and outputs leave through the same tiles: before a tile is loaded again, what it has become is stored.
__device__ __forceinline__ void produce_values(const Arguments& a, Shared& s, const CUtensorMap* map_v, const CUtensorMap* map_o) {
  WorkReader works;
  Place<kValueStages> stage;
  const auto store_output = [&] {
    device::barrier_wait(s.v_replaced[stage.at], stage.parity ^ 1);
    Output& to = s.output[stage.at];
    if (to.map == nullptr) return;
    device::store_box(to.map, s.v[stage.at], to.head, to.token, to.row);
    to.map = nullptr;
    device::wait_stores_read();
  };
#pragma unroll 1
  for (;; works.done(s)) {
    const Work& work = works.next(s);
    const int chunks = work.item.chunks;
    if (chunks < 0) break;
    if (!work.values()) continue;
    if (a.bounded_maps != nullptr && work.ragged()) {
      device::acquire_map(bounded(a, work.item.sequence, kMapV));
      device::acquire_map(bounded(a, work.item.sequence, kMapO));
    }
    const int head = work.item.head, row = work.row, warm = work.item.warm, tail = tail_of(a, work);
    int token = work.token + work.item.first * kChunk;
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      store_output();
      device::barrier_arrive_expect(s.v_loaded[stage.at], kChunk * kHead * 2);
      device::load_box(s.v[stage.at], c == tail ? bounded(a, work.item.sequence, kMapV) : map_v, s.v_loaded[stage.at], head, token, row);
      if (c >= warm) s.output[stage.at] = {c == tail ? bounded(a, work.item.sequence, kMapO) : map_o, head, token, row};
      token += kChunk;
      stage.next();
    }
  }
#pragma unroll 1
  for (int i = 0; i < kValueStages; ++i) store_output(), stage.next();
  device::wait_stores_done();
}

// --- the factor warps: everything that is per token, one token a thread

// 1 / |q| of a row of the q tile.
template <Operand Type>
__device__ __forceinline__ float inverse_query_norm(const Shared& s, int stage, int row) {
  float sum = 0.F;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
#pragma unroll 2
    for (int unit = 0; unit < 8; ++unit) {
      // Rows start at different units, or their banks would meet.
      const uint4 x = *reinterpret_cast<const uint4*>(s.q[stage][half] + row * 128 + ((unit + row) & 7) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = device::unpack<Type>(i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w);
        sum = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sum));
      }
    }
  }
  return rsqrtf(sum + 1e-6F);
}

// In the scanning consumers' place: a release to the whole device takes longer than a step.
__device__ __forceinline__ void announce_steps(const Arguments& a, Shared& s, const Item& item) {
#pragma unroll 1
  for (int step = 1; step <= item.scan_steps; ++step) {
    while (device::count(s.scanned) == s.announced) __nanosleep(20);
    segment::add_to_count(&a.plan.scanned[item.from_boundary + step]);
    s.announced = s.announced + 1;
  }
}

template <Operand Type>
__device__ __forceinline__ void make_factors(const Arguments& a, Shared& s, int token) {
  WorkReader works;
  Place<kStages> stage;
  Place<kValueStages> v_stage;
#pragma unroll 1
  for (;; works.done(s)) {
    const Work& work = works.next(s);
    const int chunks = work.item.chunks;
    if (chunks < 0) return;
    if (work.item.scan_steps > 0 && token == 0) announce_steps(a, s, work.item);
    const bool values = work.values();
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int at = stage.at;
      device::barrier_wait(s.loaded[at], stage.parity);
      const RecordTail& record = s.t[at].tail;
      // Keys scaled by 2^-e count as normalised ones whose values are scaled by 2^e; the record's beta has that factor.
      const float key = a.l2norm ? record.norm[token] : exp2f(-static_cast<float>(record.exponent[token]));
      const float query = a.l2norm && work.full(chunk) ? a.scale * inverse_query_norm<Type>(s, at, token) : a.scale;
      s.query[at][token] = query;
      s.key[at][token] = key;
      device::barrier_arrive(s.normed[at]);
      const float c = record.c[token], last = record.c[kChunk - 1], gamma = device::exp2_fast(c);
      const float beta = record.beta[token];
      auto* solve = reinterpret_cast<float*>(&s.solve[at][token / 2]) + token % 2;
      solve[0] = -gamma * (a.l2norm ? key : 1.F) * beta, solve[2] = beta;
      s.write[at][token] = device::exp2_fast(last - c) * key;
      s.out[at][token] = gamma * query;
      if (token == 0) s.decay[at] = device::exp2_fast(last);
      // So that the consumers have one barrier to wait for.
      if (values) {
        device::barrier_wait(s.v_loaded[v_stage.at], v_stage.parity);
        v_stage.next();
      }
      device::barrier_arrive(s.made[at]);
      stage.next();
    }
  }
}

// --- the auxiliary warpgroup: P

// Blocks (warp, 0 .. Blocks - 1) of P = scale * lower(q k^T) * G, from the rows of q k^T that this warp holds.
template <Operand Type, int Blocks>
__device__ __forceinline__ void make_p(const float (&A)[32], const float* c, const float* key, const float (&row_scale)[2], uint32_t to,
                                       int warp, int lane) {
  const int row = warp * 16 + lane / 4, column = 2 * (lane % 4);
  const float c0 = c[row], c1 = c[row + 8];
#pragma unroll
  for (int J = 0; J < Blocks; ++J) {
    uint32_t packed[4];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int j = 16 * J + 8 * v + column, e = 8 * J + 4 * v;
      const float2 cj = *reinterpret_cast<const float2*>(c + j);
      const float2 nj = *reinterpret_cast<const float2*>(key + j);
      const float left0 = row_scale[0] * nj.x, right0 = row_scale[0] * nj.y, left1 = row_scale[1] * nj.x, right1 = row_scale[1] * nj.y;
      float p00 = A[e] * left0 * device::exp2_fast(c0 - cj.x), p01 = A[e + 1] * right0 * device::exp2_fast(c0 - cj.y);
      float p10 = A[e + 2] * left1 * device::exp2_fast(c1 - cj.x), p11 = A[e + 3] * right1 * device::exp2_fast(c1 - cj.y);
      // Selected, not multiplied: above the diagonal the exponential may be infinite.
      p00 = j <= row ? p00 : 0.F, p01 = j + 1 <= row ? p01 : 0.F;
      p10 = j <= row + 8 ? p10 : 0.F, p11 = j + 1 <= row + 8 ? p11 : 0.F;
      packed[2 * v] = device::pack<Type>(p00, p01), packed[2 * v + 1] = device::pack<Type>(p10, p11);
    }
    device::store_matrices(to + staged_panel(J), packed[0], packed[1], packed[2], packed[3]);
  }
}

template <Operand Type>
__device__ __forceinline__ void assist(const Arguments& a, Shared& s, int tid) {
  const int lane = tid % 32, warp = __shfl_sync(~0U, tid / 32, 0);
  WorkReader works;
  Place<kStages> stage;
#pragma unroll 1
  for (;; works.done(s)) {
    const Work& work = works.next(s);
    const int chunks = work.item.chunks;
    if (chunks < 0) return;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int at = stage.at;
      const float* c = s.t[at].tail.c;
      device::barrier_wait(s.loaded[at], stage.parity);
      if (!work.full(chunk)) {
        device::barrier_arrive(s.made[at]);
        stage.next();
        continue;
      }
      float A[32];
      const uint64_t q = device::describe_rows_128(s.q[at][0]), k = device::describe_rows_128(s.k[at][0]);
      device::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        const int bytes = (step / 4) * kChunk * 128 + (step % 4) * 32;
        if (step == 0) {
          device::wgmma_ss_n64<Type, true>(A, q, k);
        } else {
          device::wgmma_ss_n64<Type, false>(A, device::advance(q, bytes), device::advance(k, bytes));
        }
      }
      device::wgmma_commit();
      const int row = warp * 16 + lane / 4;
      device::barrier_wait(s.normed[at], stage.parity);
      const float row_scale[2] = {s.query[at][row], s.query[at][row + 8]};
      device::wgmma_wait<0>();
      device::hold(A);
      const int stored_row = warp * 16 + (lane & 15);
      const uint32_t to = device::shared_address(s.p[at]) + stored_row * 32 + (((lane >> 4) ^ ((lane >> 2) & 1)) << 4);
      if (warp == 0) make_p<Type, 1>(A, c, s.key[at], row_scale, to, 0, lane);
      if (warp == 1) make_p<Type, 2>(A, c, s.key[at], row_scale, to, 1, lane);
      if (warp == 2) make_p<Type, 3>(A, c, s.key[at], row_scale, to, 2, lane);
      if (warp == 3) make_p<Type, 4>(A, c, s.key[at], row_scale, to, 3, lane);
      device::fence_shared_to_async();
      device::barrier_arrive(s.made[at]);
      stage.next();
    }
  }
}

// --- the consumers: the state

// Element (k, v) of S for register i of S^T: rows v, columns k.
__device__ __forceinline__ int state_k(int i, int lane) { return i / 4 * 8 + 2 * (lane % 4) + i % 2; }
__device__ __forceinline__ int state_v(int i, int first_row, int lane) { return first_row + lane / 4 + i / 2 % 2 * 8; }

// Register i's place from that of register 0, in a state whose rows are k (values next to one another) or v.
template <StateRows Rows>
__host__ __device__ constexpr int state_offset(int i) {
  const int k = i / 4 * 8 + i % 2, v = i / 2 % 2 * 8;
  return Rows == StateRows::k ? k * kHead + v : v * kHead + k;
}

// Reads and writes with offsets known here: all are in flight at once.
template <class E, StateRows Rows>
__device__ __forceinline__ void load_rows(float (&S)[64], const void* data, std::int64_t offset, int first_row, int lane) {
  const int k = state_k(0, lane), v = state_v(0, first_row, lane);
  const E* from = static_cast<const E*>(data) + offset + (Rows == StateRows::k ? k * kHead + v : v * kHead + k);
#pragma unroll
  for (int i = 0; i < 64; ++i) S[i] = static_cast<float>(from[state_offset<Rows>(i)]);
}
template <class E, StateRows Rows>
__device__ __forceinline__ void store_rows(const float (&S)[64], void* data, std::int64_t offset, int first_row, int lane) {
  const int k = state_k(0, lane), v = state_v(0, first_row, lane);
  E* to = static_cast<E*>(data) + offset + (Rows == StateRows::k ? k * kHead + v : v * kHead + k);
#pragma unroll
  for (int i = 0; i < 64; ++i) to[state_offset<Rows>(i)] = static_cast<E>(S[i]);
}

__device__ __forceinline__ void load_state(float (&S)[64], const States& from, std::int64_t offset, int first_row, int lane) {
  if (from.data == nullptr) {
#pragma unroll
    for (int i = 0; i < 64; ++i) S[i] = 0.F;
    return;
  }
  switch (from.rows) {
    case StateRows::k:
      if (from.type == device::Type::f32) return load_rows<float, StateRows::k>(S, from.data, offset, first_row, lane);
      if (from.type == device::Type::bf16) return load_rows<__nv_bfloat16, StateRows::k>(S, from.data, offset, first_row, lane);
      return load_rows<__half, StateRows::k>(S, from.data, offset, first_row, lane);
    case StateRows::v:
      if (from.type == device::Type::f32) return load_rows<float, StateRows::v>(S, from.data, offset, first_row, lane);
      if (from.type == device::Type::bf16) return load_rows<__nv_bfloat16, StateRows::v>(S, from.data, offset, first_row, lane);
      return load_rows<__half, StateRows::v>(S, from.data, offset, first_row, lane);
    default:
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        S[i] = device::load_element(from.data, from.type, offset + state_k(i, lane) * from.k + state_v(i, first_row, lane) * from.v);
      }
  }
}

__device__ __forceinline__ void store_state(const float (&S)[64], const States& to, std::int64_t offset, int first_row, int lane) {
  switch (to.rows) {
    case StateRows::k:
      if (to.type == device::Type::f32) return store_rows<float, StateRows::k>(S, to.data, offset, first_row, lane);
      if (to.type == device::Type::bf16) return store_rows<__nv_bfloat16, StateRows::k>(S, to.data, offset, first_row, lane);
      return store_rows<__half, StateRows::k>(S, to.data, offset, first_row, lane);
    case StateRows::v:
      if (to.type == device::Type::f32) return store_rows<float, StateRows::v>(S, to.data, offset, first_row, lane);
      if (to.type == device::Type::bf16) return store_rows<__nv_bfloat16, StateRows::v>(S, to.data, offset, first_row, lane);
      return store_rows<__half, StateRows::v>(S, to.data, offset, first_row, lane);
    default:
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        device::store_element(to.data, to.type, offset + state_k(i, lane) * to.k + state_v(i, first_row, lane) * to.v, S[i]);
      }
  }
}

// A transition as the scan wants it (segment/scan_sm90.cuh): rows k; v and v + 8 of a column block share a register.
__device__ __forceinline__ void store_transition(const float (&S)[64], uint32_t* to, int first_row, int lane) {
  to += 2 * (lane % 4) * segment::kPairs + first_row / 2 + lane / 4;
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const segment::Split x = segment::split(S[i + e], S[i + e + 2]);
      const int at = (2 * i + e) * segment::kPairs;  // row i / 4 * 8 + e
      to[at] = x.high, to[kHead * segment::kPairs + at] = x.low;
    }
  }
}

// The state that an item begins with.
__device__ __forceinline__ void begin_item(const Arguments& a, const Item& item, float (&S)[64], int w, int first_row, bool leader, int lane) {
  if (item.from == From::identity) {
#pragma unroll
    for (int i = 0; i < 64; ++i) S[i] = state_k(i, lane) == state_v(i, first_row, lane) ? 1.F : 0.F;
    return;
  }
  States from = a.initial_state;
  std::int64_t at = item.sequence * from.sequence + item.head * from.head;
  if (item.from == From::zero) from.data = nullptr;
  if (item.from == From::boundary) {
    if (leader) {
      if (item.from_scan != 0) {
        segment::wait_for_count(&a.plan.scanned[item.from_boundary], kScanBlocks);
      } else {
        segment::wait_for_count(&a.plan.arrived[item.from_boundary], kArrivalsWhole);
      }
    }
    device::named_sync(kConsumerBarrier + w, 128);
    from = {a.plan.states, device::Type::f32, 0, 0, kHead, 1, StateRows::k};
    at = static_cast<std::int64_t>(item.from_boundary) * kHead * kHead;
  }
  load_state(S, from, at, first_row, lane);
  if (a.plan.initial_read != nullptr && item.from == From::start) {  // the final state will overwrite it
    device::named_sync(kConsumerBarrier + w, 128);
    if (leader) segment::add_to_count(&a.plan.initial_read[item.sequence * a.HV + item.head]);
  }
}

// Where an item's state goes.
__device__ __forceinline__ void end_item(const Arguments& a, const Item& item, const float (&S)[64], int w, int first_row, bool leader, int lane) {
  if (item.to == To::nowhere) return;
  if (item.to == To::final_state) {
    if (a.final_state.data == nullptr) return;
    if (a.plan.initial_read != nullptr && item.from != From::start) {
      if (leader) segment::wait_for_count(&a.plan.initial_read[item.sequence * a.HV + item.head], 2);
      device::named_sync(kConsumerBarrier + w, 128);
    }
    store_state(S, a.final_state, item.sequence * a.final_state.sequence + item.head * a.final_state.head, first_row, lane);
    return;
  }
  const std::int64_t at = static_cast<std::int64_t>(item.to_boundary) * kHead * kHead;
  if (item.to == To::transition) {
    store_transition(S, a.plan.transitions + at, first_row, lane);
  } else {
    store_rows<float, StateRows::k>(S, a.plan.states, at, first_row, lane);
  }
  device::named_sync(kConsumerBarrier + w, 128);
  if (leader) segment::add_to_count(&a.plan.arrived[item.to_boundary]);
}

// U (64 x 64) = or += A (64 x 64, four k steps) B^T, B lower triangular in staged panels: rows 0..31 meet two panels, 32..63 all four.
template <Operand Type, bool Fresh>
__device__ __forceinline__ void multiply_panels(float (&U)[32], const uint32_t* a, uint64_t panels) {
  device::wgmma_rs_n32<Type, Fresh>(U, a, panels);
  device::wgmma_rs_n32<Type, Fresh>(U + 16, a, device::advance(panels, staged_panel(0) + 1024));
  device::wgmma_rs_n32<Type, false>(U, a + 4, device::advance(panels, staged_panel(1)));
  device::wgmma_rs_n32<Type, false>(U + 16, a + 4, device::advance(panels, staged_panel(1) + 1024));
  device::wgmma_rs_n32<Type, false>(U + 16, a + 8, device::advance(panels, staged_panel(2) + 1024));
  device::wgmma_rs_n32<Type, false>(U + 16, a + 12, device::advance(panels, staged_panel(3) + 1024));
}

// X^T = beta (v - gam k S)^T: (k S)^T in U.
template <Operand Type>
__device__ __forceinline__ void solve_for(uint32_t (&X)[16], const float (&U)[32], const uint32_t (&V)[16], const float4 (&solve)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 v0 = device::unpack<Type>(V[2 * j]), v1 = device::unpack<Type>(V[2 * j + 1]);
    const float4 f = solve[j];
    X[2 * j] = device::pack<Type>(fmaf(U[4 * j], f.x, v0.x * f.z), fmaf(U[4 * j + 1], f.y, v0.y * f.w));
    X[2 * j + 1] = device::pack<Type>(fmaf(U[4 * j + 2], f.x, v1.x * f.z), fmaf(U[4 * j + 3], f.y, v1.y * f.w));
  }
}

// S^T += (factor U)^T k, issued and committed.
template <Operand Type>
__device__ __forceinline__ void write_state(float (&S)[64], const float (&U)[32], const float2 (&factor)[8], const unsigned char* tile) {
  uint32_t U16[16];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    U16[2 * j] = device::pack<Type>(U[4 * j] * factor[j].x, U[4 * j + 1] * factor[j].y);
    U16[2 * j + 1] = device::pack<Type>(U[4 * j + 2] * factor[j].x, U[4 * j + 3] * factor[j].y);
  }
  const uint64_t k_columns = device::describe_columns_128(tile, kChunk * 128);
  device::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    device::wgmma_rs_n128_columns<Type>(S, U16 + 4 * step, device::advance(k_columns, step * 2048));
  }
  device::wgmma_commit();
}

template <Operand Type>
__device__ __forceinline__ void multiply_tile(float (&U)[32], const uint32_t* state, uint64_t tile) {
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    if (step == 0) {
      device::wgmma_rs_n64<Type, true>(U, state, tile);
    } else {
      device::wgmma_rs_n64<Type, false>(U, state + 4 * step, device::advance(tile, (step / 4) * kChunk * 128 + (step % 4) * 32));
    }
  }
}

// A hard chunk, token by token in float32, on the state as it lies in registers: about ten times as long as the products take, and as
// exact as the recurrence itself. o replaces v in its tile, where it is wanted (full).
template <Operand Type>
__device__ __forceinline__ void step_through(const Arguments& a, const Shared& s, float (&S)[64], int at, unsigned char* v_tile, bool full,
                                             bool values, int warp, int lane) {
  const RecordTail& record = s.t[at].tail;
  const int pair = lane % 4, first = warp * 16 + lane / 4;  // its value columns: first and first + 8
  float c_before = 0.F;
#pragma unroll 1
  for (int t = 0; t < kChunk; ++t) {
    const float c = record.c[t], key = s.key[at][t], decay = device::exp2_fast(c - c_before);
    c_before = c;
    const auto channels = [&](const unsigned char (&tile)[2][kChunk * 128], int j) {  // 8 j + 2 pair and the one after it
      return device::unpack<Type>(*reinterpret_cast<const uint32_t*>(tile[j / 8] + t * 128 + (((j % 8) ^ (t & 7)) << 4) + pair * 4));
    };
    float read0 = 0.F, read1 = 0.F;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 k = channels(s.k[at], j);
      S[4 * j] *= decay, S[4 * j + 1] *= decay, S[4 * j + 2] *= decay, S[4 * j + 3] *= decay;
      read0 = fmaf(k.x, S[4 * j], fmaf(k.y, S[4 * j + 1], read0)), read1 = fmaf(k.x, S[4 * j + 2], fmaf(k.y, S[4 * j + 3], read1));
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) read0 += __shfl_xor_sync(~0U, read0, o), read1 += __shfl_xor_sync(~0U, read1, o);
    const auto element = [&](int v) { return v_tile + t * 128 + (((v / 8) ^ (t & 7)) << 4) + v % 8 * 2; };
    using Element = std::conditional_t<Type == Operand::f16, __half, __nv_bfloat16>;
    auto* v0 = reinterpret_cast<Element*>(element(first));
    auto* v1 = reinterpret_cast<Element*>(element(first + 8));
    const float beta = record.beta[t], read_scale = a.l2norm ? key : 1.F;
    const float given0 = values ? static_cast<float>(*v0) : 0.F, given1 = values ? static_cast<float>(*v1) : 0.F;
    const float u0 = key * beta * (given0 - read_scale * read0), u1 = key * beta * (given1 - read_scale * read1);
    if (!full) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 k = channels(s.k[at], j);
        S[4 * j] = fmaf(k.x, u0, S[4 * j]), S[4 * j + 1] = fmaf(k.y, u0, S[4 * j + 1]);
        S[4 * j + 2] = fmaf(k.x, u1, S[4 * j + 2]), S[4 * j + 3] = fmaf(k.y, u1, S[4 * j + 3]);
      }
      continue;
    }
    float o0 = 0.F, o1 = 0.F;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 k = channels(s.k[at], j), q = channels(s.q[at], j);
      S[4 * j] = fmaf(k.x, u0, S[4 * j]), S[4 * j + 1] = fmaf(k.y, u0, S[4 * j + 1]);
      S[4 * j + 2] = fmaf(k.x, u1, S[4 * j + 2]), S[4 * j + 3] = fmaf(k.y, u1, S[4 * j + 3]);
      o0 = fmaf(q.x, S[4 * j], fmaf(q.y, S[4 * j + 1], o0)), o1 = fmaf(q.x, S[4 * j + 2], fmaf(q.y, S[4 * j + 3], o1));
    }
#pragma unroll
    for (int o = 1; o < 4; o <<= 1) o0 += __shfl_xor_sync(~0U, o0, o), o1 += __shfl_xor_sync(~0U, o1, o);
    const float query = s.query[at][t];
    __syncwarp();
    if (pair == 0) *v0 = static_cast<Element>(query * o0), *v1 = static_cast<Element>(query * o1);
  }
}

template <Operand Type>
__device__ __forceinline__ void consume(const Arguments& a, Shared& s, int w, int tid) {
  using device::pack;
  const int warp = __shfl_sync(~0U, tid / 32, 0), first_row = w * 64 + warp * 16;
  // Through a shuffle, since ptxas would read the thread's number again in every round, which takes longer than what it is needed for.
  const int lane = __shfl_sync(~0U, tid % 32, tid % 32);
  int column = 2 * (lane % 4);
  // This lane's row of a 16 x 16 block of a transposed v or o tile.
  uint32_t v_offset;
  {
    const int row = lane % 8 + (lane >> 4) * 8, unit = 2 * warp + (lane >> 3 & 1);
    v_offset = row * 128 + ((unit ^ (row & 7)) << 4);
  }
  device::keep(column), device::keep(v_offset);
  WorkReader works;
  Place<kStages> stage;
  Place<kValueStages> v_stage;
  float S[64], U[32], O[32];
  uint32_t S16[32], O16[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) O16[i] = 0;
  // The output of the chunk before, on its way into the tile that its values came in; it may be another item's.
  bool pending = false;
  int before = 0;
  const auto replaced = [&](int at) {
    __syncwarp();
    device::barrier_arrive_if(s.v_replaced[at], lane == 0);
  };
  const auto put_o = [&] {
    const uint32_t to = device::shared_address(s.v[before][w]) + v_offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) device::store_matrices_transposed(to + i * 2048, O16 + 4 * i);
    device::fence_shared_to_async();
    replaced(before);
  };
  const auto load_factors = [&](float2(&to)[8], const float* from) {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = device::load_shared_pair(from + 8 * j + column);
  };
  const auto load_solve = [&](float4(&to)[8], const float4* from) {
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = device::load_shared_quad(from + 4 * j + column / 2);
  };
  const auto load_values = [&](uint32_t(&to)[16]) {
    const uint32_t from = device::shared_address(s.v[v_stage.at][w]) + v_offset;
#pragma unroll
    for (int i = 0; i < 4; ++i) device::load_matrices_transposed(to + 4 * i, from + i * 2048);
  };
  if (w == 1) device::named_arrive(kTurnBarrier, 256);
#pragma unroll 1
  for (;; works.done(s)) {
    const Work& work = works.next(s);
    const Item& item = work.item;
    const int chunks = item.chunks;
    if (chunks < 0) break;
    if (item.scan_steps > 0) {
      segment::scan_boundaries(a.plan, s.scan, item, kScanBarrier, s.scanned, 4 * w + warp, lane);
      continue;
    }
    begin_item(a, item, S, w, first_row, warp == 0 && lane == 0, lane);
#pragma unroll
    for (int i = 0; i < 32; ++i) S16[i] = device::pack_here<Type>(S[2 * i], S[2 * i + 1]);
    const bool values = work.values();
    const auto wait_for_chunk = [&] { device::barrier_wait(s.made[stage.at], stage.parity); };
    if (chunks > 0) wait_for_chunk();
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      const int at = stage.at;
      const uint64_t k = device::describe_rows_128(s.k[at][0]), q = device::describe_rows_128(s.q[at][0]);
      const float decay = s.decay[at];
      const bool full = work.full(c);
      if (a.saved_states.data != nullptr && full && (item.first + c) % a.checkpoint_chunks == 0) {
        const std::int64_t slot = (static_cast<std::int64_t>(work.row) * a.sequences.T + work.token) / (kChunk * a.checkpoint_chunks) +
                                  item.sequence + (item.first + c) / a.checkpoint_chunks;
        store_state(S, a.saved_states, slot * a.saved_states.sequence + item.head * a.saved_states.head, first_row, lane);
      }
      if (s.t[at].tail.hard != 0) {
        device::named_sync(kTurnBarrier + w, 256);
        device::named_arrive(kTurnBarrier + 1 - w, 256);
        if (pending) put_o();
        step_through<Type>(a, s, S, at, s.v[v_stage.at][w], full, values, warp, lane);
        pending = false;
        if (full) device::fence_shared_to_async();
        if (values) replaced(v_stage.at);
#pragma unroll
        for (int i = 0; i < 32; ++i) S16[i] = device::pack_here<Type>(S[2 * i], S[2 * i + 1]);
        __syncwarp();
        device::barrier_arrive_if(s.released[at], lane == 0);
        stage.next();
        if (values) v_stage.next();
        if (c + 1 < chunks) wait_for_chunk();
        continue;
      }
      if (!full) {  // the state alone; a branch further down would cross products in flight, which ptxas then serialises
        device::named_sync(kTurnBarrier + w, 256);
        device::wgmma_fence();
        multiply_tile<Type>(U, S16, k);
        device::wgmma_commit();
        if (pending) put_o();
        device::wgmma_wait<1>();
        device::hold(S);
#pragma unroll
        for (int i = 0; i < 64; ++i) S[i] *= decay;
        device::hold(S);
        uint32_t V16[16], X16[16];
        load_values(V16);
        if (!values) {
#pragma unroll
          for (int i = 0; i < 16; ++i) V16[i] = 0;
        }
        float4 solve[8];
        load_solve(solve, s.solve[at]);
        device::wgmma_wait<0>();
        device::hold(U);
        solve_for<Type>(X16, U, V16, solve);
        device::wgmma_fence();
        multiply_panels<Type, true>(U, X16, device::describe_panel(s.t[at].panels));
        device::wgmma_commit();
        device::named_arrive(kTurnBarrier + 1 - w, 256);
        float2 factor[8];
        load_factors(factor, s.write[at]);
        if (values) replaced(v_stage.at);
        pending = false;
        device::wgmma_wait<0>();
        device::hold(U);
        write_state<Type>(S, U, factor, s.k[at][0]);
        stage.next();
        if (values) v_stage.next();
        if (c + 1 < chunks) wait_for_chunk();
        device::wgmma_wait<0>();
        device::hold(S);
#pragma unroll
        for (int i = 0; i < 32; ++i) S16[i] = device::pack_here<Type>(S[2 * i], S[2 * i + 1]);
        device::barrier_arrive_if(s.released[at], lane == 0);
        continue;
      }
      device::named_sync(kTurnBarrier + w, 256);
      device::wgmma_fence();
      multiply_tile<Type>(U, S16, k);  // U^T = S^T k^T
      device::wgmma_commit();
      if (pending) put_o();
      // Waits for nothing, but ptxas must see that S is free while the product runs.
      device::wgmma_wait<1>();
      device::hold(S);
#pragma unroll
      for (int i = 0; i < 64; ++i) S[i] *= decay;
      device::hold(S);
      uint32_t V16[16], X16[16];
      load_values(V16);
      float4 solve[8];
      load_solve(solve, s.solve[at]);
      device::wgmma_wait<0>();
      device::hold(U);
      solve_for<Type>(X16, U, V16, solve);
      device::wgmma_fence();
      multiply_panels<Type, true>(U, X16, device::describe_panel(s.t[at].panels));  // U^T = X^T T^T
      device::wgmma_commit();
      multiply_tile<Type>(O, S16, q);  // O^T = S^T q^T
      device::wgmma_commit();
      device::named_arrive(kTurnBarrier + 1 - w, 256);
      float2 factor[8];
      load_factors(factor, s.write[at]);
      device::wgmma_wait<1>();
      device::hold(U);
      write_state<Type>(S, U, factor, s.k[at][0]);
      load_factors(factor, s.out[at]);
      device::wgmma_wait<1>();
      device::hold(O);
      device::hold(U);
      uint32_t Up16[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) Up16[i] = pack<Type>(U[2 * i], U[2 * i + 1]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        O[4 * j] *= factor[j].x, O[4 * j + 1] *= factor[j].y, O[4 * j + 2] *= factor[j].x, O[4 * j + 3] *= factor[j].y;
      }
      device::wgmma_fence();
      multiply_panels<Type, false>(O, Up16, device::describe_panel(s.p[at]));  // O^T = gam scale O^T + U^T P^T
      device::wgmma_commit();
      pending = true, before = v_stage.at;
      stage.next();
      v_stage.next();
      if (c + 1 < chunks) wait_for_chunk();
      device::wgmma_wait<1>();
      device::hold(S);
#pragma unroll
      for (int i = 0; i < 32; ++i) S16[i] = device::pack_here<Type>(S[2 * i], S[2 * i + 1]);
      device::wgmma_wait<0>();
      device::hold(O);
      device::barrier_arrive_if(s.released[at], lane == 0);
#pragma unroll
      for (int i = 0; i < 16; ++i) O16[i] = pack<Type>(O[2 * i], O[2 * i + 1]);
    }
    end_item(a, item, S, w, first_row, warp == 0 && lane == 0, lane);
  }
  if (pending) put_o();
}

template <Operand Type>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                   const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_o) {
  extern __shared__ __align__(1024) unsigned char raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int tid = threadIdx.x % 128, group = __shfl_sync(~0U, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      device::barrier_init(s.loaded[i], 1);
      device::barrier_init(s.normed[i], kChunk);
      device::barrier_init(s.made[i], 128 + kChunk);
      device::barrier_init(s.released[i], 8);
    }
    for (int i = 0; i < kValueStages; ++i) {
      device::barrier_init(s.v_loaded[i], 1);
      device::barrier_init(s.v_replaced[i], 8);
      s.output[i].map = nullptr;
    }
    for (int i = 0; i < kWorkRing; ++i) {
      device::barrier_init(s.item_full[i], 1);
      device::barrier_init(s.item_empty[i], 3 * 128 + 1 + kChunk);
    }
    s.scanned = 0, s.announced = 0;
    device::barrier_init_fence();
    device::prefetch_map(&map_q), device::prefetch_map(&map_k), device::prefetch_map(&map_v), device::prefetch_map(&map_o);
  }
  // The rows on top of panels 1 and 3 stay zero for good.
  for (int i = threadIdx.x; i < kStages * 2 * 32; i += kThreads) {
    const int hole = i / 32 % 2, unit = i % 32;
    const int at = (hole == 0 ? staged_panel(1) : staged_panel(3) + 1024) + unit * 16;
    *reinterpret_cast<uint4*>(s.t[i / 64].panels + at) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(s.p[i / 64] + at) = make_uint4(0, 0, 0, 0);
  }
  device::fence_shared_to_async();
  __syncthreads();
  device::wait_for_previous_launch();
  if (group == 3) {
    device::fewer_registers<kProducerRegisters>();
    if (tid == 0) produce_keys(a, s, &map_q, &map_k);
    if (tid == 32) produce_values(a, s, &map_v, &map_o);
    if (tid >= kChunk) make_factors<Type>(a, s, tid - kChunk);
  } else if (group == 0) {
    device::fewer_registers<kAuxiliaryRegisters>();
    assist<Type>(a, s, tid);
  } else {
    device::more_registers<kConsumerRegisters>();
    consume<Type>(a, s, group - 1, tid);
  }
}

}  // namespace flashdelta::cuda::forward
