// flashdelta.hpp with tensors on a device: the C++ face says the same things as the C ABI.
#include "flashdelta/flashdelta.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <optional>
#include <span>
#include <string>

#include "gpu/device_call.hpp"

namespace flashdelta::testing {
namespace {

using CudaHpp = GpuTest;

std::optional<TensorView> view(const DLTensor* tensor) { return tensor == nullptr ? std::nullopt : std::optional<TensorView>(*tensor); }

// The tensors of a prepared call.
ForwardArgs arguments_of(const flashdelta_forward_args& c) {
  ForwardArgs args;
  args.q = view(c.q), args.k = view(c.k), args.v = view(c.v), args.g = view(c.g), args.beta = view(c.beta);
  args.initial_state = view(c.initial_state), args.cu_seqlens = view(c.cu_seqlens);
  args.o = view(c.o), args.final_state = view(c.final_state);
  return args;
}

std::span<std::byte> workspace_of(const flashdelta_forward_args& c) { return {static_cast<std::byte*>(c.workspace), c.workspace_size}; }

Call packed_call() { return cuda_call({.T = 300, .H = 2, .HV = 4, .cu_seqlens = {0, 1, 65, 65, 300}, .dtype = DType::bf16}); }

TEST_F(CudaHpp, GivesTheBitsOfTheCAbi) {
  const Call call = packed_call();
  for (const Operation operation : {Operation::chunk_forward, Operation::recurrent_forward}) {
    const Tensors expected = cuda_forward(call, operation);
    DeviceCall device(call, operation);
    ASSERT_EQ(device.prepare(), "");
    const flashdelta_forward_args c = device.arguments();
    const ForwardArgs args = arguments_of(c);
    if (operation == Operation::chunk_forward) {
      EXPECT_LE(chunk_forward_workspace_size(args), c.workspace_size);
      chunk_forward(args, workspace_of(c));
    } else {
      EXPECT_LE(recurrent_forward_workspace_size(args), c.workspace_size);
      recurrent_forward(args, workspace_of(c));
    }
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    expect_same_bits(device.results(), expected, "flashdelta.hpp");
  }
}

TEST_F(CudaHpp, RefusesToMakeAWorkspaceOnTheHost) {
  DeviceCall device(packed_call());
  ASSERT_EQ(device.prepare(), "");
  const ForwardArgs args = arguments_of(device.arguments());
  try {
    chunk_forward(args);
    FAIL() << "no error";
  } catch (const ValueError& error) {
    EXPECT_NE(std::string(error.what()).find("workspace: tensors are on a CUDA device"), std::string::npos) << error.what();
  }
}

TEST_F(CudaHpp, ABackwardIsUnavailable) {
  Call call = packed_call();
  call.unwanted = {"saved_c", "saved_T"};
  DeviceCall device(call);
  ASSERT_EQ(device.prepare(), "");
  const flashdelta_forward_args c = device.arguments();
  const ForwardArgs forward = arguments_of(c);
  BackwardArgs args;
  args.q = forward.q, args.k = forward.k, args.v = forward.v, args.g = forward.g, args.beta = forward.beta,
  args.cu_seqlens = forward.cu_seqlens;
  args.saved_states = view(c.saved_states), args.d_o = forward.o;
  EXPECT_THROW(static_cast<void>(chunk_backward_workspace_size(args)), UnavailableError);
}

}  // namespace
}  // namespace flashdelta::testing
