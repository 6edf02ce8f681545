// The scan over segment boundaries: S at the next boundary = transition * S + local state, for 16 value columns, by 256 threads. Products
// are of bf16 pairs (x = high + low; high high + high low + low high): 2^-16 of error against 2^-9 of the transitions themselves.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/segment/items.cuh"

namespace flashdelta::cuda::segment {

using device::Operand;
using std::uint32_t;

// A row of 128 with padding that spreads the lanes' 8-byte loads over all banks.
constexpr int kScanRow = kHead + 16;
struct ScanShared {
  __nv_bfloat16 high[2][kScanColumns][kScanRow], low[2][kScanColumns][kScanRow];  // S^T, in turn
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

// Row `row` of 16 columns' block, elements (v, v + 1), into the transposed tile.
__device__ __forceinline__ void put_transposed(ScanShared& s, int turn, int v, int row, float x, float y) {
  const Split parts = split(x, y);
  const auto high = *reinterpret_cast<const __nv_bfloat162*>(&parts.high), low = *reinterpret_cast<const __nv_bfloat162*>(&parts.low);
  s.high[turn][v][row] = high.x, s.high[turn][v + 1][row] = high.y;
  s.low[turn][v][row] = low.x, s.low[turn][v + 1][row] = low.y;
}

// Threads 0..255, all together; `barrier` is theirs.
__device__ __forceinline__ void scan_boundaries(const Plan& plan, ScanShared& s, const Item& item, int barrier, int tid) {
  const int lane = tid % 32, g = lane / 4, t = lane % 4, row = tid / 32 * 16 + g, column = item.first * kScanColumns;
  const auto state_at = [&](int step) {
    return plan.states + static_cast<std::int64_t>(item.from_boundary + step) * kHead * kHead + row * kHead + column + 2 * t;
  };
  const auto ready = [&](int step) {
    if (tid == 0) wait_for_count(&plan.arrived[item.from_boundary + step], step == 0 ? kArrivalsWhole : kArrivalsParts);
  };
  float4 next[8][2];  // rows `row` and `row + 8` of the transition: four neighbouring columns of every sixteen
  const auto load_transition = [&](int step) {
    const float* from = plan.transitions + static_cast<std::int64_t>(item.from_boundary + step) * kHead * kHead + row * kHead + 4 * t;
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      next[b][0] = __ldcg(reinterpret_cast<const float4*>(from + 16 * b));
      next[b][1] = __ldcg(reinterpret_cast<const float4*>(from + 16 * b + 8 * kHead));
    }
  };
  ready(0), ready(1);
  device::named_sync(barrier, 256);
  load_transition(1);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 x = __ldcg(reinterpret_cast<const float2*>(state_at(0) + h * 8 * kHead + 8 * n));
      put_transposed(s, 0, 8 * n + 2 * t, row + 8 * h, x.x, x.y);
    }
  }
#pragma unroll 1
  for (int step = 1; step <= item.scan_steps; ++step) {
    if (step < item.scan_steps) ready(step + 1);
    device::named_sync(barrier, 256);
    const int turn = (step - 1) & 1;
    float4 now[8][2];
#pragma unroll
    for (int b = 0; b < 8; ++b) now[b][0] = next[b][0], now[b][1] = next[b][1];
    if (step < item.scan_steps) load_transition(step + 1);
    float sum[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 x = __ldcg(reinterpret_cast<const float2*>(state_at(step) + 8 * n));
      const float2 y = __ldcg(reinterpret_cast<const float2*>(state_at(step) + 8 * n + 8 * kHead));
      sum[n][0] = x.x, sum[n][1] = x.y, sum[n][2] = y.x, sum[n][3] = y.y;
    }
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      const Split p0 = split(now[b][0].x, now[b][0].y), p1 = split(now[b][1].x, now[b][1].y);
      const Split p2 = split(now[b][0].z, now[b][0].w), p3 = split(now[b][1].z, now[b][1].w);
      const uint32_t high[4] = {p0.high, p1.high, p2.high, p3.high}, low[4] = {p0.low, p1.low, p2.low, p3.low};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint2 x = *reinterpret_cast<const uint2*>(&s.high[turn][8 * n + g][16 * b + 4 * t]);
        const uint2 y = *reinterpret_cast<const uint2*>(&s.low[turn][8 * n + g][16 * b + 4 * t]);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], low, x.x, x.y);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], high, y.x, y.y);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], high, x.x, x.y);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      put_transposed(s, turn ^ 1, 8 * n + 2 * t, row, sum[n][0], sum[n][1]);
      put_transposed(s, turn ^ 1, 8 * n + 2 * t, row + 8, sum[n][2], sum[n][3]);
      *reinterpret_cast<float2*>(state_at(step) + 8 * n) = make_float2(sum[n][0], sum[n][1]);
      *reinterpret_cast<float2*>(state_at(step) + 8 * n + 8 * kHead) = make_float2(sum[n][2], sum[n][3]);
    }
    device::named_sync(barrier, 256);
    if (tid == 0) add_to_count(&plan.scanned[item.from_boundary + step]);
  }
}

}  // namespace flashdelta::cuda::segment
