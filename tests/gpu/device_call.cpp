#include "gpu/device_call.hpp"

#include <cmath>
#include <cstdlib>
#include <optional>

#include "cuda/cuda.hpp"
#include "gpu/record.hpp"
#include "gpu/shared_memory.hpp"
#include "support/contract.hpp"

namespace flashdelta::testing {
namespace {

// Asked once: a look at all devices takes milliseconds.
const std::string& why_no_gpu() {
  static const std::string reason = cuda::devices().empty() ? cuda::problem() : "";
  return reason;
}

Shape states_of(const Call& call) {
  const Case& c = call.made_from;
  const auto given = call.inputs.find("initial_state");
  if (given != call.inputs.end()) return given->second.shape();
  const bool v_first = call.options.state_v_first != 0;
  return {call.sequences(), c.HV, v_first ? c.V : c.K, v_first ? c.K : c.V};
}

// For compute-sanitizer's initcheck, to which a poisoned workspace is an initialised one.
bool bare_workspace() { return std::getenv("FLASHDELTA_TESTS_BARE_WORKSPACE") != nullptr; }

// Gradients are inputs of backward alone.
bool is_forward_input(const std::string& name) { return !name.starts_with("d_"); }

}  // namespace

void GpuTest::SetUp() {
  if (!why_no_gpu().empty()) GTEST_SKIP() << why_no_gpu();
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) FAIL() << "CUDA is unusable since an earlier test: " << cudaGetErrorString(error);
}

void GpuTest::TearDown() {
  if (!why_no_gpu().empty()) return;
  const cudaError_t error = cudaDeviceSynchronize();
  EXPECT_EQ(error, cudaSuccess) << "a kernel of this test failed: " << cudaGetErrorString(error);
  const cudaError_t left = cudaGetLastError();
  EXPECT_EQ(left, cudaSuccess) << "the test left an error behind: " << cudaGetErrorString(left);
}

Call cuda_call(Case c) {
  Call call = cuda_call_saving(std::move(c));
  call.unwanted = {"saved_c", "saved_T", "saved_states"};
  return call;
}

Call cuda_call_saving(Case c) {
  c.K = c.V = 128;
  c.d_o = c.d_final_state = false;
  Call call = make_call(c);
  call.options.backend = FLASHDELTA_BACKEND_AUTO;
  return call;
}

DeviceCall::DeviceCall(const Call& call, Operation operation, Poison poison, int device)
    : call_(call), operation_(operation), poison_(poison), device_(device) {
  for (const auto& [name, tensor] : call_.inputs) {
    if (is_forward_input(name)) inputs_.try_emplace(name, tensor, poison.guards, device);
  }
  cu_seqlens_ = DeviceOffsets(call_.cu_seqlens.values(), call_.made_from.int64_offsets, device);
  const Case& c = call_.made_from;
  const HostTensor& v = call_.inputs.at("v");
  const std::int64_t rows = v.shape()[0], tokens = v.shape()[1];
  add_output("o", v.dtype(), v.shape());
  if (!call_.in_place) add_output("final_state", call_.final_state_dtype, states_of(call_));
  if (operation == Operation::recurrent_forward) return;
  const std::int64_t per_state = FLASHDELTA_CHUNK * std::max(call_.options.checkpoint_chunks, 1);
  add_output("saved_c", DType::f32, {rows, tokens, c.HV});
  add_output("saved_T", DType::f32, {rows, tokens, c.HV, FLASHDELTA_CHUNK});
  add_output("saved_states", call_.saved_states_dtype, {rows * tokens / per_state + call_.sequences(), c.HV, c.K, c.V});
  if (call_.segment_counts) add_output("segment_counts", DType::i32, {4});
}

void DeviceCall::add_output(const std::string& name, DType dtype, const Shape& shape) {
  if (call_.unwanted.contains(name)) return;
  const auto layout = call_.layouts.find(name);
  outputs_.try_emplace(name, HostTensor(dtype, shape, layout == call_.layouts.end() ? Layout::contiguous : layout->second), kNaNByte,
                       device_);
}

flashdelta_forward_args DeviceCall::arguments() {
  const auto in = [this](const char* name) {
    const auto found = inputs_.find(name);
    return found == inputs_.end() ? nullptr : found->second.dl();
  };
  const auto out = [this](const char* name) {
    const auto found = outputs_.find(name);
    return found == outputs_.end() ? nullptr : found->second.dl();
  };
  flashdelta_forward_args args{};
  args.struct_size = sizeof(args);
  args.options = call_.options;
  args.q = in("q");
  args.k = in("k");
  args.v = in("v");
  args.g = in("g");
  args.beta = in("beta");
  args.initial_state = in("initial_state");
  args.cu_seqlens = cu_seqlens_.dl();
  args.A_log = in("A_log");
  args.dt_bias = in("dt_bias");
  args.o = out("o");
  args.final_state = call_.in_place ? inputs_.at("initial_state").dl() : out("final_state");
  args.saved_c = out("saved_c");
  args.saved_T = out("saved_T");
  args.saved_states = out("saved_states");
  args.segment_counts = out("segment_counts");
  args.workspace = workspace_.data();
  args.workspace_size = workspace_.size();
  return args;
}

std::string DeviceCall::prepare() {
  if (has_workspace_) return "";
  const flashdelta_forward_args args = arguments();
  std::size_t bytes = 0;
  status_ = operation_ == Operation::chunk_forward ? flashdelta_chunk_forward_workspace_size(&args, &bytes)
                                                   : flashdelta_recurrent_forward_workspace_size(&args, &bytes);
  if (status_ != FLASHDELTA_OK) return flashdelta_last_error();
  const auto content = bare_workspace() ? std::nullopt : std::optional(poison_.workspace);
  workspace_ = DeviceBuffer(bytes, content, kNaNByte, device_);
  has_workspace_ = true;
  return "";
}

std::string DeviceCall::launch(cudaStream_t stream) {
  call_.options.stream = stream;
  if (std::string error = prepare(); !error.empty()) return error;
  const flashdelta_forward_args args = arguments();
  status_ = operation_ == Operation::chunk_forward ? flashdelta_chunk_forward(&args) : flashdelta_recurrent_forward(&args);
  return status_ == FLASHDELTA_OK ? "" : flashdelta_last_error();
}

void DeviceCall::write(const std::string& name, const HostTensor& values) { inputs_.at(name).write(values); }

void DeviceCall::write_cu_seqlens(const std::vector<std::int64_t>& values) { cu_seqlens_.write(values); }

void DeviceCall::poison() {
  poison_shared_memory(nullptr);
  workspace_.fill(poison_.workspace);
  for (auto& [name, tensor] : outputs_) {
    HostTensor values = tensor.host();
    values.fill(std::nan(""));
    tensor.write(values);
  }
}

Tensors DeviceCall::results() {
  EXPECT_TRUE(workspace_.guards_intact()) << "wrote outside the workspace";
  for (const auto& [name, tensor] : inputs_) {
    if (call_.in_place && name == "initial_state") continue;
    EXPECT_TRUE(tensor.unchanged()) << "changed its input " << name << ", or wrote around it";
  }
  EXPECT_TRUE(cu_seqlens_.unchanged()) << "changed cu_seqlens, or wrote around it";
  Tensors found;
  for (auto& [name, tensor] : outputs_) {
    found[name] = tensor.read();
    EXPECT_TRUE(tensor.guards_intact()) << "wrote outside the elements of " << name;
  }
  if (call_.in_place) {
    found["final_state"] = inputs_.at("initial_state").read();
    EXPECT_TRUE(inputs_.at("initial_state").guards_intact()) << "wrote outside the elements of final_state";
  }
  return found;
}

Tensors cuda_forward(const Call& call, Operation operation, Poison poison) {
  DeviceCall device(call, operation, poison);
  poison_shared_memory(nullptr);
  const std::string error = device.launch();
  EXPECT_EQ(device.status(), FLASHDELTA_OK) << error << "; " << call.made_from;
  if (device.status() != FLASHDELTA_OK) return {};
  const cudaError_t finished = cudaDeviceSynchronize();
  EXPECT_EQ(finished, cudaSuccess) << cudaGetErrorString(finished) << "; " << call.made_from;
  if (finished != cudaSuccess) return {};
  return device.results();
}

std::string short_name(DType dtype) {
  switch (dtype) {
    case DType::bf16: return "bf16";
    case DType::f16: return "fp16";
    case DType::f32: return "fp32";
    default: return "fp64";
  }
}

void expect_contract_recorded(const Call& call, const Tensors& got, const Tensors& oracle, const std::string& context) {
  if (got.empty()) return;  // the call failed and said so
  const DType dtype = call.made_from.dtype;
  for (const char* name : {"o", "final_state"}) {
    const auto found = got.find(name);
    if (found == got.end()) continue;
    const HostTensor& x = found->second;
    std::string entry = std::string(name) + '_' + short_name(dtype);
    // What a narrower state costs by being stored is not the kernel's.
    if (std::string(name) == "final_state" && x.dtype() != DType::f32) entry += "_stored_" + short_name(x.dtype());
    const double smallest = underflow(x.dtype()) * std::sqrt(static_cast<double>(x.size()));
    test::record_error(entry, relative_error(x, oracle.at(name), smallest / contract(dtype).o));
  }
  expect_contract(call, got, oracle, context);
}

void expect_contract_recorded(const Call& call, const Tensors& got, const std::string& context) {
  if (!got.empty()) expect_contract_recorded(call, got, oracle_forward(call), context);
}

Tensors run_and_expect_contract(const Call& call, const std::string& context) {
  Tensors got = cuda_forward(call);
  expect_contract_recorded(call, got, context);
  return got;
}

}  // namespace flashdelta::testing
