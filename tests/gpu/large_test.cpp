// Sizes of real use and beyond, held against the double-precision kernel of device_oracle.hpp, which is held against the reference backend
// first.
#include <gtest/gtest.h>

#include <cstdio>
#include <deque>
#include <ostream>

#include "gpu/child.hpp"
#include "gpu/device_call.hpp"
#include "gpu/device_oracle.hpp"
#include "gpu/device_tensors.hpp"
#include "gpu/record.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {
namespace {

struct Large {
  std::string name;
  std::int64_t B, T, H, HV;
  std::vector<std::int64_t> cu_seqlens{};
  DType dtype = DType::bf16;
  DType final_state = DType::f32;
  bool initial_state = true;
};
std::ostream& operator<<(std::ostream& out, const Large& c) { return out << c.name; }

// The inputs of the published benchmarks: gates of logsigmoid(randn) / 16, a quarter of the heads at 0; unit keys.
class LargeCall {
 public:
  explicit LargeCall(const Large& c) : case_(c), offsets_(c.cu_seqlens, true) {
    const std::int64_t sequences = c.cu_seqlens.empty() ? c.B : static_cast<std::int64_t>(c.cu_seqlens.size()) - 1;
    args_.struct_size = sizeof(args_);
    args_.q = add(c.dtype, {c.B, c.T, c.H, 128});
    args_.k = add(c.dtype, {c.B, c.T, c.H, 128});
    args_.v = add(c.dtype, {c.B, c.T, c.HV, 128});
    args_.g = add(DType::f32, {c.B, c.T, c.HV});
    args_.beta = add(DType::f32, {c.B, c.T, c.HV});
    fill_normal(*args_.q, 1);
    fill_vectors(*args_.k, 2);
    fill_normal(*args_.v, 3);
    fill_gates(*args_.g, 4);
    fill_sigmoid(*args_.beta, 5);
    if (c.initial_state) {
      args_.initial_state = add(DType::f32, {sequences, c.HV, 128, 128});
      fill_normal(*args_.initial_state, 6, 0.5);
    }
    args_.cu_seqlens = offsets_.dl();
    args_.o = add(c.dtype, {c.B, c.T, c.HV, 128});
    args_.final_state = add(c.final_state, {sequences, c.HV, 128, 128});
  }

  [[nodiscard]] const flashdelta_forward_args& args() const { return args_; }

  void run() {
    std::size_t bytes = 0;
    ASSERT_EQ(flashdelta_chunk_forward_workspace_size(&args_, &bytes), FLASHDELTA_OK) << flashdelta_last_error();
    const DeviceBuffer workspace(bytes, kNaNByte);
    args_.workspace = workspace.data();
    args_.workspace_size = bytes;
    ASSERT_EQ(flashdelta_chunk_forward(&args_), FLASHDELTA_OK) << flashdelta_last_error();
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_TRUE(workspace.guards_intact()) << "wrote outside the workspace";
    for (const Array& array : arrays_) EXPECT_TRUE(array.guards_intact()) << "wrote outside a tensor";
  }

  // Of the first `tokens` of each sequence, or of all where 0.
  void expect_contract(std::int64_t tokens = 0) const {
    const DeviceErrors errors = device_errors(args_, tokens);
    const Contract allowed = contract(case_.dtype);
    test::record_error("o_" + short_name(case_.dtype), errors.o);
    EXPECT_GT(errors.o_norm, 0);
    EXPECT_LE(errors.o, allowed.o);
    const bool wide = case_.final_state == DType::f32;
    if (wide) test::record_error("final_state_" + short_name(case_.dtype), errors.final_state);
    EXPECT_LE(errors.final_state, allowed.final_state + (wide ? 0 : rounding(case_.final_state)));
    EXPECT_EQ(count_not_finite(*args_.o), 0);
    EXPECT_EQ(count_not_finite(*args_.final_state), 0);
  }

 private:
  DLTensor* add(DType dtype, Shape shape) { return arrays_.emplace_back(dtype, std::move(shape)).dl(); }

  Large case_;
  DeviceOffsets offsets_;
  std::deque<Array> arrays_;
  flashdelta_forward_args args_{};
};

// Errors that the kernel finds in the reference backend's own results.
void expect_oracles_agree(const Call& call) {
  Call on_host = oracle_call(call);
  Tensors exact = chunk_forward(on_host);
  Call twin = call;
  twin.unwanted.insert({"o", "final_state"});
  DeviceCall device(twin);
  const DeviceTensor o(exact.at("o")), final_state(exact.at("final_state"));
  flashdelta_forward_args args = device.arguments();
  args.o = o.dl();
  args.final_state = final_state.dl();
  const DeviceErrors errors = device_errors(args);
  EXPECT_LT(errors.o, 1e-12) << call.made_from;
  EXPECT_LT(errors.final_state, 1e-12) << call.made_from;
  EXPECT_GT(errors.o_norm, 0) << call.made_from;
  // And that it would find one.
  exact.at("o").put(exact.at("o").size() / 2, exact.at("o")[exact.at("o").size() / 2] + 1);
  const DeviceTensor wrong(exact.at("o"));
  args.o = wrong.dl();
  EXPECT_NEAR(device_errors(args).o, 1 / errors.o_norm, 1e-9 / errors.o_norm) << call.made_from;
}

class CudaLarge : public GpuTest {};

TEST_F(CudaLarge, TheKernelThatServesAsOracleIsTheReference) {
  expect_oracles_agree(cuda_call({.name = "Plain", .B = 2, .T = 130, .H = 2, .HV = 4, .dtype = DType::bf16}));
  expect_oracles_agree(cuda_call({.name = "Packed",
                                  .T = 130,
                                  .H = 1,
                                  .HV = 3,
                                  .cu_seqlens = {3, 3, 70, 120},
                                  .int64_offsets = false,
                                  .dtype = DType::f16,
                                  .gate_dtype = DType::bf16,
                                  .state_dtype = DType::f16,
                                  .gate = Gate::in_kernel,
                                  .beta = Beta::sigmoid_twice,
                                  .keys = Keys::raw,
                                  .l2norm = true,
                                  .state_v_first = true,
                                  .scale = 0.3}));
  expect_oracles_agree(cuda_call({.name = "Bare",
                                  .T = 90,
                                  .H = 1,
                                  .HV = 2,
                                  .dtype = DType::bf16,
                                  .gate = Gate::absent,
                                  .beta = Beta::absent,
                                  .initial_state = false}));
}

const Large kRealUse[] = {
    {"Heads16And64Rows4Of2048", 4, 2048, 16, 64},
    {"Heads8And32Row1Of8192", 1, 8192, 8, 32},
    {"Heads16And48Rows8Of1024", 8, 1024, 16, 48},
    {"Heads16And16Rows8Of1024", 8, 1024, 16, 16},
    {"Heads2And8Row1Of32768", 1, 32768, 2, 8},
    {"Heads16And64Fp16", 2, 2048, 16, 64, {}, DType::f16},
    {"Heads8And32Packed", 1, 8192, 8, 32, {0, 1, 700, 701, 2900, 2900, 6001, 8192}},
    {"Heads4And32PackedFp16", 1, 8192, 4, 32, {17, 3000, 3064, 8000}, DType::f16},
};

class CudaRealUse : public CudaLarge, public ::testing::WithParamInterface<Large> {};
INSTANTIATE_TEST_SUITE_P(, CudaRealUse, ::testing::ValuesIn(kRealUse), [](const auto& param_info) { return param_info.param.name; });

TEST_P(CudaRealUse, HoldsTheContract) {
  LargeCall call(GetParam());
  ASSERT_NO_FATAL_FAILURE(call.run());
  call.expect_contract();
}

TEST_F(CudaLarge, MoreThan65535SequencesTimesHeads) {
  std::vector<std::int64_t> offsets{0};
  while (offsets.size() < 16601) offsets.push_back(offsets.back() + static_cast<std::int64_t>(offsets.size()) % 4);
  LargeCall call({"ManyShort", 1, offsets.back(), 1, 4, offsets, DType::bf16, DType::bf16, false});
  ASSERT_NO_FATAL_FAILURE(call.run());
  call.expect_contract();
}

// Offsets of elements, and of bytes, beyond what 32 bits hold, signed and not: v and o have 2.2e9 elements. The last sequence starts below
// 2^31 elements and crosses it; the first tokens of each and all of the short ones are compared, and every element of o for being finite.
TEST_F(CudaLarge, TensorsOfMoreThan2To31Elements) {
  constexpr std::int64_t kTokens = 270000;
  LargeCall call({"Huge", 1, kTokens, 16, 64, {0, 100, 131000, 131072, 262000, 269999, kTokens}, DType::bf16, DType::f32, true});
  ASSERT_NO_FATAL_FAILURE(call.run());
  call.expect_contract(1000);
}

// The same without cu_seqlens: rows of a batch that lie 2^31 elements and more apart.
TEST_F(CudaLarge, BatchRowsBeyond2To31Elements) {
  LargeCall call({"HugeRows", 3, 180000, 8, 48, {}, DType::f16, DType::f32, true});
  ASSERT_NO_FATAL_FAILURE(call.run());
  call.expect_contract(1000);
}

TEST_F(CudaLarge, TheFirstCallOfAProcessTakesMilliseconds) {
  const std::string output = run_child(Child::first_call);
  const double milliseconds = std::stod(output);
  std::printf("first call: %.3f ms\n", milliseconds);
  test::record_error("first_call_ms", milliseconds);
  EXPECT_LT(milliseconds, 50);
}

}  // namespace
}  // namespace flashdelta::testing
