// T of one value head, and whether its chunk is hard.
//
// The inverse needs no forward substitution: widths 2, 4, 8, 16 double by X <- X - X L X on the new block, then 16 x 16 blocks follow by
// T_IJ = -(sum over M of T_IM L_MJ) T_JJ, in the registers of one warp. Seen through unit keys every factor is a product of
// I - beta k k^T, so for beta |k|^2 <= 2 nothing exceeds 2 and fp16 operands (11 bits, against 8 in bf16) have the range.
#pragma once

#include "cuda/device/fragment.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/factors.cuh"
#include "cuda/prepare/gram.cuh"
#include "cuda/prepare/shared.cuh"

namespace flashdelta::cuda::prepare {

// Block (i, j) of T into the record: x is rows 0-7 of columns 0-7 (2 numbers a lane), rows 8-15 of columns 0-7, then both of columns
// 8-15. `at`: address of this lane's row of block (0, 0).
template <Operand Type>
__device__ __forceinline__ void put_block(uint32_t at, int i, int j, const float (&x)[8]) {
  device::store_matrices(at + panel_offset(j) + (i - j) * 512, device::pack<Type>(x[0], x[1]), device::pack<Type>(x[2], x[3]),
                         device::pack<Type>(x[4], x[5]), device::pack<Type>(x[6], x[7]));
}

// Which entries of an 8 x 8 block (row r, columns 2 q and 2 q + 1) belong to the widths 2, 4, 8 of the recursion, t: of its transpose.
// Packed halves share a mask except at width 2.
struct Masks {
  bool on_first, on_second;
  float one0, one1;
  uint32_t one, width2, width2t, width4t, width8t;

  __device__ __forceinline__ explicit Masks(int r, int q) {
    const bool same_half = (r >> 2) == (q >> 1);
    on_first = r == 2 * q, on_second = r == 2 * q + 1;
    one0 = on_first ? 1.F : 0.F, one1 = on_second ? 1.F : 0.F;
    one = on_first ? 0x00003C00U : on_second ? 0x3C000000U : 0U;
    width2 = on_second ? 0x0000FFFFU : 0U, width2t = on_first ? 0xFFFF0000U : 0U;
    width4t = same_half && !(r & 2) && (q & 1) ? ~0U : 0U, width8t = !(r & 4) && (q & 2) ? ~0U : 0U;
  }
};

// A diagonal block of T: as A fragments, and, times the column factor, as B: (k 0-7, n 0-7), (k 8-15, n 0-7), (k 8-15, n 8-15). What fp16
// lost of both where operands are split.
struct Diagonal {
  uint32_t a[4], a_rest[4], b[3], b_rest[3];
};
// Sums of squares of L, x, and of L with all products of keys 1, y: this lane's parts. inner: of 8 x 8 diagonal blocks, which not all lanes
// hold.
struct Squares {
  float2 sum = make_float2(0.F, 0.F), inner = make_float2(0.F, 0.F);
  __device__ __forceinline__ float2 of_lane(int r, int q) const { return 2 * q > r ? make_float2(sum.x + inner.x, sum.y + inner.y) : sum; }
};

// Diagonal block i of T, into the record too; d: that of K K^T. With its column factor unless it is the last.
template <Operand Type, bool Split>
__device__ __forceinline__ void invert_diagonal(Diagonal& to, Squares& squares, const float2 (&d)[3], const Factors& f, const Masks& mask,
                                                uint32_t out, int i, bool last, int lane) {
  using device::mma_16x8x8;
  using device::pack_f16;
  using device::pack_rest_f16;
  using device::transpose_matrix;
  const int r = lane >> 2, q = lane & 3;
  const float2 R0 = f.gate[16 * i + r], R1 = f.gate[16 * i + 8 + r];
  const float4 C0 = *reinterpret_cast<const float4*>(&f.gate[16 * i + 2 * q]),
               C1 = *reinterpret_cast<const float4*>(&f.gate[16 * i + 8 + 2 * q]);
  const float2 d0 = d[0], d1 = d[1], d2 = d[2];
  // -L^T above the diagonal; the one entry of -L that width 2 needs sits where on_second.
  const float w0 = device::exp2_fast(-fabsf(R0.x - C0.x)) * (mask.on_second ? R0.y : C0.y),
              w1 = device::exp2_fast(-fabsf(R0.x - C0.z)) * C0.w;
  const float w2 = device::exp2_fast(-fabsf(R1.x - C1.x)) * (mask.on_second ? R1.y : C1.y),
              w3 = device::exp2_fast(-fabsf(R1.x - C1.z)) * C1.w;
  const float v0 = d0.x * w0, v1 = d0.y * w1, v2 = d2.x * w2, v3 = d2.y * w3;
  const uint32_t p0 = pack_f16(v0, v1), p1 = pack_f16(v2, v3);
  const float w4 = device::exp2_fast(C1.x - R0.x) * C1.y, w5 = device::exp2_fast(C1.z - R0.x) * C1.w;
  const float u0 = d1.x * w4, u1 = d1.y * w5;  // -L21^T
  const uint32_t pt = pack_f16(u0, u1);
  float2 &sum = squares.sum, &inner = squares.inner;
  sum.x = fmaf(u0, u0, fmaf(u1, u1, sum.x)), sum.y = fmaf(w4, w4, fmaf(w5, w5, sum.y));
  inner.x = fmaf(v0, v0, fmaf(v1, v1, fmaf(v2, v2, fmaf(v3, v3, inner.x))));
  inner.y = fmaf(w0, w0, fmaf(w1, w1, fmaf(w2, w2, fmaf(w3, w3, inner.y))));
  float xa[4], xb[4];  // rows 0-7 of xa and rows 8-15 of xb count; the other halves are never read
  xa[0] = mask.on_second ? v0 : mask.one0, xa[1] = mask.one1, xb[2] = mask.on_second ? v2 : mask.one0, xb[3] = mask.one1;
  device::undefined(xa[2]), device::undefined(xa[3]), device::undefined(xb[0]), device::undefined(xb[1]);
  uint32_t ha = (p0 & mask.width2) | mask.one, hb = (p1 & mask.width2) | mask.one;
  uint32_t ta = (p0 & mask.width2t) | mask.one, tb = (p1 & mask.width2t) | mask.one;
  uint32_t p0_rest = 0, p1_rest = 0, pt_rest = 0, ha_rest = 0, hb_rest = 0, ta_rest = 0, tb_rest = 0;
  if constexpr (Split) {
    p0_rest = pack_rest_f16(v0, v1, p0), p1_rest = pack_rest_f16(v2, v3, p1), pt_rest = pack_rest_f16(u0, u1, pt);
    ha_rest = p0_rest & mask.width2, hb_rest = p1_rest & mask.width2, ta_rest = p0_rest & mask.width2t, tb_rest = p1_rest & mask.width2t;
  }
#pragma unroll
  for (int width = 0; width < 2; ++width) {
    const uint32_t upper = width == 1 ? mask.width8t : mask.width4t;
    float wa[4], wb[4];
    mma_16x8x8<true>(wa, ha, hb, p0 & upper), mma_16x8x8<true>(wb, ha, hb, p1 & upper);
    if constexpr (Split) {
      mma_16x8x8<false>(wa, ha_rest, hb_rest, p0 & upper), mma_16x8x8<false>(wb, ha_rest, hb_rest, p1 & upper);
      mma_16x8x8<false>(wa, ha, hb, p0_rest & upper), mma_16x8x8<false>(wb, ha, hb, p1_rest & upper);
    }
    const uint32_t ya = pack_f16(wa[0], wa[1]), yb = pack_f16(wb[2], wb[3]);
    mma_16x8x8<false>(xa, ya, yb, ta), mma_16x8x8<false>(xb, ya, yb, tb);
    if constexpr (Split) mma_16x8x8<false>(xa, ya, yb, ta_rest), mma_16x8x8<false>(xb, ya, yb, tb_rest);
    ha = pack_f16(xa[0], xa[1]), hb = pack_f16(xb[2], xb[3]), ta = transpose_matrix(ha), tb = transpose_matrix(hb);
    if constexpr (Split) {
      ha_rest = pack_rest_f16(xa[0], xa[1], ha), hb_rest = pack_rest_f16(xb[2], xb[3], hb);
      ta_rest = transpose_matrix(ha_rest), tb_rest = transpose_matrix(hb_rest);
    }
  }
  float w[4], t[4];
  mma_16x8x8<true>(w, ha, hb, pt);
  if constexpr (Split) mma_16x8x8<false>(w, ha_rest, hb_rest, pt), mma_16x8x8<false>(w, ha, hb, pt_rest);
  const uint32_t wp = pack_f16(w[2], w[3]);
  mma_16x8x8<true>(t, wp, wp, ta);
  if constexpr (Split) mma_16x8x8<false>(t, wp, wp, ta_rest);
  const uint32_t th = pack_f16(t[0], t[1]), th_rest = Split ? pack_rest_f16(t[0], t[1], th) : 0;
  put_block<Type>(out, i, i, {xa[0], xa[1], t[0], t[1], 0.F, 0.F, xb[2], xb[3]});
  to.a[0] = ha, to.a[1] = th, to.a[2] = 0, to.a[3] = hb;
  if constexpr (Split) to.a_rest[0] = ha_rest, to.a_rest[1] = th_rest, to.a_rest[2] = 0, to.a_rest[3] = hb_rest;
  if (last) return;
  if constexpr (Split) {
    const float end = f.gate[16 * i + 15].x;
    const float2 f0 = make_float2(device::exp2_fast(end - C0.x), device::exp2_fast(end - C0.z));
    const float2 f1 = make_float2(device::exp2_fast(end - C1.x), device::exp2_fast(end - C1.z));
    const auto scaled = [&](uint32_t high, uint32_t low, float2 by, int e) {
      const float2 a = device::unpack_f16(high), b = device::unpack_f16(low);
      const float x = (a.x + b.x) * by.x, y = (a.y + b.y) * by.y;
      to.b[e] = pack_f16(x, y), to.b_rest[e] = pack_rest_f16(x, y, to.b[e]);
    };
    scaled(ta, ta_rest, f0, 0), scaled(transpose_matrix(th), transpose_matrix(th_rest), f1, 1), scaled(tb, tb_rest, f1, 2);
  } else {
    const uint32_t f0 = *reinterpret_cast<const uint32_t*>(&f.column[16 * i + 2 * q]),
                   f1 = *reinterpret_cast<const uint32_t*>(&f.column[16 * i + 8 + 2 * q]);
    to.b[0] = device::multiply_f16(ta, f0), to.b[1] = device::multiply_f16(transpose_matrix(th), f1),
    to.b[2] = device::multiply_f16(tb, f1);
  }
}

// T of one value head by one warp. Split: operands L and T as a sum of two fp16 numbers. `measure` gets this lane's part of the sums of
// squares of L as soon as they are there: what it waits for, products fill.
template <Operand Type, bool Split, class S, class Measure>
__device__ __forceinline__ void invert(const S& s, const Factors& f, const BlockDecay& decay, uint32_t out, int lane,
                                       const Measure& measure) {
  using device::mma_16x8x16;
  using device::mma_16x8x8;
  using device::pack_f16;
  using device::pack_rest_f16;
  const int r = lane >> 2, q = lane & 3;
  const Masks mask(r, q);
  Squares squares;
  uint32_t Ta[4][4][4], Ta_rest[4][4][4];  // T as A fragments
  uint32_t Tb[3][3], Tb_rest[3][3];        // diag(column) T_JJ as B
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    float2 d[3];
#pragma unroll
    for (int e = 0; e < 3; ++e) d[e] = s.diagonal[i][e][lane];
    Diagonal block;
    invert_diagonal<Type, Split>(block, squares, d, f, mask, out, i, i == 3, lane);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Ta[i][i][e] = block.a[e];
      if constexpr (Split) Ta_rest[i][i][e] = block.a_rest[e];
      if (i == 3 || e == 3) continue;
      Tb[i][e] = block.b[e];
      if constexpr (Split) Tb_rest[i][e] = block.b_rest[e];
    }
  }
  measure(squares.of_lane(r, q));
  uint32_t row_factor[3][2];
#pragma unroll
  for (int m = 1; m < 4; ++m) {
#pragma unroll
    for (int v = 0; v < 2; ++v) row_factor[m - 1][v] = *reinterpret_cast<const uint32_t*>(&f.row[16 * m + 8 * v + 2 * q]);
  }
  const uint32_t above = device::shared_address(s.above) + lane * 16;
  // Blocks below the diagonal, column by column from the right: T_IJ = (sum over M of T_IM (-L_MJ)) T_JJ, L without its column factor,
  // which Tb has.
#pragma unroll
  for (int j = 2; j >= 0; --j) {
    uint32_t L[4][4], L_rest[4][4];
#pragma unroll
    for (int m = j + 1; m < 4; ++m) {
      const float between = m - j < 2 ? 1.F : j == 1 ? decay.d31 : m == 2 ? decay.d20 : decay.d30;
      uint32_t high[4], low[4];
      device::load_matrices(high, above + pair_of(j, m) * 512);
      if constexpr (Split) device::load_matrices(low, above + (6 + pair_of(j, m)) * 512);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        uint32_t factor = row_factor[m - 1][v];
        if (!Split && m - j >= 2) factor = device::multiply_f16(factor, pack_f16(between, between));
        float2 factor32;
        if constexpr (Split) {
          const float base = f.gate[16 * m - 1].x;
          const float4 row = *reinterpret_cast<const float4*>(&f.gate[16 * m + 8 * v + 2 * q]);
          factor32 = make_float2(row.y * device::exp2_fast(row.x - base), row.w * device::exp2_fast(row.z - base));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (Split) {
            const float2 a = device::unpack_f16(high[2 * h + v]), b = device::unpack_f16(low[2 * h + v]);
            const float x = (a.x + b.x) * factor32.x * between, y = (a.y + b.y) * factor32.y * between;
            L[m][2 * h + v] = pack_f16(x, y), L_rest[m][2 * h + v] = pack_rest_f16(x, y, L[m][2 * h + v]);
          } else {
            L[m][2 * h + v] = device::multiply_f16(high[2 * h + v], factor);
          }
        }
      }
    }
#pragma unroll
    for (int i = j + 1; i < 4; ++i) {
      float z[8], t[8];
      mma_16x8x16<Operand::f16, true>(z, Ta[i][i], L[i][0], L[i][1]);
      mma_16x8x16<Operand::f16, true>(z + 4, Ta[i][i], L[i][2], L[i][3]);
#pragma unroll
      for (int m = i; m > j; --m) {
        if (m < i) {
          mma_16x8x16<Operand::f16, false>(z, Ta[i][m], L[m][0], L[m][1]);
          mma_16x8x16<Operand::f16, false>(z + 4, Ta[i][m], L[m][2], L[m][3]);
        }
        if constexpr (Split) {
          mma_16x8x16<Operand::f16, false>(z, Ta_rest[i][m], L[m][0], L[m][1]);
          mma_16x8x16<Operand::f16, false>(z + 4, Ta_rest[i][m], L[m][2], L[m][3]);
          mma_16x8x16<Operand::f16, false>(z, Ta[i][m], L_rest[m][0], L_rest[m][1]);
          mma_16x8x16<Operand::f16, false>(z + 4, Ta[i][m], L_rest[m][2], L_rest[m][3]);
        }
      }
      const uint32_t a[4] = {pack_f16(z[0], z[1]), pack_f16(z[2], z[3]), pack_f16(z[4], z[5]), pack_f16(z[6], z[7])};
      mma_16x8x16<Operand::f16, true>(t, a, Tb[j][0], Tb[j][1]);
      mma_16x8x8<true>(t + 4, a[2], a[3], Tb[j][2]);
      if constexpr (Split) {
        mma_16x8x16<Operand::f16, false>(t, a, Tb_rest[j][0], Tb_rest[j][1]);
        mma_16x8x8<false>(t + 4, a[2], a[3], Tb_rest[j][2]);
      }
      put_block<Type>(out, i, j, t);
      if (j == 0) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        Ta[i][j][e] = pack_f16(t[2 * e], t[2 * e + 1]);
        if constexpr (Split) Ta_rest[i][j][e] = pack_rest_f16(t[2 * e], t[2 * e + 1], Ta[i][j][e]);
      }
    }
  }
}

// Whether the loop has to take this chunk of this head token by token (config.h). For lane 0.
template <Operand Type>
__device__ __forceinline__ bool is_hard(float2 squares, const Factors& f, const float* norm, bool l2norm, int rows, bool powers,
                                        const RecordTail& tail, int lane) {
  constexpr Hardness kHard = Type == Operand::f16 ? kHardF16 : kHardBf16;
  // Betas of scaled keys are those of unit keys: the factors have them times |k|^2.
  const float left = device::exp2_fast(f.gate[kChunk - 1].x), of_beta = kHard.beta_square * (1.F + kHard.lasting * left);
  const float of_reflection = kHard.reflections * (left * left) * (left * left);
  const auto amount_of = [&](int i) {
    const float beta = -f.gate[i].y, past = fmaxf(0.F, beta - 1.F), square = past * past;
    return of_beta * beta * beta + of_reflection * square * square;
  };
  const float beta_part = amount_of(2 * lane) + amount_of(2 * lane + 1);
  // Three sums over the warp at once: x ends in lane 0, beta_part in lane 8, y in lane 16.
  const bool upper = (lane & 16) != 0, odd = (lane & 8) != 0;
  float sum = (upper ? squares.y : squares.x) + __shfl_xor_sync(~0U, upper ? squares.x : squares.y, 16);
  const float third = beta_part + __shfl_xor_sync(~0U, beta_part, 16);
  sum = (odd ? third : sum) + __shfl_xor_sync(~0U, odd ? sum : third, 8);
#pragma unroll
  for (int o = 4; o > 0; o >>= 1) sum += __shfl_xor_sync(~0U, sum, o);
  const float amount = __shfl_sync(~0U, sum, 8);
  squares = make_float2(sum, __shfl_sync(~0U, sum, 16));
  bool hard = false;
  if (Type == Operand::f16 && powers) {
    hard = __any_sync(~0U, tail.exponent[2 * lane] >= kHardExponentF16 || tail.exponent[2 * lane + 1] >= kHardExponentF16);
  }
  if constexpr (Type == Operand::f16) {
    float written = -1.F;  // the most by one of this lane's tokens; -1: neither writes
#pragma unroll
    for (int i = 2 * lane; i < 2 * lane + 2; ++i) {
      const float2 gate = f.gate[i];
      const float key = l2norm ? tail.norm[i] : exp2f(-static_cast<float>(tail.exponent[i]));
      const float weight = -gate.y * key * device::exp2_fast(f.gate[kChunk - 1].x - gate.x);
      if (norm[i] > kSmallestNorm && gate.y != 0.F) written = fmaxf(written, weight);
    }
    hard |= __any_sync(~0U, written >= 0.F) && !__any_sync(~0U, written > kSmallestWriteF16);
  }
  const float ratio = squares.y > kSmallestWeight ? __fdividef(squares.x, squares.y) : 0.F;
  return hard || ratio > kHard.ratio_alone || amount * (1.F + kHard.both * ratio) + kHard.ratio * ratio * rows > rows;
}

}  // namespace flashdelta::cuda::prepare
