#include <gtest/gtest.h>

#include <cmath>

#include "cpu/cpu.hpp"
#include "op/check.hpp"
#include "support/case.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {
namespace {

const DLTensor* input(const Call& call, const char* name) {
  const auto found = call.inputs.find(name);
  return found == call.inputs.end() ? nullptr : found->second.dl();
}

// Adds a poisoned output unless the call does not want it; null then.
DLTensor* output(const Call& call, Tensors& outputs, const char* name, DType dtype, const Shape& shape) {
  if (call.unwanted.contains(name)) return nullptr;
  const auto layout = call.layouts.find(name);
  outputs[name] = HostTensor(dtype, shape, layout == call.layouts.end() ? Layout::contiguous : layout->second);
  return outputs[name].dl();
}

template <class Args>
void set_inputs(const Call& call, Args& args) {
  args.struct_size = sizeof(Args);
  args.options = call.options;
  args.q = input(call, "q");
  args.k = input(call, "k");
  args.v = input(call, "v");
  args.g = input(call, "g");
  args.beta = input(call, "beta");
  args.initial_state = input(call, "initial_state");
  args.cu_seqlens = call.cu_seqlens.dl();
  args.A_log = input(call, "A_log");
  args.dt_bias = input(call, "dt_bias");
}

// Asks for the workspace, runs, and checks that nothing but outputs and workspace was written.
template <class Args>
void run(Call& call, Args& args, const Tensors& outputs, flashdelta_status (*query)(const Args*, std::size_t*),
         flashdelta_status (*operation)(const Args*)) {
  const Tensors before = call.inputs;
  std::size_t bytes = 0;
  ASSERT_EQ(query(&args, &bytes), FLASHDELTA_OK) << flashdelta_last_error();
  Workspace workspace(bytes);
  args.workspace = workspace.data();
  args.workspace_size = workspace.size();
  ASSERT_EQ(operation(&args), FLASHDELTA_OK) << flashdelta_last_error();
  EXPECT_TRUE(workspace.guards_intact()) << "wrote outside the workspace";
  for (const auto& [name, tensor] : outputs) EXPECT_TRUE(tensor.guards_intact()) << "wrote outside the elements of " << name;
  for (const auto& [name, tensor] : before) {
    if (call.in_place && name == "initial_state") continue;
    EXPECT_EQ(call.inputs[name].bits(), tensor.bits()) << "changed its input " << name;
  }
}

enum class Path : std::uint8_t { chunked, recurrent, separate_passes };

flashdelta_status separate_passes_forward(const flashdelta_forward_args* args) {
  cpu::separate_passes_forward(op::check_forward(args, op::Operation::recurrent_forward, true));
  return FLASHDELTA_OK;
}

Tensors forward(Call& call, Path path) {
  const bool chunked = path == Path::chunked;
  const Case& c = call.made_from;
  Tensors outputs;
  flashdelta_forward_args args{};
  set_inputs(call, args);
  const Shape& states = call.inputs.contains("initial_state")
                            ? call.inputs["initial_state"].shape()
                            : Shape{call.sequences(), c.HV, c.state_v_first ? c.V : c.K, c.state_v_first ? c.K : c.V};
  args.o = output(call, outputs, "o", call.inputs["v"].dtype(), call.inputs["v"].shape());
  if (call.in_place) {
    args.final_state = call.inputs["initial_state"].dl();
  } else {
    args.final_state = output(call, outputs, "final_state", call.final_state_dtype, states);
  }
  if (chunked) {
    const std::int64_t every = std::max(call.options.checkpoint_chunks, 1);
    const Shape gates = {c.B, c.T, c.HV};
    args.saved_c = output(call, outputs, "saved_c", DType::f32, gates);
    args.saved_T = output(call, outputs, "saved_T", DType::f32, {c.B, c.T, c.HV, FLASHDELTA_CHUNK});
    args.saved_states = output(call, outputs, "saved_states", call.saved_states_dtype,
                               {c.B * c.T / (FLASHDELTA_CHUNK * every) + call.sequences(), c.HV, c.K, c.V});
    if (call.segment_counts) args.segment_counts = output(call, outputs, "segment_counts", DType::i32, {4});
  }
  if (chunked) {
    run(call, args, outputs, flashdelta_chunk_forward_workspace_size, flashdelta_chunk_forward);
  } else {
    run(call, args, outputs, flashdelta_recurrent_forward_workspace_size,
        path == Path::recurrent ? flashdelta_recurrent_forward : separate_passes_forward);
  }
  if (call.in_place) outputs["final_state"] = call.inputs["initial_state"];
  return outputs;
}

double norm(const HostTensor& tensor) {
  double squares = 0;
  for (const double value : tensor.values()) squares += value * value;
  return std::sqrt(squares);
}

// dg is a difference of terms of the size of <o, d_o> (and, at a sequence's end, <S', dS'>). Where they cancel to less than a fiftieth, or
// altogether as in a first token without a state, its error is held against a fiftieth of those terms. (With repeated keys and beta 1 even
// these are what is left of larger ones: what one token writes the next removes.)
double gate_terms(const Call& call, const Tensors& forward, double dg_norm) {
  double squares = 0;
  const auto add_dots = [&](const char* gradient_name, const HostTensor& value, std::int64_t width) {
    const auto gradient = call.inputs.find(gradient_name);
    if (gradient == call.inputs.end()) return;
    const std::vector<double> a = value.values();
    const std::vector<double> b = gradient->second.values();
    for (std::size_t i = 0; i < a.size(); i += static_cast<std::size_t>(width)) {
      double dot = 0;
      for (std::size_t j = i; j < i + static_cast<std::size_t>(width); ++j) dot += a[j] * b[j];
      squares += dot * dot;
    }
  };
  const Case& c = call.made_from;
  add_dots("d_o", forward.at("o"), c.V);
  add_dots("d_final_state", forward.at("final_state"), c.K * c.V);
  return std::max(dg_norm, 0.02 * std::sqrt(squares));
}

double tolerance(const Contract& row, const std::string& name) {
  if (name == "o") return row.o;
  if (name == "final_state") return row.final_state;
  if (name == "dq" || name == "dk" || name == "dv" || name == "d_initial_state") return row.vectors;
  return row.scalars;
}

}  // namespace

Tensors chunk_forward(Call& call) { return forward(call, Path::chunked); }
Tensors recurrent_forward(Call& call) { return forward(call, Path::recurrent); }
Tensors separate_passes_forward(Call& call) { return forward(call, Path::separate_passes); }

Tensors chunk_backward(Call& call, const Tensors& saved) {
  Tensors outputs;
  flashdelta_backward_args args{};
  set_inputs(call, args);
  const auto saved_tensor = [&](const char* name) {
    const auto found = saved.find(name);
    return found == saved.end() ? nullptr : found->second.dl();
  };
  args.saved_c = saved_tensor("saved_c");
  args.saved_T = saved_tensor("saved_T");
  args.saved_states = saved_tensor("saved_states");
  args.d_o = input(call, "d_o");
  args.d_final_state = input(call, "d_final_state");
  const auto gradient = [&](const char* name, const char* argument) -> DLTensor* {
    const auto found = call.inputs.find(argument);
    return found == call.inputs.end() ? nullptr : output(call, outputs, name, found->second.dtype(), found->second.shape());
  };
  args.dq = gradient("dq", "q");
  args.dk = gradient("dk", "k");
  args.dv = gradient("dv", "v");
  args.dg = gradient("dg", "g");
  args.dbeta = gradient("dbeta", "beta");
  args.d_initial_state = gradient("d_initial_state", "initial_state");
  args.dA_log = gradient("dA_log", "A_log");
  args.d_dt_bias = gradient("d_dt_bias", "dt_bias");
  const Tensors saved_before = saved;
  run(call, args, outputs, flashdelta_chunk_backward_workspace_size, flashdelta_chunk_backward);
  for (const auto& [name, tensor] : saved_before) EXPECT_EQ(saved.at(name).bits(), tensor.bits()) << "changed its input " << name;
  return outputs;
}

Tensors forward_and_backward(Call& call) {
  Tensors outputs = chunk_forward(call);
  outputs.merge(chunk_backward(call, outputs));
  return outputs;
}

Tensors oracle_forward(const Call& call) {
  Call oracle = oracle_call(call);
  return chunk_forward(oracle);
}

Tensors oracle_backward(const Call& call) {
  Call oracle = oracle_call(call);
  return chunk_backward(oracle, {});
}

double relative_error(const HostTensor& x, const HostTensor& x64, double floor) {
  const std::vector<double> a = x.values();
  const std::vector<double> b = x64.values();
  double difference = 0;
  double squares = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    squares += b[i] * b[i];
  }
  return difference == 0 ? 0 : std::sqrt(difference) / std::max(std::sqrt(squares), floor);
}

Tensors oracle_forward_and_backward(const Call& call) {
  Tensors out = oracle_forward(call);
  out.merge(oracle_backward(call));
  return out;
}

double expect_contract(const Call& call, const Tensors& got, const std::string& context) {
  const bool has_gradients = got.contains("dq") || got.contains("dv") || got.contains("dg");
  return expect_contract(call, got, has_gradients ? oracle_forward_and_backward(call) : oracle_forward(call), context);
}

double expect_contract(const Call& call, const Tensors& got, const Tensors& oracle, const std::string& context) {
  const DType dtype = call.made_from.dtype;
  const double dg = oracle.contains("dg") ? gate_terms(call, oracle, norm(oracle.at("dg"))) : 0;
  double worst = 0;
  for (const auto& [name, x] : got) {
    if (!oracle.contains(name)) continue;
    const double narrowing = rounding(x.dtype()) > rounding(dtype) ? rounding(x.dtype()) : 0;
    const double allowed = tolerance(contract(dtype), name) + narrowing;
    double floor = underflow(x.dtype()) * std::sqrt(static_cast<double>(x.size())) / allowed;
    // Sums of dg over the tokens are as large as dg itself unless they cancel.
    if (name == "dg" || name == "dA_log" || name == "d_dt_bias") floor = std::max(floor, dg);
    const double error = relative_error(x, oracle.at(name), floor);
    EXPECT_LE(error, allowed) << name << " of " << call.made_from << ' ' << context;
    worst = std::isnan(error) ? error : std::max(worst, error / allowed);
  }
  return worst;
}

void expect_same_bits(const Tensors& a, const Tensors& b, const std::string& context) {
  for (const auto& [name, tensor] : a) {
    ASSERT_TRUE(b.contains(name)) << name;
    EXPECT_TRUE(tensor.bits() == b.at(name).bits()) << name << " differs; " << context;
  }
  EXPECT_EQ(a.size(), b.size());
}

}  // namespace flashdelta::testing
