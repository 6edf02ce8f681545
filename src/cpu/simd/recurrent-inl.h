// The rule token by token: one row of the state per value column, each row one pass of dot, update, dot. Included once per
// instruction set.
#if defined(FLASHDELTA_CPU_SIMD_RECURRENT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_RECURRENT_INL_H_
#undef FLASHDELTA_CPU_SIMD_RECURRENT_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_RECURRENT_INL_H_
#endif

#include "cpu/scratch.hpp"
#include "cpu/simd/hard-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

// s <- g s + u k, returns q . s (new).
HWY_INLINE float UpdateAndRead(float* HWY_RESTRICT s, const float* HWY_RESTRICT k, const float* HWY_RESTRICT q, float g, float u, Index n) {
  const DF d;
  const VF gv = hn::Set(d, g), uv = hn::Set(d, u);
  VF o0 = hn::Zero(d), o1 = hn::Zero(d);
  Index j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const VF s0 = hn::MulAdd(uv, hn::LoadU(d, k + j), hn::Mul(gv, hn::LoadU(d, s + j)));
    const VF s1 = hn::MulAdd(uv, hn::LoadU(d, k + j + kLanes), hn::Mul(gv, hn::LoadU(d, s + j + kLanes)));
    hn::StoreU(s0, d, s + j);
    hn::StoreU(s1, d, s + j + kLanes);
    o0 = hn::MulAdd(s0, hn::LoadU(d, q + j), o0);
    o1 = hn::MulAdd(s1, hn::LoadU(d, q + j + kLanes), o1);
  }
  for (; j < n; j += kLanes) {
    const VF s0 = hn::MulAdd(uv, hn::LoadU(d, k + j), hn::Mul(gv, hn::LoadU(d, s + j)));
    hn::StoreU(s0, d, s + j);
    o0 = hn::MulAdd(s0, hn::LoadU(d, q + j), o0);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(o0, o1)));
}

HWY_NOINLINE void LoadVector(const op::Problem& p, const op::Tensor& x, Index b, Index t, Index h, float factor, float* row) {
  LoadRow(x.dtype, x.at(b, t, h), x.stride[3], p.K, row);
  Fill(row + p.K, padded(p.K) - p.K);
  const float r = p.qk_l2norm ? 1 / std::sqrt(Dot(row, row, padded(p.K)) + 1e-6F) : 1.0F;
  if (r * factor != 1) ScaleRow(row, r * factor, padded(p.K));
}

// Rows are value columns: a state with K contiguous is read as it is, one with V contiguous goes through a tile.
HWY_NOINLINE void LoadRows(const op::Problem& p, Index n, Index h, const RecurrentScratch& s) {
  const Index ld = padded(p.K);
  const op::Tensor& x = p.initial_state;
  if (x && x.stride[2] == 1) {
    for (Index j = 0; j < p.V; ++j) {
      LoadRow(x.dtype, x.at(n, h, 0, j), 1, p.K, s.S + j * ld);
      Fill(s.S + j * ld + p.K, ld - p.K);
    }
    return;
  }
  Fill(s.S, padded(p.V) * ld);
  if (!x) return;
  for (Index v0 = 0; v0 < p.V; v0 += kTransposed) {
    const Index w = std::min<Index>(kTransposed, p.V - v0), ldt = leading(w);
    LoadColumns(x, n, h, p.K, v0, w, s.tile, ldt);
    Transpose(ld, padded(w), s.tile, ldt, s.S + v0 * ld, ld);
  }
}

HWY_NOINLINE void StoreRows(const op::Problem& p, Index n, Index h, const RecurrentScratch& s) {
  const Index ld = padded(p.K);
  const op::Tensor& x = p.final_state;
  if (x.stride[2] == 1) {
    for (Index j = 0; j < p.V; ++j) StoreRow(x.dtype, x.at(n, h, 0, j), 1, p.K, s.S + j * ld);
    return;
  }
  for (Index v0 = 0; v0 < p.V; v0 += kTransposed) {
    const Index w = std::min<Index>(kTransposed, p.V - v0), ldt = leading(w);
    Transpose(padded(w), ld, s.S + v0 * ld, ld, s.tile, ldt);
    StoreColumns(x, n, h, p.K, v0, w, s.tile, ldt);
  }
}

// The same as Dot, in float64.
HWY_INLINE double WideDot(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, Index n) {
  const DD d;
  const hn::Rebind<float, DD> df;
  VD s0 = hn::Zero(d), s1 = hn::Zero(d);
  for (Index j = 0; j < n; j += 2 * kWide) {
    s0 = hn::MulAdd(hn::PromoteTo(d, hn::LoadU(df, a + j)), hn::PromoteTo(d, hn::LoadU(df, b + j)), s0);
    s1 = hn::MulAdd(hn::PromoteTo(d, hn::LoadU(df, a + j + kWide)), hn::PromoteTo(d, hn::LoadU(df, b + j + kWide)), s1);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1)));
}

// One token: from k, q, v in s, the state there becomes the next and s.o the output. OnePass takes decay, read, update and output of a row
// while it is in registers; SeparatePasses makes a pass over the whole state for each.
struct OnePass {
  static HWY_INLINE void Step(const RecurrentScratch& s, Index ld, Index V, float g, float beta) {
    for (Index j = 0; j < V; ++j) {
      float* row = s.S + j * ld;
      const float u = beta * (s.v[j] - g * Dot(s.k, row, ld));
      s.o[j] = UpdateAndRead(row, s.k, s.q, g, u, ld);
    }
  }
};

struct SeparatePasses {
  static HWY_INLINE void Step(const RecurrentScratch& s, Index ld, Index V, float g, float beta) {
    const DF d;
    ScaleRow(s.S, g, V * ld);
    for (Index j = 0; j < V; ++j) s.v[j] = beta * (s.v[j] - Dot(s.k, s.S + j * ld, ld));
    for (Index j = 0; j < V; ++j) {
      const VF u = hn::Set(d, s.v[j]);
      float* row = s.S + j * ld;
      for (Index i = 0; i < ld; i += kLanes) hn::StoreU(hn::MulAdd(u, hn::LoadU(d, s.k + i), hn::LoadU(d, row + i)), d, row + i);
    }
    for (Index j = 0; j < V; ++j) s.o[j] = Dot(s.q, s.S + j * ld, ld);
  }
};

// A token whose rounding may last: what it reads is summed in float64, and beta has what rounding took from its key's length.
HWY_NOINLINE void StepOfReflection(const RecurrentScratch& s, Index ld, Index V, float g, double beta) {
  for (Index j = 0; j < V; ++j) {
    float* row = s.S + j * ld;
    const double u = beta * (static_cast<double>(s.v[j]) - static_cast<double>(g) * WideDot(s.k, row, ld));
    s.o[j] = UpdateAndRead(row, s.k, s.q, g, static_cast<float>(u), ld);
  }
}

template <class Rule>
void Recurrent(const op::Problem& p, std::int64_t n, std::int64_t h, float* scratch) {
  const RecurrentScratch s(p, scratch);
  const op::Sequence seq = op::sequence(p, n);
  const Index ld = padded(p.K), hk = h / (p.HV / p.H);
  LoadRows(p, n, h, s);
  for (Index t = seq.begin; t < seq.end; ++t) {
    LoadVector(p, p.k, seq.row, t, hk, 1, s.k);
    LoadVector(p, p.q, seq.row, t, hk, static_cast<float>(p.scale), s.q);
    LoadRow(p.v.dtype, p.v.at(seq.row, t, h), p.v.stride[3], p.V, s.v);
    const auto g = static_cast<float>(std::exp(LogGate(p, seq.row, t, h)));
    const double beta = Beta(p, seq.row, t, h);
    const auto rounded = static_cast<float>(beta);
    if (Reflection(rounded, Dot(s.k, s.k, ld)) > kLeastReflection) {
      StepOfReflection(s, ld, p.V, g, beta * LengthRatio(p, seq.row, t, hk, WideDot(s.k, s.k, ld)));
    } else {
      Rule::Step(s, ld, p.V, g, rounded);
    }
    StoreRow(p.o.dtype, p.o.at(seq.row, t, h), p.o.stride[3], p.V, s.o);
  }
  if (p.final_state) StoreRows(p, n, h, s);
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
