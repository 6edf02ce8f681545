// Calls of any shape, dtype, flag and layout at once: what the tables of contract_test.cpp vary one by one.
#include <gtest/gtest.h>

#include <algorithm>

#include "gpu/device_call.hpp"
#include "support/random.hpp"

namespace flashdelta::testing {
namespace {

constexpr int kCalls = 60;

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : random_(seed) {}
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random_.uniform() * static_cast<double>(high - low + 1));
  }
  bool chance(double probability) { return random_.uniform() < probability; }
  template <class T, std::size_t n>
  T one_of(const T (&choices)[n]) {
    return choices[between(0, n - 1)];
  }
  // Non-decreasing, within [0, T], with empty sequences among them.
  std::vector<std::int64_t> offsets(std::int64_t T) {
    std::vector<std::int64_t> values(static_cast<std::size_t>(between(1, 9)));
    for (std::int64_t& value : values) value = between(0, T);
    if (chance(0.5)) values.push_back(values.front());
    std::sort(values.begin(), values.end());
    if (chance(0.5)) values.front() = 0;
    if (chance(0.5)) values.back() = T;
    return values;
  }

 private:
  Random random_;
};

Call draw_call(std::uint64_t seed) {
  Draw draw(seed);
  constexpr DType wide_or_narrow[] = {DType::f32, DType::bf16, DType::f16};
  Case c{.name = "Random" + std::to_string(seed)};
  const bool packed = draw.chance(0.6);
  c.B = packed ? 1 : draw.between(1, 4);
  c.T = draw.chance(0.2) ? draw.between(0, 20) : draw.between(20, 400);
  c.H = draw.between(1, 3);
  c.HV = c.H * draw.between(1, 5);
  if (packed) c.cu_seqlens = draw.offsets(c.T);
  c.int64_offsets = draw.chance(0.5);
  c.dtype = draw.chance(0.5) ? DType::bf16 : DType::f16;
  c.gate_dtype = draw.one_of(wide_or_narrow);
  c.state_dtype = draw.one_of(wide_or_narrow);
  c.gate = draw.one_of({Gate::absent, Gate::random, Gate::random, Gate::zero, Gate::strong, Gate::infinite, Gate::mixed, Gate::bursts,
                        Gate::in_kernel, Gate::in_kernel});
  c.beta = draw.one_of({Beta::absent, Beta::random, Beta::random, Beta::zero, Beta::two, Beta::sigmoid, Beta::sigmoid_twice});
  c.l2norm = draw.chance(0.5);
  c.keys = c.l2norm ? Keys::raw : draw.one_of({Keys::unit, Keys::unit, Keys::zero, Keys::repeated, Keys::close});
  c.initial_state = draw.chance(0.7);
  c.dt_bias = draw.chance(0.5);
  c.state_v_first = draw.chance(0.5);
  if (draw.chance(0.3)) c.scale = 0.01 + static_cast<double>(draw.between(0, 200)) / 100;
  c.seed = seed;

  Call call = draw.chance(0.3) ? cuda_call_saving(c) : cuda_call(c);
  call.options.checkpoint_chunks = static_cast<int>(draw.between(0, 4));
  call.options.context_parallel = static_cast<int>(draw.between(0, 2));
  call.options.batch_invariant = draw.chance(0.5) ? 1 : 0;
  for (auto& [name, tensor] : call.inputs) {
    const bool tile = name == "q" || name == "k" || name == "v";
    if (draw.chance(0.3)) tensor = tensor.with_layout(tile || draw.chance(0.5) ? Layout::padded : Layout::transposed);
  }
  if (draw.chance(0.3)) call.layouts["o"] = Layout::padded;
  if (draw.chance(0.3)) call.layouts["final_state"] = Layout::transposed;
  if (c.initial_state && draw.chance(0.2)) {
    call.in_place = true;
    call.inputs["initial_state"] = call.inputs["initial_state"].with_layout(Layout::contiguous);
  } else if (draw.chance(0.2)) {
    call.unwanted.insert("final_state");
  }
  if (call.options.context_parallel != FLASHDELTA_CONTEXT_PARALLEL_OFF && call.options.batch_invariant == 0 && draw.chance(0.6)) {
    call.options.num_segments = static_cast<int>(draw.between(1, 8));
  }
  return call;
}

class CudaRandom : public GpuTest, public ::testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(, CudaRandom, ::testing::Range(1, kCalls + 1),
                         [](const auto& param_info) { return "Seed" + std::to_string(param_info.param); });

TEST_P(CudaRandom, CallHoldsTheContract) { run_and_expect_contract(draw_call(static_cast<std::uint64_t>(GetParam()))); }

}  // namespace
}  // namespace flashdelta::testing
