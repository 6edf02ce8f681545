// Offsets that are no offsets, where the library may not read them back: nothing outside the tensors is touched. And arguments that the
// GPU does not take: refused by name.
#include <gtest/gtest.h>

#include <limits>
#include <ostream>

#include "gpu/child.hpp"
#include "gpu/device_call.hpp"

namespace flashdelta::testing {
namespace {

constexpr std::int64_t kMost64 = std::numeric_limits<std::int64_t>::max(), kLeast64 = std::numeric_limits<std::int64_t>::min();
constexpr std::int64_t kMost32 = std::numeric_limits<std::int32_t>::max(), kLeast32 = std::numeric_limits<std::int32_t>::min();

struct Offsets {
  const char* name;
  std::vector<std::int64_t> values;
  bool only_int64 = false;
};
std::ostream& operator<<(std::ostream& out, const Offsets& offsets) { return out << offsets.name; }

const Offsets kMalformed[] = {
    {"Decreasing", {0, 200, 100, 300}},
    {"AllDecreasing", {300, 200, 100, 0}},
    {"StartsNegative", {-70, 10, 64, 300}},
    {"AllNegative", {-300, -200, -100, -1}},
    {"EndsBeyondT", {0, 100, 200, 301}},
    {"EndsFarBeyondT", {0, 100, 200, 1000000}},
    {"AllBeyondT", {301, 400, 500, 600}},
    {"JumpsOutAndBack", {0, 5000, 10, 300}},
    {"JumpsBelowAndBack", {0, -5000, 10, 300}},
    {"MostOfInt32", {0, kMost32, kMost32, kMost32}},
    {"LeastOfInt32", {kLeast32, 0, kLeast32, kMost32}},
    {"WidestSpanOfInt32", {kLeast32, kMost32, kLeast32, kMost32}},
    {"MostOfInt64", {0, kMost64, kMost64, kMost64}, true},
    {"LeastOfInt64", {kLeast64, 0, kLeast64, kMost64}, true},
    {"WidestSpanOfInt64", {kLeast64, kMost64, kLeast64, kMost64}, true},
    {"FitsOnlyInTheLow32Bits", {0, (std::int64_t{1} << 32) + 100, (std::int64_t{1} << 33) + 200, (std::int64_t{1} << 34) + 300}, true},
    {"AllBitsSet", {-1, -1, -1, -1}},
};

class CudaMalformedOffsets : public GpuTest, public ::testing::WithParamInterface<Offsets> {};
INSTANTIATE_TEST_SUITE_P(, CudaMalformedOffsets, ::testing::ValuesIn(kMalformed),
                         [](const auto& param_info) { return param_info.param.name; });

TEST_P(CudaMalformedOffsets, TouchNothingOutsideTheTensors) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const bool int64 : {false, true}) {
      if (GetParam().only_int64 && !int64) continue;
      Call call = cuda_call_saving({.name = "Malformed", .T = 300, .H = 2, .HV = 4, .cu_seqlens = {0, 100, 200, 300}, .dtype = dtype});
      call.made_from.int64_offsets = int64;
      call.set_cu_seqlens(GetParam().values);
      // Fails where a guard zone was written to, an input changed, or the kernel faulted.
      cuda_forward(call);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    }
  }
}

class CudaRefusals : public GpuTest {};

// In a process of its own: the switch may be read once and for all.
TEST_F(CudaRefusals, TheSwitchThatChecksOffsetsNamesThem) {
  const std::string output = run_child(Child::checked_offsets, "FLASHDELTA_CHECK_CU_SEQLENS=1");
  EXPECT_EQ(output.find("good: 0 "), 0U) << output;
  for (const char* line : {"\ndecreasing: 1 cu_seqlens", "\nnegative: 1 cu_seqlens", "\nbeyond: 1 cu_seqlens", "\ncaptured: 0 "}) {
    EXPECT_NE(output.find(line), std::string::npos) << output;
  }
}

void expect_refused(const Call& call, flashdelta_status status, const std::string& name) {
  DeviceCall device(call);
  const std::string error = device.launch();
  EXPECT_EQ(device.status(), status) << error << "; " << call.made_from;
  EXPECT_TRUE(error.starts_with(name + ":")) << error;
}

TEST_F(CudaRefusals, WhatTheGpuDoesNotTakeIsRefusedByName) {
  Case c{.name = "Refused", .T = 70, .HV = 2, .K = 96, .V = 128, .dtype = DType::bf16, .d_o = false, .d_final_state = false};
  Call call = make_call(c);
  call.options.backend = FLASHDELTA_BACKEND_AUTO;
  expect_refused(call, FLASHDELTA_VALUE_ERROR, "q");
  c.K = 128;
  c.V = 256;
  call = make_call(c);
  call.options.backend = FLASHDELTA_BACKEND_CUDA;
  expect_refused(call, FLASHDELTA_VALUE_ERROR, "v");
  expect_refused(cuda_call({.name = "Fp32", .T = 70, .HV = 2, .dtype = DType::f32}), FLASHDELTA_TYPE_ERROR, "q");
}

}  // namespace
}  // namespace flashdelta::testing
