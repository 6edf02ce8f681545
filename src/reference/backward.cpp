#include "reference/parallel.hpp"
#include "reference/recurrence.hpp"
#include "reference/reference.hpp"

namespace flashdelta::reference {
namespace {

// What stands per sequence and value head until it can be summed in a fixed order.
struct HeadSums {
  double A_log = 0, dt_bias = 0;
};

// Memory of a value head: the state before every 64th token of the sequence, and around every token of 64.
constexpr std::int64_t kCheckpoint = 64;

std::vector<Vector> checkpoints(const op::Problem& p, std::int64_t n, std::int64_t head) {
  const op::Sequence sequence = op::sequence(p, n);
  const TokenReader reader(p, sequence.row, head);
  Vector state = read_state(p, p.initial_state, n, head);
  std::vector<Vector> states;
  Token token;
  Step step;
  for (std::int64_t t = sequence.begin; t < sequence.end; ++t) {
    if ((t - sequence.begin) % kCheckpoint == 0) states.push_back(state);
    reader.read(t, token);
    step_forward(token, p.scale, state, step);
  }
  return states;
}

// Gradients of one key head's normed q and k over a sequence, [length, K], summed over its value heads.
struct KeyHeadSums {
  Vector q, k;
};

void write_token(const op::Problem& p, const TokenReader& reader, std::int64_t row, std::int64_t t, std::int64_t head, const Token& token,
                 const TokenGradient& gradient, HeadSums& sums) {
  if (p.dv) write_row(p.dv, p.dv.at(row, t, head), p.dv.stride[3], p.V, gradient.v.data());
  const TokenReader::GateGradient gate = reader.gate_gradient(t, token, gradient.log_gate);
  if (p.dg) write_row(p.dg, p.dg.at(row, t, head), 0, 1, &gate.g);
  sums.A_log += gate.A_log;
  sums.dt_bias += gate.dt_bias;
  const double beta = reader.beta_gradient(t, gradient.beta);
  if (p.dbeta) write_row(p.dbeta, p.dbeta.at(row, t, head), 0, 1, &beta);
}

HeadSums backward_head(const op::Problem& p, std::int64_t n, std::int64_t head, KeyHeadSums& key_sums) {
  const op::Sequence sequence = op::sequence(p, n);
  const TokenReader reader(p, sequence.row, head);
  const std::vector<Vector> starts = checkpoints(p, n, head);
  const std::int64_t matrix = p.K * p.V;
  std::vector<Token> tokens(kCheckpoint);
  std::vector<Step> steps(kCheckpoint);
  Vector states(static_cast<std::size_t>((kCheckpoint + 1) * matrix));
  Vector d_state = read_state(p, p.d_final_state, n, head);
  Vector d_o(static_cast<std::size_t>(p.d_o ? p.V : 0));
  TokenGradient gradient;
  HeadSums sums;
  for (auto block = static_cast<std::int64_t>(starts.size()) - 1; block >= 0; --block) {
    const std::int64_t begin = sequence.begin + block * kCheckpoint;
    const std::int64_t length = std::min(kCheckpoint, sequence.end - begin);
    Vector state = starts[block];
    std::copy(state.begin(), state.end(), states.begin());
    for (std::int64_t i = 0; i < length; ++i) {
      reader.read(begin + i, tokens[i]);
      step_forward(tokens[i], p.scale, state, steps[i]);
      std::copy(state.begin(), state.end(), states.begin() + (i + 1) * matrix);
    }
    for (std::int64_t i = length - 1; i >= 0; --i) {
      const std::int64_t t = begin + i;
      if (p.d_o) read_row(p.d_o, p.d_o.at(sequence.row, t, head), p.d_o.stride[3], p.V, d_o.data());
      const double* before = states.data() + i * matrix;
      step_backward(tokens[i], steps[i], p.scale, before, before + matrix, d_o, d_state, gradient);
      write_token(p, reader, sequence.row, t, head, tokens[i], gradient, sums);
      const std::int64_t at = (t - sequence.begin) * p.K;
      for (std::int64_t d = 0; d < p.K; ++d) {
        key_sums.q[at + d] += gradient.q[d];
        key_sums.k[at + d] += gradient.k[d];
      }
    }
  }
  write_state(p, p.d_initial_state, n, head, d_state);
  return sums;
}

// From the gradient of y = x * f, f = rsqrt(sum x^2 + eps), to that of x: f * (dy - y <y, dy>).
void through_norm(const op::Problem& p, const Normed& y, double* gradient) {
  if (!p.qk_l2norm) return;
  double dot = 0;
  for (std::int64_t d = 0; d < p.K; ++d) dot += y.value[d] * gradient[d];
  for (std::int64_t d = 0; d < p.K; ++d) gradient[d] = y.factor * (gradient[d] - y.value[d] * dot);
}

void backward_key_head(const op::Problem& p, std::int64_t n, std::int64_t key_head, HeadSums* head_sums) {
  const op::Sequence sequence = op::sequence(p, n);
  const std::int64_t group = p.HV / p.H;
  KeyHeadSums sums;
  sums.q.assign(static_cast<std::size_t>(sequence.length() * p.K), 0.0);
  sums.k = sums.q;
  for (std::int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    head_sums[n * p.HV + head] = backward_head(p, n, head, sums);
  }
  const TokenReader reader(p, sequence.row, key_head * group);
  Token token;
  for (std::int64_t t = sequence.begin; t < sequence.end; ++t) {
    reader.read(t, token);
    double* dq = sums.q.data() + (t - sequence.begin) * p.K;
    double* dk = sums.k.data() + (t - sequence.begin) * p.K;
    through_norm(p, token.q, dq);
    through_norm(p, token.k, dk);
    if (p.dq) write_row(p.dq, p.dq.at(sequence.row, t, key_head), p.dq.stride[3], p.K, dq);
    if (p.dk) write_row(p.dk, p.dk.at(sequence.row, t, key_head), p.dk.stride[3], p.K, dk);
  }
}

}  // namespace

void backward(const op::Problem& problem) {
  // Tokens of no sequence keep this zero.
  for (const op::Tensor* tensor : {&problem.dq, &problem.dk, &problem.dv, &problem.dg, &problem.dbeta}) fill_zero(*tensor);
  std::vector<HeadSums> sums(static_cast<std::size_t>(problem.N * problem.HV));
  parallel_for(problem.N * problem.H, problem.num_threads,
               [&](std::int64_t i) { backward_key_head(problem, i / problem.H, i % problem.H, sums.data()); });
  for (std::int64_t head = 0; head < problem.HV; ++head) {
    HeadSums total;
    for (std::int64_t n = 0; n < problem.N; ++n) {
      total.A_log += sums[n * problem.HV + head].A_log;
      total.dt_bias += sums[n * problem.HV + head].dt_bias;
    }
    if (problem.dA_log) write_row(problem.dA_log, problem.dA_log.at(head), 0, 1, &total.A_log);
    if (problem.d_dt_bias) write_row(problem.d_dt_bias, problem.d_dt_bias.at(head), 0, 1, &total.dt_bias);
  }
}

}  // namespace flashdelta::reference
