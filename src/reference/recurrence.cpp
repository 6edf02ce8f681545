#include "reference/recurrence.hpp"

namespace flashdelta::reference {

void step_forward(const Token& token, double scale, Vector& state, Step& step) {
  const std::size_t K = token.k.value.size();
  const std::size_t V = token.v.size();
  step.read = token.v;
  for (std::size_t i = 0; i < K; ++i) {
    double* row = state.data() + i * V;
    for (std::size_t j = 0; j < V; ++j) row[j] *= token.decay;
    for (std::size_t j = 0; j < V; ++j) step.read[j] -= token.k.value[i] * row[j];
  }
  step.written.resize(V);
  for (std::size_t j = 0; j < V; ++j) step.written[j] = token.beta * step.read[j];
  step.o.assign(V, 0.0);
  for (std::size_t i = 0; i < K; ++i) {
    double* row = state.data() + i * V;
    for (std::size_t j = 0; j < V; ++j) row[j] += token.k.value[i] * step.written[j];
    for (std::size_t j = 0; j < V; ++j) step.o[j] += token.q.value[i] * row[j];
  }
  for (double& value : step.o) value *= scale;
}

void step_backward(const Token& token, const Step& step, double scale, const double* before, const double* after, const Vector& d_o,
                   Vector& d_state, TokenGradient& gradient) {
  const std::size_t K = token.k.value.size();
  const std::size_t V = token.v.size();
  gradient.q.assign(K, 0.0);
  gradient.k.assign(K, 0.0);
  // o = scale * q S
  if (!d_o.empty()) {
    for (std::size_t i = 0; i < K; ++i) {
      double* d_row = d_state.data() + i * V;
      const double* row = after + i * V;
      double dot = 0;
      for (std::size_t j = 0; j < V; ++j) dot += row[j] * d_o[j];
      gradient.q[i] = scale * dot;
      const double factor = scale * token.q.value[i];
      for (std::size_t j = 0; j < V; ++j) d_row[j] += factor * d_o[j];
    }
  }
  // S <- S + k^T u
  Vector d_written(V, 0.0);
  for (std::size_t i = 0; i < K; ++i) {
    const double* d_row = d_state.data() + i * V;
    double dot = 0;
    for (std::size_t j = 0; j < V; ++j) dot += d_row[j] * step.written[j];
    gradient.k[i] = dot;
    for (std::size_t j = 0; j < V; ++j) d_written[j] += token.k.value[i] * d_row[j];
  }
  // u = beta * r, r = v - k S
  gradient.beta = 0;
  gradient.v.resize(V);
  for (std::size_t j = 0; j < V; ++j) {
    gradient.beta += d_written[j] * step.read[j];
    gradient.v[j] = token.beta * d_written[j];
  }
  // r = v - k S, then S <- decay * S
  double d_decay = 0;
  for (std::size_t i = 0; i < K; ++i) {
    double* d_row = d_state.data() + i * V;
    const double* row = before + i * V;
    double dot = 0;
    for (std::size_t j = 0; j < V; ++j) {
      dot += row[j] * gradient.v[j];
      d_row[j] -= token.k.value[i] * gradient.v[j];
      d_decay += row[j] * d_row[j];
      d_row[j] *= token.decay;
    }
    gradient.k[i] -= token.decay * dot;
  }
  gradient.log_gate = token.decay * d_decay;
}

}  // namespace flashdelta::reference
