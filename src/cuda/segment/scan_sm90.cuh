// The scan over segment boundaries: S at the next boundary = transition * S + local state, for 16 value columns, by both consumers: rows
// 0..63 are the first one's, 64..127 the second's.
//
// Products are of pairs of bf16 numbers (x = high + low, all four products of parts): 2^-16 of error, against 2^-9 of the transitions
// themselves. Sums run over the state's rows in any order, so rows r and r + 8 of every sixteen share a register: what a product leaves
// in a thread is then, packed, what the next product wants, and a transition's registers pack without a shuffle.
//
// A step needs 64 KB of transition, which threads would wait for 2 us. So it comes through the chunk loop's stages: its low parts in one,
// its high parts and the local state in the next; each from there into registers while the products of the other run.
#pragma once

#include "cuda/device/copy.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/segment/items.cuh"

namespace flashdelta::cuda::segment {

using device::Operand;
using std::uint32_t;

// The state that a step multiplies, transposed: 16 columns' high parts, then their low parts; two tiles of 64 rows of the state, 128-byte
// swizzled.
constexpr int kScanTile = 2 * kScanColumns * 128;
struct ScanShared {
  alignas(1024) unsigned char state[2][2][kScanTile];  // in turn
};

// Orders what this thread has seen, or written, before what others see of its later writes.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
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
      fence_device();
      return there;
    }
    __nanosleep(40);
  }
}
__device__ __forceinline__ void add_behind_fence(std::int32_t* count) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
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

// In global memory a transition is 128 rows of high parts, then of low parts, 16 rows after another, each 16 as products take them from
// registers: for 16 of the state's rows a lane's four registers side by side, each with two entries of a row, of columns r and r + 8.
constexpr int kHalfRows = kHead / 2, kHalfBytes = kHalfRows * kHead * 2, kBlockBytes = kHead * kScanColumns * 4;
// The register of row `row` and columns c and c + 8, where c is the `pair`th such; that of row + 8 is the next one.
__host__ __device__ constexpr int transition_offset(int row, int pair) {
  return ((row / 16 * 8 + pair / 8) * 32 + row % 8 * 4 + pair % 4) * 4 + pair % 8 / 4 * 2 + row % 16 / 8;
}

// A boundary's state is in blocks of 16 columns. Eight rows of a block are 512 bytes in an order in which a warp that holds the state, and
// one that scans it, read and write from all banks: bits 1 and 2 of the row beside the three low ones of the column. Sums of offsets are
// offsets where the bits of rows and columns are not the same.
__host__ __device__ constexpr int boundary_offset(int row, int column) {
  return (row >> 3) * 8 * kScanColumns | (row & 1) << 6 | (column >> 3 & 1) << 5 | (row >> 1 & 3) << 3 | (column & 7);
}

// Half a local state lies in two runs of 32 rows: the stage's holes, which stay zero, are between.
constexpr int kRunBytes = kHalfRows / 2 * kScanColumns * 4, kRunStep = 2560;

// acc (64 x 32) = or += one part of half a transition (64 x 128) * (high | low) parts of the state; issued and committed.
template <bool Fresh>
__device__ __forceinline__ void multiply_state(float (&acc)[16], const uint4 (&part)[8], const unsigned char (&state)[2][kScanTile]) {
  const std::uint64_t tiles = device::describe_rows_128(state[0]);
  device::wgmma_fence();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::uint64_t rows = device::advance(tiles, i / 4 * kScanTile + i % 4 * 32);
    const uint32_t a[4] = {part[i].x, part[i].y, part[i].z, part[i].w};
    if (Fresh && i == 0) {
      device::wgmma_rs_n32<Operand::bf16, true>(acc, a, rows);
    } else {
      device::wgmma_rs_n32<Operand::bf16, false>(acc, a, rows);
    }
  }
  device::wgmma_commit();
}

// `ring`: the stages, in turn: low parts, beside the first ones the state to begin with; then high parts and the local state. `done` counts
// steps that all have written. `half`: which consumer.
template <class Ring>
__device__ __forceinline__ void scan_boundaries(const Plan& plan, ScanShared& s, const Item& item, Ring& ring, int barrier, int& done,
                                                int half, int warp, int lane) {
  // What follows from it would be made, and spilled, before the first item.
  device::keep(lane);
  const int g = lane / 4, t = lane % 4, row = 16 * warp + g, pair = 8 * (4 * half + warp) + g;  // row: within the half
  const int place = boundary_offset(row, 2 * t), steps = item.scan_steps;
  float* states = plan.states + static_cast<std::int64_t>(item.from_boundary) * kHead * kHead + item.first * (kBlockBytes / 4) +
                  kHalfRows * half * kScanColumns + place;
  const auto load_part = [&](uint4(&to)[8]) {
    ring.wait();
    const unsigned char* from = ring.part(half) + warp * 8 * 512 + lane * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = *reinterpret_cast<const uint4*>(from + i * 512);
  };
  float sum[2][4];
  const auto load_sum = [&] {
    const unsigned char* from = ring.state(half) + (row >= 32 ? kRunStep - kRunBytes : 0) + place * 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 x = *reinterpret_cast<const float2*>(from + boundary_offset(0, 8 * n) * 4),
                   y = *reinterpret_cast<const float2*>(from + boundary_offset(8, 8 * n) * 4);
      sum[n][0] = x.x, sum[n][1] = x.y, sum[n][2] = y.x, sum[n][3] = y.y;
    }
  };
  // For the next step's products.
  const auto put = [&](int turn) {
    unsigned char* to = s.state[turn][half] + pair % 4 * 4;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Split x = split(sum[n][e], sum[n][e + 2]);
        unsigned char* at = to + (8 * n + 2 * t + e) * 128 + ((pair / 4 % 8 ^ (2 * t + e)) << 4);
        *reinterpret_cast<uint32_t*>(at) = x.high, *reinterpret_cast<uint32_t*>(at + kScanColumns * 128) = x.low;
      }
    }
  };
  const auto store = [&](int step) {
    float* to = states + static_cast<std::int64_t>(step) * kHead * kHead;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      *reinterpret_cast<float2*>(to + boundary_offset(0, 8 * n)) = make_float2(sum[n][0], sum[n][1]);
      *reinterpret_cast<float2*>(to + boundary_offset(8, 8 * n)) = make_float2(sum[n][2], sum[n][3]);
    }
  };
  const auto meet = [&] {
    device::fence_shared_to_async();
    device::named_sync(barrier, 256);
  };
  // Each part comes into registers while the products of the other run.
  uint4 high[8], low[8];
  load_part(low);
  load_sum();
  ring.release();
  put(0);
  meet();
#pragma unroll 1
  for (int step = 1; step <= steps; ++step) {
    float acc[16];
    const auto& state = s.state[(step - 1) & 1];
    multiply_state<true>(acc, low, state);
    load_part(high);
    load_sum();
    ring.release();
    multiply_state<false>(acc, high, state);
    device::wgmma_wait<1>();
    if (step < steps) load_part(low), ring.release();
    device::wgmma_wait<0>();
    device::hold(acc);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] += acc[4 * n + e] + acc[8 + 4 * n + e];
    }
    put(step & 1);
    store(step);
    meet();
    device::count_up_if(done, half == 0 && warp == 0 && lane == 0);
  }
}

}  // namespace flashdelta::cuda::segment
