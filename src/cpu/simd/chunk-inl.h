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

// Per-token scalars of one value head's chunk, or of half of one: the rest of the arrays is not set then. Beyond `rows` a token acts as if
// k, beta and g were 0.
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

// Log gate of a token before the floor.
HWY_INLINE double LogGate(const op::Problem& p, Index b, Index t, Index h) {
  if (!p.g) return 0;
  const double raw = ReadScalar(p.g, b, t, h);
  if (!p.gate_in_kernel) return raw;
  const double x = raw + (p.dt_bias ? ReadScalar(p.dt_bias, h) : 0.0);
  return -std::exp(ReadScalar(p.A_log, h)) * Softplus(x);
}

HWY_INLINE double Beta(const op::Problem& p, Index b, Index t, Index h) {
  if (!p.beta) return 1;
  const double x = ReadScalar(p.beta, b, t, h);
  return p.beta_sigmoid ? (p.neg_eigval ? 2 : 1) * Sigmoid(x) : x;
}

using DD = hn::Repartition<double, DF>;
using VD = hn::Vec<DD>;
constexpr int kWide = kLanes / 2;

// Highway's exp makes 0 of a NaN, which has to come through.
HWY_INLINE VD ExpOrNaN(VD x) { return hn::IfThenElse(hn::Eq(x, x), hn::Exp(DD(), x), x); }

HWY_INLINE void StoreFloats(VD x, float* to) { hn::StoreU(hn::DemoteTo(hn::Rebind<float, DD>(), x), hn::Rebind<float, DD>(), to); }

// A chunk's scalars of one head as doubles, 0 beyond its tokens.
HWY_INLINE void ReadScalars(const op::Tensor& x, const Place& at, Index h, Index n, double* out) {
  const std::byte* from = x.at(at.b, at.t, h);
  const Index step = x.stride[1] * op::size_of(x.dtype);
  for (Index i = 0; i < at.rows; ++i, from += step) out[i] = op::load_element(x.dtype, from);
  for (Index i = at.rows; i < n; ++i) out[i] = 0;
}

// LogGate of a chunk's tokens, with its slopes.
HWY_INLINE void LogGates(const op::Problem& p, const Place& at, Index h, Index n, Gates& s) {
  const DD d;
  for (Index i = 0; i < n; ++i) s.g[i] = 0, s.slope[i] = 1;
  if (!p.g) return;
  ReadScalars(p.g, at, h, n, s.g);
  if (!p.gate_in_kernel) return;
  const VD zero = hn::Zero(d), one = hn::Set(d, 1.0);
  const VD rate = hn::Set(d, -std::exp(ReadScalar(p.A_log, h))), bias = hn::Set(d, p.dt_bias ? ReadScalar(p.dt_bias, h) : 0.0);
  for (Index i = 0; i < n; i += kWide) {
    const VD x = hn::Add(hn::LoadU(d, s.g + i), bias), e = ExpOrNaN(hn::Neg(hn::Abs(x)));
    const auto positive = hn::Ge(x, zero);
    const VD sigmoid = hn::Div(hn::IfThenElse(positive, one, e), hn::Add(one, e));
    const VD softplus = hn::Add(hn::IfThenElseZero(positive, x), hn::Log1p(d, e));
    hn::StoreU(hn::IfThenElse(hn::Eq(x, x), hn::Mul(rate, softplus), x), d, s.g + i);
    hn::StoreU(hn::Mul(rate, sigmoid), d, s.slope + i);
  }
}

HWY_INLINE void Betas(const op::Problem& p, const Place& at, Index h, Index n, Gates& s) {
  const DD d;
  double beta[kC];
  if (p.beta) ReadScalars(p.beta, at, h, n, beta);
  const VD one = hn::Set(d, 1.0), most = hn::Set(d, p.neg_eigval ? 2.0 : 1.0);
  for (Index i = 0; i < n; i += kWide) {
    VD x = p.beta ? hn::LoadU(d, beta + i) : one;
    if (p.beta && p.beta_sigmoid) {
      const VD e = ExpOrNaN(hn::Neg(hn::Abs(x)));
      x = hn::Mul(most, hn::Div(hn::IfThenElse(hn::Ge(x, hn::Zero(d)), one, e), hn::Add(one, e)));
    }
    StoreFloats(x, s.beta + i);
  }
  std::fill(s.beta + at.rows, s.beta + n, 0.0F);
}

HWY_NOINLINE void LoadGates(const op::Problem& p, const Place& at, Index h, Gates& s) {
  const DD d;
  const Index n = at.m > kHalf ? kC : kHalf;
  LogGates(p, at, h, n, s);
  Betas(p, at, h, n, s);
  double c = 0;
  for (Index i = 0; i < n; ++i) {
    if (i < at.rows) {
      if (s.g[i] < kGateFloor) s.g[i] = kGateFloor;  // keeps a NaN
      c += s.g[i];
    }
    s.c[i] = c;
  }
  const VD last = hn::Set(d, c);
  for (Index i = 0; i < n; i += kWide) {
    const VD sum = hn::LoadU(d, s.c + i);
    StoreFloats(ExpOrNaN(sum), s.gam + i);
    StoreFloats(ExpOrNaN(hn::Sub(last, sum)), s.tail + i);
  }
  for (Index i = 0; i < n; ++i) {
    s.c_high[i] = static_cast<float>(s.c[i]);
    s.c_low[i] = static_cast<float>(s.c[i] - static_cast<double>(s.c_high[i]));
  }
  s.gl = s.gam[n - 1];
  std::fill(s.tail + at.rows, s.tail + n, 0.0F);
}

// q or k of a chunk, l2-normalised where asked, times `factor`, transposed [padded(K), m]: what a step of a product broadcasts then stands
// in one line. They pass through `rows`, [m, ld_rows]. norms (may be null) gets the rows' 1 / |x|.
HWY_NOINLINE void LoadTransposed(const op::Problem& p, const op::Tensor& x, const Place& at, Index h, float factor, float* rows,
                                 Index ld_rows, float* xT, Index ld, float* norms) {
  HWY_ALIGN_MAX float factors[kC];
  LoadTile(x, at.b, at.t, at.rows, at.m, h, 0, p.K, rows, ld_rows);
  std::fill(factors, factors + kC, 1.0F);
  if (p.qk_l2norm) {
    const DF d;
    for (Index i = 0; i < at.rows; ++i) factors[i] = Dot(rows + i * ld_rows, rows + i * ld_rows, padded(p.K));
    for (Index i = 0; i < kC; i += kLanes) {
      const VF squares = hn::Add(hn::LoadU(d, factors + i), hn::Set(d, 1e-6F));
      hn::StoreU(hn::Div(hn::Set(d, 1.0F), hn::Sqrt(squares)), d, factors + i);
    }
  }
  if (norms != nullptr) std::copy(factors, factors + at.rows, norms);
  for (Index i = 0; i < at.m; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(DF(), factors + i), hn::Set(DF(), factor)), DF(), factors + i);
  Transpose(at.m, padded(p.K), rows, ld_rows, xT, ld, factors);
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

// G[i][j] = exp(c[i] - c[j]) below and on the diagonal, 0 above in the same vector. Only blocks on the diagonal take an exponential per
// element. Left of them it is a product: with r the block's first row, both c[i] - c[r] and c[r] - c[j] are sums of gates and not positive.
template <int C>
HWY_NOINLINE void Decays(const Gates& s, Index m, float* G) {
  const DF d;
  constexpr Index kBlock = 16;
  HWY_ALIGN_MAX float before[C], within[kBlock];
  const auto exps = [&](Index i, Index j0, float sign, float* out) HWY_ATTR {
    const VF high = hn::Sub(hn::LoadU(d, s.c_high + j0), hn::Set(d, s.c_high[i]));
    const VF low = hn::Sub(hn::LoadU(d, s.c_low + j0), hn::Set(d, s.c_low[i]));
    hn::StoreU(hn::Exp(d, hn::Mul(hn::Set(d, sign), hn::Add(high, low))), d, out);
  };
  for (Index r = 0; r < m; r += kBlock) {
    for (Index j = 0; j < r; j += kLanes) exps(r, j, -1, before + j);
    for (Index j = 0; j < kBlock && r > 0; j += kLanes) exps(r, r + j, 1, within + j);
    for (Index i = r; i < std::min(r + kBlock, m); ++i) {
      float* row = G + i * kSquare<C>;
      const VF factor = hn::Set(d, r > 0 ? within[i - r] : 0.0F);
      Index j = 0;
      for (; j < r; j += kLanes) hn::StoreU(hn::Mul(factor, hn::LoadU(d, before + j)), d, row + j);
      for (; j <= i; j += kLanes) hn::StoreU(DecayLanes(s, i, j), d, row + j);
    }
  }
}

// out = a * G on and below the diagonal, exact zeros above it. `out` may be `a`.
template <int C>
HWY_NOINLINE void MaskedByDecay(const float* a, const float* G, Index m, float* out) {
  const DF d;
  for (Index i = 0; i < m; ++i) {
    const VF row = hn::Set(d, static_cast<float>(i));
    for (Index j = 0; j < C; j += kLanes) {
      const VF x = hn::Mul(hn::LoadU(d, a + i * kSquare<C> + j), hn::LoadU(d, G + i * kSquare<C> + j));
      hn::StoreU(hn::IfThenElseZero(hn::Le(hn::Iota(d, static_cast<float>(j)), row), x), d, out + i * kSquare<C> + j);
    }
  }
}

// L = strict_lower(beta * kk * G), below the diagonal and no further than its own vector beyond it.
template <int C>
HWY_NOINLINE void MakeL(const float* kk, const float* G, const Gates& s, Index m, float* L) {
  const DF d;
  for (Index i = 0; i < m; ++i) {
    const VF row = hn::Set(d, static_cast<float>(i)), beta = hn::Set(d, s.beta[i]);
    for (Index j = 0; j <= i; j += kLanes) {
      const VF x = hn::Mul(hn::LoadU(d, kk + i * kSquare<C> + j), hn::Mul(beta, hn::LoadU(d, G + i * kSquare<C> + j)));
      hn::StoreU(hn::IfThenElseZero(hn::Lt(hn::Iota(d, static_cast<float>(j)), row), x), d, L + i * kSquare<C> + j);
    }
  }
}

// L becomes T = (I + L)^-1 by forward substitution, exact zeros above the diagonal; four rows at a time, whose sums over the rows before
// them are one product. In float64, in `wide` [C, C]: with beta near 2 and keys that repeat T's rows neither grow nor shrink, and float32
// alone would use up the float32 contract.
template <int C>
HWY_NOINLINE void Inverse(Index m, double* wide, float* T) {
  const DD d;
  constexpr Index kRows = 4, kPanel = 2 * kWide;
  static_assert(C % kPanel == 0);
  HWY_ALIGN_MAX double L[kRows][C];
  for (Index i = 0; i < m; i += kRows) {
    for (Index r = 0; r < kRows; ++r) {
      for (Index j = 0; j < i + kRows; ++j) L[r][j] = static_cast<double>(T[(i + r) * kSquare<C> + j]);
    }
    Index x = 0;
    for (; x < i + kRows; x += kPanel) {
      VD acc[kRows][2];
      FLASHDELTA_UNROLL(4) for (Index r = 0; r < kRows; ++r) {  // the identity's rows
        const VD at = hn::Set(d, static_cast<double>(i + r - x));
        const VD lanes = hn::Iota(d, 0.0);
        acc[r][0] = hn::IfThenElseZero(hn::Eq(lanes, at), hn::Set(d, 1.0));
        acc[r][1] = hn::IfThenElseZero(hn::Eq(hn::Add(lanes, hn::Set(d, static_cast<double>(kWide))), at), hn::Set(d, 1.0));
      }
      for (Index j = x; j < i; ++j) {
        const VD t0 = hn::LoadU(d, wide + j * C + x), t1 = hn::LoadU(d, wide + j * C + x + kWide);
        FLASHDELTA_UNROLL(4) for (Index r = 0; r < kRows; ++r) {
          const VD l = hn::Set(d, L[r][j]);
          acc[r][0] = hn::NegMulAdd(l, t0, acc[r][0]);
          acc[r][1] = hn::NegMulAdd(l, t1, acc[r][1]);
        }
      }
      FLASHDELTA_UNROLL(4) for (Index r = 0; r < kRows; ++r) {
        FLASHDELTA_UNROLL(4) for (Index q = 0; q < r; ++q) {
          const VD l = hn::Set(d, L[r][i + q]);
          acc[r][0] = hn::NegMulAdd(l, acc[q][0], acc[r][0]);
          acc[r][1] = hn::NegMulAdd(l, acc[q][1], acc[r][1]);
        }
        FLASHDELTA_UNROLL(2) for (Index v = 0; v < 2; ++v) {
          hn::StoreU(acc[r][v], d, wide + (i + r) * C + x + v * kWide);
          StoreFloats(acc[r][v], T + (i + r) * kSquare<C> + x + v * kWide);
        }
      }
    }
    for (; x < C; x += kPanel) {
      for (Index r = 0; r < kRows; ++r) hn::StoreU(hn::Zero(DF()), DF(), T + (i + r) * kSquare<C> + x);
    }
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
