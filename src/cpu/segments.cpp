#include "cpu/segments.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "op/element.hpp"

namespace flashdelta::cpu {
namespace {

std::int64_t planned_segments(const op::Problem& p, std::int64_t chunks, double ideal) {
  if (p.context_parallel == FLASHDELTA_CONTEXT_PARALLEL_OFF) return 1;
  if (p.num_segments > 0) return p.num_segments;
  if (p.batch_invariant || static_cast<double>(chunks) <= kSegmentThreshold * ideal) return 1;
  const auto wanted = static_cast<std::int64_t>(std::ceil(static_cast<double>(chunks) / ideal));
  return std::min({wanted, kMaxSegments, chunks / kMinSegmentChunks});
}

// An upper bound of the log norm of one token's transition.
double log_norm(const op::Problem& p, std::int64_t b, std::int64_t t, std::int64_t h) {
  double g = 0, beta = 1, k2 = 1;
  if (p.g) {
    g = op::load_element(p.g.dtype, p.g.at(b, t, h));
    if (p.gate_in_kernel) {
      const double x = g + (p.dt_bias ? op::load_element(p.dt_bias.dtype, p.dt_bias.at(h)) : 0.0);
      g = -std::exp(op::load_element(p.A_log.dtype, p.A_log.at(h))) * (std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
    }
  }
  if (p.beta) {
    beta = op::load_element(p.beta.dtype, p.beta.at(b, t, h));
    if (p.beta_sigmoid) beta = (p.neg_eigval ? 2 : 1) / (1 + std::exp(-beta));
  }
  if (!p.qk_l2norm) {
    const std::int64_t hk = h / (p.HV / p.H);
    k2 = 0;
    for (std::int64_t i = 0; i < p.K; ++i) {
      const double x = op::load_element(p.k.dtype, p.k.at(b, t, hk, i));
      k2 += x * x;
    }
  }
  // With the l2-norm 0 <= |k|^2 <= 1, and max(1, |1 - beta |k|^2|) is largest at its ends.
  return g + std::log(std::max(1.0, std::abs(1 - beta * k2)));
}

}  // namespace

std::vector<Cut> cut_sequences(const op::Problem& p, int threads) {
  double total = 0;
  std::vector<Cut> cuts(static_cast<std::size_t>(p.N));
  for (std::int64_t n = 0; n < p.N; ++n) total += static_cast<double>(chunks_of(p, n));
  const double ideal = total * static_cast<double>(p.HV) / threads;
  std::int64_t boundaries = 0;
  for (std::int64_t n = 0; n < p.N; ++n) {
    Cut& cut = cuts[static_cast<std::size_t>(n)];
    const std::int64_t chunks = chunks_of(p, n), units = (chunks + p.checkpoint_chunks - 1) / p.checkpoint_chunks;
    cut = {n, std::max<std::int64_t>(1, std::min(planned_segments(p, chunks, ideal), units)), boundaries};
    boundaries += (cut.count - 1) * p.HV;
  }
  std::stable_sort(cuts.begin(), cuts.end(), [&](const Cut& a, const Cut& b) { return chunks_of(p, a.n) > chunks_of(p, b.n); });
  return cuts;
}

std::int64_t boundary_count(const op::Problem& p, const std::vector<Cut>& cuts) {
  std::int64_t count = 0;
  for (const Cut& cut : cuts) count += (cut.count - 1) * p.HV;
  return count;
}

Span segment(const op::Problem& p, const Cut& cut, std::int64_t j) {
  const std::int64_t chunks = chunks_of(p, cut.n), e = p.checkpoint_chunks, units = (chunks + e - 1) / e;
  return {cut.n, units * j / cut.count * e, std::min(chunks, units * (j + 1) / cut.count * e)};
}

std::int64_t warm_up_chunks(const op::Problem& p, const Span& span, std::int64_t h, bool from_start) {
  if (p.context_parallel != FLASHDELTA_CONTEXT_PARALLEL_AUTO) return 0;
  const op::Sequence seq = op::sequence(p, span.n);
  const double enough = std::log(p.tolerance);
  double bound = 0;
  for (std::int64_t i = 0; i < span.last - span.first; ++i) {
    const std::int64_t begin = seq.begin + (from_start ? span.first + i : span.last - 1 - i) * kChunk;
    for (std::int64_t t = begin; t < std::min(begin + kChunk, seq.end); ++t) bound += log_norm(p, seq.row, t, h);
    if (bound < enough) return i + 1;
  }
  return 0;
}

void clear_outside(const op::Problem& p, const op::Tensor& x) {
  if (!x || p.cu_seqlens == nullptr) return;
  const std::int64_t begin = p.N > 0 ? op::cu_seqlen(p, 0) : p.T, end = p.N > 0 ? op::cu_seqlen(p, p.N) : p.T;
  const std::int64_t channels = x.rank == 4 ? x.shape[3] : 1, step = x.rank == 4 ? x.stride[3] : 1;
  for (std::int64_t b = 0; b < p.B; ++b) {
    for (std::int64_t t = 0; t < p.T; ++t) {
      if (t == begin) t = std::max(begin, end);
      if (t >= p.T) break;
      for (std::int64_t h = 0; h < x.shape[2]; ++h) {
        std::byte* row = x.at(b, t, h);
        for (std::int64_t i = 0; i < channels; ++i) {
          std::memset(row + i * step * op::size_of(x.dtype), 0, static_cast<std::size_t>(op::size_of(x.dtype)));
        }
      }
    }
  }
}

}  // namespace flashdelta::cpu
