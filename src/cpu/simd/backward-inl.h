// The adjoint of the chunk loop, one value head at a time. Names are algebra's (docs/numerics.md); q carries the scale, so P = lower(q k^T)
// G.
#if defined(FLASHDELTA_CPU_SIMD_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_BACKWARD_INL_H_
#undef FLASHDELTA_CPU_SIMD_BACKWARD_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_BACKWARD_INL_H_
#endif

#include "cpu/simd/forward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

constexpr Index kH = kHalf;
constexpr Index kLdH = kSquare<kHalf>;
constexpr Index kLdB = kValueBlock;

HWY_INLINE void LoadOrZero(const op::Tensor& x, const Place& at, Index h, Index c0, Index width, float* tile, Index ld) {
  if (x) return LoadTile(x, at.b, at.t, at.rows, at.m, h, c0, width, tile, ld);
  for (Index i = 0; i < at.m; ++i) Fill(tile + i * ld, padded(width));
}

// One block of value columns of the reverse chain, dS its part of the state's gradient.
HWY_INLINE void BackwardStateBlock(const op::Problem& p, const Place& at, Index h, bool with_o, Index v0, Index w, const Gates& gates,
                                   float* dS, const BackwardStateScratch& s, const Hard<kC>& hard) {
  constexpr Index ldt = kSquare<kC>;
  const Index m = at.m, wp = padded(w);
  if (with_o) LoadTile(p.d_o, at.b, at.t, at.rows, m, h, v0, w, s.d_o, kLdB);
  Gemm(m, w, p.K, {s.kT, 1, ldt}, {dS, wp}, {.data = s.dU, .ld = kLdB, .rows = gates.tail});
  if (with_o) Gemm(m, w, m, {s.P, 1, ldt}, {s.d_o, kLdB}, {.data = s.dU, .ld = kLdB, .c0 = 1}, Shape::left_upper);
  if (hard.is) {
    SolveHard<true>(hard, m, wp, s.dU, s.dX);
  } else {
    Gemm(m, w, m, {s.T, 1, ldt}, {s.dU, kLdB}, {.data = s.dX, .ld = kLdB}, Shape::left_upper);
  }
  for (Index i = 0; i < m; ++i) {
    ScaleRow(s.dX + i * kLdB, gates.gam[i] * gates.beta[i], wp);
    if (with_o) ScaleRow(s.d_o + i * kLdB, gates.gam[i], wp);
  }
  Gemm(p.K, w, at.rows, {s.kT, ldt, 1}, {s.dX, kLdB}, {.data = dS, .ld = wp, .c0 = gates.gl, .alpha = -1});
  if (with_o) Gemm(p.K, w, at.rows, {s.qT, ldt, 1}, {s.d_o, kLdB}, {.data = dS, .ld = wp, .c0 = 1});
}

void BackwardState(const op::Problem& p, const Span& span, std::int64_t h, Pass pass, float* d_state, float* scratch) {
  const Index width = pass == Pass::transition ? p.K : p.V;
  const bool with_o = pass != Pass::transition && p.d_o;
  const BackwardStateScratch s(p, scratch);
  Gates gates;
  Hard<kC> hard;
  for (Index chunk = span.last - 1; chunk >= span.first; --chunk) {
    const Place at = PlaceOf(p, span.n, chunk);
    LoadGates(p, at, h, gates);
    PrepareChunk<kC>(p, at, h, with_o, gates, s, &hard);
    for (Index v0 = 0; v0 < width; v0 += kValueBlock) {
      const Index w = std::min<Index>(kValueBlock, width - v0);
      BackwardStateBlock(p, at, h, with_o, v0, w, gates, d_state + v0 * padded(p.K), s, hard);
    }
  }
}

// What one value head's chunk gathers for dg and dbeta, per token, in double: the sums below telescope, and what is left of them may be
// small beside their terms.
struct GateGradient {
  double read[kC] = {};   // do . (gam q S) + dX . (-gam b k S): what c[i] changes at the token itself
  double write[kC] = {};  // (tail k) . (U dS'^T): what c[-1] - c[i] changes
  double beta[kC] = {};
  double state = 0;          // gl <S, dS'>
  double crossing[kC] = {};  // sum over j >= i > m of dP P + dL L
};

// One value head's half chunk. Before the second half stands the first, across which the state is carried. `next` is the half chunk that
// comes next, of no rows where there is none; `next_whole` its chunk, if that has not begun yet.
struct Halves {
  Place at, first, next, next_whole;
  bool second;
  Gates gates, first_gates;
  Hard<kH> hard, first_hard;
  Ahead* ahead;
};

// out += W, and to[i] += the sum over n key columns of x W at token i, all transposed: the dot is taken of this part alone, before it is
// lost in the sum over parts and value heads.
HWY_NOINLINE void AddAndDot(const float* W, const float* x, Index n, Index m, float* out, double* to) {
  const DF d;
  constexpr int kVecs = kH / kLanes;
  HWY_ALIGN_MAX float sums[kH];
  VF sum[kVecs];
  FLASHDELTA_UNROLL(8) for (int u = 0; u < kVecs; ++u) sum[u] = hn::Zero(d);
  for (Index j = 0; j < n; ++j, W += kLdH, x += kLdH, out += kLdH) {
    FLASHDELTA_UNROLL(8) for (int u = 0; u < kVecs; ++u) {
      const VF w = hn::LoadU(d, W + u * kLanes);
      sum[u] = hn::MulAdd(w, hn::LoadU(d, x + u * kLanes), sum[u]);
      hn::StoreU(hn::Add(w, hn::LoadU(d, out + u * kLanes)), d, out + u * kLanes);
    }
  }
  FLASHDELTA_UNROLL(8) for (int u = 0; u < kVecs; ++u) hn::StoreU(sum[u], d, sums + u * kLanes);
  for (Index i = 0; i < m; ++i) to[i] += static_cast<double>(sums[i]);
}

// R = v - gam kS in v's tile, X = beta R.
HWY_INLINE void Residual(const Gates& gates, const float* kS, Index m, Index wp, float* R, float* X) {
  const DF d;
  for (Index i = 0; i < m; ++i) {
    const VF gam = hn::Set(d, gates.gam[i]), beta = hn::Set(d, gates.beta[i]);
    for (Index j = i * kLdB; j < i * kLdB + wp; j += kLanes) {
      const VF r = hn::NegMulAdd(gam, hn::LoadU(d, kS + j), hn::LoadU(d, R + j));
      hn::StoreU(r, d, R + j);
      hn::StoreU(hn::Mul(beta, r), d, X + j);
    }
  }
}

// Sum over a block of S dS', a few rows at a time in float.
HWY_INLINE double StateDot(const float* S, const float* dS, Index rows, Index wp) {
  const DF d;
  double total = 0;
  for (Index i0 = 0; i0 < rows; i0 += 8) {
    VF s0 = hn::Zero(d), s1 = hn::Zero(d);
    for (Index i = i0; i < i0 + 8; i += 2) {
      for (Index j = 0; j < wp; j += kLanes) {
        s0 = hn::MulAdd(hn::LoadU(d, S + i * kLdB + j), hn::LoadU(d, dS + i * wp + j), s0);
        s1 = hn::MulAdd(hn::LoadU(d, S + (i + 1) * kLdB + j), hn::LoadU(d, dS + (i + 1) * wp + j), s1);
      }
    }
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, hn::Add(s0, s1))));
  }
  return total;
}

// S from the state in front of the chunk to that in front of its second half, a block of value columns.
HWY_INLINE void CarryAcross(const op::Problem& p, const Halves& x, Index h, Index v0, Index w, const BackwardScratch& s) {
  const Place& at = x.first;
  LoadTile(p.v, at.b, at.t, at.rows, at.m, h, v0, w, s.R, kLdB);
  Gemm(at.m, w, p.K, {s.kT_first, 1, kLdH}, {s.S, kLdB}, {.data = s.R, .ld = kLdB, .c0 = 1, .alpha = -1, .rows = x.first_gates.gam},
       Shape::full, x.ahead);
  if (x.first_hard.is) {
    SolveHard<false>(x.first_hard, at.m, padded(w), s.R, s.U);
    for (Index i = 0; i < at.m; ++i) ScaleRow(s.U + i * kLdB, x.first_gates.tail[i], padded(w));
  } else {
    Gemm(at.m, w, at.m, {s.T_first, kLdH, 1}, {s.R, kLdB}, {.data = s.U, .ld = kLdB, .rows = x.first_gates.tail}, Shape::left_lower,
         x.ahead);
  }
  Gemm(p.K, w, at.rows, {s.kT_first, kLdH, 1}, {s.U, kLdB}, {.data = s.S, .ld = kLdB, .c0 = x.first_gates.gl}, Shape::full, x.ahead);
}

// Of a block of value columns: R, U, kS, do. s.S becomes the state in front of the half chunk. Columns that pad are written too, from
// zeros: dots run over them.
HWY_INLINE void MakeU(const op::Problem& p, const Halves& x, Index h, Index v0, Index w, const BackwardScratch& s) {
  const Place& at = x.at;
  const Index m = at.m, wp = padded(w);
  if (x.second) CarryAcross(p, x, h, v0, w, s);
  LoadTile(p.v, at.b, at.t, at.rows, m, h, v0, w, s.R, kLdB);
  Gemm(m, wp, p.K, {s.kT, 1, kLdH}, {s.S, kLdB}, {.data = s.kS, .ld = kLdB}, Shape::full, x.ahead);
  float* X = s.dX;
  Residual(x.gates, s.kS, m, wp, s.R, X);
  if (x.hard.is) {
    SolveHard<false>(x.hard, m, wp, s.R, s.U);
  } else {
    Gemm(m, wp, m, {s.T, kLdH, 1}, {X, kLdB}, {.data = s.U, .ld = kLdB}, Shape::left_lower, x.ahead);
  }
  LoadOrZero(p.d_o, at, h, v0, w, s.d_o, kLdB);
}

// A block of value columns of what reaches q, k and the state in front through the state: from gam do, gam b dX, and U.
HWY_INLINE void BackwardKeys(const op::Problem& p, const Halves& x, Index w, float* dS, const BackwardScratch& s, GateGradient& sum) {
  const Index m = x.at.m, wp = padded(w);
  for (Index i = 0; i < m; ++i) {
    ScaleRow(s.d_o + i * kLdB, x.gates.gam[i], wp);
    ScaleRow(s.dX + i * kLdB, x.gates.gam[i] * x.gates.beta[i], wp);
    ScaleRow(s.U + i * kLdB, x.gates.tail[i], wp);
  }
  Transpose(m, wp, s.U, kLdB, s.UT, kLdH);
  Transpose(m, wp, s.d_o, kLdB, s.d_oT, kLdH);
  Transpose(m, wp, s.dX, kLdB, s.dXT, kLdH);
  for (Index k0 = 0; k0 < p.K; k0 += kKeyBlock) {
    const Index n = std::min<Index>(kKeyBlock, p.K - k0);
    Gemm(n, m, w, {s.S + k0 * kLdB, kLdB, 1}, {s.d_oT, kLdH}, {.data = s.W, .ld = kLdH}, Shape::full, x.ahead);
    AddAndDot(s.W, s.qT + k0 * kLdH, n, m, s.dqT + k0 * kLdH, sum.read);
  }
  Gemm(p.K, m, w, {s.S, kLdB, 1}, {s.dXT, kLdH}, {.data = s.dkT, .ld = kLdH, .c0 = 1, .alpha = -1}, Shape::full, x.ahead);
  Gemm(p.K, m, w, {dS, wp, 1}, {s.UT, kLdH}, {.data = s.dkT, .ld = kLdH, .c0 = 1}, Shape::full, x.ahead);

  Gemm(p.K, w, x.at.rows, {s.qT, kLdH, 1}, {s.d_o, kLdB}, {.data = dS, .ld = wp, .c0 = x.gates.gl}, Shape::full, x.ahead);
  Gemm(p.K, w, x.at.rows, {s.kT, kLdH, 1}, {s.dX, kLdB}, {.data = dS, .ld = wp, .c0 = 1, .alpha = -1}, Shape::full, x.ahead);
}

// One block of value columns: R, U, dU, dX; adds to dP, dL, dq, dk; stores dv; moves its part dS of the state's gradient to before the half
// chunk. s.S holds the state in front of the chunk.
HWY_NOINLINE void BackwardBlock(const op::Problem& p, const Halves& x, Index h, Index v0, float* dS, const BackwardScratch& s,
                                GateGradient& sum) {
  const Place& at = x.at;
  const Gates& gates = x.gates;
  const Index m = at.m, w = std::min<Index>(kValueBlock, p.V - v0), wp = padded(w);
  const float c0 = v0 == 0 ? 0.0F : 1.0F;
  MakeU(p, x, h, v0, w, s);
  sum.state += static_cast<double>(gates.gl) * StateDot(s.S, dS, padded(p.K), wp);
  float* dU = s.d_oT;
  Gemm(m, wp, p.K, {s.kT, 1, kLdH}, {dS, wp}, {.data = dU, .ld = kLdB, .rows = gates.tail}, Shape::full, x.ahead);
  for (Index i = 0; i < m; ++i) sum.write[i] += static_cast<double>(Dot(s.U + i * kLdB, dU + i * kLdB, wp));
  Gemm(m, wp, m, {s.P, 1, kLdH}, {s.d_o, kLdB}, {.data = dU, .ld = kLdB, .c0 = 1}, Shape::left_upper, x.ahead);
  if (x.hard.is) {
    SolveHard<true>(x.hard, m, wp, dU, s.dX);
  } else {
    Gemm(m, wp, m, {s.T, 1, kLdH}, {dU, kLdB}, {.data = s.dX, .ld = kLdB}, Shape::left_upper, x.ahead);
  }
  for (Index i = 0; i < m; ++i) {
    const float *dX = s.dX + i * kLdB, *kS = s.kS + i * kLdB;
    float* row = s.R + i * kLdB;
    sum.beta[i] += Dot(dX, row, wp);
    sum.read[i] -= static_cast<double>(gates.gam[i] * gates.beta[i]) * static_cast<double>(Dot(dX, kS, wp));
    std::memcpy(row, dX, static_cast<std::size_t>(wp) * sizeof(float));
    ScaleRow(row, gates.beta[i], wp);
  }
  if (p.dv) StoreTile(p.dv, at.b, at.t, at.rows, h, v0, w, s.R, kLdB);

  Transpose(m, wp, s.U, kLdB, s.UT, kLdH);
  Gemm(m, m, w, {s.d_o, kLdB, 1}, {s.UT, kLdH}, {.data = s.dP, .ld = kLdH, .c0 = c0}, Shape::out_lower, x.ahead);
  Gemm(m, m, w, {s.dX, kLdB, 1}, {s.UT, kLdH}, {.data = s.dL, .ld = kLdH, .c0 = c0, .alpha = -1}, Shape::out_lower, x.ahead);
  BackwardKeys(p, x, w, dS, s, sum);
}

// From dP and dL: E, N, their sums over the value heads, and what they give to dg and dbeta.
HWY_NOINLINE void BackwardSquare(const Place& at, const Gates& gates, bool first_head, const BackwardScratch& s, GateGradient& sum) {
  const Index m = at.m;
  float* G = s.T;
  Decays<kH>(gates, m, G);
  MaskedByDecay<kH>(s.dP, G, m, s.dP);
  MaskedByDecay<kH>(s.dL, G, m, s.dL);
  double columns[kH] = {}, rows[kH] = {};
  for (Index i = 0; i < at.rows; ++i) {
    const float *E = s.dP + i * kLdH, *qk = s.qk + i * kLdH, *kk = s.kk + i * kLdH;
    float* N = s.dL + i * kLdH;
    N[i] = 0;
    double beta = 0, row = 0;
    for (Index j = 0; j < i; ++j) {
      const double x = static_cast<double>(N[j]) * static_cast<double>(kk[j]);
      const double both = static_cast<double>(E[j]) * static_cast<double>(qk[j]) + x * static_cast<double>(gates.beta[i]);
      beta += x;
      row += both;
      columns[j] += both;
    }
    sum.beta[i] += beta;
    rows[i] = row;
  }
  for (Index i = 0; i < m; ++i) {
    if (i >= at.rows) s.dL[i * kLdH + i] = 0;
    ScaleRow(s.dL + i * kLdH, gates.beta[i], padded(i + 1));
  }
  double crossing = 0;
  for (Index i = at.rows - 1; i >= 0; --i) {
    crossing += rows[i] - columns[i];
    sum.crossing[i] = crossing;
  }
  if (s.E == s.dP) return;
  if (first_head) {
    std::memcpy(s.E, s.dP, static_cast<std::size_t>(m * kLdH) * sizeof(float));
    std::memcpy(s.N, s.dL, static_cast<std::size_t>(m * kLdH) * sizeof(float));
  } else {
    AddRow(s.dP, m * kLdH, s.E);
    AddRow(s.dL, m * kLdH, s.N);
  }
}

// dg[i] is the sum of dc[j] over j >= i, each part summed the way in which it cancels nothing.
HWY_NOINLINE void StoreGateGradients(const op::Problem& p, const Place& at, Index h, const Gates& gates, const GateGradient& sum,
                                     double* gate_sums) {
  double writes_before[kC];
  double before = 0, reads = 0;
  for (Index i = 0; i < at.rows; ++i) {
    writes_before[i] = before;
    before += sum.write[i];
  }
  for (Index i = at.rows - 1; i >= 0; --i) {
    reads += sum.read[i];
    const double dg = reads + writes_before[i] + sum.state + sum.crossing[i];
    // Through the floor nothing passes: every term of dg carries a factor exp(-1000).
    const double raw = dg * gates.slope[i];
    if (p.dg) op::store_element(p.dg.dtype, p.dg.at(at.b, at.t + i, h), raw);
    if (p.gate_in_kernel) {
      gate_sums[0] += dg * gates.g[i];
      gate_sums[1] += raw;
    }
    if (!p.dbeta) continue;
    double dbeta = sum.beta[i];
    if (p.beta_sigmoid) {
      const double y = Sigmoid(ReadScalar(p.beta, at.b, at.t + i, h));
      dbeta *= (p.neg_eigval ? 2 : 1) * y * (1 - y);
    }
    op::store_element(p.dbeta.dtype, p.dbeta.at(at.b, at.t + i, h), dbeta);
  }
}

// Gradient of x from that of factor * x r, r = 1 / |x|, given `tile` = factor * x r.
HWY_NOINLINE void StoreNormed(const op::Problem& p, const op::Tensor& out, const Place& at, Index h, float factor, const float* tile,
                              const float* norms, float* d_tile) {
  const DF d;
  const Index ld = padded(p.K);
  for (Index i = 0; i < at.rows; ++i) {
    float* row = d_tile + i * ld;
    const float* x = tile + i * ld;
    const VF along = hn::Set(d, p.qk_l2norm && factor != 0 ? Dot(x, row, ld) / factor : 0.0F);
    const VF f = hn::Set(d, factor), r = hn::Set(d, norms[i]);
    for (Index j = 0; j < ld; j += kLanes) {
      const VF across = hn::NegMulAdd(along, hn::LoadU(d, x + j), hn::Mul(f, hn::LoadU(d, row + j)));
      hn::StoreU(hn::Mul(r, across), d, row + j);
    }
  }
  if (out) StoreTile(out, at.b, at.t, at.rows, h, 0, p.K, d_tile, ld);
}

// T = (I + L)^-1.
HWY_INLINE void MakeInverse(const Gates& gates, const float* kk, const float* G, Index m, double* wide, float* T) {
  MakeL<kH>(kk, G, gates, m, T);
  Inverse<kH>(m, wide, T);
}

// Where the state in front of a chunk is: in saved_states' slot, or, where it had to be computed again, in `state`.
struct StateSource {
  Index slot;
  const float* state;
};

HWY_INLINE void LoadBlock(const op::Problem& p, const StateSource& from, Index h, Index v0, Index w, const BackwardScratch& s) {
  if (from.state == nullptr) return LoadColumns(p.saved_states, from.slot, h, p.K, v0, w, s.S, kLdB);
  const Index wp = padded(w);
  const float* block = from.state + v0 * padded(p.K);
  for (Index i = 0; i < padded(p.K); ++i) std::memcpy(s.S + i * kLdB, block + i * wp, static_cast<std::size_t>(wp) * sizeof(float));
}

// Gates, T (unless it is hard) and P of one value head's half chunk.
HWY_NOINLINE void PrepareHead(const op::Problem& p, Halves& x, Index h, const BackwardScratch& s) {
  const Index hk = h / (p.HV / p.H);
  float* G = s.dL;
  if (x.second) {
    LoadGates(p, x.first, h, x.first_gates);
    Decays<kH>(x.first_gates, x.first.m, G);
    FindHard(p, x.first, h, hk, s.kT_first, s.kk_first, G, x.first_gates, x.first_hard);
    if (!x.first_hard.is) {
      MakeInverse(x.first_gates, s.kk_first, G, x.first.m, s.wide, s.T_first);
      ScaleColumns<kH>(s.T_first, x.first_gates.beta, x.first.m);
    }
  }
  LoadGates(p, x.at, h, x.gates);
  Decays<kH>(x.gates, x.at.m, G);
  MaskedByDecay<kH>(s.qk, G, x.at.m, s.P);
  FindHard(p, x.at, h, hk, s.kT, s.kk, G, x.gates, x.hard);
  if (!x.hard.is) MakeInverse(x.gates, s.kk, G, x.at.m, s.wide, s.T);
}

// One value head's half chunk. `first` of those worked on together sets E and N, the others add to them.
HWY_NOINLINE void BackwardHead(const op::Problem& p, Halves& x, Index h, bool first, const StateSource& from, float* d_state,
                               double* gate_sums, const BackwardScratch& s) {
  GateGradient sum;
  PrepareHead(p, x, h, s);
  for (Index v0 = 0; v0 < p.V; v0 += kValueBlock) {
    LoadBlock(p, from, h, v0, std::min<Index>(kValueBlock, p.V - v0), s);
    BackwardBlock(p, x, h, v0, d_state + v0 * padded(p.K), s, sum);
  }
  BackwardSquare(x.at, x.gates, first, s, sum);
  StoreGateGradients(p, x.at, h, x.gates, sum, gate_sums);
}

// What one value head gives to dq, alone: it needs nothing of the state's gradient.
HWY_NOINLINE void QueryHead(const op::Problem& p, Halves& x, Index h, const StateSource& from, const BackwardScratch& s) {
  const Index m = x.at.m;
  PrepareHead(p, x, h, s);
  for (Index v0 = 0; v0 < p.V; v0 += kValueBlock) {
    const Index w = std::min<Index>(kValueBlock, p.V - v0), wp = padded(w);
    LoadBlock(p, from, h, v0, w, s);
    MakeU(p, x, h, v0, w, s);
    Transpose(m, wp, s.U, kLdB, s.UT, kLdH);
    Gemm(m, m, w, {s.d_o, kLdB, 1}, {s.UT, kLdH}, {.data = s.dP, .ld = kLdH, .c0 = v0 == 0 ? 0.0F : 1.0F}, Shape::out_lower);
    for (Index i = 0; i < m; ++i) ScaleRow(s.d_o + i * kLdB, x.gates.gam[i], wp);
    Transpose(m, wp, s.d_o, kLdB, s.d_oT, kLdH);
    Gemm(p.K, m, w, {s.S, kLdB, 1}, {s.d_oT, kLdH}, {.data = s.dqT, .ld = kLdH, .c0 = 1});
  }
  float *G = s.T, *E = s.dP, *ET = s.dL;
  Decays<kH>(x.gates, m, G);
  MaskedByDecay<kH>(E, G, m, E);
  Transpose(m, m, E, kLdH, ET, kLdH);
  Gemm(p.K, m, m, {s.kT, kLdH, 1}, {ET, kLdH}, {.data = s.dqT, .ld = kLdH, .c0 = 1});
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
