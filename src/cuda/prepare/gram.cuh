// K K^T of a chunk, shared out over the warps, and how keys enter it.
//
// An accumulator is an A fragment as it stands. K K^T is symmetric: blocks above its diagonal are the B fragments of those below.
#pragma once

#include "cuda/device/fragment.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// Blocks of 16 x 16, numbered by block rows and columns. Fewer than four warps make the products of some block rows (A) with some block
// columns (B) each: the same instructions for every warp, and only the numbers differ. A block below the diagonal is turned when it is left
// to the others.
struct Product {
  int row, column;  // which of the warp's
  bool may_turn;
};
template <int W>
struct Share;
template <>
struct Share<1> {
  static constexpr int kRows = 4, kColumns = 4, kProducts = 10;
  __host__ __device__ static constexpr Product product(int p) {
    constexpr Product all[] = {{0, 0, false}, {1, 1, false}, {2, 2, false}, {3, 3, false}, {0, 1, false},
                               {0, 2, false}, {0, 3, false}, {1, 2, false}, {1, 3, false}, {2, 3, false}};
    return all[p];
  }
  int row[kRows] = {0, 1, 2, 3}, column[kColumns] = {0, 1, 2, 3};
  int warp;
  __device__ __forceinline__ explicit Share(int w) : warp(w) {}
};
template <>
struct Share<2> {
  static constexpr int kRows = 2, kColumns = 4, kProducts = 5;
  __host__ __device__ static constexpr Product product(int p) {
    constexpr Product all[] = {{0, 0, false}, {1, 2, false}, {0, 1, false}, {0, 2, false}, {1, 3, true}};
    return all[p];
  }
  int row[kRows], column[kColumns], warp;
  __device__ __forceinline__ explicit Share(int w) : row{w, w + 2}, column{w, w + 1, w + 2, (w + 3) & 3}, warp(w) {}
};
// The last diagonal block falls to all three, which is cheaper than to one.
template <>
struct Share<3> {
  static constexpr int kRows = 2, kColumns = 3, kProducts = 4;
  __host__ __device__ static constexpr Product product(int p) {
    constexpr Product all[] = {{0, 0, false}, {1, 2, false}, {0, 1, true}, {0, 2, false}};
    return all[p];
  }
  int row[kRows], column[kColumns], warp;
  __device__ __forceinline__ explicit Share(int w) : row{w, 3}, column{w, w == 2 ? 0 : w + 1, 3}, warp(w) {}
};
// Four warps are a warpgroup, whose products are all blocks: warp w has block row w, and leaves what is on and above the diagonal. Its
// diagonal block is selected, and stores are predicated: a branch around each block takes more instructions than what it skips.
template <>
struct Share<4> {
  static constexpr int kProducts = 4;
  int warp;
  __device__ __forceinline__ explicit Share(int w) : warp(w) {}

  // Sums of the diagonal block.
  __device__ __forceinline__ void diagonal(float (&d)[8], const float* sum) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float low = warp & 1 ? sum[8 + e] : sum[e], high = warp & 1 ? sum[24 + e] : sum[16 + e];
      d[e] = warp & 2 ? high : low;
    }
  }
};

// Calls f(sums of columns 0-7, of columns 8-15, block row, block column, whether it may have to be turned) for each block that the warp
// has; of four warps, also those below the diagonal.
template <int W, class F>
__device__ __forceinline__ void for_blocks(const Share<W>& share, float* sum, const F& f) {
#pragma unroll
  for (int p = 0; p < Share<W>::kProducts; ++p) {
    float *x = sum + 8 * p, *y = x + 4;
    if constexpr (W == 4) {
      f(x, y, share.warp, p, false);
    } else {
      const Product t = Share<W>::product(p);
      if (W == 3 && p == 1 && share.warp != 0) continue;
      f(x, y, share.row[t.row], share.column[t.column], t.may_turn);
    }
  }
}
// The same for diagonal blocks alone: f(sums of columns 0-7, of columns 8-15, block).
template <int W, class F>
__device__ __forceinline__ void for_diagonal_blocks(const Share<W>& share, float* sum, const F& f) {
  if constexpr (W == 4) {
    float d[8];
    share.diagonal(d, sum);
    f(d, d + 4, share.warp);
  } else {
    for_blocks(share, sum, [&](const float* x, const float* y, int row, int column, bool) {
      if (row == column) f(x, y, row);
    });
  }
}
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

// A warp's share of K K^T: eight sums of product p from sum[8 p] on, first of columns 0-7. Rows of K are both operands; A and B want the
// four 8 x 8 matrices of a block in different orders, and loading a block twice (addresses a, b) takes fewer instructions than moving
// registers.
template <Operand Type, int W>
__device__ __forceinline__ void gram(float* sum, const Share<W>& share, uint32_t k, int lane) {
  using S = Share<W>;
  const uint32_t address_a = k + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
  const uint32_t address_b = k + ((lane & 7) + ((lane >> 4) << 3)) * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    uint32_t a[S::kRows][4], b[S::kColumns][4];
    const uint32_t unit = (step & 3) << 5, at = (step >> 2) * 8192;
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) device::load_matrices(a[i], ((address_a + share.row[i] * 2048) ^ unit) + at);
#pragma unroll
    for (int i = 0; i < S::kColumns; ++i) device::load_matrices(b[i], ((address_b + share.column[i] * 2048) ^ unit) + at);
#pragma unroll
    for (int p = 0; p < S::kProducts; ++p) {
      const Product t = S::product(p);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (step == 0) {
          device::mma_16x8x16<Type, true>(sum + 8 * p + 4 * v, a[t.row], b[t.column][2 * v], b[t.column][2 * v + 1]);
        } else {
          device::mma_16x8x16<Type, false>(sum + 8 * p + 4 * v, a[t.row], b[t.column][2 * v], b[t.column][2 * v + 1]);
        }
      }
    }
  }
}
// All of it, by a warpgroup: a block row each, in the same order.
template <Operand Type>
__device__ __forceinline__ void gram_of_group(float (&sum)[32], const unsigned char* tile) {
  const uint64_t k = device::describe_rows_128(tile);
  device::wgmma_fence();
  device::wgmma_ss_rows<Type>(sum, k, k);
  device::wgmma_commit();
  device::wgmma_wait<0>();
  device::hold(sum);
}

// How keys enter fp16 products, if not as they are: times 1 / |k| of the l2-norm; or, where long ones would leave fp16's range, times the
// power of two that brings each near length 1, so that T is scaled back exactly.
enum class KeyScale { power_of_two, l2norm };

// e with |k| about 2^e, from |k|^2.
__device__ __forceinline__ int norm_exponent(float norm) {
  int exponent = 0;
  frexpf(fmaxf(norm, kSmallestNorm), &exponent);
  return exponent >> 1;
}
__device__ __forceinline__ float scale_of(KeyScale scale, float norm) {
  return scale == KeyScale::l2norm ? rsqrtf(norm + static_cast<float>(kNormEpsilon)) : ldexpf(1.F, -norm_exponent(norm));
}

// Scales a warp's share by the keys' factors.
template <int W, class S>
__device__ __forceinline__ void scale_products(S& s, float* sum, const Share<W>& share, int lane) {
  const int r = lane >> 2, q = lane & 3;
  for_blocks(share, sum, [&](float* x, float* y, int row, int column, bool) {
    const float row0 = s.key_scale[16 * row + r], row1 = s.key_scale[16 * row + 8 + r];
    const float2 by0 = *reinterpret_cast<const float2*>(&s.key_scale[16 * column + 2 * q]);
    const float2 by1 = *reinterpret_cast<const float2*>(&s.key_scale[16 * column + 8 + 2 * q]);
    x[0] *= row0 * by0.x, x[1] *= row0 * by0.y, x[2] *= row1 * by0.x, x[3] *= row1 * by0.y;
    y[0] *= row0 * by1.x, y[1] *= row0 * by1.y, y[2] *= row1 * by1.x, y[3] *= row1 * by1.y;
  });
}

// Leaves a warp's share to all: diagonal blocks as they are, the others as B fragments of the blocks below the diagonal: a matrix for each
// row half (n tile) and column half (k half) of the block above it.
template <int W, bool Split, class S>
__device__ __forceinline__ void exchange(S& s, float* sum, const Share<W>& share, int lane) {
  using device::pack_f16;
  using device::pack_rest_f16;
  auto& to = s.derived;
  for_diagonal_blocks(share, sum, [&](const float* x, const float* y, int block) {
    const float2 parts[3] = {make_float2(x[0], x[1]), make_float2(y[0], y[1]), make_float2(y[2], y[3])};
#pragma unroll
    for (int e = 0; e < 3; ++e) to.diagonal[block][e][lane] = parts[e];
  });
  for_blocks(share, sum, [&](const float* x, const float* y, int row, int column, bool may_turn) {
    if (W == 4 ? column == 0 : row == column) return;
    const bool turn = may_turn && row > column;
    const int pair = turn ? pair_of(column, row) : pair_of(row, column);
    const uint32_t x0 = pack_f16(x[0], x[1]), x1 = pack_f16(x[2], x[3]), y0 = pack_f16(y[0], y[1]), y1 = pack_f16(y[2], y[3]);
    if constexpr (W == 4) {
      const uint32_t at = device::shared_address(to.above) + pair * 512 + lane * 16;
      device::store_matrices_if(at, x0, y0, x1, y1, column > row);
      if constexpr (Split) {
        device::store_matrices_if(at + 6 * 512, pack_rest_f16(x[0], x[1], x0), pack_rest_f16(y[0], y[1], y0), pack_rest_f16(x[2], x[3], x1),
                                  pack_rest_f16(y[2], y[3], y1), column > row);
      }
    } else {
      const auto leave = [&](uint32_t (&block)[2][2][32], uint32_t a0, uint32_t b0, uint32_t a1, uint32_t b1) {
        const uint32_t at = device::shared_address(block) + lane * 16;
        if (turn) {
          const uint32_t turned[4] = {a0, a1, b0, b1};
          device::store_matrices_transposed(at, turned);
        } else {
          device::store_matrices(at, a0, b0, a1, b1);
        }
      };
      leave(to.above[pair], x0, y0, x1, y1);
      if constexpr (Split) {
        leave(to.above[6 + pair], pack_rest_f16(x[0], x[1], x0), pack_rest_f16(y[0], y[1], y0), pack_rest_f16(x[2], x[3], x1),
              pack_rest_f16(y[2], y[3], y1));
      }
    }
  });
}

// K K^T, shared out over the warps and exchanged through shared memory, and |k|^2. `between` runs when every warp is done with K and with
// the item before. Barriers stand in code that all warps run. Returns whether keys are scaled by powers of two.
template <Operand Type, int W, bool Split, class S, class Between>
__device__ __forceinline__ bool key_products(S& s, bool l2norm, int warp, int lane, const Between& between) {
  // Kept over the loop of items, what follows from them would not leave the inverse enough registers.
  device::keep(warp), device::keep(lane);
  const Share<W> share(warp);
  const int r = lane >> 2, q = lane & 3;
  float sum[8 * Share<W>::kProducts];
  if constexpr (W == 4) {
    gram_of_group<Type>(sum, s.k);
  } else {
    gram<Type, W>(sum, share, device::shared_address(s.k), lane);
  }
  block_sync<W>();
  between();
  bool any_long = false;  // NaN is not: it takes the plain way and stays what it is
  for_diagonal_blocks(share, sum, [&](const float* x, const float* y, int block) {
    const float norm[2] = {r & 1 ? x[1] : x[0], r & 1 ? y[3] : y[2]};
    if (q != r >> 1) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = 16 * block + r + 8 * h;
      s.norm[token] = norm[h];
      if (l2norm) s.key_scale[token] = scale_of(KeyScale::l2norm, norm[h]);
      any_long = any_long || norm[h] > kLargestPlainNorm;
    }
  });
  // Most keys go as they are; should they not, what is left here is left again.
  if (!l2norm) exchange<W, Split>(s, sum, share, lane);
  any_long = block_any<W>(any_long);
  if (!l2norm && !any_long) return false;
  if (!l2norm) {
    for (int i = warp * 32 + lane; i < kChunk; i += 32 * W) s.key_scale[i] = scale_of(KeyScale::power_of_two, s.norm[i]);
    block_sync<W>();
  }
  scale_products<W>(s, sum, share, lane);
  exchange<W, Split>(s, sum, share, lane);
  block_sync<W>();
  return !l2norm;
}

}  // namespace flashdelta::cuda::prepare
