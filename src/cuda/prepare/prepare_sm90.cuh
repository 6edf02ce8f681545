// Device code of `prepare`. Formulas: algebra.md ("Forward, one chunk"); timeline and budgets: README.md beside this file.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/copy.cuh"
#include "cuda/layout.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/early.cuh"
#include "cuda/prepare/factors.cuh"
#include "cuda/prepare/gram.cuh"
#include "cuda/prepare/inverse.cuh"
#include "cuda/prepare/prepare.hpp"
#include "cuda/prepare/saved.cuh"
#include "cuda/prepare/shared.cuh"
#include "cuda/prepare/team.cuh"
#include "cuda/segment/uncut.cuh"

namespace flashdelta::cuda::prepare {

// The sequence that chunk number `slot` would belong to, or -1. One warp, each lane for its own.
__device__ __forceinline__ int sequence_of(const Sequences& s, int slot, int lane) {
  // Among 32 sequences first, all read at once; then between two of them.
  const int step = (s.N + 31) / 32;
  const int probe = lane * step < s.N ? s.slot(lane * step) : 0;
  int group = 0;
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const int from = __shfl_sync(~0U, probe, group + o);
    if ((group + o) * step < s.N && from <= slot) group += o;
  }
  int first = group * step;
  for (int end = min(first + step, s.N); end - first > 1;) {
    const int middle = (first + end) / 2;
    (s.slot(middle) <= slot ? first : end) = middle;
  }
  return s.N > 0 && s.slot(first) <= slot ? first : -1;
}

// Finds the places of items p to p + kBatch - 1 of this CTA at most, in the order of its items (item, item + step, ..), past chunk numbers
// that no sequence uses. Behind them stands that there are no more, or where to go on. One warp. Returns, the first time, covered().
static __device__ __noinline__ int find_places(const Inputs& a, Place* place, int p, int item, unsigned step, int lane) {
  // Chunks of few packed sequences are counted one behind another, so that no CTA has numbers which no sequence uses.
  const bool counted = a.sequences.cu_seqlens != nullptr && a.sequences.N < 32;
  int begin = 0, length = 0, until = 0, covered = 0;  // of sequence `lane`; until: chunks of the sequences up to it
  if (counted) {
    begin = a.sequences.offset(min(lane, a.sequences.N));
    length = max(0, __shfl_down_sync(~0U, begin, 1) - begin);
    covered = max(0, __shfl_sync(~0U, begin, a.sequences.N) - __shfl_sync(~0U, begin, 0));
    until = (length + kChunk - 1) / kChunk;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int before = __shfl_up_sync(~0U, until, o);
      if (lane >= o) until += before;
    }
  } else if (p == 0) {
    covered = a.sequences.covered();
  }
  const unsigned items = static_cast<unsigned>(counted ? __shfl_sync(~0U, until, 31) : a.slots) * a.H;
  unsigned next = item;
  for (bool found = false; !found && next < items; next += kBatch * step) {
    const unsigned mine = min(next + min(lane, kBatch - 1) * step, items);
    const int slot = static_cast<int>(mine / a.H), h = static_cast<int>(mine % a.H);
    Place at{};
    at.slot = slot, at.h = h;
    if (counted) {
      int n = 0;
#pragma unroll
      for (int o = 16; o > 0; o >>= 1) {
        if (__shfl_sync(~0U, until, n + o - 1) <= slot) n += o;
      }
      const int chunk = slot - __shfl_sync(~0U, until - (length + kChunk - 1) / kChunk, n), first = __shfl_sync(~0U, begin, n);
      at.token = first + chunk * kChunk;
      at.rows = max(0, min(kChunk, __shfl_sync(~0U, length, n) - chunk * kChunk));
      at.slot = first / kChunk + n + chunk;
    } else if (a.sequences.cu_seqlens == nullptr) {
      const int chunks = (a.sequences.T + kChunk - 1) / kChunk;
      at.row = slot / chunks, at.token = slot % chunks * kChunk;
      at.rows = min(kChunk, a.sequences.T - at.token);
    } else if (const int n = sequence_of(a.sequences, slot, lane); n >= 0) {
      const Sequences::Span span = a.sequences.span(n);
      const int before = (slot - span.slot) * kChunk;
      at.row = span.row, at.token = span.begin + before;
      at.rows = max(0, min(kChunk, span.length - before));
    }
    at.g = at.row * a.g.row + at.token * a.g.token + at.h * a.group * a.g.head;
    at.beta = at.row * a.beta.row + at.token * a.beta.token + at.h * a.group * a.beta.head;
    const bool valid = lane < kBatch && mine < items && at.rows > 0;
    const unsigned all = __ballot_sync(~0U, valid);
    if (valid) place[place_of(p + __popc(all & ((1U << lane) - 1)))] = at;
    p += __popc(all);
    found = all != 0;
  }
  if (lane == 0) {
    Place end{};
    end.rows = next < items ? kNotYet : kNoMore, end.slot = static_cast<int>(next);
    place[place_of(p)] = end;
  }
  __syncwarp();
  return covered;
}

// Bounded maps of the sequences from `first` on, one in `step`, whose last chunk is not full. One warp.
static __device__ __noinline__ void bound_maps(const Sequences& sequences, CUtensorMap* maps, const CUtensorMap& q, const CUtensorMap& k,
                                               const CUtensorMap& v, const CUtensorMap& o, int first, int step, unsigned char* scratch,
                                               int lane) {
  for (int n = first; n < sequences.N; n += step) {
    const Sequences::Span span = sequences.span(n);
    if (span.length % kChunk == 0) continue;
    CUtensorMap* to = maps + static_cast<std::int64_t>(n) * kMaps;
    const int end = span.begin + span.length;
    device::write_bounded_map(to + kMapQ, q, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapK, k, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapV, v, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapO, o, end, reinterpret_cast<uint32_t*>(scratch), lane);
  }
}

// Of a CTA without items, where there is to be a plan: whether there is anything to plan. By cost: the plan may leave all pairs uncut; it
// then reads no bound.
static __device__ __noinline__ void tell_of_plan(const Inputs& a, PlanHeader* plan, signed char* bounds, bool by_cost, int multiprocessors,
                                                 int tid) {
  bool uncut = false;
  if (tid < 32 && by_cost && a.sequences.N <= kMostTold) {
    uncut = segment::hand_out_uncut(plan, a.sequences, a.H * a.group, multiprocessors, tid);
  }
  if (__syncthreads_or(uncut) == 0 && bounds != nullptr) clear_bounds_of_no_chunk(a, bounds);
}

// What of a record needs no product: gate sums, betas, exponents and norms. By one warp.
__device__ __forceinline__ RecordTail& put_tail(const Arguments& a, unsigned char* record, const Gates& x, float2 c, const float* norm,
                                                const float* key_scale, bool powers, int lane) {
  auto& tail = *reinterpret_cast<RecordTail*>(record + kPanelBytes);
  reinterpret_cast<float2*>(tail.c)[lane] = make_float2(c.x * kLog2e, c.y * kLog2e);
  float2 beta = make_float2(x.b0, x.b1);
  reinterpret_cast<char2*>(tail.exponent)[lane] = make_char2(0, 0);
  if (powers) {
    const int e0 = norm_exponent(norm[2 * lane]), e1 = norm_exponent(norm[2 * lane + 1]);
    reinterpret_cast<char2*>(tail.exponent)[lane] = make_char2(static_cast<signed char>(e0), static_cast<signed char>(e1));
    beta = make_float2(ldexpf(x.b0, e0), ldexpf(x.b1, e1));
  }
  reinterpret_cast<float2*>(tail.beta)[lane] = beta;
  if (a.l2norm) reinterpret_cast<float2*>(tail.norm)[lane] = reinterpret_cast<const float2*>(key_scale)[lane];
  return tail;
}

// What the chunk forgets, for the plan; head: among those of its key head. Early: unless gates have told it. By one warp.
template <bool Early>
__device__ __forceinline__ void tell_forgotten(const Arguments& a, const Place& at, int head, const Gates& x, float gates,
                                               const float* norm, int lane) {
  if (a.bounds == nullptr) return;
  const float growth = log_growth(x, norm, a.l2norm, lane);
  if (lane == 31 && (!Early || growth != 0.F)) {
    *bound_of(a, at, head) = forgotten(gates + growth);
    if constexpr (Early) *a.grown = 1;
  }
}

// squares: this lane's part (inverse.cuh). By one warp.
template <Operand Type>
__device__ __forceinline__ void put_hard(RecordTail& tail, float2 squares, const Factors& f, const float* norm, bool l2norm, int rows,
                                         bool powers, int lane) {
  const bool hard = is_hard<Type>(squares, f, norm, l2norm, rows, powers, tail, lane);
  if (lane == 0) *reinterpret_cast<int4*>(&tail.hard) = make_int4(hard ? 1 : 0, 0, 0, 0);  // and the padding
}

// This lane's row of T's block (0, 0) in a record.
__device__ __forceinline__ uint32_t row_of_record(const unsigned char* record, int lane) {
  int row = lane;
  device::keep(row);
  return device::shared_address(record) + (row & 15) * 32 + (((row >> 4) ^ ((row >> 2) & 1)) << 4);
}

// Sends a record off, behind its writers' fences. By one warp.
__device__ __forceinline__ void store_record(const Arguments& a, const unsigned char* record, const Place& at, int head, int lane) {
  // Through a shuffle: with an address that ptxas does not know to be the same for all, each copy would be a loop.
  const int number = __shfl_sync(~0U, at.slot * (a.H * a.group) + head, 0);
  __syncwarp();
  if (lane != 0) return;
  const int bytes = record_bytes(a.l2norm);
  const uint32_t from = device::shared_address(record);
  unsigned char* const to = a.records + static_cast<std::int64_t>(number) * bytes;
  // In the pieces that the chunk loop loads: tools that follow bulk copies match them.
  device::store_run(to, from, panel_offset(1));
  device::store_run(to + panel_offset(1), from + panel_offset(1), panel_offset(3) - panel_offset(1));
  device::store_bytes(to + panel_offset(3), from + panel_offset(3), bytes - panel_offset(3));
}

// W: value heads at once. Split: T itself is wanted, for a backward. Early: what gates tell of all chunks is there before the next launch
// may begin (a.grown).
template <Operand Type, int W, bool Split, bool Early>
__global__ void __maxnreg__(most_registers(W, Split))
    prepare_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map_q,
                   const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                   const __grid_constant__ CUtensorMap map_o) {
  extern __shared__ __align__(1024) unsigned char raw[];
  // The declared array's own address: rounded up as an integer it would become generic loads. The launch checks nothing else is static.
  Shared<W, Split>& s = *reinterpret_cast<Shared<W, Split>*>(raw);
  // From registers: ptxas would read the thread's number again wherever it is wanted, and wait for it.
  int lane = static_cast<int>(threadIdx.x & 31);
  device::keep(lane);
  const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x >> 5), 0), tid = warp * 32 + lane;
  if (warp == 0) {
    static_assert(sizeof(Inputs) == 32 * sizeof(int));
    reinterpret_cast<int*>(&s.inputs)[lane] = reinterpret_cast<const int*>(static_cast<const Inputs*>(&a))[lane];
    __syncwarp();
  }
  if (static_cast<int>(blockIdx.x) == workers(a)) {
    // What comes behind this launch may come as soon as the plan is marked as not ready: all of it waits for the last CTA that has not
    // allowed it. Early, the plan begins with bounds, and those of no chunk have to be clear by then.
    if (tid == 0) {
      *a.plan = PlanHeader::not_ready(), *a.counter = 0;
      if constexpr (Early) {
        *a.grown = 0;
      } else {
        __threadfence();
      }
    }
    __syncthreads();
    if constexpr (!Early) device::allow_dependent_launch();
    tell_of_plan(s.inputs, a.plan, a.bounds, a.may_leave_uncut, a.multiprocessors, tid);
    if constexpr (Early) {
      __threadfence();
      __syncthreads();
      device::allow_dependent_launch();
    }
    return;
  }
  constexpr int kWarps = warps_of(W, Split);
  constexpr bool kTeam = is_team(W, kWarps);
  auto& derived = s.derived;
  const auto load_k = [&](const Place& at) {
    device::barrier_arrive_expect(s.full, kChunk * kHead * 2);
    device::load_box(s.k, &map_k, s.full, 0, at.h, at.token, at.row);
  };
  // Work items are (chunk number, key head), the head running fastest. Warp 0 finds their places and leaves them in shared memory; what all
  // warps kept in registers would not leave the inverse enough.
  if (tid == 0) {
    device::prefetch_map(&map_k);
    device::barrier_init(s.full, 1);
    device::barrier_init_fence();
    if (a.plan == nullptr && blockIdx.x == 0) *a.counter = 0, __threadfence();
  }
  if (warp == 0) {
    // Offsets are asked for before the keys, behind which they would queue.
    const int covered = find_places(s.inputs, s.place, 0, first_item(a), workers(a), lane);
    if (lane == 0) s.covered = covered;
  }
  __syncthreads();
  Given<W> given;
  if (!kTeam || warp == 0) given.load(a, s.place[0], 0, tid);  // in front of the keys, behind which they would queue
  const int number = blockIdx.x * kWarps + warp;
  if (a.bounded_maps != nullptr && number < a.sequences.N) {
    bound_maps(s.inputs.sequences, a.bounded_maps, map_q, map_k, map_v, map_o, number, workers(a) * kWarps, s.scratch(warp), lane);
  }
  const auto load_first = [&] {
    if (tid == 0 && s.place[0].rows > 0) load_k(s.place[0]);
  };
  if constexpr (Early) {
    tell_gates<W, kWarps>(a, s.place, warp, lane, load_first);
    block_sync<kWarps>();
  } else {
    load_first();
  }
  // Not sooner: what runs then takes instructions and memory from the first items.
  device::allow_dependent_launch();
  if (s.covered < a.sequences.T) zero_rows_of_no_sequence(a, s.covered);  // a call waits for the gates
  if (a.saved_c.data != nullptr || a.saved_T.data != nullptr || a.saved_states.data != nullptr) zero_saved_of_no_sequence(a);

#pragma unroll 1
  for (int n = 0;; n = place_of(n + 1)) {
    const Place& here = s.place[n];
    const Place& next = s.place[place_of(n + 1)];
    const int rows = here.rows;
    if (rows <= 0) break;
    device::barrier_wait(s.full, n & 1);
    if (rows < kChunk) {  // what stands behind the end is not this sequence's
      for (int e = tid; e < (kChunk - rows) * 16; e += 32 * kWarps) {
        *reinterpret_cast<uint4*>(s.k + (e & 1) * (kChunk * 128) + (rows + (e >> 4)) * 128 + ((e >> 1) & 7) * 16) = make_uint4(0, 0, 0, 0);
      }
      device::fence_shared_to_async();
      __syncthreads();
    }
    if (warp == 0 && next.rows == kNotYet) find_places(s.inputs, s.place, n + 1, next.slot, workers(a), lane);
    const bool powers = key_products<Type, kWarps, Split>(s, a.l2norm, warp, lane, [&] {
      if (!kTeam || warp == 0) given.put(a, s, tid);
      if (warp == 0 && lane == 0) {
        if (next.rows > 0) load_k(next);
        if constexpr (kTeam) device::wait_stores_read();  // for all warps: a barrier follows
      }
    });
    if constexpr (kTeam) {
      if (warp == 0) given.load(a, next, 0, tid);
      Factors& factors = derived.factors[warp];
      const Head& head = derived.head[0];
      float2 whole, c;
      const Gates x = activate(a, head.given.g, head.given.beta, rows, here.h, lane, whole);
      BlockDecay decay;
      make_factors(x, s.key_scale, powers, factors, decay, c, lane);
      uint32_t T[4][4];
      const uint32_t record_row = row_of_record(derived.record[0], lane);
      invert_own_diagonal<Type>(derived, factors, T[0], record_row, warp, lane);
      __syncthreads();
      if (warp > 0) {
        invert_row<Type>(derived, factors, T, record_row, warp, lane);
      } else {  // which has no blocks beside the diagonal
        RecordTail& tail = put_tail(a, derived.record[0], x, c, s.norm, s.key_scale, powers, lane);
        tell_forgotten<Early>(a, here, 0, x, c.y, s.norm, lane);
        put_hard<Type>(tail, lane < 4 ? derived.squares[lane] : make_float2(0.F, 0.F), factors, s.norm, a.l2norm, rows, powers, lane);
        if (a.saved_c.data != nullptr) save<Type>(a, here, here.h, derived.record[0], whole, lane);
      }
      device::fence_shared_to_async();
      __syncthreads();
      if (warp == 0) store_record(a, derived.record[0], here, here.h, lane);
    } else {
#pragma unroll 1
      for (int pass = 0; pass < a.group; pass += W) {
        if (pass > 0) {
          __syncthreads();
          given.put(a, s, tid);
          __syncthreads();
        }
        // Those of the next pass or item: while T is made, they come.
        const bool last = pass + W >= a.group;
        given.load(a, last ? next : here, last ? 0 : pass + W, tid);
        if (pass + warp >= a.group) continue;
        const int head = here.h * a.group + pass + warp;
        float2 whole, c;
        const Gates x = activate(a, derived.head[warp].given.g, derived.head[warp].given.beta, here.rows, head, lane, whole);
        BlockDecay decay;
        Factors& factors = derived.head[warp].factors;
        const bool split = make_factors(x, s.key_scale, powers, factors, decay, c, lane);
        if (lane == 0) device::wait_stores_read();  // the record before this one has left shared memory
        __syncwarp();
        unsigned char* const record = derived.record[warp];
        RecordTail& tail = put_tail(a, record, x, c, s.norm, s.key_scale, powers, lane);
        tell_forgotten<Early>(a, here, pass + warp, x, c.y, s.norm, lane);
        const uint32_t record_row = row_of_record(record, lane);
        const auto measure = [&](float2 squares) { put_hard<Type>(tail, squares, factors, s.norm, a.l2norm, here.rows, powers, lane); };
        if (Split && split) {
          invert<Type, Split>(derived, factors, decay, record_row, lane, measure);
        } else {
          invert<Type, false>(derived, factors, decay, record_row, lane, measure);
        }
        if (a.saved_c.data != nullptr || a.saved_T.data != nullptr) save<Type>(a, here, head, record, whole, lane);
        device::fence_shared_to_async();
        store_record(a, record, here, head, lane);
      }
    }
  }
  if (lane == 0) device::wait_stores_done();
}

}  // namespace flashdelta::cuda::prepare
