#include "reference/token.hpp"

#include <cmath>

#include "op/element.hpp"

namespace flashdelta::reference {
namespace {

constexpr double kNormEpsilon = 1e-6;

double element(const op::Tensor& tensor, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0) {
  return op::load_element(tensor.dtype, tensor.at(i, j, k));
}

void normalise(bool wanted, Normed& x) {
  x.factor = 1;
  if (!wanted) return;
  double squares = 0;
  for (const double value : x.value) squares += value * value;
  x.factor = 1 / std::sqrt(squares + kNormEpsilon);
  for (double& value : x.value) value *= x.factor;
}

}  // namespace

double sigmoid(double x) {
  const double small = std::exp(-std::abs(x));
  return (x >= 0 ? 1 : small) / (1 + small);
}

double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::abs(x))); }

void read_row(const op::Tensor& tensor, const std::byte* at, std::int64_t stride, std::int64_t count, double* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = op::load_element(tensor.dtype, at + i * stride * op::size_of(tensor.dtype));
}

void write_row(const op::Tensor& tensor, std::byte* at, std::int64_t stride, std::int64_t count, const double* in) {
  for (std::int64_t i = 0; i < count; ++i) op::store_element(tensor.dtype, at + i * stride * op::size_of(tensor.dtype), in[i]);
}

Vector read_state(const op::Problem& problem, const op::Tensor& states, std::int64_t n, std::int64_t head) {
  Vector state(static_cast<std::size_t>(problem.K * problem.V), 0.0);
  if (!states) return state;
  for (std::int64_t i = 0; i < problem.K; ++i) {
    read_row(states, states.at(n, head, i), states.stride[3], problem.V, state.data() + i * problem.V);
  }
  return state;
}

void write_state(const op::Problem& problem, const op::Tensor& states, std::int64_t n, std::int64_t head, const Vector& state) {
  if (!states) return;
  for (std::int64_t i = 0; i < problem.K; ++i) {
    write_row(states, states.at(n, head, i), states.stride[3], problem.V, state.data() + i * problem.V);
  }
}

void fill_zero(const op::Tensor& tensor) {
  if (!tensor) return;
  std::array<std::int64_t, 4> shape = {1, 1, 1, 1};
  for (int axis = 0; axis < tensor.rank; ++axis) shape[axis] = tensor.shape[axis];
  for (std::int64_t i = 0; i < shape[0]; ++i) {
    for (std::int64_t j = 0; j < shape[1]; ++j) {
      for (std::int64_t k = 0; k < shape[2]; ++k) {
        for (std::int64_t l = 0; l < shape[3]; ++l) op::store_element(tensor.dtype, tensor.at(i, j, k, l), 0);
      }
    }
  }
}

TokenReader::TokenReader(const op::Problem& problem, std::int64_t row, std::int64_t head)
    : problem_(problem), row_(row), head_(head), key_head_(head / (problem.HV / problem.H)) {
  if (problem.gate_in_kernel) gate_rate_ = std::exp(element(problem.A_log, head));
}

double TokenReader::raw_gate(std::int64_t t) const {
  return element(problem_.g, row_, t, head_) + (problem_.dt_bias ? element(problem_.dt_bias, head_) : 0);
}

void TokenReader::read(std::int64_t t, Token& token) const {
  const op::Problem& p = problem_;
  token.q.value.resize(static_cast<std::size_t>(p.K));
  token.k.value.resize(static_cast<std::size_t>(p.K));
  token.v.resize(static_cast<std::size_t>(p.V));
  read_row(p.q, p.q.at(row_, t, key_head_), p.q.stride[3], p.K, token.q.value.data());
  read_row(p.k, p.k.at(row_, t, key_head_), p.k.stride[3], p.K, token.k.value.data());
  read_row(p.v, p.v.at(row_, t, head_), p.v.stride[3], p.V, token.v.data());
  normalise(p.qk_l2norm, token.q);
  normalise(p.qk_l2norm, token.k);

  token.log_gate = 0;
  if (p.gate_in_kernel) {
    token.log_gate = -gate_rate_ * softplus(raw_gate(t));
  } else if (p.g) {
    token.log_gate = element(p.g, row_, t, head_);
  }
  token.decay = std::exp(token.log_gate);

  token.beta = p.beta ? element(p.beta, row_, t, head_) : 1;
  if (p.beta_sigmoid) token.beta = sigmoid(token.beta) * (p.neg_eigval ? 2 : 1);
}

TokenReader::GateGradient TokenReader::gate_gradient(std::int64_t t, const Token& token, double d_log_gate) const {
  if (!problem_.gate_in_kernel) return {d_log_gate, 0, 0};
  // A gate that forgot everything has no gradient; its log gate of -inf must not turn 0 * inf into NaN.
  if (d_log_gate == 0) return {0, 0, 0};
  const double raw = -gate_rate_ * sigmoid(raw_gate(t)) * d_log_gate;
  return {raw, token.log_gate * d_log_gate, raw};
}

double TokenReader::beta_gradient(std::int64_t t, double d_beta) const {
  if (!problem_.beta_sigmoid) return d_beta;
  const double logit = element(problem_.beta, row_, t, head_);
  return d_beta * sigmoid(logit) * sigmoid(-logit) * (problem_.neg_eigval ? 2 : 1);
}

}  // namespace flashdelta::reference
