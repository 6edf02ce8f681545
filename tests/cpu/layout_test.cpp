// How tensors lie in memory, and how sequences are given, changes no bit.
#include <gtest/gtest.h>

#include "support/case.hpp"

namespace flashdelta::testing {
namespace {

const Case kCase{.name = "Layout", .B = 2, .T = 100, .H = 2, .HV = 4, .K = 24, .V = 40};

Case with_dtype(Case c, DType dtype) {
  c.dtype = dtype;
  return c;
}

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

TEST(CpuLayout, SlicesOfOnePackedProjectionGiveTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    Call call = make_call(with_dtype(kCase, dtype));
    const Tensors contiguous = forward_and_backward(call);
    pack_projection(call);
    expect_same_bits(forward_and_backward(call), contiguous);
  }
}

TEST(CpuLayout, InputsOfAnyStrideGiveTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Call call = make_call(with_dtype(kCase, dtype));
    const Tensors contiguous = forward_and_backward(call);
    for (const char* name : {"q", "k", "v"}) call.inputs[name] = call.inputs[name].with_layout(Layout::padded);
    for (const char* name : {"g", "beta", "d_o", "initial_state", "d_final_state"}) {
      call.inputs[name] = call.inputs[name].with_layout(Layout::transposed);
    }
    expect_same_bits(forward_and_backward(call), contiguous);
  }
}

TEST(CpuLayout, OutputsOfAnyStrideGetTheSameBits) {
  for (const DType dtype : {DType::f32, DType::f16}) {
    Call call = make_call(with_dtype(kCase, dtype));
    const Tensors contiguous = forward_and_backward(call);
    for (const Layout layout : {Layout::padded, Layout::transposed}) {
      for (const auto& [name, tensor] : contiguous) call.layouts[name] = layout;
      expect_same_bits(forward_and_backward(call), contiguous);
    }
  }
}

TEST(CpuLayout, StateWithVFirstGivesTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Call k_first = make_call(with_dtype(kCase, dtype));
    Call v_first = k_first;
    v_first.options.state_v_first = 1;
    for (const char* name : {"initial_state", "d_final_state"}) v_first.inputs[name] = v_first.inputs[name].swapped_last_two();
    const Tensors a = results_only(forward_and_backward(k_first));
    Tensors b = results_only(forward_and_backward(v_first));
    for (const char* name : {"final_state", "d_initial_state"}) b[name] = b[name].swapped_last_two();
    expect_same_bits(a, b);
  }
}

TEST(CpuLayout, Int32AndInt64OffsetsGiveTheSameBits) {
  Case c{.name = "Offsets", .T = 150, .HV = 2, .cu_seqlens = {3, 3, 70, 140}};
  Call call64 = make_call(c);
  c.int64_offsets = false;
  Call call32 = make_call(c);
  expect_same_bits(forward_and_backward(call32), forward_and_backward(call64));
}

TEST(CpuLayout, PackedEqualLengthsGiveTheBitsOfBatchRows) {
  Call rows = make_call({.name = "Rows", .B = 3, .T = 70, .H = 2, .HV = 4});
  rows.options.batch_invariant = 1;
  Call packed = rows;
  packed.made_from.B = 1;
  packed.made_from.T = 210;
  packed.set_cu_seqlens({0, 70, 140, 210});
  for (const char* name : {"q", "k", "v", "g", "beta", "d_o"}) {
    const HostTensor& tensor = rows.inputs[name];
    Shape shape = tensor.shape();
    shape[0] = 1;
    shape[1] = 210;
    packed.inputs[name] = tensor.view(shape, strides_of(shape, Layout::contiguous), 0);
  }
  const Tensors a = results_only(forward_and_backward(rows));
  const Tensors b = results_only(forward_and_backward(packed));
  for (const auto& [name, tensor] : a) EXPECT_TRUE(tensor.bits() == b.at(name).bits()) << name;
}

TEST(CpuLayout, FinalStateMayReplaceTheInitialState) {
  for (const DType state : {DType::f32, DType::bf16, DType::f16}) {
    for (const bool v_first : {false, true}) {
      Call call = make_call({.name = "InPlace",
                             .T = 150,
                             .HV = 2,
                             .K = 20,
                             .V = 12,
                             .cu_seqlens = {0, 0, 70, 150},
                             .state_dtype = state,
                             .state_v_first = v_first});
      Call in_place = call;
      in_place.in_place = true;
      expect_same_bits(chunk_forward(in_place), chunk_forward(call));
    }
  }
}

TEST(CpuLayout, FinalStateIsRoundedToItsOwnDtype) {
  Call call = make_call({.name = "StateDtype", .T = 100, .HV = 2, .dtype = DType::bf16});
  const HostTensor exact = chunk_forward(call).at("final_state");
  for (const DType dtype : {DType::bf16, DType::f16}) {
    call.final_state_dtype = dtype;
    EXPECT_EQ(chunk_forward(call).at("final_state").bits(), exact.converted(dtype).bits());
  }
}

}  // namespace
}  // namespace flashdelta::testing
