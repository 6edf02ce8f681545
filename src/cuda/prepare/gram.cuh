// K K^T of a chunk, shared out over the warps, and how keys enter it.
//
// An accumulator is an A fragment as it stands. K K^T is symmetric: blocks above its diagonal are the B fragments of those below.
#pragma once

#include "cuda/device/fragment.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// K K^T needs 20 tiles of 16 x 8: (block row j, block column m >= j, half v). Warp w of W makes its share of them.
struct Tile {
  int j, m, v;
};
__host__ __device__ constexpr Tile tile(int u) {
  const int j = u < 8 ? 0 : u < 14 ? 1 : u < 18 ? 2 : 3, first = j == 0 ? 0 : j == 1 ? 8 : j == 2 ? 14 : 18;
  return {j, j + (u - first) / 2, u & 1};
}
__host__ __device__ constexpr int pair_of(int j, int m) { return j == 0 ? m - 1 : j == 1 ? m + 1 : 5; }  // j < m
__host__ __device__ constexpr bool needs_row(int low, int high, int j) {
  for (int u = low; u < high; ++u) {
    if (tile(u).j == j) return true;
  }
  return false;
}
__host__ __device__ constexpr bool needs_column(int low, int high, int m) {
  for (int u = low; u < high; ++u) {
    if (tile(u).m == m) return true;
  }
  return false;
}

// Tiles Low..High-1 of K K^T. Rows of K are both operands; A and B want the four 8 x 8 matrices of a block in different orders, and
// loading a block twice (addresses a, b) takes fewer instructions than moving registers.
template <Operand Type, int Low, int High>
__device__ __forceinline__ void gram(float (*sum)[4], uint32_t address_a, uint32_t address_b) {
  constexpr bool row[4] = {needs_row(Low, High, 0), needs_row(Low, High, 1), needs_row(Low, High, 2), needs_row(Low, High, 3)};
  constexpr bool column[4] = {needs_column(Low, High, 0), needs_column(Low, High, 1), needs_column(Low, High, 2),
                              needs_column(Low, High, 3)};
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    uint32_t a[4][4], b[4][4];
    const uint32_t unit = (step & 3) << 5, half = (step >> 2) * 8192;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row[i]) device::load_matrices(a[i], (address_a ^ unit) + half + i * 2048);
      if (column[i]) device::load_matrices(b[i], (address_b ^ unit) + half + i * 2048);
    }
#pragma unroll
    for (int u = Low; u < High; ++u) {
      const Tile t = tile(u);
      if (step == 0) {
        device::mma_16x8x16<Type, true>(sum[u - Low], a[t.j], b[t.m][2 * t.v], b[t.m][2 * t.v + 1]);
      } else {
        device::mma_16x8x16<Type, false>(sum[u - Low], a[t.j], b[t.m][2 * t.v], b[t.m][2 * t.v + 1]);
      }
    }
  }
}

// How keys enter fp16 products: as they are; times 1 / |k| of the l2-norm; or, where long ones would leave fp16's range, times the power
// of two that brings each near length 1, so that T is scaled back exactly.
enum class KeyScale { none, power_of_two, l2norm };

__device__ __forceinline__ KeyScale key_scale(const float* norm, bool l2norm, int lane) {
  if (l2norm) return KeyScale::l2norm;
  // Not all: so NaN takes the plain way and stays what it is.
  return __any_sync(~0U, norm[lane] > kLargestPlainNorm || norm[lane + 32] > kLargestPlainNorm) ? KeyScale::power_of_two : KeyScale::none;
}
// e with |k| about 2^e, from |k|^2.
__device__ __forceinline__ int norm_exponent(float norm) {
  int exponent = 0;
  frexpf(fmaxf(norm, kSmallestNorm), &exponent);
  return exponent >> 1;
}
__device__ __forceinline__ float scale_of(KeyScale scale, float norm) {
  return scale == KeyScale::l2norm ? rsqrtf(norm + kNormEpsilon) : ldexpf(1.F, -norm_exponent(norm));
}

// Warp I of W: its tiles of K K^T, exchanged through shared memory. `between` runs when every warp is done with K and with the item
// before. may_want_rest: some head of this thread may need split operands. Register numbers depend on the warp, hence a copy for each.
template <Operand Type, int W, int I, class S, class WantsRest, class Between>
__device__ __forceinline__ KeyScale gram_of_warp(S& s, uint32_t address_a, uint32_t address_b, bool l2norm, const WantsRest& may_want_rest,
                                                 int lane, const Between& between) {
  constexpr int Low = 20 * I / W, High = 20 * (I + 1) / W;
  const int r = lane >> 2, q = lane & 3;
  float sum[High - Low][4];
  gram<Type, Low, High>(sum, address_a, address_b);
  // Counted barriers: each warp comes to them on a way of its own.
  bool wants_rest = may_want_rest();
  device::named_sync(kGramBarrier, 32 * W);
  between();
#pragma unroll
  for (int u = Low; u < High; ++u) {
    const Tile t = tile(u);
    if (t.j != t.m) continue;
    const float* x = sum[u - Low] + 2 * t.v;
    if (r == 2 * q) s.norm[16 * t.j + 8 * t.v + r] = x[0];
    if (r == 2 * q + 1) s.norm[16 * t.j + 8 * t.v + r] = x[1];
  }
  device::named_sync(kGramBarrier, 32 * W);
  const KeyScale scale = key_scale(s.norm, l2norm, lane);
  if (scale != KeyScale::none) {
    for (int i = I * 32 + lane; i < kChunk; i += 32 * W) s.key_scale[i] = scale_of(scale, s.norm[i]);
    device::named_sync(kGramBarrier, 32 * W);
#pragma unroll
    for (int u = Low; u < High; ++u) {
      const Tile t = tile(u);
      float* x = sum[u - Low];
      const float row0 = s.key_scale[16 * t.j + r], row1 = s.key_scale[16 * t.j + 8 + r];
      const float2 column = *reinterpret_cast<const float2*>(&s.key_scale[16 * t.m + 8 * t.v + 2 * q]);
      x[0] *= row0 * column.x, x[1] *= row0 * column.y, x[2] *= row1 * column.x, x[3] *= row1 * column.y;
    }
  }
#pragma unroll
  for (int u = Low; u < High; ++u) {
    const Tile t = tile(u);
    const float* x = sum[u - Low];
    if (t.j == t.m) {
      s.diagonal[t.j][t.v][lane] = make_float2(x[0], x[1]);
      if (t.v == 1) s.diagonal[t.j][2][lane] = make_float2(x[2], x[3]);
    } else {
      // The halves of a B fragment of block (m, j): row half h of (j, m) is its n tile h, column half v its k half.
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t packed = device::pack_f16(x[2 * h], x[2 * h + 1]);
        s.above[pair_of(t.j, t.m)][h][t.v][lane] = packed;
        if (wants_rest) s.above_rest[pair_of(t.j, t.m)][h][t.v][lane] = device::pack_rest_f16(x[2 * h], x[2 * h + 1], packed);
      }
    }
  }
  device::named_sync(kGramBarrier, 32 * W);
  return scale;
}

// K K^T, shared out over the warps.
template <Operand Type, int W, int I = 0, class S, class WantsRest, class Between>
__device__ __forceinline__ KeyScale key_products(S& s, uint32_t address_a, uint32_t address_b, bool l2norm, const WantsRest& wants_rest,
                                                 int warp, int lane, const Between& between) {
  if constexpr (I + 1 < W) {
    if (warp != I) return key_products<Type, W, I + 1>(s, address_a, address_b, l2norm, wants_rest, warp, lane, between);
  }
  return gram_of_warp<Type, W, I>(s, address_a, address_b, l2norm, wants_rest, lane, between);
}

}  // namespace flashdelta::cuda::prepare
