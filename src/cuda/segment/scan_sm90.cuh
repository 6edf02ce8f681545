// The scan over segment boundaries: S at the next boundary = transition * S + local state, for 16 value columns, by both consumers.
//
// Products are of pairs of bf16 numbers (x = high + low; high high + high low + low high): 2^-16 of error, against 2^-9 of the transitions
// themselves. Sums run over the state's rows in any order, so rows r and r + 8 of every sixteen share a register: what a product leaves
// in a thread is then, packed, what the next product wants, and a transition's registers pack without a shuffle.
//
// A step needs 64 KB of transition, which threads would wait for 2 us. So it comes through the chunk loop's stages, half a transition a
// stage: rows 0..63 for the first consumer, 64..127 for the second; and from there into registers a step ahead.
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
// Of `count` counts one behind the other, how many of the first have what is wanted, once the first of them has.
__device__ __forceinline__ int wait_for_counts(const std::int32_t* counts, int count, int wanted) {
  constexpr int kAtOnce = 4;
  for (;;) {
    std::int32_t now[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      now[i] = 0;
      if (i < count) asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(now[i]) : "l"(counts + i) : "memory");
    }
    int there = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (there == i && now[i] >= wanted) ++there;
    }
    if (there > 0) {
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
      return there;
    }
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

// In global memory a transition is 128 rows of high parts, then of low parts, 256 bytes a row, whose 16-byte units are swapped by fours in
// odd rows, so that eight lanes read from all banks.
constexpr int kHalfRows = kHead / 2, kHalfBytes = kHalfRows * kPairs * 4, kBlockBytes = kHead * kScanColumns * 4;
__host__ __device__ constexpr int transition_offset(int row, int pair) { return row * kPairs + (pair ^ ((row & 1) << 4)); }

// A boundary's state is in blocks of 16 columns. Eight rows of a block are 512 bytes in an order in which a warp that holds the state, and
// one that scans it, read and write from all banks: bits 1 and 2 of the row beside the three low ones of the column. Sums of offsets are
// offsets where the bits of rows and columns are not the same.
__host__ __device__ constexpr int boundary_offset(int row, int column) {
  return (row >> 3) * 8 * kScanColumns | (row & 1) << 6 | (column >> 3 & 1) << 5 | (row >> 1 & 3) << 3 | (column & 7);
}

// A half's local state lies in two runs of 32 rows: the stage's holes, which stay zero, are between.
constexpr int kRunBytes = kHalfRows / 2 * kScanColumns * 4, kRunStep = 2560;

// `ring`: the stages, in turn. `done` counts steps that all have written. `half`: which consumer.
template <class Ring>
__device__ __forceinline__ void scan_boundaries(const Plan& plan, ScanShared& s, const Item& item, Ring& ring, int barrier, int& done,
                                                int half, int warp, int lane) {
  const int g = lane / 4, t = lane % 4, row = 16 * warp + g, pairs = 8 * (4 * half + warp) + g;  // row: within the half
  const int place = boundary_offset(row, 2 * t);
  float* states = plan.states + static_cast<std::int64_t>(item.from_boundary) * kHead * kHead + item.first * (kBlockBytes / 4) +
                  kHalfRows * half * kScanColumns + place;
  const auto put = [&](int turn, const float (&sum)[2][4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Split x = split(sum[n][e], sum[n][e + 2]);
        s.high[turn][8 * n + 2 * t + e][pairs] = x.high, s.low[turn][8 * n + 2 * t + e][pairs] = x.low;
      }
    }
  };
  // Of the step that comes next, in registers since the step before: so its stages are free while that one ends.
  uint4 high[4][2], low[4][2];
  float sum[2][4];
  const auto load = [&] {
    if (half == 1) ring.let_pass();
    ring.wait();
    const unsigned char* local = ring.local() + (row >= 32 ? kRunStep - kRunBytes : 0) + place * 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 x = *reinterpret_cast<const float2*>(local + boundary_offset(0, 8 * n) * 4),
                   y = *reinterpret_cast<const float2*>(local + boundary_offset(8, 8 * n) * 4);
      sum[n][0] = x.x, sum[n][1] = x.y, sum[n][2] = y.x, sum[n][3] = y.y;
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = transition_offset(row, 16 * b + 4 * t) * 4 + e * 8 * kPairs * 4;
        high[b][e] = *reinterpret_cast<const uint4*>(ring.high() + at), low[b][e] = *reinterpret_cast<const uint4*>(ring.low() + at);
      }
    }
    ring.release();
    if (half == 0) ring.let_pass();
  };
  load();
  {
    float first[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 x = *reinterpret_cast<const float2*>(states + boundary_offset(0, 8 * n)),
                   y = *reinterpret_cast<const float2*>(states + boundary_offset(8, 8 * n));
      first[n][0] = x.x, first[n][1] = x.y, first[n][2] = y.x, first[n][3] = y.y;
    }
    put(0, first);
    device::named_sync(barrier, 256);
  }
#pragma unroll 1
  for (int step = 1; step <= item.scan_steps; ++step) {
    const int turn = (step - 1) & 1;
    // Sums of their own for the three products: a chain of dependent products a third as long.
    float low_high[2][4] = {}, high_low[2][4] = {};
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const uint32_t h0[4] = {high[b][0].x, high[b][1].x, high[b][0].y, high[b][1].y};
      const uint32_t h1[4] = {high[b][0].z, high[b][1].z, high[b][0].w, high[b][1].w};
      const uint32_t l0[4] = {low[b][0].x, low[b][1].x, low[b][0].y, low[b][1].y};
      const uint32_t l1[4] = {low[b][0].z, low[b][1].z, low[b][0].w, low[b][1].w};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 x = *reinterpret_cast<const uint4*>(&s.high[turn][8 * n + g][16 * b + 4 * t]);
        const uint4 y = *reinterpret_cast<const uint4*>(&s.low[turn][8 * n + g][16 * b + 4 * t]);
        device::mma_16x8x16<Operand::bf16, false>(low_high[n], l0, x.x, x.y);
        device::mma_16x8x16<Operand::bf16, false>(high_low[n], h0, y.x, y.y);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], h0, x.x, x.y);
        device::mma_16x8x16<Operand::bf16, false>(low_high[n], l1, x.z, x.w);
        device::mma_16x8x16<Operand::bf16, false>(high_low[n], h1, y.z, y.w);
        device::mma_16x8x16<Operand::bf16, false>(sum[n], h1, x.z, x.w);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] += low_high[n][e] + high_low[n][e];
    }
    put(turn ^ 1, sum);
    float* to = states + static_cast<std::int64_t>(step) * kHead * kHead;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      *reinterpret_cast<float2*>(to + boundary_offset(0, 8 * n)) = make_float2(sum[n][0], sum[n][1]);
      *reinterpret_cast<float2*>(to + boundary_offset(8, 8 * n)) = make_float2(sum[n][2], sum[n][3]);
    }
    if (step < item.scan_steps) load();
    device::named_sync(barrier, 256);
    device::count_up_if(done, half == 0 && warp == 0 && lane == 0);
  }
}

}  // namespace flashdelta::cuda::segment
