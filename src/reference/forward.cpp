#include "op/segment_counts.hpp"
#include "reference/parallel.hpp"
#include "reference/recurrence.hpp"
#include "reference/reference.hpp"

namespace flashdelta::reference {
namespace {

// Saved for backward at one chunk: the running sum of the log gates, and T = (I + L)^-1 where
// L[i, j] = beta_i * <k_i, k_j> * (decay of i) * ... * (decay of j + 1) for i > j. Written from that definition, by forward substitution.
void save_chunk(const op::Problem& p, std::int64_t row, std::int64_t head, std::int64_t begin, const std::vector<Token>& chunk) {
  constexpr std::int64_t C = FLASHDELTA_CHUNK;
  const auto length = static_cast<std::int64_t>(chunk.size());
  double sum = 0;
  for (std::int64_t i = 0; i < length && p.saved_c; ++i) {
    sum += chunk[i].log_gate;
    write_row(p.saved_c, p.saved_c.at(row, begin + i, head), 0, 1, &sum);
  }
  if (!p.saved_T) return;
  Vector inverse(C * C, 0.0);
  for (std::int64_t i = 0; i < length; ++i) {
    inverse[i * C + i] = 1;
    double decay = 1;
    for (std::int64_t j = i - 1; j >= 0; --j) {
      decay *= chunk[j + 1].decay;
      double dot = 0;
      for (std::int64_t d = 0; d < p.K; ++d) dot += chunk[i].k.value[d] * chunk[j].k.value[d];
      const double L = chunk[i].beta * dot * decay;
      for (std::int64_t m = 0; m <= j; ++m) inverse[i * C + m] -= L * inverse[j * C + m];
    }
    write_row(p.saved_T, p.saved_T.at(row, begin + i, head), p.saved_T.stride[3], C, inverse.data() + i * C);
  }
}

void forward_head(const op::Problem& p, std::int64_t n, std::int64_t head) {
  const op::Sequence sequence = op::sequence(p, n);
  const TokenReader reader(p, sequence.row, head);
  Vector state = read_state(p, p.initial_state, n, head);
  std::vector<Token> chunk;
  Step step;
  for (std::int64_t begin = sequence.begin; begin < sequence.end; begin += FLASHDELTA_CHUNK) {
    const std::int64_t index = (begin - sequence.begin) / FLASHDELTA_CHUNK;
    if (index % p.checkpoint_chunks == 0) {
      write_state(p, p.saved_states, op::saved_states_base(p, n) + index / p.checkpoint_chunks, head, state);
    }
    chunk.resize(static_cast<std::size_t>(std::min<std::int64_t>(FLASHDELTA_CHUNK, sequence.end - begin)));
    for (std::size_t i = 0; i < chunk.size(); ++i) {
      const std::int64_t t = begin + static_cast<std::int64_t>(i);
      reader.read(t, chunk[i]);
      step_forward(chunk[i], p.scale, state, step);
      write_row(p.o, p.o.at(sequence.row, t, head), p.o.stride[3], p.V, step.o.data());
    }
    save_chunk(p, sequence.row, head, begin, chunk);
  }
  write_state(p, p.final_state, n, head, state);
}

}  // namespace

void forward(const op::Problem& problem) {
  // Tokens of no sequence, and slots of saved_states that no chunk owns, keep this zero.
  for (const op::Tensor* tensor : {&problem.o, &problem.saved_c, &problem.saved_T, &problem.saved_states}) fill_zero(*tensor);
  parallel_for(problem.N * problem.HV, problem.num_threads, [&](std::int64_t i) { forward_head(problem, i / problem.HV, i % problem.HV); });
  op::store_segment_counts(problem, {});
}

}  // namespace flashdelta::reference
