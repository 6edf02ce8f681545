#include "support/case.hpp"

#include <cmath>
#include <limits>
#include <ostream>

#include "support/random.hpp"

namespace flashdelta::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

HostTensor normal_tensor(DType dtype, const Shape& shape, Random& random, double factor = 1) {
  HostTensor tensor(dtype, shape);
  for (std::int64_t i = 0; i < tensor.size(); ++i) tensor.put(i, factor * random.normal());
  return tensor;
}

std::vector<double> unit_vector(std::int64_t width, Random& random) {
  std::vector<double> x(static_cast<std::size_t>(width));
  double squares = 0;
  for (double& value : x) {
    value = random.normal();
    squares += value * value;
  }
  for (double& value : x) value /= std::sqrt(squares);
  return x;
}

// Keys share a direction with weight w, so that two of them have cosine about w^2.
HostTensor make_keys(const Case& c, Random& random) {
  const Shape shape = {c.B, c.T, c.H, c.K};
  if (c.keys == Keys::raw) return normal_tensor(c.dtype, shape, random);
  HostTensor k(c.dtype, shape);
  k.fill(0);
  if (c.keys == Keys::zero) return k;
  const double shared = c.keys == Keys::repeated  ? 1
                        : c.keys == Keys::close   ? std::sqrt(0.99)
                        : c.keys == Keys::similar ? std::sqrt(0.9)
                        : c.keys == Keys::alike   ? std::sqrt(0.65)
                                                  : 0;
  const std::vector<double> direction = unit_vector(c.K, random);
  for (std::int64_t row = 0; row < c.B * c.T * c.H; ++row) {
    if (c.keys == Keys::ended && row / c.H % c.T % 64 >= 48) continue;
    const std::vector<double> own = unit_vector(c.K, random);
    for (std::int64_t d = 0; d < c.K; ++d) {
      k.put(row * c.K + d, shared * direction[d] + std::sqrt(1 - shared * shared) * own[d]);
    }
  }
  return k;
}

double random_gate(Random& random, std::int64_t head) {
  const double gate = -std::log1p(std::exp(-random.normal())) / 16;
  return head % 4 == 3 ? 0 : gate;
}

double make_gate(Gate kind, std::int64_t t, std::int64_t head, Random& random) {
  switch (kind) {
    case Gate::steady: return -0.75;
    case Gate::strong: return -1000;
    case Gate::infinite: return -kInfinity;
    case Gate::bursts: return t % 20 < 3 ? -30 * random.uniform() : 0;
    case Gate::in_kernel: return random.normal();
    case Gate::random: return random_gate(random, head);
    case Gate::mixed: break;
    default: return 0;
  }
  const double per_head[] = {0, -1000, random_gate(random, 0), t % 7 == 3 ? -kInfinity : -0.01};
  return per_head[head % 4];
}

double make_beta(Beta kind, Random& random) {
  switch (kind) {
    case Beta::zero: return 0;
    case Beta::two: return 2;
    case Beta::random: return 1 / (1 + std::exp(-random.normal()));
    case Beta::sigmoid:
    case Beta::sigmoid_twice: return random.normal();
    default: return 1;
  }
}

Shape state_shape(const Case& c, std::int64_t sequences) {
  return {sequences, c.HV, c.state_v_first ? c.V : c.K, c.state_v_first ? c.K : c.V};
}

void make_gates(const Case& c, Random& random, Tensors& inputs) {
  const Shape shape = {c.B, c.T, c.HV};
  if (c.gate != Gate::absent) {
    HostTensor g(c.gate_dtype, shape);
    for (std::int64_t i = 0; i < g.size(); ++i) g.put(i, make_gate(c.gate, i / c.HV % c.T, i % c.HV, random));
    inputs["g"] = std::move(g);
  }
  if (c.gate == Gate::in_kernel) {
    HostTensor A_log(c.gate_dtype, {c.HV});
    for (std::int64_t i = 0; i < c.HV; ++i) A_log.put(i, std::log(0.05 + random.uniform()));
    inputs["A_log"] = std::move(A_log);
    if (c.dt_bias) inputs["dt_bias"] = normal_tensor(c.gate_dtype, {c.HV}, random);
  }
  if (c.beta != Beta::absent) {
    HostTensor beta(c.gate_dtype, shape);
    for (std::int64_t i = 0; i < beta.size(); ++i) beta.put(i, make_beta(c.beta, random));
    inputs["beta"] = std::move(beta);
  }
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.name << " (B " << c.B << ", T " << c.T << ", H " << c.H << ", HV " << c.HV << ", K " << c.K << ", V " << c.V << ", seed "
             << c.seed << ')';
}

void Call::set_cu_seqlens(std::vector<std::int64_t> values) {
  made_from.cu_seqlens = values;
  cu_seqlens = HostOffsets(std::move(values), made_from.int64_offsets);
}

std::int64_t Call::sequences() const { return made_from.sequences(); }

Call make_call(const Case& c) {
  Call call;
  call.made_from = c;
  call.options.backend = FLASHDELTA_BACKEND_CPU;
  call.options.has_scale = c.scale.has_value() ? 1 : 0;
  call.options.scale = c.scale.value_or(0);
  call.options.use_qk_l2norm_in_kernel = c.l2norm ? 1 : 0;
  call.options.use_gate_in_kernel = c.gate == Gate::in_kernel ? 1 : 0;
  call.options.use_beta_sigmoid_in_kernel = c.beta == Beta::sigmoid || c.beta == Beta::sigmoid_twice ? 1 : 0;
  call.options.allow_neg_eigval = c.beta == Beta::sigmoid_twice ? 1 : 0;
  call.options.state_v_first = c.state_v_first ? 1 : 0;
  call.final_state_dtype = c.state_dtype;
  if (!c.cu_seqlens.empty()) call.set_cu_seqlens(c.cu_seqlens);

  Random random(c.seed);
  const DType v_dtype = c.v_dtype.value_or(c.dtype);
  const Shape states = state_shape(c, c.sequences());
  call.inputs["q"] = normal_tensor(c.dtype, {c.B, c.T, c.H, c.K}, random);
  call.inputs["k"] = make_keys(c, random);
  call.inputs["v"] = normal_tensor(v_dtype, {c.B, c.T, c.HV, c.V}, random);
  make_gates(c, random, call.inputs);
  if (c.initial_state) call.inputs["initial_state"] = normal_tensor(c.state_dtype, states, random, 0.5);
  if (c.d_o) call.inputs["d_o"] = normal_tensor(v_dtype, {c.B, c.T, c.HV, c.V}, random);
  if (c.d_final_state) call.inputs["d_final_state"] = normal_tensor(c.state_dtype, states, random, 0.5);
  return call;
}

Call tokens_of(const Call& call, std::int64_t begin, std::int64_t end) {
  Call result = call;
  result.made_from.T = end - begin;
  for (const char* name : {"q", "k", "v", "g", "beta", "d_o"}) {
    if (call.inputs.contains(name)) result.inputs[name] = call.inputs.at(name).slice(1, begin, end);
  }
  return result;
}

Call sequence_of(const Call& packed, std::int64_t n) {
  const std::vector<std::int64_t>& offsets = packed.made_from.cu_seqlens;
  Call result = tokens_of(packed, offsets[n], offsets[n + 1]);
  result.set_cu_seqlens({});
  for (const char* name : {"initial_state", "d_final_state"}) {
    if (packed.inputs.contains(name)) result.inputs[name] = packed.inputs.at(name).slice(0, n, n + 1);
  }
  return result;
}

Tensors results_of_sequence(const Call& packed, const Tensors& results, std::int64_t n) {
  const std::vector<std::int64_t>& offsets = packed.made_from.cu_seqlens;
  Tensors parts;
  for (const auto& [name, tensor] : results) {
    if (name == "final_state" || name == "d_initial_state") {
      parts[name] = tensor.slice(0, n, n + 1);
    } else if (tensor.shape().size() > 2 && !name.starts_with("saved")) {
      parts[name] = tensor.slice(1, offsets[n], offsets[n + 1]);
    }
  }
  return parts;
}

Tensors results_only(Tensors tensors) {
  for (const char* name : {"saved_c", "saved_T", "saved_states", "segment_counts"}) tensors.erase(name);
  return tensors;
}

Call oracle_call(const Call& call) {
  Call oracle = call;
  oracle.options.backend = FLASHDELTA_BACKEND_REFERENCE;
  oracle.final_state_dtype = DType::f64;
  oracle.in_place = oracle.segment_counts = false;
  oracle.layouts.clear();
  oracle.unwanted = {"saved_c", "saved_T", "saved_states"};
  for (auto& [name, tensor] : oracle.inputs) tensor = tensor.converted(DType::f64);
  return oracle;
}

}  // namespace flashdelta::testing
