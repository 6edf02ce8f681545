// Device code of `prepare`. Formulas: algebra.md ("Forward, one chunk"); timeline and budgets: README.md beside this file.
//
// The inverse needs no forward substitution: widths 2, 4, 8, 16 double by X <- X - X L X on the new block, then 16 x 16 blocks follow by
// T_IJ = -(sum over M of T_IM L_MJ) T_JJ, in the registers of one warp. Seen through unit keys every factor is a product of
// I - beta k k^T, so for beta |k|^2 <= 2 nothing exceeds 2 and fp16 operands (11 bits, against 8 in bf16) have the range.
// An accumulator is an A fragment as it stands. K K^T is symmetric: blocks above its diagonal are the B fragments of those below.
// Gates enter as exp(c_i - r) and exp(r - c_j), r the sum at the end of block J or of the block before I: no exponent is positive.
#pragma once

#include "cuda/device/barrier.cuh"
#include "cuda/device/copy.cuh"
#include "cuda/device/fragment.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/layout.cuh"
#include "cuda/prepare/config.h"
#include "cuda/prepare/prepare.hpp"

namespace flashdelta::cuda::prepare {

using device::Barrier;
using device::Operand;
using std::uint32_t;

// One value head's factors, per token of the chunk; b is beta, times 4^e where keys are scaled by 2^-e.
struct Factors {
  float2 gate[kChunk];    // c in units of log 2, -b
  __half row[kChunk];     // -b exp(c - c at the end of the block before)
  __half column[kChunk];  // exp(c at the end of this block - c)
};

// Where a work item, a chunk of a key head, lies.
struct Place {
  int row, token, rows, slot, h;  // rows: tokens of the chunk; 0 where no sequence uses the number, or where no work is left
};

template <int Warps>
struct alignas(1024) Shared {
  unsigned char k[2][kChunk * 128];  // two halves of K, 128-byte swizzled
  unsigned char record[Warps][record_bytes(true)];
  Factors factors[Warps];
  float g[Warps][kChunk + 8], beta[Warps][kChunk + 8];  // as given; padded, because they are written head by head
  float norm[kChunk];                                   // |k|^2
  float key_scale[kChunk];                              // what keys are multiplied by, where they are
  float2 diagonal[4][3][32];                            // K K^T: the diagonal blocks' upper triangles, accumulator layout, lane last
  uint32_t above[6][2][2][32];                          // blocks above the diagonal, [pair][row half][column half][lane], fp16
  uint32_t above_rest[6][2][2][32];                     // what fp16 lost of them
  Place place[4];                                       // of items n % 4: warps are at most one item apart
  Barrier full;
};

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
  bool wants_rest = __syncthreads_or(may_want_rest());
  between();
#pragma unroll
  for (int u = Low; u < High; ++u) {
    const Tile t = tile(u);
    if (t.j != t.m) continue;
    const float* x = sum[u - Low] + 2 * t.v;
    if (r == 2 * q) s.norm[16 * t.j + 8 * t.v + r] = x[0];
    if (r == 2 * q + 1) s.norm[16 * t.j + 8 * t.v + r] = x[1];
  }
  __syncthreads();
  const KeyScale scale = key_scale(s.norm, l2norm, lane);
  if (scale != KeyScale::none) {
    for (int i = I * 32 + lane; i < kChunk; i += 32 * W) s.key_scale[i] = scale_of(scale, s.norm[i]);
    __syncthreads();
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
  __syncthreads();
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

// One warp; leaves h to the caller. `cached`: lane l's slot(l * step) of the first search step, step = ceil(N / 32).
__device__ __forceinline__ Place locate(const Sequences& s, int slot, int cached, int lane) {
  if (s.cu_seqlens == nullptr) {
    const int chunks = (s.T + kChunk - 1) / kChunk;
    const int n = slot / chunks, chunk = slot % chunks;
    return {n, chunk * kChunk, min(kChunk, s.T - chunk * kChunk), slot, 0};
  }
  int first = 0, count = s.N;
  for (int step = (count + 31) / 32;; step = (count + 31) / 32) {
    const int candidate = first + lane * step;
    const int from = first == 0 && count == s.N ? cached : candidate < s.N ? s.slot(candidate) : 0;
    const unsigned below = __ballot_sync(~0U, candidate < first + count && from <= slot);
    if (below == 0) return {0, 0, 0, slot, 0};
    first += (31 - __clz(below)) * step;
    if (step == 1) break;
    count = min(step, s.N - first);
  }
  const Sequences::Span span = s.span(first);
  const int token = (slot - span.slot) * kChunk;
  return {span.row, span.begin + token, max(0, min(kChunk, span.length - token)), slot, 0};
}

// Gates and betas as given, of W value heads from `first` on: two elements a thread, so that neighbours read neighbouring heads. Their
// bits: turning them into numbers would wait for them.
template <int W>
struct Given {
  uint32_t g[2], beta[2];

  __device__ __forceinline__ void load(const Arguments& a, const Place& at, int pass, int tid) {
    const int first = at.h * a.group + pass, heads = a.group - pass;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = (tid + i * 32 * W) % W, token = (tid + i * 32 * W) / W;
      g[i] = 0, beta[i] = device::bits_of(1.F, a.beta.type);
      if (head >= heads || token >= at.rows) continue;
      if (a.g.data != nullptr) {
        g[i] = device::load_bits(a.g.data, a.g.type, at.row * a.g.row + (at.token + token) * a.g.token + (first + head) * a.g.head);
      }
      if (a.beta.data != nullptr) {
        beta[i] = device::load_bits(a.beta.data, a.beta.type,
                                    at.row * a.beta.row + (at.token + token) * a.beta.token + (first + head) * a.beta.head);
      }
    }
  }
  template <class S>
  __device__ __forceinline__ void put(const Arguments& a, S& s, int tid) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = (tid + i * 32 * W) % W, token = (tid + i * 32 * W) / W;
      s.g[head][token] = device::from_bits(g[i], a.g.type), s.beta[head][token] = device::from_bits(beta[i], a.beta.type);
    }
  }
};

__device__ __forceinline__ float softplus(float x) { return x > 20.F ? x : log1pf(expf(x)); }

// Log gates and betas of tokens 2 lane and 2 lane + 1.
struct Gates {
  float g0, g1, b0, b1;
};

// In-kernel gate and sigmoid: their library functions would push the common path out of the instruction cache.
static __device__ __noinline__ Gates activate_raw(const Arguments& a, Gates x, int head) {
  if (a.gate_in_kernel) {
    const float rate = -expf(device::load_element(a.A_log.data, a.A_log.type, head * a.A_log.head));
    const float bias = a.dt_bias.data == nullptr ? 0.F : device::load_element(a.dt_bias.data, a.dt_bias.type, head * a.dt_bias.head);
    x.g0 = rate * softplus(x.g0 + bias), x.g1 = rate * softplus(x.g1 + bias);
  }
  if (a.beta_sigmoid) {
    const float most = a.neg_eigval ? 2.F : 1.F;
    x.b0 = most / (1.F + expf(-x.b0)), x.b1 = most / (1.F + expf(-x.b1));
  }
  return x;
}

// Given values to log gates and betas; tokens past the sequence's end get 0 and 0. `whole`: the gates before kLowestGate.
__device__ __forceinline__ Gates activate(const Arguments& a, const float* g, const float* beta, int rows, int head, int lane,
                                          float2& whole) {
  const float2 given_g = reinterpret_cast<const float2*>(g)[lane], given_beta = reinterpret_cast<const float2*>(beta)[lane];
  Gates x{given_g.x, given_g.y, given_beta.x, given_beta.y};
  if (a.gate_in_kernel || a.beta_sigmoid) x = activate_raw(a, x, head);
  if (2 * lane >= rows) x.g0 = x.b0 = 0.F;
  if (2 * lane + 1 >= rows) x.g1 = x.b1 = 0.F;
  whole = make_float2(x.g0 < kLowestSavedGate ? kLowestSavedGate : x.g0, x.g1 < kLowestSavedGate ? kLowestSavedGate : x.g1);
  // Comparisons that NaN passes through.
  x.g0 = x.g0 < kLowestGate ? kLowestGate : x.g0, x.g1 = x.g1 < kLowestGate ? kLowestGate : x.g1;
  return x;
}

// exp of the sums at the ends of blocks 0, 1, 2 between one another.
struct BlockDecay {
  float d20, d31, d30;
};

// Everything of a value head that is per token. Returns whether the inverse needs split operands.
__device__ __forceinline__ bool make_factors(const Gates& x, const float* key_scale, KeyScale scale, Factors& f, BlockDecay& decay,
                                             float2& c, int lane) {
  float sum = x.g0 + x.g1;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const float before = __shfl_up_sync(~0U, sum, o);
    if (lane >= o) sum += before;
  }
  float before = __shfl_up_sync(~0U, sum, 1);
  if (lane == 0) before = 0.F;
  c.x = before + x.g0, c.y = c.x + x.g1;
  const float c0 = c.x * kLog2e, c1 = c.y * kLog2e;
  const float end_before = __shfl_sync(~0U, c1, ((lane & 24) + 31) & 31), base = lane < 8 ? 0.F : end_before;
  const float end = __shfl_sync(~0U, c1, lane | 7);
  const float end0 = __shfl_sync(~0U, c1, 7), end1 = __shfl_sync(~0U, c1, 15), end2 = __shfl_sync(~0U, c1, 23);
  decay = {device::exp2_fast(end1 - end0), device::exp2_fast(end2 - end1), device::exp2_fast(end2 - end0)};
  float b0 = x.b0, b1 = x.b1;
  if (scale == KeyScale::power_of_two) {
    const float s0 = key_scale[2 * lane], s1 = key_scale[2 * lane + 1];
    b0 /= s0 * s0, b1 /= s1 * s1;
  }
  const float row0 = -b0 * device::exp2_fast(c0 - base), row1 = -b1 * device::exp2_fast(c1 - base);
  const float left0 = device::exp2_fast(end - c0), left1 = device::exp2_fast(end - c1);
  __syncwarp();
  reinterpret_cast<float4*>(f.gate)[lane] = make_float4(c0, -b0, c1, -b1);
  reinterpret_cast<uint32_t*>(f.row)[lane] = device::pack_f16(row0, row1);
  reinterpret_cast<uint32_t*>(f.column)[lane] = device::pack_f16(left0, left1);
  __syncwarp();
  return __any_sync(~0U, b0 > kSplitAbove || b1 > kSplitAbove);
}

// Log of a bound of the chunk's transition: the gates' sum, and log |1 - beta |k|^2| where that is above 0. For lane 31.
__device__ __forceinline__ float log_norm_bound(const Gates& x, float2 c, const float* norm, bool l2norm, int lane) {
  const float2 square = l2norm ? make_float2(1.F, 1.F) : reinterpret_cast<const float2*>(norm)[lane];
  const float most0 = fabsf(1.F - x.b0 * square.x), most1 = fabsf(1.F - x.b1 * square.y);
  float growth = 0.F;
  if (__any_sync(~0U, !(most0 <= 1.F && most1 <= 1.F))) {
    growth = (most0 <= 1.F ? 0.F : logf(most0)) + (most1 <= 1.F ? 0.F : logf(most1));
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) growth += __shfl_xor_sync(~0U, growth, o);
  }
  return c.y + growth;
}

// Block (i, j) of T into the record: x is rows 0-7 of columns 0-7 (2 numbers a lane), rows 8-15 of columns 0-7, then both of columns
// 8-15. `at`: address of this lane's row of block (0, 0).
template <Operand Type>
__device__ __forceinline__ void put_block(uint32_t at, int i, int j, const float (&x)[8]) {
  device::store_matrices(at + panel_offset(j) + (i - j) * 512, device::pack<Type>(x[0], x[1]), device::pack<Type>(x[2], x[3]),
                         device::pack<Type>(x[4], x[5]), device::pack<Type>(x[6], x[7]));
}

// Where T[i][j] lies in a record.
__device__ __forceinline__ int element_offset(int i, int j) {
  const int panel = j >> 4, row = i - 16 * panel;
  return panel_offset(panel) + row * 32 + ((((j >> 3) ^ (row >> 2)) & 1) << 4) + (j & 7) * 2;
}
template <Operand Type>
__device__ __forceinline__ float get_element(const unsigned char* at) {
  if constexpr (Type == Operand::f16) return __half2float(*reinterpret_cast<const __half*>(at));
  return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(at));
}

// What a backward reads: T and c of the chunk. T is scaled back to that of the keys themselves; c is summed again without kLowestGate.
template <Operand Type>
__device__ __noinline__ void save(const Arguments& a, const Place& at, int head, const unsigned char* record, float2 log_gates, int lane) {
  __syncwarp();
  const auto& tail = *reinterpret_cast<const RecordTail*>(record + kPanelBytes);
  if (a.saved_c.data != nullptr) {
    float sum = log_gates.x + log_gates.y;
    for (int o = 1; o < 32; o <<= 1) {
      const float before = __shfl_up_sync(~0U, sum, o);
      if (lane >= o) sum += before;
    }
    float before = __shfl_up_sync(~0U, sum, 1);
    if (lane == 0) before = 0.F;
    float* to = static_cast<float*>(const_cast<void*>(a.saved_c.data)) + at.row * a.saved_c.row + (at.token + 2 * lane) * a.saved_c.token +
                head * a.saved_c.head;
    if (2 * lane < at.rows) to[0] = before + log_gates.x;
    if (2 * lane + 1 < at.rows) to[a.saved_c.token] = before + log_gates.x + log_gates.y;
  }
  if (a.saved_T.data == nullptr) return;
  float* to =
      static_cast<float*>(const_cast<void*>(a.saved_T.data)) + at.row * a.saved_T.row + at.token * a.saved_T.token + head * a.saved_T.head;
  for (int e = lane; e < at.rows * kChunk; e += 32) {
    const int i = e / kChunk, j = e % kChunk;
    float x = 0.F;
    if (j / 16 <= i / 16) x = ldexpf(get_element<Type>(record + element_offset(i, j)), tail.exponent[j] - tail.exponent[i]);
    to[i * a.saved_T.token + j * a.saved_T_column] = x;
  }
}

// T of one value head. Split: operands L and T as a sum of two fp16 numbers.
// Returns this lane's part of the sums of squares of L over the diagonal blocks (x), and of L with all products of keys 1 (y).
template <Operand Type, bool Split, class S>
__device__ __forceinline__ float2 invert(const S& s, const Factors& f, const BlockDecay& decay, uint32_t out, int lane) {
  using device::mma_16x8x16;
  using device::mma_16x8x8;
  using device::pack_f16;
  using device::pack_rest_f16;
  using device::transpose_matrix;
  const int r = lane >> 2, q = lane & 3;
  // Which entries of an 8 x 8 block (row r, columns 2 q and 2 q + 1) belong to the widths 2, 4, 8 of the recursion, t: of its
  // transpose. Packed halves share a mask except at width 2.
  const bool on_first = r == 2 * q, on_second = r == 2 * q + 1, same_half = (r >> 2) == (q >> 1);
  const float one0 = on_first ? 1.F : 0.F, one1 = on_second ? 1.F : 0.F;
  const uint32_t one = on_first ? 0x00003C00U : on_second ? 0x3C000000U : 0U;
  const uint32_t mask2 = on_second ? 0x0000FFFFU : 0U, mask2t = on_first ? 0xFFFF0000U : 0U;
  const uint32_t mask4t = same_half && !(r & 2) && (q & 1) ? ~0U : 0U, mask8t = !(r & 4) && (q & 2) ? ~0U : 0U;
  float2 squares = make_float2(0.F, 0.F);
  uint32_t Ta[4][4][4], Ta_rest[4][4][4];  // T as A fragments
  uint32_t Tb[3][3], Tb_rest[3][3];        // diag(column) T_JJ as B: (k 0-7, n 0-7), (k 8-15, n 0-7), (k 8-15, n 8-15)
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    const float2 R0 = f.gate[16 * i + r], R1 = f.gate[16 * i + 8 + r];
    const float4 C0 = *reinterpret_cast<const float4*>(&f.gate[16 * i + 2 * q]),
                 C1 = *reinterpret_cast<const float4*>(&f.gate[16 * i + 8 + 2 * q]);
    const float2 d0 = s.diagonal[i][0][lane], d1 = s.diagonal[i][1][lane], d2 = s.diagonal[i][2][lane];
    // -L^T above the diagonal; the one entry of -L that width 2 needs sits where on_second.
    const float w0 = device::exp2_fast(-fabsf(R0.x - C0.x)) * (on_second ? R0.y : C0.y), w1 = device::exp2_fast(-fabsf(R0.x - C0.z)) * C0.w;
    const float w2 = device::exp2_fast(-fabsf(R1.x - C1.x)) * (on_second ? R1.y : C1.y), w3 = device::exp2_fast(-fabsf(R1.x - C1.z)) * C1.w;
    const float v0 = d0.x * w0, v1 = d0.y * w1, v2 = d2.x * w2, v3 = d2.y * w3;
    const uint32_t p0 = pack_f16(v0, v1), p1 = pack_f16(v2, v3);
    const float w4 = device::exp2_fast(C1.x - R0.x) * C1.y, w5 = device::exp2_fast(C1.z - R0.x) * C1.w;
    const float u0 = d1.x * w4, u1 = d1.y * w5;  // -L21^T
    const uint32_t pt = pack_f16(u0, u1);
    squares.x = fmaf(u0, u0, fmaf(u1, u1, squares.x)), squares.y = fmaf(w4, w4, fmaf(w5, w5, squares.y));
    if (2 * q > r) {
      squares.x = fmaf(v0, v0, fmaf(v1, v1, fmaf(v2, v2, fmaf(v3, v3, squares.x))));
      squares.y = fmaf(w0, w0, fmaf(w1, w1, fmaf(w2, w2, fmaf(w3, w3, squares.y))));
    }
    float xa[4], xb[4];  // rows 0-7 of xa and rows 8-15 of xb count; the other halves are never read
    xa[0] = on_second ? v0 : one0, xa[1] = one1, xb[2] = on_second ? v2 : one0, xb[3] = one1;
    device::undefined(xa[2]), device::undefined(xa[3]), device::undefined(xb[0]), device::undefined(xb[1]);
    uint32_t ha = (p0 & mask2) | one, hb = (p1 & mask2) | one, ta = (p0 & mask2t) | one, tb = (p1 & mask2t) | one;
    uint32_t p0_rest = 0, p1_rest = 0, pt_rest = 0, ha_rest = 0, hb_rest = 0, ta_rest = 0, tb_rest = 0;
    if constexpr (Split) {
      p0_rest = pack_rest_f16(v0, v1, p0), p1_rest = pack_rest_f16(v2, v3, p1), pt_rest = pack_rest_f16(u0, u1, pt);
      ha_rest = p0_rest & mask2, hb_rest = p1_rest & mask2, ta_rest = p0_rest & mask2t, tb_rest = p1_rest & mask2t;
    }
#pragma unroll
    for (int width = 0; width < 2; ++width) {
      const uint32_t upper = width == 1 ? mask8t : mask4t;
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
    Ta[i][i][0] = ha, Ta[i][i][1] = th, Ta[i][i][2] = 0, Ta[i][i][3] = hb;
    if constexpr (Split) Ta_rest[i][i][0] = ha_rest, Ta_rest[i][i][1] = th_rest, Ta_rest[i][i][2] = 0, Ta_rest[i][i][3] = hb_rest;
    if (i == 3) continue;
    if constexpr (Split) {
      const float end = f.gate[16 * i + 15].x;
      const float2 f0 = make_float2(device::exp2_fast(end - C0.x), device::exp2_fast(end - C0.z));
      const float2 f1 = make_float2(device::exp2_fast(end - C1.x), device::exp2_fast(end - C1.z));
      const auto scaled = [&](uint32_t high, uint32_t low, float2 by, int e) {
        const float2 a = device::unpack_f16(high), b = device::unpack_f16(low);
        const float x = (a.x + b.x) * by.x, y = (a.y + b.y) * by.y;
        Tb[i][e] = pack_f16(x, y), Tb_rest[i][e] = pack_rest_f16(x, y, Tb[i][e]);
      };
      scaled(ta, ta_rest, f0, 0), scaled(transpose_matrix(th), transpose_matrix(th_rest), f1, 1), scaled(tb, tb_rest, f1, 2);
    } else {
      const uint32_t f0 = *reinterpret_cast<const uint32_t*>(&f.column[16 * i + 2 * q]),
                     f1 = *reinterpret_cast<const uint32_t*>(&f.column[16 * i + 8 + 2 * q]);
      Tb[i][0] = device::multiply_f16(ta, f0), Tb[i][1] = device::multiply_f16(transpose_matrix(th), f1),
      Tb[i][2] = device::multiply_f16(tb, f1);
    }
  }
  // Blocks below the diagonal, column by column from the right: T_IJ = (sum over M of T_IM (-L_MJ)) T_JJ, L without its column factor,
  // which Tb has.
#pragma unroll
  for (int j = 2; j >= 0; --j) {
    uint32_t L[4][4], L_rest[4][4];
#pragma unroll
    for (int m = j + 1; m < 4; ++m) {
      const float between = m - j < 2 ? 1.F : j == 1 ? decay.d31 : m == 2 ? decay.d20 : decay.d30;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        uint32_t factor = *reinterpret_cast<const uint32_t*>(&f.row[16 * m + 8 * v + 2 * q]);
        if (!Split && m - j >= 2) factor = device::multiply_f16(factor, pack_f16(between, between));
        float2 factor32;
        if constexpr (Split) {
          const float base = f.gate[16 * m - 1].x;
          const float4 row = *reinterpret_cast<const float4*>(&f.gate[16 * m + 8 * v + 2 * q]);
          factor32 = make_float2(row.y * device::exp2_fast(row.x - base), row.w * device::exp2_fast(row.z - base));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t high = s.above[pair_of(j, m)][h][v][lane];
          if constexpr (Split) {
            const float2 a = device::unpack_f16(high), b = device::unpack_f16(s.above_rest[pair_of(j, m)][h][v][lane]);
            const float x = (a.x + b.x) * factor32.x * between, y = (a.y + b.y) * factor32.y * between;
            L[m][2 * h + v] = pack_f16(x, y), L_rest[m][2 * h + v] = pack_rest_f16(x, y, L[m][2 * h + v]);
          } else {
            L[m][2 * h + v] = device::multiply_f16(high, factor);
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
  return squares;
}

// Rows of o before the first sequence and after the last.
static __device__ __noinline__ void zero_rows_of_no_sequence(const Arguments& a) {
  if (a.sequences.cu_seqlens == nullptr) return;
  const int low = a.sequences.offset(0), high = max(low, a.sequences.offset(a.sequences.N));
  const int heads = a.H * a.group, outside = a.sequences.T - (high - low);
  constexpr int kUnits = kHead * 2 / 16;
  for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       e < static_cast<std::int64_t>(outside) * heads * kUnits; e += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const int unit = e % kUnits, head = e / kUnits % heads, i = static_cast<int>(e / kUnits / heads);
    const int token = i < low ? i : high + (i - low);
    *reinterpret_cast<uint4*>(a.o + token * a.o_token + head * a.o_head + unit * 16) = make_uint4(0, 0, 0, 0);
  }
}

// Rows of saved_c and saved_T of tokens in no sequence, and saved states of no chunk: they come out as zero, as everything that is wanted
// is written completely.
static __device__ __noinline__ void zero_saved_of_no_sequence(const Arguments& a) {
  const int tid = threadIdx.x, threads = blockDim.x, heads = a.H * a.group;
  if (a.sequences.cu_seqlens != nullptr && (a.saved_c.data != nullptr || a.saved_T.data != nullptr)) {
    const int low = a.sequences.offset(0), high = max(low, a.sequences.offset(a.sequences.N));
    for (int i = blockIdx.x; i < a.sequences.T - (high - low); i += gridDim.x) {
      const int token = i < low ? i : high + (i - low);
      for (int e = tid; e < heads * kChunk; e += threads) {
        const int head = e / kChunk, j = e % kChunk;
        if (a.saved_T.data != nullptr) {
          static_cast<float*>(const_cast<void*>(a.saved_T.data))[token * a.saved_T.token + head * a.saved_T.head + j * a.saved_T_column] =
              0.F;
        }
        if (a.saved_c.data != nullptr && j == 0) {
          static_cast<float*>(const_cast<void*>(a.saved_c.data))[token * a.saved_c.token + head * a.saved_c.head] = 0.F;
        }
      }
    }
  }
  if (a.saved_states.data == nullptr) return;
  const int tokens = kChunk * a.checkpoint_chunks;
  const auto first_slot = [&](int n) -> std::int64_t {
    if (n == a.sequences.N) return a.saved_slots;
    const Sequences::Span span = a.sequences.span(n);
    return (static_cast<std::int64_t>(span.row) * a.sequences.T + span.begin) / tokens + n;
  };
  // Between the end of sequence n (-1: before the first) and the next one's first slot.
  for (int n = static_cast<int>(blockIdx.x) - 1; n < a.sequences.N; n += gridDim.x) {
    const std::int64_t from = n < 0 ? 0 : first_slot(n) + (a.sequences.span(n).length + tokens - 1) / tokens;
    const std::int64_t until = min(first_slot(n + 1), static_cast<std::int64_t>(a.saved_slots));
    for (std::int64_t e = from * heads * kHead * kHead + tid; e < until * heads * kHead * kHead; e += threads) {
      const int v = e % kHead, k = e / kHead % kHead;
      const std::int64_t row = e / kHead / kHead;
      device::store_element(
          a.saved_states.data, a.saved_states.type,
          row / heads * a.saved_states.sequence + row % heads * a.saved_states.head + k * a.saved_states.k + v * a.saved_states.v, 0.F);
    }
  }
}

// Whether the loop has to take this chunk of this head token by token (config.h).
template <Operand Type>
__device__ __forceinline__ bool is_hard(float2 squares, const Factors& f, int rows, KeyScale scale, const RecordTail& tail, int lane) {
  constexpr Hardness kHard = Type == Operand::f16 ? kHardF16 : kHardBf16;
  // Betas of scaled keys are those of unit keys: the factors have them times |k|^2.
  const float b0 = f.gate[2 * lane].y, b1 = f.gate[2 * lane + 1].y;
  float beta_square = fmaf(b0, b0, b1 * b1);
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    squares.x += __shfl_xor_sync(~0U, squares.x, o), squares.y += __shfl_xor_sync(~0U, squares.y, o);
    beta_square += __shfl_xor_sync(~0U, beta_square, o);
  }
  bool hard = false;
  if (Type == Operand::f16 && scale == KeyScale::power_of_two) {
    hard = __any_sync(~0U, tail.exponent[2 * lane] >= kHardExponentF16 || tail.exponent[2 * lane + 1] >= kHardExponentF16);
  }
  const float ratio = squares.y > kSmallestWeight ? squares.x / squares.y : 0.F;
  // Without gates errors last, and add up from chunk to chunk.
  const float lasting = 1.F + kHard.lasting * device::exp2_fast(f.gate[kChunk - 1].x);
  return hard || ratio > kHard.ratio_alone || kHard.beta_square * lasting * beta_square + kHard.ratio * ratio * rows > rows;
}

// Bounded maps of the sequences from `first` on, one in `step`, whose last chunk is not full. One warp.
static __device__ __noinline__ void bound_maps(const Arguments& a, const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v,
                                               const CUtensorMap& o, int first, int step, unsigned char* scratch, int lane) {
  for (int n = first; n < a.sequences.N; n += step) {
    const Sequences::Span span = a.sequences.span(n);
    if (span.length % kChunk == 0) continue;
    CUtensorMap* to = a.bounded_maps + static_cast<std::int64_t>(n) * kMaps;
    const int end = span.begin + span.length;
    device::write_bounded_map(to + kMapQ, q, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapK, k, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapV, v, end, reinterpret_cast<uint32_t*>(scratch), lane);
    device::write_bounded_map(to + kMapO, o, end, reinterpret_cast<uint32_t*>(scratch), lane);
  }
}

template <Operand Type, int W>
__global__ void __launch_bounds__(32 * W, ctas_per_multiprocessor(W))
    prepare_kernel(const __grid_constant__ Arguments a, const __grid_constant__ CUtensorMap map_q,
                   const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                   const __grid_constant__ CUtensorMap map_o) {
  extern __shared__ __align__(1024) unsigned char raw[];
  // The declared array's own address: rounded up as an integer it would become generic loads. The launch checks nothing else is static.
  Shared<W>& s = *reinterpret_cast<Shared<W>*>(raw);
  const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(~0U, tid >> 5, 0);
  const int step = (a.sequences.N + 31) / 32;
  const int cached = a.sequences.cu_seqlens != nullptr && lane * step < a.sequences.N ? a.sequences.slot(lane * step) : 0;
  // Work items are (chunk number, key head), the head running fastest. Warp 0 walks them and leaves places in shared memory; what all
  // warps kept in registers would not leave the inverse enough.
  const int slot_step = gridDim.x / a.H, head_step = gridDim.x % a.H;
  int slot = blockIdx.x / a.H, h = blockIdx.x % a.H;
  const auto find = [&](Place& to) {
    Place at{};
    while (slot < a.slots) {
      at = locate(a.sequences, slot, cached, lane);
      at.h = h;
      slot += slot_step, h += head_step;
      if (h >= a.H) h -= a.H, ++slot;
      if (at.rows > 0) break;
    }
    if (lane == 0) to = at;
    __syncwarp();
  };
  const auto load_k = [&](const Place& at) {
    device::barrier_arrive_expect(s.full, kChunk * kHead * 2);
    device::load_box(s.k, &map_k, s.full, at.h, at.token, at.row);
  };
  if (warp == 0) find(s.place[0]);
  if (tid == 0) {
    device::barrier_init(s.full, 1);
    device::barrier_init_fence();
    if (s.place[0].rows > 0) load_k(s.place[0]);
    if (blockIdx.x == 0) *a.counter = 0;
  }
  __syncthreads();
  if (a.bounded_maps != nullptr) bound_maps(a, map_q, map_k, map_v, map_o, blockIdx.x * W + warp, gridDim.x * W, s.record[warp], lane);
  zero_rows_of_no_sequence(a);
  if (a.saved_c.data != nullptr || a.saved_T.data != nullptr || a.saved_states.data != nullptr) zero_saved_of_no_sequence(a);
  device::allow_dependent_launch();

  const uint32_t address_a = device::shared_address(s.k[0]) + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
  const uint32_t address_b =
      device::shared_address(s.k[0]) + ((lane & 7) + ((lane >> 4) << 3)) * 128 + ((((lane >> 3) & 1) ^ (lane & 7)) << 4);
  const uint32_t record = device::shared_address(s.record[warp]);
  const uint32_t record_row = record + (lane & 15) * 32 + (((lane >> 4) ^ ((lane >> 2) & 1)) << 4);
#pragma unroll 1
  for (int n = 0; s.place[n & 3].rows > 0; ++n) {
    const Place& here = s.place[n & 3];
    Place& next = s.place[(n + 1) & 3];
    Given<W> given;
    given.load(a, here, 0, tid);
    device::barrier_wait(s.full, n & 1);
    if (here.rows < kChunk) {  // what stands behind the end is not this sequence's
      for (int e = tid; e < (kChunk - here.rows) * 16; e += 32 * W) {
        *reinterpret_cast<uint4*>(s.k[e & 1] + (here.rows + (e >> 4)) * 128 + ((e >> 1) & 7) * 16) = make_uint4(0, 0, 0, 0);
      }
      device::fence_shared_to_async();
      __syncthreads();
    }
    if (warp == 0) find(next);
    const auto wants_rest = [&] { return false; };
    const KeyScale scale = key_products<Type, W>(s, address_a, address_b, a.l2norm, wants_rest, warp, lane, [&] {
      given.put(a, s, tid);
      if (tid == 0 && next.rows > 0) load_k(next);
    });
#pragma unroll 1
    for (int pass = 0; pass < a.group; pass += W) {
      if (pass > 0) {
        given.load(a, here, pass, tid);
        __syncthreads();
        given.put(a, s, tid);
        __syncthreads();
      }
      if (pass + warp >= a.group) continue;
      const int head = here.h * a.group + pass + warp;
      float2 whole;
      const Gates x = activate(a, s.g[warp], s.beta[warp], here.rows, head, lane, whole);
      BlockDecay decay;
      float2 c;
      const bool split = make_factors(x, s.key_scale, scale, s.factors[warp], decay, c, lane);
      if (lane == 0) device::wait_stores_read();  // the record before this one has left shared memory
      __syncwarp();
      auto& tail = *reinterpret_cast<RecordTail*>(s.record[warp] + kPanelBytes);
      reinterpret_cast<float2*>(tail.c)[lane] = make_float2(c.x * kLog2e, c.y * kLog2e);
      float2 beta = make_float2(x.b0, x.b1);
      reinterpret_cast<char2*>(tail.exponent)[lane] = make_char2(0, 0);
      if (scale == KeyScale::power_of_two) {
        const int e0 = norm_exponent(s.norm[2 * lane]), e1 = norm_exponent(s.norm[2 * lane + 1]);
        reinterpret_cast<char2*>(tail.exponent)[lane] = make_char2(static_cast<signed char>(e0), static_cast<signed char>(e1));
        beta = make_float2(ldexpf(x.b0, e0), ldexpf(x.b1, e1));
      }
      reinterpret_cast<float2*>(tail.beta)[lane] = beta;
      if (a.l2norm) reinterpret_cast<float2*>(tail.norm)[lane] = reinterpret_cast<const float2*>(s.key_scale)[lane];
      if (a.bounds != nullptr) {
        const float bound = log_norm_bound(x, c, s.norm, a.l2norm, lane);
        if (lane == 31) a.bounds[static_cast<std::int64_t>(head) * a.slots + here.slot] = bound;
      }
      const float2 squares = invert<Type, false>(s, s.factors[warp], decay, record_row, lane);
      const bool hard = is_hard<Type>(squares, s.factors[warp], here.rows, scale, tail, lane);
      if (lane == 0) tail.hard = hard ? 1 : 0;
      if (a.saved_c.data != nullptr || a.saved_T.data != nullptr) save<Type>(a, here, head, s.record[warp], whole, lane);
      device::fence_shared_to_async();
      __syncwarp();
      if (lane == 0) {
        const int bytes = record_bytes(a.l2norm);
        device::store_bytes(a.records + (static_cast<std::int64_t>(here.slot) * a.H * a.group + head) * bytes, record, bytes);
      }
    }
  }
  if (lane == 0) device::wait_stores_done();
}

}  // namespace flashdelta::cuda::prepare
