// The chunk loop of the forward pass. Included once per instruction set.
#if defined(FLASHDELTA_CPU_SIMD_FORWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_FORWARD_INL_H_
#undef FLASHDELTA_CPU_SIMD_FORWARD_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_FORWARD_INL_H_
#endif

#include "cpu/scratch.hpp"
#include "cpu/simd/chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

HWY_NOINLINE void SaveChunk(const op::Problem& p, const Place& at, Index h, const Gates& gates, const float* T) {
  for (Index i = 0; i < at.rows; ++i) {
    if (p.saved_c) {
      const auto c = static_cast<float>(gates.c[i]);
      std::memcpy(p.saved_c.at(at.b, at.t + i, h), &c, sizeof(c));
    }
    if (p.saved_T) StoreRow(p.saved_T.dtype, p.saved_T.at(at.b, at.t + i, h, 0), p.saved_T.stride[3], kC, T + i * kLdC);
  }
}

void Forward(const op::Problem& p, const Span& span, std::int64_t h, Pass pass, float* state, float* scratch) {
  const Index width = pass == Pass::transition ? p.K : p.V;
  const Index ld = leading(width), ldk = leading(p.K), hk = h / (p.HV / p.H);
  const bool full = pass == Pass::full;
  const ForwardScratch s(p, scratch);
  Gates gates;
  for (Index chunk = span.first; chunk < span.last; ++chunk) {
    const Place at = PlaceOf(p, span.n, chunk);
    const Index m = at.m;
    if (full && p.saved_states && chunk % p.checkpoint_chunks == 0) {
      StoreState(p.saved_states, op::saved_states_base(p, span.n) + chunk / p.checkpoint_chunks, h, p.K, p.V, state);
    }
    Ahead ahead;
    if (full) AskFor(p.o, at.b, at.t, at.rows, h, ahead);
    if (chunk + 1 < span.last) {
      const Place next = PlaceOf(p, span.n, chunk + 1);
      AskFor(p.k, next.b, next.t, next.rows, hk, ahead);
      if (full) AskFor(p.q, next.b, next.t, next.rows, hk, ahead);
      if (pass != Pass::transition) AskFor(p.v, next.b, next.t, next.rows, h, ahead);
    }
    LoadGates(p, at, h, gates);
    LoadNormed(p, p.k, at, hk, 1, s.k, nullptr);
    Transpose(m, padded(p.K), s.k, ldk, s.kT, kLdC);
    TimesKeys(p, {s.kT, 1, kLdC}, s.kT, m, s.L);  // A reads k transposed too: what a step broadcasts stands in one line
    Decays(gates, m, s.G);
    if (full) {
      LoadNormed(p, p.q, at, hk, static_cast<float>(p.scale), s.R, nullptr);  // R's tile is free until v comes
      Transpose(m, padded(p.K), s.R, ldk, s.qT, kLdC);
      TimesKeys(p, {s.qT, 1, kLdC}, s.kT, m, s.P);
      MaskedByDecay(s.P, s.G, m, s.P);
    }
    MakeL(s.L, s.G, gates, m, s.L);
    Inverse(s.L, m, s.wide, s.T);
    if (full && (p.saved_c || p.saved_T)) SaveChunk(p, at, h, gates, s.T);
    ScaleColumns(s.T, gates.beta, m);

    if (pass == Pass::transition) {
      for (Index i = 0; i < m; ++i) Fill(s.R + i * ld, padded(width));
    } else {
      LoadTile(p.v, at.b, at.t, at.rows, m, h, 0, width, s.R, ld);
    }
    Gemm(m, width, p.K, {s.kT, 1, kLdC}, {state, ld}, {.data = s.R, .ld = ld, .c0 = 1, .alpha = -1, .rows = gates.gam}, Shape::full,
         &ahead);
    Gemm(m, width, m, {s.T, kLdC, 1}, {s.R, ld}, {.data = s.U, .ld = ld}, Shape::left_lower, &ahead);
    if (full) {  // o takes R's tile
      Gemm(m, width, p.K, {s.qT, 1, kLdC}, {state, ld}, {.data = s.R, .ld = ld, .rows = gates.gam}, Shape::full, &ahead);
      Gemm(m, width, m, {s.P, kLdC, 1}, {s.U, ld}, {.data = s.R, .ld = ld, .c0 = 1}, Shape::left_lower, &ahead);
      StoreTile(p.o, at.b, at.t, at.rows, h, 0, width, s.R, ld);
    }
    for (Index i = 0; i < m; ++i) ScaleRow(s.U + i * ld, gates.tail[i], padded(width));
    Gemm(p.K, width, at.rows, {s.k, 1, ldk}, {s.U, ld}, {.data = state, .ld = ld, .c0 = gates.gl}, Shape::full, &ahead);
  }
}

void ApplyTransition(std::int64_t K, std::int64_t V, const float* m, const float* s, float* b) {
  Gemm(K, V, K, {m, leading(K), 1}, {s, leading(V)}, {.data = b, .ld = leading(V), .c0 = 1});
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
