// One value head's T by four warps, a block row each. The bits are those of one warp's (inverse.cuh).
#pragma once

#include "cuda/prepare/inverse.cuh"

namespace flashdelta::cuda::prepare {

// Block row i, for the warp that has made its diagonal block `T[0]`; `columns` has what the other warps left. From the diagonal to the
// left: T_IJ = (sum over M of T_IM (-L_MJ)) T_JJ.
template <Operand Type, class S>
__device__ __forceinline__ void invert_row(const S& s, const Factors& f, uint32_t (&T)[4][4], uint32_t out, int i, int lane) {
  using device::mma_16x8x16;
  using device::mma_16x8x8;
  using device::multiply_f16;
  using device::pack_f16;
  const int q = lane & 3;
  const uint32_t above = device::shared_address(s.above) + lane * 16;
#pragma unroll
  for (int distance = 1; distance < 4; ++distance) {
    const int j = i - distance;
    if (j < 0) break;
    float z[8], t[8];
#pragma unroll
    for (int e = 0; e < distance; ++e) {
      const int m = i - e, pair = j + m - (j == 0 ? 1 : 0);
      uint32_t L[4];  // without its column factor, which T_JJ has
      device::load_matrices(L, above + pair * 512);
      const float between = distance - e < 2 ? 1.F : device::exp2_fast(f.gate[16 * m - 1].x - f.gate[16 * j + 15].x);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        uint32_t factor = *reinterpret_cast<const uint32_t*>(&f.row[16 * m + 8 * v + 2 * q]);
        if (distance - e >= 2) factor = multiply_f16(factor, pack_f16(between, between));
        L[v] = multiply_f16(L[v], factor), L[2 + v] = multiply_f16(L[2 + v], factor);
      }
      if (e == 0) {
        mma_16x8x16<Operand::f16, true>(z, T[0], L[0], L[1]), mma_16x8x16<Operand::f16, true>(z + 4, T[0], L[2], L[3]);
      } else {
        mma_16x8x16<Operand::f16, false>(z, T[e], L[0], L[1]), mma_16x8x16<Operand::f16, false>(z + 4, T[e], L[2], L[3]);
      }
    }
    const uint32_t a[4] = {pack_f16(z[0], z[1]), pack_f16(z[2], z[3]), pack_f16(z[4], z[5]), pack_f16(z[6], z[7])};
    mma_16x8x16<Operand::f16, true>(t, a, s.columns[j][0][lane], s.columns[j][1][lane]);
    mma_16x8x8<true>(t + 4, a[2], a[3], s.columns[j][2][lane]);
    put_block<Type>(out, i, j, t);
    if (distance == 3) break;
#pragma unroll
    for (int e = 0; e < 4; ++e) T[distance][e] = pack_f16(t[2 * e], t[2 * e + 1]);
  }
}

// This warp's part of the head's diagonal, left for the others: column factors, and its sums of squares.
template <Operand Type, class S>
__device__ __forceinline__ void invert_own_diagonal(S& s, const Factors& f, uint32_t (&T)[4], uint32_t out, int i, int lane) {
  const int r = lane >> 2, q = lane & 3;
  float2 d[3];
#pragma unroll
  for (int e = 0; e < 3; ++e) d[e] = s.diagonal[i][e][lane];
  Diagonal block;
  Squares squares;
  invert_diagonal<Type, false>(block, squares, d, f, Masks(r, q), out, i, false, lane);
#pragma unroll
  for (int e = 0; e < 4; ++e) T[e] = block.a[e];
  if (i < 3) {
#pragma unroll
    for (int e = 0; e < 3; ++e) s.columns[i][e][lane] = block.b[e];
  }
  const float2 mine = squares.of_lane(r, q);
  const float sum = device::sum_halves(mine.x, mine.y, lane);
  if (lane == 0) s.squares[i].x = sum;
  if (lane == 16) s.squares[i].y = sum;
}

}  // namespace flashdelta::cuda::prepare
