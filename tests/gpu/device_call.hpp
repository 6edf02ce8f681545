// A call of support/case.hpp on a GPU: poisoned outputs and workspace, guard zones around everything, and the contract.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "gpu/device_memory.hpp"
#include "support/case.hpp"

namespace flashdelta::testing {

// Skips where there is no usable GPU; fails a test whose kernels did, and those after it, by name.
class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override;
  void TearDown() override;
};

// K = V = 128, on the backend that the tensors' device asks for, without the saved tensors.
Call cuda_call(Case c);
// The saved tensors too.
Call cuda_call_saving(Case c);

enum class Operation { chunk_forward, recurrent_forward };

// The bytes that a call must not depend on.
struct Poison {
  std::byte workspace = kNaNByte;
  std::byte guards = kNaNByte;
};

// One call with all of its tensors on a device. It may be launched many times, by way of a graph too: nothing of it moves.
class DeviceCall {
 public:
  explicit DeviceCall(const Call& call, Operation operation = Operation::chunk_forward, Poison poison = {}, int device = 0);
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;

  flashdelta_options& options() { return call_.options; }
  // Allocates the workspace, once. "" or the error's text.
  [[nodiscard]] std::string prepare();
  // prepare(), then enqueues and nothing else. "" or the error's text.
  [[nodiscard]] std::string launch(cudaStream_t stream = nullptr);
  [[nodiscard]] flashdelta_status status() const { return status_; }

  // Other values for what is on the device; sizes stay.
  void write(const std::string& name, const HostTensor& values);
  void write_cu_seqlens(const std::vector<std::int64_t>& values);
  // Outputs, workspace and shared memory as before the first launch.
  void poison();

  // After the stream was waited for: the outputs. Fails the test where anything but outputs and workspace was written.
  Tensors results();

  [[nodiscard]] flashdelta_forward_args arguments();

 private:
  void add_output(const std::string& name, DType dtype, const Shape& shape);

  Call call_;
  Operation operation_;
  Poison poison_;
  int device_;
  std::map<std::string, DeviceTensor> inputs_, outputs_;
  DeviceOffsets cu_seqlens_;
  DeviceBuffer workspace_;
  bool has_workspace_ = false;
  flashdelta_status status_ = FLASHDELTA_OK;
};

// Launches on poisoned shared memory and waits; a failure of any kind fails the test. Outputs: o, final_state, and the saved tensors that
// are wanted.
Tensors cuda_forward(const Call& call, Operation operation = Operation::chunk_forward, Poison poison = {});

// Holds o and final_state to the contract and notes their errors in the record.
void expect_contract_recorded(const Call& call, const Tensors& got, const std::string& context = "");
void expect_contract_recorded(const Call& call, const Tensors& got, const Tensors& oracle, const std::string& context);
// All of it for a call.
Tensors run_and_expect_contract(const Call& call, const std::string& context = "");

// "bf16", for names in the record.
std::string short_name(DType dtype);

}  // namespace flashdelta::testing
