// What is made for the consumers: per-token factors by the factor warps (one token a thread), P by the auxiliary warpgroup.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/forward/shared.cuh"

namespace flashdelta::cuda::forward {

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
  return rsqrtf(sum + static_cast<float>(kNormEpsilon));
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
    const bool values = work.values();
#pragma unroll 1
    for (int i = work.stages_before(); i > 0; --i) {
      device::barrier_wait(s.released[stage.at], stage.parity ^ 1);
      device::barrier_wait(s.loaded[stage.at], stage.parity);
      // A state's tiles of v too, and before anyone may read them: a phase that passes unseen would be taken for the one after it.
#pragma unroll 1
      for (int piece = 2; piece < 4 && work.staged != Staged::no; ++piece) {
        device::barrier_wait(s.v_loaded[v_stage.at], v_stage.parity);
        v_stage.next();
      }
      device::barrier_arrive(s.normed[stage.at]), device::barrier_arrive(s.made[stage.at]);
      stage.next();
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int at = stage.at;
      // The consumers' release, though the producer has waited for it: so each pair of threads that shares memory meets at a barrier.
      device::barrier_wait(s.released[at], stage.parity ^ 1);
      device::barrier_wait(s.loaded[at], stage.parity);
      const RecordTail& record = s.t[at].tail;
      // Keys scaled by 2^-e count as normalised ones whose values are scaled by 2^e; the record's beta has that factor.
      const float key = a.l2norm ? record.norm[token] : exp2f(-static_cast<float>(record.exponent[token]));
      const float query = a.l2norm && work.full(chunk) ? a.scale * inverse_query_norm<Type>(s, at, token) : a.scale;
      s.query[at][token] = query;
      s.key[at][token] = key;
      const float c = record.c[token];
      s.column[at][token] = key * device::exp2_fast(record.c[token | 15] - c);
      device::barrier_arrive(s.normed[at]);
      const float last = record.c[kChunk - 1], gamma = device::exp2_fast(c);
      const float beta = record.beta[token];
      auto* solve = reinterpret_cast<float*>(&s.solve[at][token / 2]) + token % 2;
      solve[0] = -gamma * (a.l2norm ? key : 1.F) * beta, solve[2] = beta;
      s.write[at][token] = device::exp2_fast(last - c) * key;
      s.out[at][token] = gamma * query;
      if (token == 0) s.decay[at] = device::exp2_fast(last);
      // So that the consumers have one barrier to wait for, until they want P.
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

// Blocks (warp, 0 .. warp) of P = scale * lower(q k^T) * G, from the rows of q k^T that this warp holds. Below the diagonal blocks
// exp(c_i - c_j) is a product, with the sum of gates at the end of the block's columns between the two, so that no exponent is positive.
template <Operand Type>
__device__ __forceinline__ void make_p(const float (&A)[32], const float* c, const float* key, const float* column_scale,
                                       const float (&row_scale)[2], uint32_t to, int warp, int lane) {
  const int row = warp * 16 + lane / 4, column = 2 * (lane % 4);
  const float c0 = c[row], c1 = c[row + 8];
  float D[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) D[e] = A[e];
#pragma unroll
  for (int J = 0; J < 3; ++J) {
    if (J >= warp) break;
    const float r = c[16 * J + 15], scale0 = row_scale[0] * device::exp2_fast(c0 - r), scale1 = row_scale[1] * device::exp2_fast(c1 - r);
    uint32_t packed[4];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int e = 8 * J + 4 * v;
      const float2 x = device::load_shared_pair(column_scale + 16 * J + 8 * v + column);
      packed[2 * v] = device::pack<Type>(A[e] * x.x * scale0, A[e + 1] * x.y * scale0);
      packed[2 * v + 1] = device::pack<Type>(A[e + 2] * x.x * scale1, A[e + 3] * x.y * scale1);
    }
    device::store_matrices(to + staged_panel(J), packed[0], packed[1], packed[2], packed[3]);
#pragma unroll
    for (int e = 0; e < 8; ++e) D[e] = A[8 * (J + 1) + e];
  }
  uint32_t packed[4];
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const int j = 16 * warp + 8 * v + column, e = 4 * v;
    const float2 cj = device::load_shared_pair(c + j), nj = device::load_shared_pair(key + j);
    const float left0 = row_scale[0] * nj.x, right0 = row_scale[0] * nj.y, left1 = row_scale[1] * nj.x, right1 = row_scale[1] * nj.y;
    float p00 = D[e] * left0 * device::exp2_fast(c0 - cj.x), p01 = D[e + 1] * right0 * device::exp2_fast(c0 - cj.y);
    float p10 = D[e + 2] * left1 * device::exp2_fast(c1 - cj.x), p11 = D[e + 3] * right1 * device::exp2_fast(c1 - cj.y);
    // Selected, not multiplied: above the diagonal the exponential may be infinite.
    p00 = j <= row ? p00 : 0.F, p01 = j + 1 <= row ? p01 : 0.F;
    p10 = j <= row + 8 ? p10 : 0.F, p11 = j + 1 <= row + 8 ? p11 : 0.F;
    packed[2 * v] = device::pack<Type>(p00, p01), packed[2 * v + 1] = device::pack<Type>(p10, p11);
  }
  device::store_matrices(to + staged_panel(warp), packed[0], packed[1], packed[2], packed[3]);
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
    for (int i = work.stages_before(); i > 0; --i) {
      device::barrier_wait(s.loaded[stage.at], stage.parity);
      device::barrier_wait(s.normed[stage.at], stage.parity);
      device::barrier_arrive(s.p_made[stage.at]);
      stage.next();
    }
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int at = stage.at;
      const float* c = s.t[at].tail.c;
      device::barrier_wait(s.loaded[at], stage.parity);
      if (!work.full(chunk)) {
        device::barrier_wait(s.normed[at], stage.parity);
        device::barrier_arrive(s.p_made[at]);
        stage.next();
        continue;
      }
      float A[32];
      const uint64_t q = device::describe_rows_128(s.q[at][0]), k = device::describe_rows_128(s.k[at][0]);
      device::wgmma_fence();
      device::wgmma_ss_rows<Type>(A, q, k);
      device::wgmma_commit();
      const int row = warp * 16 + lane / 4;
      device::barrier_wait(s.normed[at], stage.parity);
      const float row_scale[2] = {s.query[at][row], s.query[at][row + 8]};
      device::wgmma_wait<0>();
      device::hold(A);
      const int stored_row = warp * 16 + (lane & 15);
      const uint32_t to = device::shared_address(s.p[at]) + stored_row * 32 + (((lane >> 4) ^ ((lane >> 2) & 1)) << 4);
      make_p<Type>(A, c, s.key[at], s.column[at], row_scale, to, warp, lane);
      device::fence_shared_to_async();
      device::barrier_arrive(s.p_made[at]);
      stage.next();
    }
  }
}

}  // namespace flashdelta::cuda::forward
