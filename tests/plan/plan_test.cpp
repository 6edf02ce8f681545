#include "plan/plan.hpp"

#include <gtest/gtest.h>

#include <string>

#include "c_api/call.hpp"
#include "cpu/cpu.hpp"
#include "cuda/cuda.hpp"

namespace flashdelta {
namespace {

using abi_test::Call;
using abi_test::Entry;

TEST(Plan, TheReferenceBackendNeedsNoWorkspace) {
  for (const Entry entry :
       {Entry::chunk_forward_workspace_size, Entry::recurrent_forward_workspace_size, Entry::chunk_backward_workspace_size}) {
    Call call(entry);
    ASSERT_EQ(call.run(), FLASHDELTA_OK) << flashdelta_last_error();
    EXPECT_EQ(call.answered, 0U);
  }
}

TEST(Plan, WorkspacesAreMultiplesOf64Bytes) {
  for (const Entry entry :
       {Entry::chunk_forward_workspace_size, Entry::recurrent_forward_workspace_size, Entry::chunk_backward_workspace_size}) {
    Call call(entry, FLASHDELTA_BACKEND_CPU);
    ASSERT_EQ(call.run(), FLASHDELTA_OK) << flashdelta_last_error();
    EXPECT_EQ(call.answered % 64, 0U);
  }
}

TEST(Plan, AWorkspaceOneByteShortIsRefusedAndNothingIsWritten) {
  for (const Entry entry : {Entry::chunk_forward, Entry::recurrent_forward, Entry::chunk_backward}) {
    Call call(entry, FLASHDELTA_BACKEND_CPU);
    ASSERT_TRUE(call.provide_workspace()) << flashdelta_last_error();
    const std::size_t needed = call.workspace_size;
    if (needed == 0) continue;
    call.workspace_size = needed - 1;
    const auto before = call.snapshot();
    EXPECT_EQ(call.run(), FLASHDELTA_VALUE_ERROR);
    EXPECT_EQ(std::string(flashdelta_last_error()), "workspace: " + std::to_string(needed - 1) + " bytes given; this call needs " +
                                                        std::to_string(needed) + " (ask the workspace_size function)");
    EXPECT_TRUE(call.snapshot() == before);
  }
}

TEST(Plan, NoWorkspaceWhereOneIsNeededIsRefused) {
  for (const Entry entry : {Entry::chunk_forward, Entry::recurrent_forward, Entry::chunk_backward}) {
    Call call(entry, FLASHDELTA_BACKEND_CPU);
    ASSERT_TRUE(call.provide_workspace()) << flashdelta_last_error();
    if (call.workspace_size == 0) continue;
    call.workspace = nullptr;
    call.workspace_size = 0;
    EXPECT_EQ(call.run(), FLASHDELTA_VALUE_ERROR);
    EXPECT_EQ(std::string(flashdelta_last_error()).rfind("workspace: 0 bytes given", 0), 0U) << flashdelta_last_error();
  }
}

TEST(Plan, InstructionSetsThatThisProcessorLacksAreUnavailable) {
  for (const auto set : {FLASHDELTA_INSTRUCTION_SET_BASELINE, FLASHDELTA_INSTRUCTION_SET_AVX2, FLASHDELTA_INSTRUCTION_SET_AVX512}) {
    Call call(Entry::chunk_forward_workspace_size, FLASHDELTA_BACKEND_CPU);
    call.options.instruction_set = set;
    if (cpu::usable(set)) {
      EXPECT_EQ(call.run(), FLASHDELTA_OK) << flashdelta_last_error();
    } else {
      EXPECT_EQ(call.run(), FLASHDELTA_UNAVAILABLE);
      EXPECT_EQ(std::string(flashdelta_last_error()).rfind("instruction_set: is ", 0), 0U) << flashdelta_last_error();
    }
  }
}

void make_cuda(Call& call) {
  call.drop_cu_seqlens();
  call.resize(1, 6, 2, 4, 128, 128);
  call.move_to_cuda();
}

TEST(Plan, WithoutCudaCodeItsTensorsAreUnavailableAndUntouched) {
  if (cuda::built()) GTEST_SKIP() << "this build holds CUDA code";
  for (const Entry entry : {Entry::chunk_forward, Entry::recurrent_forward, Entry::chunk_forward_workspace_size}) {
    Call call(entry);
    make_cuda(call);
    const auto before = call.snapshot();
    EXPECT_EQ(call.run(), FLASHDELTA_UNAVAILABLE);
    EXPECT_EQ(std::string(flashdelta_last_error()), "backend: tensors are on a CUDA device, but " + cuda::problem());
    EXPECT_TRUE(call.snapshot() == before);
  }
}

TEST(Plan, TheWorkspaceOnCudaIsKnownWithoutAGpu) {
  if (!cuda::built()) GTEST_SKIP() << "this build holds no CUDA code";
  for (const Entry entry : {Entry::chunk_forward_workspace_size, Entry::recurrent_forward_workspace_size}) {
    Call call(entry);
    make_cuda(call);
    ASSERT_EQ(call.run(), FLASHDELTA_OK) << flashdelta_last_error();
    EXPECT_EQ(call.answered % 64, 0U);
  }
}

TEST(Plan, BackwardOnCudaIsUnavailableInEveryBuild) {
  for (const Entry entry : {Entry::chunk_backward, Entry::chunk_backward_workspace_size}) {
    Call call(entry);
    make_cuda(call);
    const auto before = call.snapshot();
    EXPECT_EQ(call.run(), FLASHDELTA_UNAVAILABLE);
    EXPECT_NE(std::string(flashdelta_last_error()).find("not yet available on the cuda backend"), std::string::npos);
    EXPECT_TRUE(call.snapshot() == before);
  }
}

}  // namespace
}  // namespace flashdelta
