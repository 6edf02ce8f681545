// From a line in a table of cases to a call of the C ABI with poisoned, guarded outputs, and to the oracle's answer.
#pragma once

#include <iosfwd>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "flashdelta/flashdelta.h"
#include "support/host_tensor.hpp"

namespace flashdelta::testing {

enum class Gate {
  absent,
  random,     // logsigmoid(randn) / 16, every fourth head 0
  zero,       //
  steady,     // -0.75 at every token
  strong,     // -1000
  infinite,   // -inf at every token
  mixed,      // per head in turn: 0, -1000, random, -inf at every seventh token
  bursts,     // 0, and every 20 tokens a few of -30
  in_kernel,  // raw, with A_log and dt_bias
};
enum class Beta { absent, random, zero, one, two, sigmoid, sigmoid_twice };
enum class Keys {
  unit,      // randn / |randn|
  raw,       // randn: for use with l2norm
  zero,      //
  repeated,  // one unit vector at every token
  close,     // unit vectors of cosine 0.99 to one another
  similar,   // of cosine 0.9
  alike,     // of cosine 0.65
  ended,     // unit, but zero in the last quarter of every 64 tokens
};

struct Case {
  std::string name;
  std::int64_t B = 1, T = 65, H = 1, HV = 1, K = 16, V = 16;
  std::vector<std::int64_t> cu_seqlens{};  // empty: B sequences of T tokens
  bool int64_offsets = true;
  DType dtype = DType::f32;
  std::optional<DType> v_dtype{};
  DType gate_dtype = DType::f32;   // of g, beta, A_log and dt_bias
  DType state_dtype = DType::f32;  // of initial_state, final_state and d_final_state
  Gate gate = Gate::random;
  Beta beta = Beta::random;
  Keys keys = Keys::unit;
  bool initial_state = true, dt_bias = true, d_o = true, d_final_state = true;
  bool l2norm = false, state_v_first = false;
  std::optional<double> scale{};
  std::uint64_t seed = 1;

  [[nodiscard]] std::int64_t sequences() const { return cu_seqlens.empty() ? B : static_cast<std::int64_t>(cu_seqlens.size()) - 1; }
};
std::ostream& operator<<(std::ostream& out, const Case& c);

// Tensors by argument name; an absent one has no entry.
using Tensors = std::map<std::string, HostTensor>;

// A call whose inputs a test may still change. Inputs: q, k, v, g, beta, initial_state, A_log, dt_bias, d_o, d_final_state.
struct Call {
  Case made_from;
  flashdelta_options options{};
  Tensors inputs;
  HostOffsets cu_seqlens;
  DType final_state_dtype = DType::f32;
  DType saved_states_dtype = DType::f32;
  std::set<std::string> unwanted;         // outputs passed as null
  std::map<std::string, Layout> layouts;  // of outputs; contiguous where not named
  bool in_place = false;                  // final_state is initial_state
  bool segment_counts = false;            // an output of chunk_forward too

  void set_cu_seqlens(std::vector<std::int64_t> values);
  [[nodiscard]] std::int64_t sequences() const;
};
// On the CPU backend unless the options are changed.
Call make_call(const Case& c);

// Run through the C ABI; a status other than OK, a write outside the outputs and workspace or a changed input fails the test.
// Outputs: o, final_state, and of the chunked operation saved_c, saved_T, saved_states.
Tensors chunk_forward(Call& call);
Tensors recurrent_forward(Call& call);
Tensors separate_passes_forward(Call& call);  // cpu::separate_passes_forward
// Outputs: dq, dk, dv, dg, dbeta, d_initial_state, dA_log, d_dt_bias. `saved` may lack saved_c and saved_T.
Tensors chunk_backward(Call& call, const Tensors& saved);

// Both, merged; what most claims are about.
Tensors forward_and_backward(Call& call);

// The same call in float64 on the reference backend.
Call oracle_call(const Call& call);
Tensors oracle_forward(const Call& call);
Tensors oracle_backward(const Call& call);
Tensors oracle_forward_and_backward(const Call& call);

// ||x - x64|| / max(||x64||, floor): NaN where x holds one, 0 where both are zero.
double relative_error(const HostTensor& x, const HostTensor& x64, double floor = 0);

// Holds every output that `got` has and the contract names against the oracle. Returns the largest error / tolerance.
double expect_contract(const Call& call, const Tensors& got, const std::string& context = "");
// The same against an answer of the oracle that several calls share.
double expect_contract(const Call& call, const Tensors& got, const Tensors& oracle, const std::string& context);
void expect_same_bits(const Tensors& a, const Tensors& b, const std::string& context = "");

// Tokens [begin, end) of every row (a call without cu_seqlens), and sequence n of a packed call, as a call of its own.
Call tokens_of(const Call& call, std::int64_t begin, std::int64_t end);
Call sequence_of(const Call& packed, std::int64_t n);
// What a packed call gave for sequence n; without the sums over sequences dA_log and d_dt_bias.
Tensors results_of_sequence(const Call& packed, const Tensors& results, std::int64_t n);

// Without the saved tensors, whose layout is the backend's.
Tensors results_only(Tensors tensors);

}  // namespace flashdelta::testing
