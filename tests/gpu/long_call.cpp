#include "gpu/long_call.hpp"

#include <gtest/gtest.h>

#include <ostream>

#include "gpu/device_call.hpp"
#include "gpu/record.hpp"
#include "gpu/shared_memory.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {

std::ostream& operator<<(std::ostream& out, const LongCase& c) { return out << c.name; }

std::ostream& operator<<(std::ostream& out, const Cut& cut) {
  constexpr const char* kModes[] = {"auto", "exact", "off"};
  out << kModes[cut.mode];
  if (cut.segments > 0) out << ", " << cut.segments << " segments";
  return out << (cut.batch_invariant ? ", batch invariant" : "");
}

void set_cut(flashdelta_options& options, const Cut& cut) {
  options.context_parallel = cut.mode;
  options.num_segments = cut.segments;
  options.batch_invariant = cut.batch_invariant ? 1 : 0;
}

LongCall::LongCall(const LongCase& c, const Cut& cut) : case_(c), offsets_(c.cu_seqlens, true) {
  const Shape states = {c.sequences(), c.HV, 128, 128};
  args_.struct_size = sizeof(args_);
  args_.q = add("q", c.dtype, {c.B, c.T, c.H, 128});
  args_.k = add("k", c.dtype, {c.B, c.T, c.H, 128});
  args_.v = add("v", c.dtype, {c.B, c.T, c.HV, 128});
  args_.g = add("g", DType::f32, {c.B, c.T, c.HV});
  args_.beta = add("beta", DType::f32, {c.B, c.T, c.HV});
  if (c.gates == Gates::raw) {
    args_.A_log = add("A_log", DType::f32, {c.HV});
    args_.dt_bias = add("dt_bias", DType::f32, {c.HV});
  }
  if (c.initial_state) args_.initial_state = add("initial_state", c.state, states);
  args_.cu_seqlens = offsets_.dl();
  args_.o = add("o", c.dtype, {c.B, c.T, c.HV, 128});
  args_.final_state = add("final_state", c.state, states);
  args_.options.use_qk_l2norm_in_kernel = c.l2norm ? 1 : 0;
  args_.options.use_gate_in_kernel = c.gates == Gates::raw ? 1 : 0;
  args_.options.use_beta_sigmoid_in_kernel = args_.options.allow_neg_eigval = c.beta == Strength::raw ? 1 : 0;
  args_.options.state_v_first = c.v_first ? 1 : 0;
  set_cut(cut);
  fill();
}

DLTensor* LongCall::add(const char* name, DType dtype, Shape shape) {
  names_.emplace_back(name, &arrays_.emplace_back(dtype, std::move(shape)));
  return arrays_.back().dl();
}

const DLTensor& LongCall::tensor(const char* name) const {
  for (const auto& [own, array] : names_) {
    if (own == name) return array->tensor();
  }
  throw std::runtime_error(std::string("this call has no ") + name);
}

void LongCall::set_cut(const Cut& cut) {
  testing::set_cut(args_.options, cut);
  workspace_.reset();
}

void LongCall::refill(const LongCase& c) {
  case_.cu_seqlens = c.cu_seqlens;
  case_.gates = c.gates;
  case_.beta = c.beta;
  case_.key_length = c.key_length, case_.key_cosine = c.key_cosine, case_.key_period = c.key_period;
  case_.seed = c.seed;
  if (args_.cu_seqlens != nullptr) offsets_.write(c.cu_seqlens);
  fill();
}

void LongCall::fill() {
  const std::uint64_t seed = 100 * case_.seed;
  fill_normal(tensor("q"), seed + 1);
  fill_vectors(tensor("k"), seed + 2, case_.key_length, case_.key_cosine);
  if (case_.key_period > 0) repeat_tokens(tensor("k"), case_.key_period);
  fill_normal(tensor("v"), seed + 3);
  fill_gates(tensor("g"), seed + 4, case_.gates);
  const DLTensor& beta = tensor("beta");
  const double unit = case_.beta_by_length && case_.key_length > 1 ? 1 / (case_.key_length * case_.key_length) : 1;
  switch (case_.beta) {
    case Strength::sigmoid: fill_sigmoid(beta, seed + 5, unit); break;
    case Strength::twice_sigmoid: fill_sigmoid(beta, seed + 5, 2 * unit); break;
    case Strength::zero: fill_constant(beta, 0); break;
    case Strength::one: fill_constant(beta, unit); break;
    case Strength::two: fill_constant(beta, 2 * unit); break;
    case Strength::raw: fill_normal(beta, seed + 5); break;
    case Strength::eighth_two: fill_in_turn(beta, 8, 2 * unit, 0.5 * unit); break;
  }
  if (case_.initial_state) fill_normal(tensor("initial_state"), seed + 6, 0.5);
  if (args_.A_log != nullptr) {
    fill_normal(*args_.A_log, seed + 7, 0.5);
    fill_normal(*args_.dt_bias, seed + 8);
  }
}

void LongCall::poison() {
  for (const auto& [name, array] : names_) {
    if (name == "o" || name == "final_state") array->poison();
  }
  if (case_.in_place) copy(tensor("initial_state"), tensor("final_state"));
  if (workspace_) workspace_->fill(kNaNByte);
  poison_shared_memory(nullptr);
}

flashdelta_forward_args LongCall::args() const { return args_; }

std::string LongCall::launch(cudaStream_t stream) {
  flashdelta_forward_args args = args_;
  args.options.stream = stream;
  if (case_.in_place) args.initial_state = args.final_state;
  if (!workspace_) {
    std::size_t bytes = 0;
    if (flashdelta_chunk_forward_workspace_size(&args, &bytes) != FLASHDELTA_OK) return flashdelta_last_error();
    workspace_.emplace(bytes, kNaNByte);
  }
  args.workspace = workspace_->data();
  args.workspace_size = workspace_->size();
  return flashdelta_chunk_forward(&args) == FLASHDELTA_OK ? "" : flashdelta_last_error();
}

void LongCall::run() {
  poison();
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  ASSERT_EQ(launch(), "");
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_TRUE(guards_intact()) << "wrote outside a tensor or the workspace";
}

std::array<std::int32_t, 4> LongCall::run_counting() {
  counts_.poison();
  args_.segment_counts = counts_.dl();
  run();
  args_.segment_counts = nullptr;
  std::array<std::int32_t, 4> counts{};
  check_cuda(cudaMemcpy(counts.data(), counts_.dl()->data, sizeof(counts), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  return counts;
}

bool LongCall::guards_intact() const {
  bool intact = counts_.guards_intact() && (!workspace_ || workspace_->guards_intact());
  for (const Array& array : arrays_) intact = intact && array.guards_intact();
  return intact;
}

DeviceErrors LongCall::expect_contract(const std::string& context) const {
  const DeviceErrors errors = device_errors(args_);
  const Contract allowed = contract(case_.dtype);
  const bool wide = case_.state == DType::f32;
  test::record_error("o_" + short_name(case_.dtype), errors.o);
  if (wide) test::record_error("final_state_" + short_name(case_.dtype), errors.final_state);
  EXPECT_GT(errors.o_norm, 0) << context;
  EXPECT_LE(errors.o, allowed.o) << "o of " << case_ << ' ' << context;
  EXPECT_LE(errors.final_state, allowed.final_state + (wide ? 0 : rounding(case_.state))) << "final_state of " << case_ << ' ' << context;
  EXPECT_EQ(count_not_finite(tensor("o")), 0) << "o of " << case_ << ' ' << context;
  EXPECT_EQ(count_not_finite(tensor("final_state")), 0) << "final_state of " << case_ << ' ' << context;
  return errors;
}

Results::Results(const LongCall& call)
    : o_(call.made_from().dtype, {call.made_from().B, call.made_from().T, call.made_from().HV, 128}),
      final_state_(call.made_from().state, {call.made_from().sequences(), call.made_from().HV, 128, 128}) {
  copy(call.tensor("o"), o());
  copy(call.tensor("final_state"), final_state());
}

void Results::expect_same_bits(const LongCall& call, const std::string& context) const {
  EXPECT_EQ(count_different(call.tensor("o"), o()), 0) << "elements of o; " << call.made_from() << ' ' << context;
  EXPECT_EQ(count_different(call.tensor("final_state"), final_state()), 0)
      << "elements of final_state; " << call.made_from() << ' ' << context;
}

}  // namespace flashdelta::testing
