#include "support/central_differences.hpp"

#include <cmath>

namespace flashdelta::testing {
namespace {

// Balances the h^2 of the formula against the rounding of float64 over h.
constexpr double kStep = 2e-5;

double dot(const HostTensor& a, const HostTensor& b) {
  double sum = 0;
  for (std::int64_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

double loss(Call& oracle) {
  const Tensors out = chunk_forward(oracle);
  double sum = 0;
  if (oracle.inputs.contains("d_o")) sum += dot(out.at("o"), oracle.inputs["d_o"]);
  if (oracle.inputs.contains("d_final_state")) sum += dot(out.at("final_state"), oracle.inputs["d_final_state"]);
  return sum;
}

}  // namespace

Tensors central_differences(const Call& call) {
  Call oracle = oracle_call(call);
  oracle.options.num_threads = 1;
  Tensors gradients;
  for (const char* name : {"q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias"}) {
    if (!oracle.inputs.contains(name)) continue;
    HostTensor gradient(DType::f64, oracle.inputs[name].shape());
    for (std::int64_t i = 0; i < gradient.size(); ++i) {
      const double x = oracle.inputs[name][i];
      const double step = kStep * std::max(1.0, std::abs(x));
      double losses[2];
      for (const int side : {0, 1}) {
        oracle.inputs[name].put(i, side == 0 ? x - step : x + step);
        losses[side] = loss(oracle);
      }
      oracle.inputs[name].put(i, x);
      gradient.put(i, std::isfinite(x) ? (losses[1] - losses[0]) / (2 * step) : 0);
    }
    gradients[name == std::string("initial_state") || name == std::string("dt_bias") ? std::string("d_") + name : std::string("d") + name] =
        std::move(gradient);
  }
  return gradients;
}

}  // namespace flashdelta::testing
