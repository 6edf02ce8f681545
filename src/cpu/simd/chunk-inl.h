// What forward and backward share of a chunk: its tokens, q and k, gates, L, T. Names are algebra's (docs/numerics.md).
#if defined(FLASHDELTA_CPU_SIMD_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_CHUNK_INL_H_
#undef FLASHDELTA_CPU_SIMD_CHUNK_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_CHUNK_INL_H_
#endif

#include <hwy/contrib/math/math-inl.h>

#include <cmath>

#include "cpu/kernels.hpp"
#include "cpu/simd/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

constexpr Index kC = kChunk;

// A chunk's place: `rows` tokens from `t` of batch row `b`; tiles are `m` rows high (a multiple of 8, zero beyond `rows`).
struct Place {
  Index b, t, rows, m;
};

HWY_INLINE Place PlaceOf(const op::Problem& p, Index n, Index chunk) {
  const op::Sequence s = op::sequence(p, n);
  const Index t = s.begin + chunk * kC;
  const Index rows = std::min<Index>(kC, s.end - t);
  return {s.row, t, rows, (rows + 7) / 8 * 8};
}

HWY_INLINE Place HalfOf(const Place& chunk, Index half) {
  const Index rows = std::clamp<Index>(chunk.rows - half * kHalf, 0, kHalf);
  return {chunk.b, chunk.t + half * kHalf, rows, (rows + 7) / 8 * 8};
}

// Per-token scalars of one value head's chunk. Beyond `rows` a token acts as k = 0, beta = 0, g = 0.
struct Gates {
  HWY_ALIGN_MAX float c_high[kC], c_low[kC];  // inclusive sum of the log gates, as two floats: c[i] - c[j] then keeps float accuracy
                                              // beside gates of -1000, where the sums are large
  HWY_ALIGN_MAX float gam[kC];                // exp(c)
  HWY_ALIGN_MAX float tail[kC];               // exp(c[-1] - c)
  HWY_ALIGN_MAX float beta[kC];
  HWY_ALIGN_MAX float temp[kC];
  double c[kC];
  double g[kC];      // activated, floored
  double slope[kC];  // d(log gate) / d(raw gate), 1 without the in-kernel gate
  float gl;          // exp(c[-1])
};

HWY_INLINE double ReadScalar(const op::Tensor& x, Index i, Index j = 0, Index k = 0) { return op::load_element(x.dtype, x.at(i, j, k)); }

HWY_INLINE double Sigmoid(double x) { return x >= 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

HWY_INLINE double Softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

// Log gate of a token before the floor; *slope (may be null) gets its derivative by the raw gate.
HWY_INLINE double LogGate(const op::Problem& p, Index b, Index t, Index h, double* slope) {
  if (slope != nullptr) *slope = 1;
  if (!p.g) return 0;
  const double raw = ReadScalar(p.g, b, t, h);
  if (!p.gate_in_kernel) return raw;
  const double rate = -std::exp(ReadScalar(p.A_log, h));
  const double x = raw + (p.dt_bias ? ReadScalar(p.dt_bias, h) : 0.0);
  if (slope != nullptr) *slope = rate * Sigmoid(x);
  return rate * Softplus(x);
}

HWY_INLINE double Beta(const op::Problem& p, Index b, Index t, Index h) {
  if (!p.beta) return 1;
  const double x = ReadScalar(p.beta, b, t, h);
  return p.beta_sigmoid ? (p.neg_eigval ? 2 : 1) * Sigmoid(x) : x;
}

HWY_NOINLINE void LoadGates(const op::Problem& p, const Place& at, Index h, Gates& s) {
  double c = 0;
  for (Index i = 0; i < at.rows; ++i) {
    double g = LogGate(p, at.b, at.t + i, h, &s.slope[i]);
    if (g < kGateFloor) g = kGateFloor;  // keeps a NaN
    c += g;
    s.g[i] = g;
    s.c[i] = c;
    s.beta[i] = static_cast<float>(Beta(p, at.b, at.t + i, h));
  }
  s.gl = static_cast<float>(std::exp(c));
  for (Index i = 0; i < kC; ++i) {
    const bool token = i < at.rows;
    if (!token) s.c[i] = c;
    s.c_high[i] = static_cast<float>(s.c[i]);
    s.c_low[i] = static_cast<float>(s.c[i] - static_cast<double>(s.c_high[i]));
    s.gam[i] = token ? static_cast<float>(std::exp(s.c[i])) : s.gl;
    s.tail[i] = token ? static_cast<float>(std::exp(c - s.c[i])) : 0.0F;
    if (!token) s.beta[i] = 0;
  }
}

// q or k of a chunk, l2-normalised where asked, times `factor`; norms[i] (may be null) gets the rows' 1 / |x|.
HWY_INLINE void LoadNormed(const op::Problem& p, const op::Tensor& x, const Place& at, Index h, float factor, float* tile, Index ld,
                           float* norms) {
  LoadTile(x, at.b, at.t, at.rows, at.m, h, 0, p.K, tile, ld);
  for (Index i = 0; i < at.rows; ++i) {
    float* row = tile + i * ld;
    const float r = p.qk_l2norm ? 1 / std::sqrt(Dot(row, row, padded(p.K)) + 1e-6F) : 1.0F;
    if (norms != nullptr) norms[i] = r;
    if (r * factor != 1) ScaleRow(row, r * factor, padded(p.K));
  }
}

// Per lane: exp(c[i] - c[j]) for j in [j0, j0 + kLanes), 0 where j > i (there it would overflow).
HWY_INLINE VF DecayLanes(const Gates& s, Index i, Index j0) {
  const DF d;
  const auto high = hn::Sub(hn::Set(d, s.c_high[i]), hn::LoadU(d, s.c_high + j0));
  const auto low = hn::Sub(hn::Set(d, s.c_low[i]), hn::LoadU(d, s.c_low + j0));
  const VF g = hn::Exp(d, hn::Add(high, low));
  const auto lane = hn::Iota(d, static_cast<float>(j0));
  return hn::IfThenElseZero(hn::Le(lane, hn::Set(d, static_cast<float>(i))), g);
}

// G[i][j] = exp(c[i] - c[j]) below and on the diagonal, 0 above, all of [m, C].
template <int C>
HWY_NOINLINE void Decays(const Gates& s, Index m, float* G) {
  const DF d;
  for (Index i = 0; i < m; ++i) {
    Index j = 0;
    for (; j <= i; j += kLanes) hn::StoreU(DecayLanes(s, i, j), d, G + i * kSquare<C> + j);
    if (j < C) Fill(G + i * kSquare<C> + j, C - j);
  }
}

// out = a * G on and below the diagonal, exact zeros above it. `out` may be `a`.
template <int C>
HWY_NOINLINE void MaskedByDecay(const float* a, const float* G, Index m, float* out) {
  const DF d;
  for (Index i = 0; i < m; ++i) {
    const VF row = hn::Set(d, static_cast<float>(i));
    Index j = 0;
    for (; j <= i; j += kLanes) {
      const VF x = hn::Mul(hn::LoadU(d, a + i * kSquare<C> + j), hn::LoadU(d, G + i * kSquare<C> + j));
      hn::StoreU(hn::IfThenElseZero(hn::Le(hn::Iota(d, static_cast<float>(j)), row), x), d, out + i * kSquare<C> + j);
    }
    if (j < C) Fill(out + i * kSquare<C> + j, C - j);
  }
}

// L = strict_lower(beta * kk * G).
template <int C>
HWY_NOINLINE void MakeL(const float* kk, const float* G, const Gates& s, Index m, float* L) {
  MaskedByDecay<C>(kk, G, m, L);
  for (Index i = 0; i < m; ++i) {
    ScaleRow(L + i * kSquare<C>, s.beta[i], padded(i + 1));
    L[i * kSquare<C> + i] = 0;
  }
}

// L becomes T = (I + L)^-1 by forward substitution, exact zeros above the diagonal. In float64, in `wide` [C, C]: with beta near 2 and keys
// that repeat T's rows neither grow nor shrink, and float32 alone would use up the float32 contract.
template <int C>
HWY_NOINLINE void Inverse(Index m, double* wide, float* T) {
  const hn::Repartition<double, DF> dd;
  const hn::Rebind<float, decltype(dd)> df;
  constexpr int kWide = kLanes / 2, kSums = std::min(8, C / kWide);
  std::memset(wide, 0, sizeof(double) * C * static_cast<std::size_t>(m));
  for (Index i = 0; i < m; ++i) {
    float* row = T + i * kSquare<C>;
    double* wide_row = wide + i * C;
    for (Index x0 = 0; x0 < i; x0 += kSums * kWide) {
      hn::Vec<decltype(dd)> sum[kSums];
      FLASHDELTA_UNROLL(8) for (int u = 0; u < kSums; ++u) sum[u] = hn::Zero(dd);
      for (Index j = x0; j < i; ++j) {  // what is left of L's row starts at x0
        const auto l = hn::Set(dd, static_cast<double>(row[j]));
        const double* t = wide + j * C + x0;
        FLASHDELTA_UNROLL(8) for (int u = 0; u < kSums; ++u) sum[u] = hn::NegMulAdd(l, hn::LoadU(dd, t + u * kWide), sum[u]);
      }
      FLASHDELTA_UNROLL(8) for (int u = 0; u < kSums; ++u) {
        hn::StoreU(sum[u], dd, wide_row + x0 + u * kWide);
        hn::StoreU(hn::DemoteTo(df, sum[u]), df, row + x0 + u * kWide);
      }
    }
    wide_row[i] = 1;
    row[i] = 1;
  }
}

// T's columns times beta: U = T X = (T beta) R.
template <int C>
HWY_NOINLINE void ScaleColumns(float* T, const float* beta, Index m) {
  const DF d;
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j <= i; j += kLanes) {
      hn::StoreU(hn::Mul(hn::LoadU(d, T + i * kSquare<C> + j), hn::LoadU(d, beta + j)), d, T + i * kSquare<C> + j);
    }
  }
}

// out = a k^T on and below the diagonal, [m, m], for a = k or q, both transposed [padded(K), m]; all rows ld apart.
HWY_INLINE void TimesKeys(const op::Problem& p, const float* aT, const float* kT, Index ld, Index m, float* out) {
  Gemm(m, m, p.K, {aT, 1, ld}, {kT, ld}, {.data = out, .ld = ld}, Shape::out_lower);
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
