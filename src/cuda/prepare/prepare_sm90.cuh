// Device code of `prepare`. Formulas: algebra.md ("Forward, one chunk"); timeline and budgets: README.md beside this file.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/copy.cuh"
#include "cuda/layout.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/factors.cuh"
#include "cuda/prepare/gram.cuh"
#include "cuda/prepare/inverse.cuh"
#include "cuda/prepare/prepare.hpp"
#include "cuda/prepare/saved.cuh"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// One warp; leaves h to the caller. `cached`: lane l's slot(l * step) of the first search step, step = ceil(N / 32).
__device__ __forceinline__ Place locate(const Sequences& s, int slot, int cached, int lane) {
  if (s.cu_seqlens == nullptr) {
    const int chunks = (s.T + kChunk - 1) / kChunk;
    const int n = slot / chunks, chunk = slot % chunks;
    return {n, chunk * kChunk, min(kChunk, s.T - chunk * kChunk), slot, 0};
  }
  int first = 0, count = s.N;
  for (int step = (count + 31) / 32;; step = (count + 31) / 32) {
    const int candidate = first + lane * step;
    const int from = first == 0 && count == s.N ? cached : candidate < s.N ? s.slot(candidate) : 0;
    const unsigned below = __ballot_sync(~0U, candidate < first + count && from <= slot);
    if (below == 0) return {0, 0, 0, slot, 0};
    first += (31 - __clz(below)) * step;
    if (step == 1) break;
    count = min(step, s.N - first);
  }
  const Sequences::Span span = s.span(first);
  const int token = (slot - span.slot) * kChunk;
  return {span.row, span.begin + token, max(0, min(kChunk, span.length - token)), slot, 0};
}

// Bounded maps of the sequences from `first` on, one in `step`, whose last chunk is not full. One warp.
static __device__ __noinline__ void bound_maps(const Arguments& a, const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v,
                                               const CUtensorMap& o, int first, int step, unsigned char* scratch, int lane) {
  for (int n = first; n < a.sequences.N; n += step) {
    const Sequences::Span span = a.sequences.span(n);
    if (span.length % kChunk == 0) continue;
    CUtensorMap* to = a.bounded_maps + static_cast<std::int64_t>(n) * kMaps;
    const int end = span.begin + span.length;
    device::write_bounded_map(to + kMapQ, q, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapK, k, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapV, v, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapO, o, end, reinterpret_cast<uint32_t*>(scratch), lane);
  }
}

// Split: T itself is wanted, for a backward.
template <Operand Type, int W, bool Split>
__global__ void __launch_bounds__(32 * W, ctas_per_multiprocessor(W))
    prepare_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map_q,
                   const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                   const __grid_constant__ CUtensorMap map_o) {
  extern __shared__ __align__(1024) unsigned char raw[];
  // The declared array's own address: rounded up as an integer it would become generic loads. The launch checks nothing else is static.
  Shared<W, Split>& s = *reinterpret_cast<Shared<W, Split>*>(raw);
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(~0U, tid >> 5, 0);
  const int step = (a.sequences.N + 31) / 32;
  const int cached = a.sequences.cu_seqlens != nullptr && lane * step < a.sequences.N ? a.sequences.slot(lane * step) : 0;
  // Work items are (chunk number, key head), the head running fastest. Warp 0 walks them and leaves places in shared memory; what all
  // warps kept in registers would not leave the inverse enough.
  const int slot_step = gridDim.x / a.H, head_step = gridDim.x % a.H;
  int slot = blockIdx.x / a.H, h = blockIdx.x % a.H;
  const auto find = [&](Place& to) {
    Place at{};
    while (slot < a.slots) {
      at = locate(a.sequences, slot, cached, lane);
      at.h = h;
      slot += slot_step, h += head_step;
      if (h >= a.H) h -= a.H, ++slot;
      if (at.rows > 0) break;
    }
    if (lane == 0) to = at;
    __syncwarp();
  };
  const auto load_k = [&](const Place& at) {
    device::barrier_arrive_expect(s.full, kChunk * kHead * 2);
    device::load_box(s.k, &map_k, s.full, at.h, at.token, at.row);
  };
  if (warp == 0) find(s.place[0]);
  if (tid == 0) {
    device::barrier_init(s.full, 1);
    device::barrier_init_fence();
    if (s.place[0].rows > 0) load_k(s.place[0]);
    if (blockIdx.x == 0) *a.counter = 0;
  }
  __syncthreads();
  if (a.bounded_maps != nullptr) bound_maps(a, map_q, map_k, map_v, map_o, blockIdx.x * W + warp, gridDim.x * W, s.record[warp], lane);
  zero_rows_of_no_sequence(a);
  if (a.saved_c.data != nullptr || a.saved_T.data != nullptr || a.saved_states.data != nullptr) zero_saved_of_no_sequence(a);
  device::allow_dependent_launch();

  const uint32_t address_a = device::shared_address(s.k[0]) + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
  const uint32_t address_b =
      device::shared_address(s.k[0]) + ((lane & 7) + ((lane >> 4) << 3)) * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
  const uint32_t record = device::shared_address(s.record[warp]);
  const uint32_t record_row = record + (lane & 15) * 32 + (((lane >> 4) ^ ((lane >> 2) & 1)) << 4);
#pragma unroll 1
  for (int n = 0; s.place[n & 3].rows > 0; ++n) {
    const Place& here = s.place[n & 3];
    Place& next = s.place[(n + 1) & 3];
    Given<W> given;
    given.load(a, here, 0, tid);
    device::barrier_wait(s.full, n & 1);
    if (here.rows < kChunk) {  // what stands behind the end is not this sequence's
      for (int e = tid; e < (kChunk - here.rows) * 16; e += 32 * W) {
        *reinterpret_cast<uint4*>(s.k[e & 1] + (here.rows + (e >> 4)) * 128 + ((e >> 1) & 7) * 16) = make_uint4(0, 0, 0, 0);
      }
      device::fence_shared_to_async();
      __syncthreads();
    }
    if (warp == 0) find(next);
    const KeyScale scale = key_products<Type, W, Split>(s, address_a, address_b, a.l2norm, warp, lane, [&] {
      given.put(a, s, tid);
      if (tid == 0 && next.rows > 0) load_k(next);
    });
#pragma unroll 1
    for (int pass = 0; pass < a.group; pass += W) {
      if (pass > 0) {
        given.load(a, here, pass, tid);
        __syncthreads();
        given.put(a, s, tid);
        __syncthreads();
      }
      if (pass + warp >= a.group) continue;
      const int head = here.h * a.group + pass + warp;
      float2 whole;
      const Gates x = activate(a, s.g[warp], s.beta[warp], here.rows, head, lane, whole);
      BlockDecay decay;
      float2 c;
      const bool split = make_factors(x, s.key_scale, scale, s.factors[warp], decay, c, lane);
      if (lane == 0) device::wait_stores_read();  // the record before this one has left shared memory
      __syncwarp();
      auto& tail = *reinterpret_cast<RecordTail*>(s.record[warp] + kPanelBytes);
      reinterpret_cast<float2*>(tail.c)[lane] = make_float2(c.x * kLog2e, c.y * kLog2e);
      float2 beta = make_float2(x.b0, x.b1);
      reinterpret_cast<char2*>(tail.exponent)[lane] = make_char2(0, 0);
      if (scale == KeyScale::power_of_two) {
        const int e0 = norm_exponent(s.norm[2 * lane]), e1 = norm_exponent(s.norm[2 * lane + 1]);
        reinterpret_cast<char2*>(tail.exponent)[lane] = make_char2(static_cast<signed char>(e0), static_cast<signed char>(e1));
        beta = make_float2(ldexpf(x.b0, e0), ldexpf(x.b1, e1));
      }
      reinterpret_cast<float2*>(tail.beta)[lane] = beta;
      if (a.l2norm) reinterpret_cast<float2*>(tail.norm)[lane] = reinterpret_cast<const float2*>(s.key_scale)[lane];
      if (a.bounds != nullptr) {
        const float bound = log_norm_bound(x, c, s.norm, a.l2norm, lane);
        if (lane == 31) a.bounds[static_cast<std::int64_t>(head) * a.slots + here.slot] = bound;
      }
      float2 squares;
      if (Split && split) {
        squares = invert<Type, Split>(s, s.factors[warp], decay, record_row, lane);
      } else {
        squares = invert<Type, false>(s, s.factors[warp], decay, record_row, lane);
      }
      const bool hard = is_hard<Type>(squares, s.factors[warp], here.rows, scale, tail, lane);
      if (lane == 0) *reinterpret_cast<int4*>(&tail.hard) = make_int4(hard ? 1 : 0, 0, 0, 0);  // and the padding
      if (a.saved_c.data != nullptr || a.saved_T.data != nullptr) save<Type>(a, here, head, s.record[warp], whole, lane);
      device::fence_shared_to_async();
      __syncwarp();
      if (lane == 0) {
        const int bytes = record_bytes(a.l2norm);
        device::store_bytes(a.records + (static_cast<std::int64_t>(here.slot) * a.H * a.group + head) * bytes, record, bytes);
      }
    }
  }
  if (lane == 0) device::wait_stores_done();
}

}  // namespace flashdelta::cuda::prepare
