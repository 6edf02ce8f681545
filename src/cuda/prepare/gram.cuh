// K K^T of a chunk, shared out over the warps, and how keys enter it.
//
// An accumulator is an A fragment as it stands. K K^T is symmetric: blocks above its diagonal are the B fragments of those below.
#pragma once

#include "cuda/device/fragment.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// Blocks of 16 x 16, numbered by block rows and columns. Each warp makes the products of some block rows (A) with some block columns (B):
// the same instructions for every warp, and only the numbers differ. A block below the diagonal is turned when it is left to the others.
struct Product {
  int row, column;  // which of the warp's
  bool diagonal, may_turn;
};
template <int W>
struct Share;
template <>
struct Share<1> {
  static constexpr int kRows = 4, kColumns = 4, kProducts = 10;
  static constexpr bool kHalf = false;
  __host__ __device__ static constexpr Product product(int p) {
    constexpr Product all[] = {{0, 0, true, false},  {1, 1, true, false},  {2, 2, true, false},  {3, 3, true, false},
                               {0, 1, false, false}, {0, 2, false, false}, {0, 3, false, false}, {1, 2, false, false},
                               {1, 3, false, false}, {2, 3, false, false}};
    return all[p];
  }
  int row[kRows] = {0, 1, 2, 3}, column[kColumns] = {0, 1, 2, 3};
  __device__ __forceinline__ explicit Share(int) {}
};
template <>
struct Share<2> {
  static constexpr int kRows = 2, kColumns = 4, kProducts = 5;
  static constexpr bool kHalf = false;
  __host__ __device__ static constexpr Product product(int p) {
    constexpr Product all[] = {{0, 0, true, false}, {1, 2, true, false}, {0, 1, false, false}, {0, 2, false, false}, {1, 3, false, true}};
    return all[p];
  }
  int row[kRows], column[kColumns];
  __device__ __forceinline__ explicit Share(int w) : row{w, w + 2}, column{w, w + 1, w + 2, (w + 3) & 3} {}
};
// The last diagonal block falls to all three, which is cheaper than to one.
template <>
struct Share<3> {
  static constexpr int kRows = 2, kColumns = 3, kProducts = 4;
  static constexpr bool kHalf = false;
  __host__ __device__ static constexpr Product product(int p) {
    constexpr Product all[] = {{0, 0, true, false}, {1, 2, true, false}, {0, 1, false, true}, {0, 2, false, false}};
    return all[p];
  }
  int row[kRows], column[kColumns];
  __device__ __forceinline__ explicit Share(int w) : row{w, 3}, column{w, w == 2 ? 0 : w + 1, 3} {}
};
// Two blocks and half of one, the last row with half of the last column.
template <>
struct Share<4> {
  static constexpr int kRows = 2, kColumns = 3, kProducts = 2;
  static constexpr bool kHalf = true;
  __host__ __device__ static constexpr Product product(int p) {
    constexpr Product all[] = {{0, 0, true, false}, {0, 1, false, true}};
    return all[p];
  }
  int row[kRows], column[kColumns];
  __device__ __forceinline__ explicit Share(int w) : row{w, w & 1}, column{w, (w + 1) & 3, (w & 1) + 2} {}
};
__host__ __device__ constexpr int pair_of(int low, int high) { return low == 0 ? high - 1 : low + high; }

template <int W>
__device__ __forceinline__ void block_sync() {
  if constexpr (W == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
template <int W>
__device__ __forceinline__ bool block_any(bool x) {
  if constexpr (W == 1) {
    __syncwarp();
    return __any_sync(~0U, x);
  } else {
    return __syncthreads_or(x) != 0;
  }
}

// A warp's share of K K^T: sum[2 p + v] is column half v of product p, then comes the half. Rows of K are both operands; A and B want the
// four 8 x 8 matrices of a block in different orders, and loading a block twice (addresses a, b) takes fewer instructions than moving
// registers.
template <Operand Type, int W>
__device__ __forceinline__ void gram(float (*sum)[4], const Share<W>& share, int half, uint32_t address_a, uint32_t address_b) {
  using S = Share<W>;
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    uint32_t a[S::kRows][4], b[S::kColumns][4];
    const uint32_t unit = (step & 3) << 5, at = (step >> 2) * 8192;
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) device::load_matrices(a[i], ((address_a + share.row[i] * 2048) ^ unit) + at);
#pragma unroll
    for (int i = 0; i < S::kColumns; ++i) {
      if (S::kHalf && i == S::kColumns - 1) {
        device::load_two_matrices(b[i], ((address_b + share.column[i] * 2048 + half * 1024) ^ unit) + at);
      } else {
        device::load_matrices(b[i], ((address_b + share.column[i] * 2048) ^ unit) + at);
      }
    }
    const auto add = [&](float* to, const uint32_t* x, const uint32_t* y) {
      if (step == 0) {
        device::mma_16x8x16<Type, true>(to, x, y[0], y[1]);
      } else {
        device::mma_16x8x16<Type, false>(to, x, y[0], y[1]);
      }
    };
#pragma unroll
    for (int p = 0; p < S::kProducts; ++p) {
      const Product t = S::product(p);
      add(sum[2 * p], a[t.row], b[t.column]), add(sum[2 * p + 1], a[t.row], b[t.column] + 2);
    }
    if constexpr (S::kHalf) add(sum[2 * S::kProducts], a[S::kRows - 1], b[S::kColumns - 1]);
  }
}

// How keys enter fp16 products: as they are; times 1 / |k| of the l2-norm; or, where long ones would leave fp16's range, times the power
// of two that brings each near length 1, so that T is scaled back exactly.
enum class KeyScale { none, power_of_two, l2norm };

// e with |k| about 2^e, from |k|^2.
__device__ __forceinline__ int norm_exponent(float norm) {
  int exponent = 0;
  frexpf(fmaxf(norm, kSmallestNorm), &exponent);
  return exponent >> 1;
}
__device__ __forceinline__ float scale_of(KeyScale scale, float norm) {
  return scale == KeyScale::l2norm ? rsqrtf(norm + kNormEpsilon) : ldexpf(1.F, -norm_exponent(norm));
}

// Scales a warp's share by the keys' factors.
template <int W, class S>
__device__ __forceinline__ void scale_products(S& s, float (*sum)[4], const Share<W>& share, int half, int lane) {
  using H = Share<W>;
  const int r = lane >> 2, q = lane & 3;
  const auto scale = [&](float* x, float row0, float row1, int column) {
    const float2 by = *reinterpret_cast<const float2*>(&s.key_scale[column + 2 * q]);
    x[0] *= row0 * by.x, x[1] *= row0 * by.y, x[2] *= row1 * by.x, x[3] *= row1 * by.y;
  };
#pragma unroll
  for (int p = 0; p < H::kProducts; ++p) {
    const int row = 16 * share.row[H::product(p).row], column = 16 * share.column[H::product(p).column];
    const float row0 = s.key_scale[row + r], row1 = s.key_scale[row + 8 + r];
    scale(sum[2 * p], row0, row1, column), scale(sum[2 * p + 1], row0, row1, column + 8);
  }
  if constexpr (H::kHalf) {
    const int row = 16 * share.row[H::kRows - 1];
    scale(sum[2 * H::kProducts], s.key_scale[row + r], s.key_scale[row + 8 + r], 16 * share.column[H::kColumns - 1] + 8 * half);
  }
}

// Leaves a warp's share to all: diagonal blocks as they are, the others as B fragments of the blocks below the diagonal: a matrix for each
// row half (n tile) and column half (k half) of the block above it.
template <int W, bool Split, class S>
__device__ __forceinline__ void exchange(S& s, const float (*sum)[4], const Share<W>& share, int half, int warp, int lane) {
  using H = Share<W>;
  using device::pack_f16;
  using device::pack_rest_f16;
  auto& to = s.derived;
#pragma unroll
  for (int p = 0; p < H::kProducts; ++p) {
    const Product t = H::product(p);
    const int row = share.row[t.row], column = share.column[t.column];
    const float *x = sum[2 * p], *y = sum[2 * p + 1];
    if (t.diagonal) {
      if (W == 3 && p == 1 && warp != 0) continue;
      to.diagonal[row][0][lane] = make_float2(x[0], x[1]), to.diagonal[row][1][lane] = make_float2(y[0], y[1]);
      to.diagonal[row][2][lane] = make_float2(y[2], y[3]);
      continue;
    }
    const bool turn = t.may_turn && row > column;
    const int pair = turn ? pair_of(column, row) : pair_of(row, column);
    const auto leave = [&](uint32_t (&block)[2][2][32], uint32_t x0, uint32_t y0, uint32_t x1, uint32_t y1) {
      const uint32_t at = device::shared_address(block) + lane * 16;
      if (turn) {
        const uint32_t turned[4] = {x0, x1, y0, y1};
        device::store_matrices_transposed(at, turned);
      } else {
        device::store_matrices(at, x0, y0, x1, y1);
      }
    };
    const uint32_t x0 = pack_f16(x[0], x[1]), x1 = pack_f16(x[2], x[3]), y0 = pack_f16(y[0], y[1]), y1 = pack_f16(y[2], y[3]);
    leave(to.above[pair], x0, y0, x1, y1);
    if constexpr (Split) {
      leave(to.above[6 + pair], pack_rest_f16(x[0], x[1], x0), pack_rest_f16(y[0], y[1], y0), pack_rest_f16(x[2], x[3], x1),
            pack_rest_f16(y[2], y[3], y1));
    }
  }
  if constexpr (H::kHalf) {
    const int pair = pair_of(share.row[H::kRows - 1], share.column[H::kColumns - 1]);
    const float* x = sum[2 * H::kProducts];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t packed = pack_f16(x[2 * h], x[2 * h + 1]);
      to.above[pair][h][half][lane] = packed;
      if constexpr (Split) to.above[6 + pair][h][half][lane] = pack_rest_f16(x[2 * h], x[2 * h + 1], packed);
    }
  }
}

// K K^T, shared out over the warps and exchanged through shared memory, and |k|^2. `between` runs when every warp is done with K and with
// the item before. Barriers stand in code that all warps run.
template <Operand Type, int W, bool Split, class S, class Between>
__device__ __forceinline__ KeyScale key_products(S& s, uint32_t address_a, uint32_t address_b, bool l2norm, int warp, int lane,
                                                 const Between& between) {
  using H = Share<W>;
  device::keep(warp);  // kept over the loop of items, what follows from it would not leave the inverse enough registers
  const H share(warp);
  const int r = lane >> 2, q = lane & 3, half = warp >> 1;
  float sum[2 * H::kProducts + (H::kHalf ? 1 : 0)][4];
  gram<Type, W>(sum, share, half, address_a, address_b);
  block_sync<W>();
  between();
  bool any_long = false;  // NaN is not: it takes the plain way and stays what it is
  if (q == r >> 1) {
#pragma unroll
    for (int p = 0; p < H::kProducts; ++p) {
      if (!H::product(p).diagonal || (W == 3 && p == 1 && warp != 0)) continue;
      const float *x = sum[2 * p], *y = sum[2 * p + 1];
      const float norm[2] = {r & 1 ? x[1] : x[0], r & 1 ? y[3] : y[2]};
      const int token = 16 * share.row[H::product(p).row] + r;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s.norm[token + 8 * h] = norm[h];
        if (l2norm) s.key_scale[token + 8 * h] = scale_of(KeyScale::l2norm, norm[h]);
        any_long = any_long || norm[h] > kLargestPlainNorm;
      }
    }
  }
  // Most keys go as they are; should they not, what is left here is left again.
  if (!l2norm) exchange<W, Split>(s, sum, share, half, warp, lane);
  any_long = block_any<W>(any_long);
  if (!l2norm && !any_long) return KeyScale::none;
  if (!l2norm) {
    for (int i = warp * 32 + lane; i < kChunk; i += 32 * W) s.key_scale[i] = scale_of(KeyScale::power_of_two, s.norm[i]);
    block_sync<W>();
  }
  scale_products<W>(s, sum, share, half, lane);
  exchange<W, Split>(s, sum, share, half, warp, lane);
  block_sync<W>();
  return l2norm ? KeyScale::l2norm : KeyScale::power_of_two;
}

}  // namespace flashdelta::cuda::prepare
