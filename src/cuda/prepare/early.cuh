// What a call's beginning owes to others: which items a CTA takes, and what the plan of segments can be made from while keys are on their
// way.
#pragma once

#include "cuda/device/reciprocal.cuh"
#include "cuda/prepare/factors.cuh"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// Where it is told what a chunk forgets; head: among those of its key head.
__device__ __forceinline__ signed char* bound_of(const Arguments& a, const Place& at, int head) {
  return a.bounds + static_cast<std::int64_t>(at.h * a.group + head) * forgotten_row(a.slots) + at.slot;
}

// The first of this CTA's items. CTAs of one multiprocessor take items one behind another, so that where not all CTAs have as many, those
// with fewer are together on some multiprocessors: the loop begins there sooner, and L2 has its instructions when the others come. CTAs
// are dealt out about one to each multiprocessor in turn; where they are not, nothing is lost.
__device__ __forceinline__ int first_item(const Arguments& a) {
  const int block = blockIdx.x, P = a.multiprocessors;
  const float share = device::reciprocal(static_cast<float>(P));
  const auto over = [&](int x) { return static_cast<int>((x + 0.5F) * share); };  // x / P: half is more than what it errs by
  const int each = over(gridDim.x + 1);                                           // CTAs of a multiprocessor, if the grid is full
  if (static_cast<int>(gridDim.x) != each * P - 1) return block;
  const int turn = over(block), rank = (block - turn * P) * each + turn;
  return a.plan != nullptr && rank >= each * (P - 1) ? rank - 1 : rank;
}

// What chunks of this CTA forget where their keys enlarge nothing, from gates alone, two chunks at once. load_keys runs behind the loads of
// the first two's gates, which would queue behind keys.
template <int W, int Warps, class F>
__device__ __forceinline__ void tell_gates(const Arguments& a, const Place* place, int warp, int lane, const F& load_keys) {
  constexpr bool kTeam = is_team(W, Warps);
  int items = 0;
  while (place[items].rows > 0) ++items;
#pragma unroll 1
  for (int pass = 0; pass < a.group; pass += W) {
    const int head = kTeam ? pass : pass + warp;
#pragma unroll 1
    for (int n = kTeam ? 2 * warp : 0; n < items; n += kTeam ? 2 * Warps : 2) {
      uint32_t bits[2][2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const Place& at = place[n + u];
        load_given(bits[u], a.g, at.g, min(head, a.group - 1), lane, at.rows);
      }
      if (pass == 0 && n == 0) load_keys();
      float sums[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const Place& at = place[n + u];
        Gates x{device::from_bits(bits[u][0], a.g.type), device::from_bits(bits[u][1], a.g.type), 0.F, 0.F};
        if (a.gate_in_kernel) x = activate_raw(a, x, at.h * a.group + min(head, a.group - 1));
        sums[u] = (lane < at.rows ? held_up(x.g0) : 0.F) + (lane + 32 < at.rows ? held_up(x.g1) : 0.F);
      }
      const float sum = device::sum_halves(sums[0], sums[1], lane);
      const Place& at = place[n + lane / 16];
      if (lane % 16 == 0 && at.rows > 0 && head < a.group) *bound_of(a, at, head) = forgotten(sum);
    }
  }
  __threadfence();
}

}  // namespace flashdelta::cuda::prepare
