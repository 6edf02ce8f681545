// What the recurrence reads at one token, in float64: every flag of the problem applied, nothing else of it left to know.
#pragma once

#include <cstdint>
#include <vector>

#include "op/problem.hpp"

namespace flashdelta::reference {

using Vector = std::vector<double>;

// 1 / (1 + e^-x) and log(1 + e^x), finite and accurate for every finite x.
double sigmoid(double x);
double softplus(double x);

// x, or x * rsqrt(sum x^2 + 1e-6) under l2norm.
struct Normed {
  Vector value;
  double factor = 1;  // what x was multiplied by
};

struct Token {
  Normed q, k;
  Vector v;
  double log_gate = 0;
  double decay = 1;  // exp(log_gate); 0 at a log gate of -inf
  double beta = 1;
};

// Token `t` of batch row `row` as value head `head` reads it.
class TokenReader {
 public:
  TokenReader(const op::Problem& problem, std::int64_t row, std::int64_t head);
  void read(std::int64_t t, Token& token) const;

  // The chain from the gate and beta that the recurrence uses back to the arguments g, A_log, dt_bias and beta.
  struct GateGradient {
    double g = 0, A_log = 0, dt_bias = 0;
  };
  [[nodiscard]] GateGradient gate_gradient(std::int64_t t, const Token& token, double d_log_gate) const;
  [[nodiscard]] double beta_gradient(std::int64_t t, double d_beta) const;

 private:
  [[nodiscard]] double raw_gate(std::int64_t t) const;

  const op::Problem& problem_;
  std::int64_t row_, head_, key_head_;
  double gate_rate_ = 1;  // exp(A_log)
};

// Strided rows of `count` elements.
void read_row(const op::Tensor& tensor, const std::byte* at, std::int64_t stride, std::int64_t count, double* out);
void write_row(const op::Tensor& tensor, std::byte* at, std::int64_t stride, std::int64_t count, const double* in);

// The [K, V] matrix of one (sequence, value head) of a state tensor; an absent tensor reads as zero and takes no writes.
Vector read_state(const op::Problem& problem, const op::Tensor& states, std::int64_t n, std::int64_t head);
void write_state(const op::Problem& problem, const op::Tensor& states, std::int64_t n, std::int64_t head, const Vector& state);

void fill_zero(const op::Tensor& tensor);

}  // namespace flashdelta::reference
