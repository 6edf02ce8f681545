// The chunk loop of the forward pass. Included once per instruction set.
#if defined(FLASHDELTA_CPU_SIMD_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_FORWARD_INL_H_
#undef FLASHDELTA_CPU_SIMD_FORWARD_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_FORWARD_INL_H_
#endif

#include "cpu/scratch.hpp"
#include "cpu/simd/hard-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

// What the products of C tokens need beside the state: k and, if wanted, q, P; T, unless the chunk is hard. For the scratch of forward and
// of the reverse chain. Without `hard` T is made in any case.
template <int C, class Scratch>
HWY_INLINE void PrepareChunk(const op::Problem& p, const Place& at, Index h, bool with_q, const Gates& gates, const Scratch& s,
                             Hard<C>* hard) {
  const Index hk = h / (p.HV / p.H);
  const Index m = at.m, ld = leading(p.K), ldt = kSquare<C>;
  LoadTransposed(p, p.k, at, hk, 1, s.rows, ld, s.kT, ldt, nullptr);
  if (with_q) LoadTransposed(p, p.q, at, hk, static_cast<float>(p.scale), s.rows, ld, s.qT, ldt, nullptr);
  Decays<C>(gates, m, s.G);
  if (with_q) {
    TimesKeys(p, s.qT, s.kT, ldt, m, s.P);
    MaskedByDecay<C>(s.P, s.G, m, s.P);
  }
  TimesKeys(p, s.kT, s.kT, ldt, m, s.T);
  if (hard != nullptr) {
    FindHard<C>(p, at, h, hk, s.kT, s.T, s.G, gates, *hard);
    if (hard->is) return;
  }
  MakeL<C>(s.T, s.G, gates, m, s.T);
  Inverse<C>(m, s.wide, s.T);
}

// saved_c and saved_T, which are those of whole chunks.
HWY_NOINLINE void SaveChunk(const op::Problem& p, const Place& at, Index h, float* scratch) {
  Gates gates;
  LoadGates(p, at, h, gates);
  for (Index i = 0; p.saved_c && i < at.rows; ++i) {
    const auto c = static_cast<float>(gates.c[i]);
    std::memcpy(p.saved_c.at(at.b, at.t + i, h), &c, sizeof(c));
  }
  if (!p.saved_T) return;
  const ChunkScratch<kC> s(p, scratch);
  PrepareChunk<kC>(p, at, h, false, gates, s, nullptr);
  for (Index i = 0; i < at.rows; ++i) {
    StoreRow(p.saved_T.dtype, p.saved_T.at(at.b, at.t + i, h, 0), p.saved_T.stride[3], kC, s.T + i * kSquare<kC>);
  }
}

// One block of value columns of a half chunk, S its part of the state.
HWY_INLINE void ForwardBlock(const op::Problem& p, const Place& at, Index h, Pass pass, Index v0, Index w, const Gates& gates, float* S,
                             const ForwardScratch& s, const Hard<kHalf>& hard, Ahead& ahead) {
  constexpr Index ld = kValueBlock, ldt = kSquare<kHalf>;
  const Index m = at.m, wp = padded(w);
  if (pass == Pass::transition) {
    for (Index i = 0; i < m; ++i) Fill(s.R + i * ld, wp);
  } else {
    LoadTile(p.v, at.b, at.t, at.rows, m, h, v0, w, s.R, ld);
  }
  Gemm(m, w, p.K, {s.kT, 1, ldt}, {S, wp}, {.data = s.R, .ld = ld, .c0 = 1, .alpha = -1, .rows = gates.gam}, Shape::full, &ahead);
  if (hard.is) {
    SolveHard<false>(hard, m, wp, s.R, s.U);
  } else {
    Gemm(m, w, m, {s.T, ldt, 1}, {s.R, ld}, {.data = s.U, .ld = ld}, Shape::left_lower, &ahead);
  }
  if (pass == Pass::full) {  // o takes R's tile
    Gemm(m, w, p.K, {s.qT, 1, ldt}, {S, wp}, {.data = s.R, .ld = ld, .rows = gates.gam}, Shape::full, &ahead);
    Gemm(m, w, m, {s.P, ldt, 1}, {s.U, ld}, {.data = s.R, .ld = ld, .c0 = 1}, Shape::left_lower, &ahead);
    StoreTile(p.o, at.b, at.t, at.rows, h, v0, w, s.R, ld);
  }
  for (Index i = 0; i < m; ++i) ScaleRow(s.U + i * ld, gates.tail[i], wp);
  Gemm(p.K, w, at.rows, {s.kT, ldt, 1}, {s.U, ld}, {.data = S, .ld = wp, .c0 = gates.gl}, Shape::full, &ahead);
}

void Forward(const op::Problem& p, const Span& span, std::int64_t h, const Columns& columns, Pass pass, float* state, float* scratch) {
  const Index hk = h / (p.HV / p.H);
  const bool full = pass == Pass::full;
  const ForwardScratch s(p, scratch);
  Gates gates;
  Hard<kHalf> hard;
  const auto ask = [&](const Place& next, Ahead& ahead) HWY_ATTR {
    AskFor(p.k, next.b, next.t, next.rows, hk, ahead);
    if (full) AskFor(p.q, next.b, next.t, next.rows, hk, ahead);
    if (pass != Pass::transition) AskFor(p.v, next.b, next.t, next.rows, h, ahead);
  };
  for (Index chunk = span.first; chunk < span.last; ++chunk) {
    const Place whole = PlaceOf(p, span.n, chunk);
    if (full && p.saved_states && chunk % p.checkpoint_chunks == 0) {
      StoreState(p.saved_states, op::saved_states_base(p, span.n) + chunk / p.checkpoint_chunks, h, p.K, columns, state);
    }
    if (full && columns.first == 0 && (p.saved_c || p.saved_T)) SaveChunk(p, whole, h, scratch);
    for (Index half = 0; half * kHalf < whole.rows; ++half) {
      const Place at = HalfOf(whole, half);
      Ahead ahead;
      if (full) AskFor(p.o, at.b, at.t, at.rows, h, ahead);
      if (half == 0 && whole.rows > kHalf) {
        ask(HalfOf(whole, 1), ahead);
      } else {
        ask(HalfOf(PlaceOf(p, span.n, chunk + 1), 0), ahead);  // of no rows behind the sequence's end
      }
      LoadGates(p, at, h, gates);
      PrepareChunk<kHalf>(p, at, h, full, gates, s, &hard);
      if (!hard.is) ScaleColumns<kHalf>(s.T, gates.beta, at.m);
      for (Index v0 = columns.first; v0 < columns.last; v0 += kValueBlock) {
        ForwardBlock(p, at, h, pass, v0, std::min<Index>(kValueBlock, columns.last - v0), gates, state + v0 * padded(p.K), s, hard, ahead);
      }
    }
  }
}

void ApplyTransition(std::int64_t K, std::int64_t V, const float* m, const float* s, float* b) {
  const Index rows = padded(K);
  for (Index v0 = 0; v0 < V; v0 += kValueBlock) {
    const Index w = std::min<Index>(kValueBlock, V - v0), wp = padded(w);
    for (Index k0 = 0; k0 < K; k0 += kValueBlock) {
      const Index n = std::min<Index>(kValueBlock, K - k0);
      Gemm(K, w, n, {m + k0 * rows, padded(n), 1}, {s + v0 * rows + k0 * wp, wp}, {.data = b + v0 * rows, .ld = wp, .c0 = 1});
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
