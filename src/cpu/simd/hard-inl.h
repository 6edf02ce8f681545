// Hard chunks: those in which roundings last. A token with beta |k|^2 near 2 is a reflection; where keys repeat and no gate forgets, the
// same rounding comes with every token, and in some hundred of them float32 adds up to more than its contract. For such a chunk, or half of
// one, L is made in float64 from betas and key lengths that nothing has rounded, and U = T beta R is solved for in float64; products with
// the state stay float32, since what they round comes once a chunk. Included once per instruction set.
#if defined(FLASHDELTA_CPU_SIMD_HARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_HARD_INL_H_
#undef FLASHDELTA_CPU_SIMD_HARD_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_HARD_INL_H_
#endif

#include "cpu/simd/chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

// What a chunk of C tokens is solved with, where it is hard.
template <int C>
struct Hard {
  bool is = false;
  double beta[C];                 // not rounded
  HWY_ALIGN_MAX double L[C * C];  // all of it: zero on the diagonal and above
};

// How far a token goes beyond forgetting what its key reads: 1 at beta |k|^2 = 2.
HWY_INLINE double Reflection(float beta, float square) { return static_cast<double>(beta) * static_cast<double>(square) - 1; }

// Exact over rounded |k|^2 of a token's key, `normed` the sum of squares of the rounded one. 1 without the l2-norm, where keys are as
// given.
HWY_INLINE double LengthRatio(const op::Problem& p, Index b, Index t, Index hk, double normed) {
  if (!p.qk_l2norm || !(normed > 0)) return 1;
  const std::byte* k = p.k.at(b, t, hk);
  const Index step = p.k.stride[3] * op::size_of(p.k.dtype);
  double given = 0;
  for (Index j = 0; j < p.K; ++j, k += step) {
    const double x = op::load_element(p.k.dtype, k);
    given += x * x;
  }
  return given / (given + 1e-6) / normed;
}

// Whether roundings last: the mean over all pairs of tokens of how much both reflect, times the squared cosine of their keys, times what
// the gates between them leave. kk, as TimesKeys leaves it, and G are C x C.
template <int C>
HWY_INLINE bool RoundingsLast(const float* kk, const float* G, const Gates& s, Index rows) {
  double weight[C];
  int reflections = 0;
  for (Index i = 0; i < rows; ++i) {
    const float square = kk[i * kSquare<C> + i];
    const double past = Reflection(s.beta[i], square);
    weight[i] = past > kLeastReflection ? past * past / static_cast<double>(square) : 0;
    reflections += past > kLeastReflection ? 1 : 0;
  }
  if (reflections < 2) return false;
  double sum = 0;
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < i; ++j) {
      const double x = static_cast<double>(kk[i * kSquare<C> + j]) * static_cast<double>(G[i * kSquare<C> + j]);
      sum += weight[i] * weight[j] * x * x;
    }
  }
  return 2 * sum > kHardMean * static_cast<double>(rows * (rows - 1));
}

// Factors that give products of a chunk's keys, kT, their exact lengths.
template <int C>
HWY_INLINE void LengthFactors(const op::Problem& p, const Place& at, Index hk, const float* kT, double* to) {
  for (Index i = 0; i < at.rows; ++i) {
    double normed = 0;
    for (Index j = 0; j < p.K; ++j) {
      const auto x = static_cast<double>(kT[j * kSquare<C> + i]);
      normed += x * x;
    }
    to[i] = std::sqrt(LengthRatio(p, at.b, at.t + i, hk, normed));
  }
}

// kT: keys transposed, rows kSquare<C> apart, as are those of kk and G, both float32's.
template <int C>
HWY_NOINLINE void FindHard(const op::Problem& p, const Place& at, Index h, Index hk, const float* kT, const float* kk, const float* G,
                           const Gates& s, Hard<C>& to) {
  to.is = RoundingsLast<C>(kk, G, s, at.rows);
  if (!to.is) return;
  const DD d;
  const hn::Rebind<float, DD> df;
  double factors[C];
  LengthFactors<C>(p, at, hk, kT, factors);
  for (Index i = 0; i < at.m; ++i) {
    double* row = to.L + i * C;
    std::fill(row, row + C, 0.0);
    to.beta[i] = i < at.rows ? Beta(p, at.b, at.t + i, h) : 0;
    for (Index j0 = 0; j0 < i && i < at.rows; j0 += kWide) {
      VD sum = hn::Zero(d);
      for (Index j = 0; j < p.K; ++j) {
        const float* k = kT + j * kSquare<C>;
        sum = hn::MulAdd(hn::Set(d, static_cast<double>(k[i])), hn::PromoteTo(d, hn::LoadU(df, k + j0)), sum);
      }
      hn::StoreU(sum, d, row + j0);
    }
    for (Index j = 0; j < C; ++j) {
      row[j] = j < i && i < at.rows ? to.beta[i] * factors[i] * factors[j] * row[j] * std::exp(s.c[i] - s.c[j]) : 0;
    }
  }
}

// X = (I + L)^-1 diag(beta) B, or with Adjoint (I + L)^-T B: [m, wp], rows kValueBlock apart.
template <bool Adjoint, int C>
HWY_NOINLINE void SolveHard(const Hard<C>& hard, Index m, Index wp, const float* B, float* X) {
  const DD d;
  const hn::Rebind<float, DD> df;
  HWY_ALIGN_MAX double x[C * kValueBlock];
  const auto at = [m](Index n) { return Adjoint ? m - 1 - n : n; };
  for (Index n = 0; n < m; ++n) {
    const Index i = at(n);
    const VD factor = hn::Set(d, Adjoint ? 1.0 : hard.beta[i]);
    for (Index v = 0; v < wp; v += kWide) {
      VD sum = hn::Mul(factor, hn::PromoteTo(d, hn::LoadU(df, B + i * kValueBlock + v)));
      for (Index e = 0; e < n; ++e) {
        const Index j = at(e);
        sum = hn::NegMulAdd(hn::Set(d, Adjoint ? hard.L[j * C + i] : hard.L[i * C + j]), hn::LoadU(d, x + j * kValueBlock + v), sum);
      }
      hn::StoreU(sum, d, x + i * kValueBlock + v);
      StoreFloats(sum, X + i * kValueBlock + v);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
