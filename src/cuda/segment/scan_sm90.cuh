// The scan over segment boundaries: S at the next boundary = transition * S + local state, for 16 value columns, by 256 threads.
//
// Products are of pairs of bf16 numbers (x = high + low; high high + high low + low high): 2^-16 of error, against 2^-9 of the transitions
// themselves. Sums run over the state's rows in any order, so rows r and r + 8 of every sixteen share a register: what a product leaves
// in a thread is then, packed, what the next product wants, and a transition's registers pack without a shuffle.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/segment/items.cuh"

namespace flashdelta::cuda::segment {

using device::Operand;
using std::uint32_t;

constexpr int kPairs = kHead / 2;  // of a row
// Of a column of S, with padding that spreads the lanes' 16-byte loads over all banks.
constexpr int kScanColumn = kPairs + 16;
struct ScanShared {
  uint32_t high[2][kScanColumns][kScanColumn], low[2][kScanColumns][kScanColumn];  // in turn
};

__device__ __forceinline__ void wait_for_count(const std::int32_t* count, int wanted) {
  int now = 0;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
    if (now >= wanted) return;
    __nanosleep(40);
  }
}
// Behind a barrier of the threads whose writes it announces (a release counts what the barrier ordered before it); by one of them.
__device__ __forceinline__ void add_to_count(std::int32_t* count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}

struct Split {
  uint32_t high, low;
};
__device__ __forceinline__ Split split(float x, float y) {
  const uint32_t high = device::pack<Operand::bf16>(x, y);
  const float2 held = device::unpack<Operand::bf16>(high);
  return {high, device::pack<Operand::bf16>(x - held.x, y - held.y)};
}

// Warps 0..7, all together; `barrier` is theirs. `done` counts steps that all of them have written.
__device__ __forceinline__ void scan_boundaries(const Plan& plan, ScanShared& s, const Item& item, int barrier, int& done, int warp,
                                                int lane) {
  const int g = lane / 4, t = lane % 4, steps = item.scan_steps, from = item.from_boundary;
  float* states =
      plan.states + static_cast<std::int64_t>(from) * kHead * kHead + (16 * warp + g) * kHead + item.first * kScanColumns + 2 * t;
  const uint4* transitions =
      reinterpret_cast<const uint4*>(plan.transitions + static_cast<std::int64_t>(from) * kHead * kHead + (16 * warp + g) * kPairs + 4 * t);
  // Boundaries up to `known` have arrived; the first warp looks at 32 at once.
  int known = -1;
  const auto ensure = [&](int step) {
    if (warp != 0) return;
    while (known < step) {
      const int mine = known + 1 + lane;
      int count = kArrivalsParts;
      if (mine <= steps) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(plan.arrived + from + mine) : "memory");
      const unsigned missing = __ballot_sync(~0U, count < (mine == 0 ? kArrivalsWhole : kArrivalsParts));
      known += missing == 0 ? 32 : __ffs(missing) - 1;
    }
  };
  uint4 m[4][2][2];    // of a transition: 16 pairs at a time, rows g and g + 8, high and low
  float2 local[2][2];  // of the local state: 8 columns at a time, rows g and g + 8
  // Registers are loaded for the next step as soon as this step is done with them: there are none to spare for two transitions.
  const auto load_part = [&](int step, int b) {
    const uint4* from_here = transitions + static_cast<std::int64_t>(step) * (kHead * kHead / 4) + 4 * b;
#pragma unroll
    for (int h = 0; h < 2; ++h) m[b][h][0] = from_here[h * 8 * kPairs / 4], m[b][h][1] = from_here[(kHead * kPairs + h * 8 * kPairs) / 4];
  };
  const auto load_local = [&](int step) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        local[n][h] = *reinterpret_cast<const float2*>(states + static_cast<std::int64_t>(step) * kHead * kHead + h * 8 * kHead + 8 * n);
      }
    }
  };
  const auto put = [&](int turn, const float (&sum)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Split x = split(sum[n][e], sum[n][e + 2]);
        s.high[turn][8 * n + 2 * t + e][8 * warp + g] = x.high, s.low[turn][8 * n + 2 * t + e][8 * warp + g] = x.low;
      }
    }
  };
  float sum[2][4];
  const auto take_local = [&] {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      sum[n][0] = local[n][0].x, sum[n][1] = local[n][0].y, sum[n][2] = local[n][1].x, sum[n][3] = local[n][1].y;
    }
  };
  ensure(1);
  device::named_sync(barrier, 256);
  load_local(0);
  take_local();
  put(0, sum);
  load_local(1);
#pragma unroll
  for (int b = 0; b < 4; ++b) load_part(1, b);
  ensure(min(2, steps));
  device::named_sync(barrier, 256);
#pragma unroll 1
  for (int step = 1; step <= steps; ++step) {
    const int turn = (step - 1) & 1;
    take_local();
    if (step < steps) load_local(step + 1);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const uint4 &high0 = m[b][0][0], &low0 = m[b][0][1], &high8 = m[b][1][0], &low8 = m[b][1][1];
      const uint32_t h0[4] = {high0.x, high8.x, high0.y, high8.y}, h1[4] = {high0.z, high8.z, high0.w, high8.w};
      const uint32_t l0[4] = {low0.x, low8.x, low0.y, low8.y}, l1[4] = {low0.z, low8.z, low0.w, low8.w};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 x = *reinterpret_cast<const uint4*>(&s.high[turn][8 * n + g][16 * b + 4 * t]);
        const uint4 y = *reinterpret_cast<const uint4*>(&s.low[turn][8 * n + g][16 * b + 4 * t]);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], l0, x.x, x.y);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], h0, y.x, y.y);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], h0, x.x, x.y);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], l1, x.z, x.w);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], h1, y.z, y.w);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], h1, x.z, x.w);
      }
      if (step < steps) load_part(step + 1, b);
    }
    put(turn ^ 1, sum);
    float* to = states + static_cast<std::int64_t>(step) * kHead * kHead;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) = make_float2(sum[n][0], sum[n][1]);
      *reinterpret_cast<float2*>(to + 8 * n + 8 * kHead) = make_float2(sum[n][2], sum[n][3]);
    }
    ensure(min(step + 2, steps));
    device::named_sync(barrier, 256);
    device::count_up_if(done, warp == 0 && lane == 0);
  }
}

}  // namespace flashdelta::cuda::segment
