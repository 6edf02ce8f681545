// How tensors lie in memory, and how sequences are given, changes no bit.
#include <gtest/gtest.h>

#include "gpu/device_call.hpp"

namespace flashdelta::testing {
namespace {

constexpr DType kDTypes[] = {DType::bf16, DType::f16};

Case layout_case(DType dtype) { return {.name = "Layout", .B = 2, .T = 150, .H = 2, .HV = 4, .dtype = dtype}; }

// q, k and v as slices of one projection [B, T, H * K + H * K + HV * V].
void pack_projection(Call& call) {
  const Case& c = call.made_from;
  const std::int64_t width = 2 * c.H * c.K + c.HV * c.V;
  const HostTensor projection(c.dtype, {c.B, c.T, width});
  std::int64_t offset = 0;
  for (const char* name : {"q", "k", "v"}) {
    HostTensor& tensor = call.inputs[name];
    const Shape shape = tensor.shape();
    HostTensor view = projection.view(shape, {c.T * width, width, shape[3], 1}, offset);
    view.assign(tensor.values());
    tensor = std::move(view);
    offset += shape[2] * shape[3];
  }
}

// [B, T, heads, width] in memory as [B, heads, T, width].
HostTensor heads_first(const HostTensor& tensor) {
  const Shape& shape = tensor.shape();
  const HostTensor base(tensor.dtype(), {shape[0], shape[2], shape[1], shape[3]});
  HostTensor view = base.view(shape, {shape[1] * shape[2] * shape[3], shape[3], shape[1] * shape[3], 1}, 0);
  view.assign(tensor.values());
  return view;
}

class CudaLayout : public GpuTest, public ::testing::WithParamInterface<DType> {};
INSTANTIATE_TEST_SUITE_P(, CudaLayout, ::testing::ValuesIn(kDTypes), [](const auto& param_info) { return short_name(param_info.param); });

TEST_P(CudaLayout, SlicesOfOnePackedProjectionGiveTheSameBits) {
  Call call = cuda_call(layout_case(GetParam()));
  const Tensors contiguous = run_and_expect_contract(call);
  pack_projection(call);
  expect_same_bits(cuda_forward(call), contiguous);
}

TEST_P(CudaLayout, HeadsBeforeTokensGiveTheSameBits) {
  Call call = cuda_call(layout_case(GetParam()));
  const Tensors contiguous = cuda_forward(call);
  for (const char* name : {"q", "k", "v"}) call.inputs[name] = heads_first(call.inputs[name]);
  expect_same_bits(cuda_forward(call), contiguous);
}

TEST_P(CudaLayout, InputsOfAnyStrideGiveTheSameBits) {
  for (const DType narrow : {DType::f32, DType::bf16, DType::f16}) {
    Case c = layout_case(GetParam());
    c.gate_dtype = c.state_dtype = narrow;
    c.gate = Gate::in_kernel;
    Call call = cuda_call(c);
    const Tensors contiguous = cuda_forward(call);
    for (const char* name : {"q", "k", "v", "A_log", "dt_bias"}) call.inputs[name] = call.inputs[name].with_layout(Layout::padded);
    for (const char* name : {"g", "beta", "initial_state"}) call.inputs[name] = call.inputs[name].with_layout(Layout::transposed);
    expect_same_bits(cuda_forward(call), contiguous, "transposed");
    for (const char* name : {"g", "beta", "initial_state"}) call.inputs[name] = call.inputs[name].with_layout(Layout::padded);
    expect_same_bits(cuda_forward(call), contiguous, "padded");
  }
}

// Broadcast gates: a stride of 0 is a stride.
TEST_P(CudaLayout, ExpandedGatesGiveTheBitsOfWrittenOutOnes) {
  Call call = cuda_call(layout_case(GetParam()));
  for (const char* name : {"g", "beta"}) {
    const HostTensor one = call.inputs[name].slice(2, 0, 1);
    HostTensor& all = call.inputs[name];
    for (std::int64_t i = 0; i < all.size(); ++i) all.put(i, one[i / 4]);
  }
  const Tensors written_out = cuda_forward(call);
  for (const char* name : {"g", "beta"}) {
    const HostTensor one = call.inputs[name].slice(2, 0, 1);
    call.inputs[name] = one.view({2, 150, 4}, {150, 1, 0}, 0);
  }
  expect_same_bits(cuda_forward(call), written_out);
}

TEST_P(CudaLayout, OutputsOfAnyStrideGetTheSameBits) {
  Call call = cuda_call_saving(layout_case(GetParam()));
  const Tensors contiguous = cuda_forward(call);
  call.layouts["o"] = Layout::padded;
  for (const Layout layout : {Layout::padded, Layout::transposed}) {
    for (const char* name : {"final_state", "saved_c", "saved_T", "saved_states"}) call.layouts[name] = layout;
    expect_same_bits(cuda_forward(call), contiguous);
  }
}

TEST_P(CudaLayout, StateWithVFirstGivesTheSameBits) {
  for (const DType state : {DType::f32, DType::bf16, DType::f16}) {
    Case c = layout_case(GetParam());
    c.state_dtype = state;
    const Call k_first = cuda_call(c);
    Call v_first = k_first;
    v_first.options.state_v_first = 1;
    v_first.inputs["initial_state"] = v_first.inputs["initial_state"].swapped_last_two();
    const Tensors a = cuda_forward(k_first);
    Tensors b = cuda_forward(v_first);
    ASSERT_FALSE(b.empty());
    b["final_state"] = b["final_state"].swapped_last_two();
    expect_same_bits(a, b, short_name(state));
  }
}

TEST_P(CudaLayout, Int32AndInt64OffsetsGiveTheSameBits) {
  Case c{.name = "Offsets", .T = 150, .HV = 2, .cu_seqlens = {3, 3, 70, 140}, .dtype = GetParam()};
  const Tensors wide = cuda_forward(cuda_call(c));
  c.int64_offsets = false;
  expect_same_bits(cuda_forward(cuda_call(c)), wide);
}

TEST_P(CudaLayout, PackedEqualLengthsGiveTheBitsOfBatchRows) {
  Call rows = cuda_call({.name = "Rows", .B = 3, .T = 70, .H = 2, .HV = 4, .dtype = GetParam()});
  rows.options.batch_invariant = 1;
  Call packed = rows;
  packed.made_from.B = 1;
  packed.made_from.T = 210;
  packed.set_cu_seqlens({0, 70, 140, 210});
  for (const char* name : {"q", "k", "v", "g", "beta"}) {
    const HostTensor& tensor = rows.inputs[name];
    Shape shape = tensor.shape();
    shape[0] = 1;
    shape[1] = 210;
    packed.inputs[name] = tensor.view(shape, strides_of(shape, Layout::contiguous), 0);
  }
  const Tensors a = cuda_forward(rows), b = cuda_forward(packed);
  ASSERT_FALSE(b.empty());
  for (const auto& [name, tensor] : a) EXPECT_TRUE(tensor.bits() == b.at(name).bits()) << name;
}

TEST_P(CudaLayout, BatchInvariantBitsDoNotDependOnThePack) {
  const Case c{.name = "Invariant", .T = 1300, .H = 1, .HV = 2, .cu_seqlens = {0, 900, 930, 994, 994, 1123, 1300}, .dtype = GetParam()};
  for (const auto mode : {FLASHDELTA_CONTEXT_PARALLEL_AUTO, FLASHDELTA_CONTEXT_PARALLEL_EXACT, FLASHDELTA_CONTEXT_PARALLEL_OFF}) {
    Call packed = cuda_call(c);
    packed.options.batch_invariant = 1;
    packed.options.context_parallel = mode;
    const Tensors together = run_and_expect_contract(packed);
    ASSERT_FALSE(together.empty());
    for (std::int64_t n = 0; n < packed.sequences(); ++n) {
      expect_same_bits(cuda_forward(sequence_of(packed, n)), results_of_sequence(packed, together, n), "sequence " + std::to_string(n));
    }
  }
}

// Few heads are taken as two halves of their value columns each, on two multiprocessors; many are not.
TEST_P(CudaLayout, HalvesOfAHeadGiveTheBitsOfTheWhole) {
  Case c{.name = "Halves", .H = 2, .HV = 4, .cu_seqlens = {0}, .dtype = GetParam(), .gate = Gate::mixed};
  for (std::int64_t n = 0; n < 20; ++n) c.cu_seqlens.push_back(c.cu_seqlens.back() + n * 37 % 200);
  c.T = c.cu_seqlens.back();
  Call many = cuda_call_saving(c);
  many.options.context_parallel = FLASHDELTA_CONTEXT_PARALLEL_OFF;
  const Tensors together = cuda_forward(many);
  ASSERT_FALSE(together.empty());
  for (std::int64_t n = 0; n < many.sequences(); n += 3) {
    Tensors expected = results_of_sequence(many, together, n);
    const Tensors alone = cuda_forward(sequence_of(many, n));
    for (const char* name : {"o", "final_state"}) EXPECT_TRUE(alone.at(name).bits() == expected.at(name).bits()) << name << ' ' << n;
  }
}

TEST_P(CudaLayout, FinalStateMayReplaceTheInitialState) {
  for (const DType state : {DType::f32, DType::bf16, DType::f16}) {
    for (const bool v_first : {false, true}) {
      const Call call = cuda_call({.name = "InPlace",
                                   .T = 150,
                                   .HV = 2,
                                   .cu_seqlens = {0, 0, 70, 150},
                                   .dtype = GetParam(),
                                   .state_dtype = state,
                                   .state_v_first = v_first});
      Call in_place = call;
      in_place.in_place = true;
      expect_same_bits(cuda_forward(in_place), cuda_forward(call), short_name(state));
    }
  }
}

TEST_P(CudaLayout, FinalStateIsRoundedToItsOwnDtype) {
  Call call = cuda_call({.name = "StateDtype", .T = 100, .HV = 2, .dtype = GetParam()});
  const Tensors exact = cuda_forward(call);
  ASSERT_FALSE(exact.empty());
  for (const DType dtype : {DType::bf16, DType::f16}) {
    call.final_state_dtype = dtype;
    const Tensors rounded = cuda_forward(call);
    ASSERT_FALSE(rounded.empty());
    EXPECT_TRUE(rounded.at("final_state").bits() == exact.at("final_state").converted(dtype).bits()) << short_name(dtype);
  }
}

TEST_P(CudaLayout, TheSameCallGivesTheSameBits) {
  Case c{.name = "Again", .T = 500, .H = 2, .HV = 8, .cu_seqlens = {0, 100, 100, 333, 500}, .dtype = GetParam()};
  const Call call = cuda_call_saving(c);
  const Tensors first = cuda_forward(call);
  for (int i = 0; i < 5; ++i) expect_same_bits(cuda_forward(call), first);
}

// A kernel that reads what it has not written itself would show here.
TEST_P(CudaLayout, WhatWorkspaceAndSurroundingsHoldNeverShows) {
  Case c{.name = "Poison", .T = 230, .H = 1, .HV = 3, .cu_seqlens = {4, 44, 120, 120, 211}, .dtype = GetParam()};
  for (const bool packed : {true, false}) {
    if (!packed) c.cu_seqlens.clear();
    const Call call = cuda_call_saving(c);
    const Tensors first = cuda_forward(call);
    for (const std::byte content : {std::byte{0}, std::byte{0x7b}, std::byte{0x3c}}) {
      expect_same_bits(cuda_forward(call, Operation::chunk_forward, {content, content}), first);
    }
  }
}

TEST_P(CudaLayout, StridesThatTmaCannotTakeAreRefusedByName) {
  for (const std::string name : {"q", "k", "v"}) {
    Call call = cuda_call(layout_case(GetParam()));
    const HostTensor& tensor = call.inputs[name];
    const Shape& s = tensor.shape();
    const HostTensor wide(tensor.dtype(), {s[0], s[1], s[2], s[3] + 4});
    HostTensor view = wide.view(s, strides_of(wide.shape(), Layout::contiguous), 0);
    view.assign(tensor.values());
    call.inputs[name] = std::move(view);
    DeviceCall device(call);
    const std::string error = device.launch();
    EXPECT_EQ(device.status(), FLASHDELTA_VALUE_ERROR) << name;
    EXPECT_TRUE(error.starts_with(name + ":")) << error;
    EXPECT_NE(error.find("16"), std::string::npos) << error;
  }
}

TEST_P(CudaLayout, ABaseAddressThatTmaCannotTakeIsRefusedByName) {
  for (const std::string name : {"q", "k", "v"}) {
    Call call = cuda_call(layout_case(GetParam()));
    const HostTensor& tensor = call.inputs[name];
    const HostTensor longer(tensor.dtype(), {tensor.size() + 4});
    HostTensor view = longer.view(tensor.shape(), strides_of(tensor.shape(), Layout::contiguous), 4);
    view.assign(tensor.values());
    call.inputs[name] = std::move(view);
    DeviceCall device(call);
    const std::string error = device.launch();
    EXPECT_EQ(device.status(), FLASHDELTA_VALUE_ERROR) << name;
    EXPECT_TRUE(error.starts_with(name + ":")) << error;
  }
}

}  // namespace
}  // namespace flashdelta::testing
