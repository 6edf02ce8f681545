// The C++ face: views, options, exceptions, and that its calls are those of the C ABI.
#include "flashdelta/flashdelta.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "c_api/json.hpp"

namespace flashdelta {
namespace {

// One head of width 2, two tokens, no gate, beta 1, scale 1: small enough to compute by hand.
struct Tiny {
  std::vector<float> q{1, 0, 0, 1}, k{1, 0, 0, 1}, v{2, 3, 5, 7}, o{-1, -1, -1, -1}, state{-1, -1, -1, -1}, saved{-1, -1, -1, -1};

  [[nodiscard]] ForwardArgs forward() {
    ForwardArgs args;
    args.options.backend = Backend::reference;
    args.options.scale = 1;
    args.q = TensorView(q.data(), {1, 2, 1, 2});
    args.k = TensorView(k.data(), {1, 2, 1, 2});
    args.v = TensorView(v.data(), {1, 2, 1, 2});
    args.o = TensorView(o.data(), {1, 2, 1, 2});
    args.final_state = TensorView(state.data(), {1, 1, 2, 2});
    return args;
  }
};

TEST(CppFace, ChunkForwardComputes) {
  Tiny tiny;
  EXPECT_EQ(chunk_forward_workspace_size(tiny.forward()), 0U);
  chunk_forward(tiny.forward());
  EXPECT_EQ(tiny.o, (std::vector<float>{2, 3, 5, 7}));
  EXPECT_EQ(tiny.state, (std::vector<float>{2, 3, 5, 7}));
}

TEST(CppFace, ChunkForwardReportsItsSegments) {
  Tiny tiny;
  ForwardArgs args = tiny.forward();
  std::vector<std::int32_t> counts(4, -1);
  args.segment_counts = TensorView(counts.data(), {4});
  chunk_forward(args);
  EXPECT_EQ(counts, (std::vector<std::int32_t>{1, 0, 0, 0}));
  EXPECT_THROW(recurrent_forward(args), ValueError);
}

TEST(CppFace, RecurrentForwardContinuesInPlace) {
  Tiny tiny;
  tiny.state = {10, 20, 30, 40};
  ForwardArgs args = tiny.forward();
  args.initial_state = args.final_state;
  recurrent_forward(args);
  EXPECT_EQ(tiny.o, (std::vector<float>{2, 3, 5, 7}));
  EXPECT_EQ(tiny.state, (std::vector<float>{2, 3, 5, 7}));
  EXPECT_EQ(recurrent_forward_workspace_size(args), 0U);
}

TEST(CppFace, ChunkBackwardComputes) {
  Tiny tiny;
  std::vector<float> d_o{1, 0, 0, 1}, dv(4, -1);
  BackwardArgs args;
  args.options = tiny.forward().options;
  args.q = tiny.forward().q;
  args.k = tiny.forward().k;
  args.v = tiny.forward().v;
  args.d_o = TensorView(d_o.data(), {1, 2, 1, 2});
  args.dv = TensorView(dv.data(), {1, 2, 1, 2});
  EXPECT_EQ(chunk_backward_workspace_size(args), 0U);
  chunk_backward(args);
  EXPECT_EQ(dv, (std::vector<float>{1, 0, 0, 1}));
}

TEST(CppFace, FailuresAreExceptionsByStatus) {
  Tiny tiny;
  ForwardArgs args = tiny.forward();
  args.k.reset();
  EXPECT_THROW(chunk_forward(args), ValueError);

  args = tiny.forward();
  args.k = TensorView(tiny.k.data(), DType::int32, {1, 2, 1, 2});
  EXPECT_THROW(recurrent_forward(args), TypeError);

  // What no build has yet, asked about memory that is not there.
  const auto on_cuda = [](std::uintptr_t address, DType dtype, std::vector<std::int64_t> shape) {
    return TensorView(reinterpret_cast<void*>(address), dtype, std::move(shape), {}, {kDLCUDA, 0});
  };
  BackwardArgs backward;
  backward.q = on_cuda(0x10000, DType::bfloat16, {1, 2, 1, 128});
  backward.k = on_cuda(0x20000, DType::bfloat16, {1, 2, 1, 128});
  backward.v = on_cuda(0x30000, DType::bfloat16, {1, 2, 1, 128});
  backward.saved_states = on_cuda(0x40000, DType::float32, {1, 1, 128, 128});
  EXPECT_THROW(chunk_backward(backward), UnavailableError);
}

TEST(CppFace, AnErrorCarriesStatusAndText) {
  try {
    chunk_forward(ForwardArgs{});
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), FLASHDELTA_VALUE_ERROR);
    EXPECT_STREQ(error.what(), "q: is null; it is required");
  }
}

TEST(CppFace, OptionsReachTheCall) {
  Tiny tiny;
  ForwardArgs args = tiny.forward();
  args.options.scale = std::numeric_limits<double>::infinity();
  EXPECT_THROW(chunk_forward(args), ValueError);
  args.options.scale = 0;
  chunk_forward(args);
  EXPECT_EQ(tiny.o, std::vector<float>(4, 0));
  args.options.scale.reset();
  chunk_forward(args);
  EXPECT_FLOAT_EQ(tiny.o[0], 2 / std::sqrt(2.0F));
}

TEST(CppFace, WorkspacesAreChecked) {
  Tiny tiny;
  alignas(64) std::byte bytes[128];
  EXPECT_THROW(chunk_forward(tiny.forward(), std::span(bytes).subspan(1)), ValueError);
  chunk_forward(tiny.forward(), std::span(bytes));
  EXPECT_EQ(tiny.o, (std::vector<float>{2, 3, 5, 7}));
}

TEST(CppFace, ViewsKeepTheirOwnShape) {
  Tiny tiny;
  TensorView copy(static_cast<const float*>(tiny.q.data()), {7});
  {
    std::vector<std::int64_t> shape{1, 2, 1, 2}, strides{4, 2, 2, 1};
    DLTensor given{};
    given.data = tiny.q.data();
    given.byte_offset = 8;
    given.device = {kDLCPU, 0};
    given.ndim = 4;
    given.dtype = dl_dtype(DType::float32);
    given.shape = shape.data();
    given.strides = strides.data();
    copy = TensorView(given);
  }
  const TensorView again = copy;
  const DLTensor t = again.dl_tensor();
  EXPECT_EQ(std::vector(t.shape, t.shape + 4), (std::vector<std::int64_t>{1, 2, 1, 2}));
  EXPECT_EQ(std::vector(t.strides, t.strides + 4), (std::vector<std::int64_t>{4, 2, 2, 1}));
  EXPECT_EQ(again.data(), tiny.q.data() + 2);
}

TEST(CppFace, ViewsRefuseStridesThatDoNotMatchTheShape) {
  float x = 0;
  EXPECT_THROW(TensorView(&x, {1, 1}, {1}), ValueError);
}

TEST(CppFace, ElementTypesGiveDtypes) {
  static_assert(dtype_of<double>() == DType::float64);
  static_assert(dtype_of<float>() == DType::float32);
  static_assert(dtype_of<std::int64_t>() == DType::int64);
  static_assert(dtype_of<std::int32_t>() == DType::int32);
  static_assert(size_of(DType::bfloat16) == 2);
  static_assert(dl_dtype(DType::bfloat16).code == kDLBfloat && dl_dtype(DType::bfloat16).bits == 16);
  static_assert(saved_states_slots(1, 200, 3) == 6);
}

TEST(CppFace, VersionAndInfo) {
  EXPECT_EQ(version(), flashdelta_version());
  EXPECT_TRUE(abi_test::is_json(info())) << info();
}

}  // namespace
}  // namespace flashdelta
