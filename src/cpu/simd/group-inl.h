// The backward of a key head: its value heads, in groups small enough for their states' gradients to be at hand together.
#if defined(FLASHDELTA_CPU_SIMD_GROUP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASHDELTA_CPU_SIMD_GROUP_INL_H_
#undef FLASHDELTA_CPU_SIMD_GROUP_INL_H_
#else
#define FLASHDELTA_CPU_SIMD_GROUP_INL_H_
#endif

#include "cpu/simd/backward-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flashdelta::cpu {
namespace HWY_NAMESPACE {

// Norms of a half chunk's rows, and of its chunk's first half's.
struct Norms {
  HWY_ALIGN_MAX float q[kH], k[kH], first[kH];
};

// A key head's side of a half chunk, common to its value heads. The first half's keys are needed for the second half already, which comes
// before it: then they change places.
HWY_NOINLINE void LoadKeys(const op::Problem& p, const Halves& x, bool kept, Index hk, BackwardScratch& s, Norms& norms) {
  const Index ld = padded(p.K);
  const auto load = [&](const op::Tensor& tensor, const Place& at, float factor, float* to, float* xT)
                        HWY_ATTR { LoadTransposed(p, tensor, at, hk, factor, s.rows, ld, xT, kLdH, to); };
  if (kept) {
    std::swap(s.kT, s.kT_first);
    std::swap(s.kk, s.kk_first);
    std::memcpy(norms.k, norms.first, sizeof(norms.k));
  } else {
    load(p.k, x.at, 1, norms.k, s.kT);
    TimesKeys(p, s.kT, s.kT, kLdH, x.at.m, s.kk);
  }
  if (x.second) {
    load(p.k, x.first, 1, norms.first, s.kT_first);
    TimesKeys(p, s.kT_first, s.kT_first, kLdH, x.first.m, s.kk_first);
  }
  load(p.q, x.at, static_cast<float>(p.scale), norms.q, s.qT);
  TimesKeys(p, s.qT, s.kT, kLdH, x.at.m, s.qk);
}

// States before the chunks of `block`, recomputed from the checkpoint at its start: [chunk][value head of the group].
HWY_NOINLINE void RecomputeStates(const op::Problem& p, const Span& block, Index hk, const BackwardScratch& s, float* scratch) {
  const Index ratio = p.HV / p.H, floats = state_floats(p.K, p.V);
  const Index slot = op::saved_states_base(p, block.n) + block.first / p.checkpoint_chunks;
  for (Index r = 0; r < ratio; ++r) {
    const Index h = hk * ratio + r;
    float* state = s.states + r * floats;
    LoadState(p.saved_states, slot, h, p.K, p.V, state);
    for (Index c = block.first; c + 1 < block.last; ++c) {
      float* next = state + ratio * floats;
      std::memcpy(next, state, static_cast<std::size_t>(floats) * sizeof(float));
      Forward(p, {block.n, c, c + 1}, h, {0, p.V}, Pass::state, next, scratch);
      state = next;
    }
  }
}

// Between two groups the sum over the heads so far of dk, exact, stands where nothing final has been written yet: in dk itself, and, where
// dk has 16 bits, the other 16 in dq.
HWY_NOINLINE void Park(const op::Problem& p, const Place& at, Index hk, const float* rows, Index ld) {
  if (!p.dk) return;
  if (p.dk.dtype == op::DType::f32) return StoreTile(p.dk, at.b, at.t, at.rows, hk, 0, p.K, rows, ld);
  for (Index i = 0; i < at.rows; ++i) {
    auto* high = reinterpret_cast<std::uint16_t*>(p.dk.at(at.b, at.t + i, hk));
    auto* low = reinterpret_cast<std::uint16_t*>(p.dq.at(at.b, at.t + i, hk));
    for (Index j = 0; j < p.K; ++j) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, rows + i * ld + j, sizeof(bits));
      high[j * p.dk.stride[3]] = static_cast<std::uint16_t>(bits >> 16U);
      low[j * p.dq.stride[3]] = static_cast<std::uint16_t>(bits);
    }
  }
}

HWY_NOINLINE void Unpark(const op::Problem& p, const Place& at, Index hk, float* rows, Index ld) {
  if (!p.dk) return Fill(rows, at.m * ld);
  if (p.dk.dtype == op::DType::f32) return LoadTile(p.dk, at.b, at.t, at.rows, at.m, hk, 0, p.K, rows, ld);
  Fill(rows, at.m * ld);
  for (Index i = 0; i < at.rows; ++i) {
    const auto* high = reinterpret_cast<const std::uint16_t*>(p.dk.at(at.b, at.t + i, hk));
    const auto* low = reinterpret_cast<const std::uint16_t*>(p.dq.at(at.b, at.t + i, hk));
    for (Index j = 0; j < p.K; ++j) {
      const std::uint32_t bits = std::uint32_t{high[j * p.dk.stride[3]]} << 16U | low[j * p.dq.stride[3]];
      std::memcpy(rows + i * ld + j, &bits, sizeof(bits));
    }
  }
}

// dq, after the last group, and dk: what is left to add, E's and N's products with the rows of k and q, and the way back through the norms.
// Tiles that nothing needs any more take those rows.
HWY_NOINLINE void FinishKeys(const op::Problem& p, const Place& at, Index hk, const HeadGroups& groups, bool last, const BackwardScratch& s,
                             const Norms& norms) {
  const Index m = at.m, ld = padded(p.K);
  float *q = s.kT, *k = s.dqT, *dq = s.rows, *dk = s.rows;
  Transpose(ld, m, s.dqT, kLdH, dq, ld);
  Transpose(ld, m, s.kT, kLdH, k, ld);
  Transpose(ld, m, s.qT, kLdH, q, ld);
  if (last) {
    Gemm(m, p.K, m, {s.E, kLdH, 1}, {k, ld}, {.data = dq, .ld = ld, .c0 = 1}, Shape::left_lower);
    StoreNormed(p, p.dq, at, hk, static_cast<float>(p.scale), q, norms.q, dq);
  }
  Transpose(ld, m, s.dkT, kLdH, dk, ld);
  Gemm(m, p.K, m, {s.N, kLdH, 1}, {k, ld}, {.data = dk, .ld = ld, .c0 = 1}, Shape::left_lower);
  Gemm(m, p.K, m, {s.E, 1, kLdH}, {q, ld}, {.data = dk, .ld = ld, .c0 = 1}, Shape::left_upper);
  Gemm(m, p.K, m, {s.N, 1, kLdH}, {k, ld}, {.data = dk, .ld = ld, .c0 = 1}, Shape::left_upper);
  if (last) {
    StoreNormed(p, p.dk, at, hk, 1, k, norms.k, dk);
  } else if (groups.live) {
    Transpose(m, ld, dk, ld, s.dkT, kLdH);
  } else {
    Park(p, at, hk, dk, ld);
  }
}

// What comes after value head h's half chunk: the next head's, or, after the last one of those worked on together, the next half chunk,
// whose first head is h0. `state` is where its state is saved, if that is read next.
HWY_INLINE void AskForNext(const op::Problem& p, const Halves& x, Index h, Index h0, Index hk, bool last, Index slot, Ahead& ahead) {
  const auto ask = [&](const op::Tensor& tensor, const Place& at, Index head)
                       HWY_ATTR { AskFor(tensor, at.b, at.t, at.rows, head, ahead); };
  ask(p.dv, x.at, h);
  if (!last) {
    ask(p.v, x.at, h + 1);
    ask(p.d_o, x.at, h + 1);
    return;
  }
  ask(p.dq, x.at, hk);
  ask(p.dk, x.at, hk);
  ask(p.q, x.next, hk);
  ask(p.d_o, x.next, h0);
  ask(p.k, x.next_whole, hk);
  ask(p.v, x.next_whole, h0);
  const op::Tensor& states = p.saved_states;
  if (slot >= 0 && states.stride[3] == 1) {
    ahead.Add(states.at(slot, h0), p.K, states.stride[2] * op::size_of(states.dtype), p.V * op::size_of(states.dtype));
  }
}

// One group's part of a half chunk, [first, first + count) of key head hk's value heads. `from` holds the first head's state, if any.
// `next_slot` is where the state in front of the next chunk is saved, if that is needed next, else negative.
struct Group {
  Index hk, first, count;
  StateSource from;
  Index next_slot;
  float* d_states;
  double* gate_sums;
};

HWY_NOINLINE void BackwardGroup(const op::Problem& p, Halves& x, const Group& group, const HeadGroups& groups, const BackwardScratch& s,
                                const Norms& norms) {
  const Index h0 = group.hk * groups.ratio, floats = state_floats(p.K, p.V), ld = padded(p.K);
  const bool first = group.first == 0, last = group.first + group.count == groups.ratio;
  const auto source = [&](Index r) HWY_ATTR {
    return StateSource{group.from.slot, group.from.state == nullptr ? nullptr : group.from.state + r * floats};
  };
  Fill(s.dqT, ld * kLdH);
  if (first) {
    Fill(s.dkT, ld * kLdH);
  } else if (!groups.live) {
    Unpark(p, x.at, group.hk, s.rows, ld);
    Transpose(x.at.m, ld, s.rows, ld, s.dkT, kLdH);
  }
  // The earlier groups left dq, whose place dk's sum took, to the last one.
  x.ahead = nullptr;
  for (Index r = 0; last && p.dq && r < group.first; ++r) QueryHead(p, x, h0 + r, source(r), s);
  for (Index i = 0; i < group.count; ++i) {
    const Index r = group.first + i;
    Ahead ahead;
    AskForNext(p, x, h0 + r, h0 + group.first, group.hk, i + 1 == group.count, group.next_slot, ahead);
    x.ahead = &ahead;
    BackwardHead(p, x, h0 + r, i == 0, source(r), group.d_states + i * floats, group.gate_sums + 2 * i, s);
  }
  FinishKeys(p, x.at, group.hk, groups, last, s, norms);
}

void Backward(const op::Problem& p, const Span& span, std::int64_t h, std::int64_t count, float* d_states, double* gate_sums,
              float* scratch) {
  const HeadGroups groups(p);
  const Index ratio = groups.ratio, hk = h / ratio, first = h % ratio, floats = state_floats(p.K, p.V), e = p.checkpoint_chunks;
  BackwardScratch s(p, groups, scratch);
  Norms norms;
  Halves x;
  for (Index end = span.last; end > span.first;) {
    const Span block{span.n, (end - 1) / e * e, end};
    if (e > 1) RecomputeStates(p, block, hk, s, scratch);
    for (Index chunk = block.last - 1; chunk >= block.first; --chunk) {
      const Place at = PlaceOf(p, span.n, chunk);
      const StateSource from{op::saved_states_base(p, span.n) + chunk, e > 1 ? s.states + (chunk - block.first) * ratio * floats : nullptr};
      for (Index half = at.rows > kH ? 1 : 0; half >= 0; --half) {
        x.at = HalfOf(at, half);
        x.first = HalfOf(at, 0);
        x.second = half > 0;
        const bool more = half == 0 && chunk > 0;
        x.next_whole = more ? PlaceOf(p, span.n, chunk - 1) : Place{};
        x.next = half > 0 ? x.first : HalfOf(x.next_whole, 1);
        const Index next_slot = more && e == 1 ? from.slot - 1 : -1;
        for (Index r = first; r < first + count; r += groups.at(r)) {
          LoadKeys(p, x, r == first && !x.second && at.rows > kH, hk, s, norms);
          const Index done = r - first;
          BackwardGroup(p, x, {hk, r, groups.at(r), from, next_slot, d_states + done * floats, gate_sums + 2 * done}, groups, s, norms);
        }
      }
    }
    end = block.first;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace flashdelta::cpu
HWY_AFTER_NAMESPACE();

#endif
