// The adjoint of the chunk loop. Names are algebra's (docs/numerics.md); q carries the scale, so P = lower(q k^T) G.
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

constexpr Index kLdB = leading(kValueBlock);

HWY_INLINE void LoadOrZero(const op::Tensor& x, const Place& at, Index h, Index c0, Index width, float* tile, Index ld) {
  if (x) return LoadTile(x, at.b, at.t, at.rows, at.m, h, c0, width, tile, ld);
  for (Index i = 0; i < at.m; ++i) Fill(tile + i * ld, padded(width));
}

void BackwardState(const op::Problem& p, const Span& span, std::int64_t h, Pass pass, float* d_state, float* scratch) {
  const Index width = pass == Pass::transition ? p.K : p.V;
  const Index ld = leading(width), ldk = leading(p.K), hk = h / (p.HV / p.H);
  const bool with_o = pass != Pass::transition && p.d_o;
  const BackwardStateScratch s(p, scratch);
  Gates gates;
  for (Index chunk = span.last - 1; chunk >= span.first; --chunk) {
    const Place at = PlaceOf(p, span.n, chunk);
    const Index m = at.m;
    LoadGates(p, at, h, gates);
    LoadNormed(p, p.k, at, hk, 1, s.k, nullptr);
    Transpose(m, padded(p.K), s.k, ldk, s.kT, kLdC);
    TimesKeys(p, {s.kT, 1, kLdC}, s.kT, m, s.L);
    Decays(gates, m, s.G);
    if (with_o) {
      LoadNormed(p, p.q, at, hk, static_cast<float>(p.scale), s.q, nullptr);
      TimesKeys(p, {s.q, ldk, 1}, s.kT, m, s.P);
      MaskedByDecay(s.P, s.G, m, s.P);
    }
    MakeL(s.L, s.G, gates, m, s.L);
    Inverse(s.L, m, s.wide, s.T);
    if (with_o) LoadTile(p.d_o, at.b, at.t, at.rows, m, h, 0, width, s.d_o, ld);

    Gemm(m, width, p.K, {s.k, ldk, 1}, {d_state, ld}, {.data = s.dU, .ld = ld, .rows = gates.tail});
    if (with_o) Gemm(m, width, m, {s.P, 1, kLdC}, {s.d_o, ld}, {.data = s.dU, .ld = ld, .c0 = 1}, Shape::left_upper);
    Gemm(m, width, m, {s.T, 1, kLdC}, {s.dU, ld}, {.data = s.dX, .ld = ld}, Shape::left_upper);
    for (Index i = 0; i < m; ++i) {
      ScaleRow(s.dX + i * ld, gates.gam[i] * gates.beta[i], padded(width));
      if (with_o) ScaleRow(s.d_o + i * ld, gates.gam[i], padded(width));
    }
    Gemm(p.K, width, at.rows, {s.k, 1, ldk}, {s.dX, ld}, {.data = d_state, .ld = ld, .c0 = gates.gl, .alpha = -1});
    if (with_o) Gemm(p.K, width, at.rows, {s.q, 1, ldk}, {s.d_o, ld}, {.data = d_state, .ld = ld, .c0 = 1});
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

// to[i] += x[i] . W[i] and out[i] += W[i]: the dot is taken of this part alone, before it is lost in the sum over parts and value heads.
HWY_INLINE void AddAndDot(const float* W, const float* x, Index ldx, Index m, Index n, float* out, double* to) {
  const DF d;
  for (Index i = 0; i < m; ++i) {
    VF sum = hn::Zero(d);
    for (Index j = 0; j < n; j += kLanes) {
      const VF w = hn::LoadU(d, W + i * n + j);
      sum = hn::MulAdd(w, hn::LoadU(d, x + i * ldx + j), sum);
      hn::StoreU(hn::Add(w, hn::LoadU(d, out + i * n + j)), d, out + i * n + j);
    }
    to[i] += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
  }
}

// One block of value columns: R, U, dU, dX; adds to dP, dL, dq, dk; stores dv; moves d_state to before the chunk.
HWY_NOINLINE void BackwardBlock(const op::Problem& p, const Place& at, Index h, Index v0, const op::Tensor& S, Index slot,
                                const Gates& gates, float* d_state, const BackwardScratch& s, GateGradient& sum) {
  const Index m = at.m, ldk = leading(p.K), ldq = padded(p.K), ldv = leading(p.V);
  const Index w = std::min<Index>(kValueBlock, p.V - v0), wp = padded(w);
  const float c0 = v0 == 0 ? 0.0F : 1.0F;
  float* dS = d_state + v0;
  for (Index i = 0; i < p.K; ++i) {
    LoadRow(S.dtype, S.at(slot, h, i, v0), S.stride[3], w, s.S + i * kLdB);
    Fill(s.S + i * kLdB + w, wp - w);
    sum.state += static_cast<double>(gates.gl) * static_cast<double>(Dot(s.S + i * kLdB, dS + i * ldv, wp));
  }
  for (Index i = p.K; i < padded(p.K); ++i) Fill(s.S + i * kLdB, wp);

  LoadTile(p.v, at.b, at.t, at.rows, m, h, v0, w, s.R, kLdB);
  Gemm(m, w, p.K, {s.k, ldk, 1}, {s.S, kLdB}, {.data = s.R, .ld = kLdB, .c0 = 1, .alpha = -1, .rows = gates.gam});
  for (Index i = 0; i < m; ++i) {  // X, in dX's tile for the moment
    std::memcpy(s.dX + i * kLdB, s.R + i * kLdB, static_cast<std::size_t>(wp) * sizeof(float));
    ScaleRow(s.dX + i * kLdB, gates.beta[i], wp);
  }
  Gemm(m, w, m, {s.T, kLdC, 1}, {s.dX, kLdB}, {.data = s.U, .ld = kLdB}, Shape::left_lower);
  Transpose(m, wp, s.U, kLdB, s.UT, kLdC);

  LoadOrZero(p.d_o, at, h, v0, w, s.d_o, kLdB);
  float* dU = s.U;
  Gemm(m, w, p.K, {s.k, ldk, 1}, {dS, ldv}, {.data = dU, .ld = kLdB, .rows = gates.tail});
  Gemm(m, w, m, {s.P, 1, kLdC}, {s.d_o, kLdB}, {.data = dU, .ld = kLdB, .c0 = 1}, Shape::left_upper);
  Gemm(m, w, m, {s.T, 1, kLdC}, {dU, kLdB}, {.data = s.dX, .ld = kLdB}, Shape::left_upper);
  for (Index i = 0; i < m; ++i) {
    float* row = s.R + i * kLdB;
    sum.beta[i] += Dot(s.dX + i * kLdB, row, wp);
    std::memcpy(row, s.dX + i * kLdB, static_cast<std::size_t>(wp) * sizeof(float));
    ScaleRow(row, gates.beta[i], wp);
  }
  if (p.dv) StoreTile(p.dv, at.b, at.t, at.rows, h, v0, w, s.R, kLdB);

  Gemm(m, m, w, {s.d_o, kLdB, 1}, {s.UT, kLdC}, {.data = s.dP, .ld = kLdC, .c0 = c0}, Shape::out_lower);
  Gemm(m, m, w, {s.dX, kLdB, 1}, {s.UT, kLdC}, {.data = s.dL, .ld = kLdC, .c0 = c0, .alpha = -1}, Shape::out_lower);

  for (Index i = 0; i < m; ++i) {
    ScaleRow(s.d_o + i * kLdB, gates.gam[i], wp);
    ScaleRow(s.dX + i * kLdB, gates.gam[i] * gates.beta[i], wp);
  }
  Transpose(padded(p.K), wp, s.S, kLdB, s.ST, ldk);
  Gemm(m, ldq, w, {s.d_o, kLdB, 1}, {s.ST, ldk}, {.data = s.W, .ld = ldq});
  AddAndDot(s.W, s.q, ldk, m, ldq, s.dq, sum.read);
  Gemm(m, ldq, w, {s.dX, kLdB, 1}, {s.ST, ldk}, {.data = s.W, .ld = ldq, .alpha = -1});
  AddAndDot(s.W, s.k, ldk, m, ldq, s.dk, sum.read);
  for (Index i = 0; i < p.K; ++i) std::memcpy(s.S + i * kLdB, dS + i * ldv, static_cast<std::size_t>(wp) * sizeof(float));
  Transpose(padded(p.K), wp, s.S, kLdB, s.ST, ldk);
  Gemm(m, ldq, w, {s.UT, 1, kLdC}, {s.ST, ldk}, {.data = s.W, .ld = ldq, .rows = gates.tail});
  AddAndDot(s.W, s.k, ldk, m, ldq, s.dk, sum.write);

  Gemm(p.K, w, at.rows, {s.q, 1, ldk}, {s.d_o, kLdB}, {.data = dS, .ld = ldv, .c0 = gates.gl});
  Gemm(p.K, w, at.rows, {s.k, 1, ldk}, {s.dX, kLdB}, {.data = dS, .ld = ldv, .c0 = 1, .alpha = -1});
}

// From dP and dL: E, N, their products with q and k, and what they give to dg and dbeta.
HWY_NOINLINE void BackwardSquare(const op::Problem& p, const Place& at, const Gates& gates, const BackwardScratch& s, GateGradient& sum) {
  const Index m = at.m, ldk = leading(p.K), ldq = padded(p.K);
  float* G = s.T;
  Decays(gates, m, G);
  MaskedByDecay(s.dP, G, m, s.dP);
  MaskedByDecay(s.dL, G, m, s.dL);
  double columns[kC] = {}, rows[kC] = {};
  for (Index i = 0; i < at.rows; ++i) {
    const float *E = s.dP + i * kLdC, *qk = s.qk + i * kLdC, *kk = s.kk + i * kLdC;
    float* N = s.dL + i * kLdC;
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
    if (i >= at.rows) s.dL[i * kLdC + i] = 0;
    ScaleRow(s.dL + i * kLdC, gates.beta[i], padded(i + 1));
  }
  double crossing = 0;
  for (Index i = at.rows - 1; i >= 0; --i) {
    crossing += rows[i] - columns[i];
    sum.crossing[i] = crossing;
  }
  Gemm(m, p.K, m, {s.dP, kLdC, 1}, {s.k, ldk}, {.data = s.dq, .ld = ldq, .c0 = 1}, Shape::left_lower);
  Gemm(m, p.K, m, {s.dL, kLdC, 1}, {s.k, ldk}, {.data = s.dk, .ld = ldq, .c0 = 1}, Shape::left_lower);
  Gemm(m, p.K, m, {s.dP, 1, kLdC}, {s.q, ldk}, {.data = s.dk, .ld = ldq, .c0 = 1}, Shape::left_upper);
  Gemm(m, p.K, m, {s.dL, 1, kLdC}, {s.k, ldk}, {.data = s.dk, .ld = ldq, .c0 = 1}, Shape::left_upper);
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
  const Index ld = leading(p.K), ldq = padded(p.K);
  for (Index i = 0; i < at.rows; ++i) {
    float* row = d_tile + i * ldq;
    const float* x = tile + i * ld;
    const VF along = hn::Set(d, p.qk_l2norm && factor != 0 ? Dot(x, row, ldq) / factor : 0.0F);
    const VF f = hn::Set(d, factor), r = hn::Set(d, norms[i]);
    for (Index j = 0; j < ldq; j += kLanes) {
      const VF across = hn::NegMulAdd(along, hn::LoadU(d, x + j), hn::Mul(f, hn::LoadU(d, row + j)));
      hn::StoreU(hn::Mul(r, across), d, row + j);
    }
  }
  if (out) StoreTile(out, at.b, at.t, at.rows, h, 0, p.K, d_tile, ldq);
}

HWY_NOINLINE void BackwardHead(const op::Problem& p, const Place& at, Index h, const op::Tensor& S, Index slot, float* d_state,
                               double* gate_sums, const BackwardScratch& s) {
  Gates gates;
  GateGradient sum;
  LoadGates(p, at, h, gates);
  float *G = s.dL, *L = s.dP;
  Decays(gates, at.m, G);
  MakeL(s.kk, G, gates, at.m, L);
  MaskedByDecay(s.qk, G, at.m, s.P);
  Inverse(L, at.m, s.wide, s.T);
  for (Index v0 = 0; v0 < p.V; v0 += kValueBlock) BackwardBlock(p, at, h, v0, S, slot, gates, d_state, s, sum);
  BackwardSquare(p, at, gates, s, sum);
  StoreGateGradients(p, at, h, gates, sum, gate_sums);
}

// States before the chunks of `block`, recomputed from the checkpoint at its start, as a states tensor of the group's first value head.
HWY_NOINLINE op::Tensor RecomputeStates(const op::Problem& p, const Span& block, Index hk, const BackwardScratch& s, float* scratch) {
  const Index ratio = p.HV / p.H, floats = p.K * leading(p.V), chunks = block.last - block.first;
  const Index slot = op::saved_states_base(p, block.n) + block.first / p.checkpoint_chunks;
  float* state = s.states + p.checkpoint_chunks * ratio * floats;
  for (Index r = 0; r < ratio; ++r) {
    const Index h = hk * ratio + r;
    LoadState(p.saved_states, slot, h, p.K, p.V, state);
    for (Index c = 0; c < chunks; ++c) {
      std::memcpy(s.states + (c * ratio + r) * floats, state, static_cast<std::size_t>(floats) * sizeof(float));
      if (c + 1 < chunks) Forward(p, {block.n, block.first + c, block.first + c + 1}, h, Pass::state, state, scratch);
    }
  }
  op::Tensor view;
  view.data = s.states;
  view.present = true;
  view.rank = 4;
  view.stride = {ratio * floats, 0, leading(p.V), 1};  // one value head at a time, found by its data pointer
  return view;
}

void Backward(const op::Problem& p, const Span& span, std::int64_t hk, float* d_states, double* gate_sums, float* scratch) {
  const Index ratio = p.HV / p.H, floats = p.K * leading(p.V), e = p.checkpoint_chunks, ldk = leading(p.K);
  const BackwardScratch s(p, scratch);
  HWY_ALIGN_MAX float q_norms[kC], k_norms[kC];
  for (Index end = span.last; end > span.first;) {
    const Span block{span.n, (end - 1) / e * e, end};
    const op::Tensor states = e > 1 ? RecomputeStates(p, block, hk, s, scratch) : p.saved_states;
    for (Index chunk = block.last - 1; chunk >= block.first; --chunk) {
      const Place at = PlaceOf(p, span.n, chunk);
      LoadNormed(p, p.k, at, hk, 1, s.k, k_norms);
      LoadNormed(p, p.q, at, hk, static_cast<float>(p.scale), s.q, q_norms);
      Transpose(at.m, padded(p.K), s.k, ldk, s.kT, kLdC);
      TimesKeys(p, {s.kT, 1, kLdC}, s.kT, at.m, s.kk);
      TimesKeys(p, {s.q, ldk, 1}, s.kT, at.m, s.qk);
      Fill(s.dq, at.m * padded(p.K));
      Fill(s.dk, at.m * padded(p.K));
      for (Index r = 0; r < ratio; ++r) {
        const Index h = hk * ratio + r;
        const Index slot = e > 1 ? chunk - block.first : op::saved_states_base(p, span.n) + chunk;
        op::Tensor S = states;
        if (e > 1) S.data = s.states + r * floats;
        BackwardHead(p, at, h, S, slot, d_states + r * floats, gate_sums + 2 * r, s);
      }
      StoreNormed(p, p.dq, at, hk, static_cast<float>(p.scale), s.q, q_norms, s.dq);
      StoreNormed(p, p.dk, at, hk, 1, s.k, k_norms, s.dk);
    }
    end = block.first;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
