// Calls as serving makes them: captured once and replayed with other values, in streams of the caller's, beside one another.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <thread>

#include "cuda/cuda.hpp"
#include "gpu/device_call.hpp"
#include "gpu/graph.hpp"

namespace flashdelta::testing {
namespace {

Case packed_case(DType dtype = DType::bf16) {
  return {.name = "Graph", .T = 400, .H = 2, .HV = 8, .cu_seqlens = {0, 100, 164, 300, 400}, .dtype = dtype};
}

// Same total and count; every kind of change that a serving loop makes.
const std::vector<std::int64_t> kOtherOffsets[] = {{0, 100, 164, 300, 400},   {0, 0, 0, 400, 400},    {0, 400, 400, 400, 400},
                                                   {0, 1, 2, 3, 400},         {7, 64, 128, 192, 256}, {0, 0, 0, 0, 0},
                                                   {400, 400, 400, 400, 400}, {0, 63, 128, 193, 321}, {0, 100, 164, 300, 400}};

class CudaGraph : public GpuTest {};

TEST_F(CudaGraph, ReplaysWithOtherSequencesGatesAndValues) {
  for (const bool int64 : {true, false}) {
    Case c = packed_case(int64 ? DType::bf16 : DType::f16);
    c.int64_offsets = int64;
    Call call = cuda_call_saving(c);
    const Stream stream;
    DeviceCall device(call);
    ASSERT_EQ(device.launch(stream.get()), "");
    stream.synchronize();
    const Graph graph(device, stream.get());
    ASSERT_EQ(graph.error(), "");
    std::uint64_t seed = 100;
    for (const auto& offsets : kOtherOffsets) {
      c.seed = ++seed;
      c.gate = seed % 2 == 0 ? Gate::mixed : Gate::random;
      Call other = cuda_call_saving(c);
      other.set_cu_seqlens(offsets);
      for (const auto& [name, tensor] : other.inputs) device.write(name, tensor);
      device.write_cu_seqlens(offsets);
      device.poison();
      graph.replay(stream.get());
      stream.synchronize();
      const Tensors replayed = device.results();
      expect_same_bits(replayed, cuda_forward(other), "replayed with other sequences");
      expect_contract_recorded(other, replayed, "replayed");
    }
  }
}

TEST_F(CudaGraph, ReplaysTwiceWithTheSameBits) {
  const Call call = cuda_call(packed_case());
  const Stream stream;
  DeviceCall device(call);
  ASSERT_EQ(device.launch(stream.get()), "");
  const Graph graph(device, stream.get());
  ASSERT_EQ(graph.error(), "");
  const Tensors expected = cuda_forward(call);
  for (int i = 0; i < 3; ++i) {
    device.poison();
    graph.replay(stream.get());
    stream.synchronize();
    expect_same_bits(device.results(), expected);
  }
}

// prepare may tell that nothing is cut while the plan asks. In about one of a thousand calls of this shape the plan's warps got different
// answers, and met at different barriers.
TEST_F(CudaGraph, ReplaysShortPacksTenThousandsOfTimes) {
  for (const int heads : {4, 16}) {
    Case c{.name = "Short", .T = 8 * 1024, .H = heads, .HV = 16, .dtype = DType::bf16};
    for (int n = 0; n <= 8; ++n) c.cu_seqlens.push_back(n * 1024);
    const Call call = cuda_call(c);
    const Stream stream;
    DeviceCall device(call);
    ASSERT_EQ(device.launch(stream.get()), "");
    const Graph graph(device, stream.get());
    ASSERT_EQ(graph.error(), "");
    const Tensors expected = cuda_forward(call);
    for (int i = 0; i < 30'000; ++i) graph.replay(stream.get());
    stream.synchronize();
    expect_same_bits(device.results(), expected);
  }
}

// State in place: every replay goes one step on.
TEST_F(CudaGraph, DecodesStepAfterStepInPlace) {
  Call call = cuda_call({.name = "Decode", .B = 4, .T = 1, .H = 2, .HV = 8, .dtype = DType::bf16});
  call.in_place = true;
  const Stream stream;
  DeviceCall device(call, Operation::recurrent_forward);
  ASSERT_EQ(device.launch(stream.get()), "");
  stream.synchronize();
  Call step = call;
  step.inputs["initial_state"] = cuda_forward(call, Operation::recurrent_forward).at("final_state");
  const Graph graph(device, stream.get());
  ASSERT_EQ(graph.error(), "");
  for (int i = 0; i < 3; ++i) {
    const Tensors expected = cuda_forward(step, Operation::recurrent_forward);
    graph.replay(stream.get());
    stream.synchronize();
    expect_same_bits(device.results(), expected, "step " + std::to_string(i));
    step.inputs["initial_state"] = expected.at("final_state");
  }
}

TEST_F(CudaGraph, ACallIsKernelsAndNothingElse) {
  for (const bool packed : {true, false}) {
    Case c = packed_case();
    if (!packed) c.cu_seqlens.clear();
    const Call call = cuda_call_saving(c);
    const Stream stream;
    DeviceCall device(call);
    ASSERT_EQ(device.launch(stream.get()), "");
    stream.synchronize();
    const Graph graph(device, stream.get());
    ASSERT_EQ(graph.error(), "");
    for (const cudaGraphNodeType type : graph.node_types()) {
      EXPECT_TRUE(type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemset) << "a node of type " << type;
    }
  }
}

TEST_F(CudaGraph, ACallAllocatesNothing) {
  const Call call = cuda_call(packed_case());
  DeviceCall device(call);
  ASSERT_EQ(device.launch(), "");
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  std::size_t before = 0, after = 0, total = 0;
  check_cuda(cudaMemGetInfo(&before, &total), "cudaMemGetInfo");
  for (int i = 0; i < 10; ++i) ASSERT_EQ(device.launch(), "");
  check_cuda(cudaMemGetInfo(&after, &total), "cudaMemGetInfo");
  EXPECT_EQ(before, after);
  check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

void sleep_in_stream(cudaStream_t stream, int milliseconds) {
  const auto sleep = [](void* duration) {
    std::this_thread::sleep_for(std::chrono::milliseconds(reinterpret_cast<std::intptr_t>(duration)));
  };
  check_cuda(cudaLaunchHostFunc(stream, sleep, reinterpret_cast<void*>(std::intptr_t{milliseconds})), "cudaLaunchHostFunc");
}

// Behind something slow in its stream, a call must come back at once, and must wait there for what the slow thing guards.
TEST_F(CudaGraph, ACallWaitsInItsStreamAndNowhereElse) {
  const Call call = cuda_call(packed_case());
  const Tensors expected = cuda_forward(call);
  ASSERT_FALSE(expected.empty());
  const Stream stream;
  DeviceCall device(call);
  ASSERT_EQ(device.launch(stream.get()), "");
  stream.synchronize();

  const HostTensor& v = call.inputs.at("v");
  HostTensor wrong = v;
  wrong.fill(1);
  device.write("v", wrong);
  device.poison();
  const DeviceTensor right(v);
  constexpr int kMilliseconds = 100;
  sleep_in_stream(stream.get(), kMilliseconds);
  const DLTensor* to = device.arguments().v;
  check_cuda(cudaMemcpyAsync(to->data, right.dl()->data, static_cast<std::size_t>(v.size()) * 2, cudaMemcpyDeviceToDevice, stream.get()),
             "cudaMemcpyAsync");
  const auto start = std::chrono::steady_clock::now();
  ASSERT_EQ(device.launch(stream.get()), "");
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
  EXPECT_LT(elapsed.count(), kMilliseconds / 2.0) << "the call waited for its stream";
  stream.synchronize();
  device.write("v", v);
  expect_same_bits(device.results(), expected);
}

TEST_F(CudaGraph, TwoStreamsAtOnceKeepApart) {
  const Case cases[] = {{.name = "One", .B = 4, .T = 2000, .H = 2, .HV = 8, .dtype = DType::bf16, .seed = 1},
                        {.name = "Other", .T = 3000, .H = 1, .HV = 16, .cu_seqlens = {0, 700, 1400, 3000}, .dtype = DType::f16, .seed = 2}};
  const Call one = cuda_call(cases[0]), other = cuda_call(cases[1]);
  const Tensors expected_one = cuda_forward(one), expected_other = cuda_forward(other);
  ASSERT_FALSE(expected_one.empty());
  const Stream stream_one, stream_other;
  DeviceCall device_one(one), device_other(other);
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(device_one.launch(stream_one.get()), "");
    ASSERT_EQ(device_other.launch(stream_other.get()), "");
  }
  stream_one.synchronize();
  stream_other.synchronize();
  expect_same_bits(device_one.results(), expected_one);
  expect_same_bits(device_other.results(), expected_other);
}

// Another thread's calls, with workspaces of their own.
TEST_F(CudaGraph, ThreadsKeepApart) {
  constexpr int kThreads = 4;
  std::vector<Call> calls;
  std::vector<Tensors> expected;
  for (std::uint64_t seed = 1; seed <= kThreads; ++seed) {
    Case c = packed_case();
    c.seed = seed;
    calls.push_back(cuda_call(c));
    expected.push_back(cuda_forward(calls.back()));
  }
  std::array<std::string, kThreads> errors;
  std::array<Tensors, kThreads> found;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      try {
        const Stream stream;
        DeviceCall device(calls[i]);
        for (int j = 0; j < 20; ++j) errors[i] += device.launch(stream.get());
        stream.synchronize();
        found[i] = device.results();
      } catch (const std::exception& error) {
        errors[i] += error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < kThreads; ++i) {
    EXPECT_EQ(errors[i], "");
    expect_same_bits(found[i], expected[i], "thread " + std::to_string(i));
  }
}

// Tensors decide where a call runs, not the caller's current device, which stays what it was.
TEST_F(CudaGraph, RunsOnTheTensorsDeviceWhicheverThatIs) {
  const Call call = cuda_call(packed_case());
  const Tensors expected = cuda_forward(call);
  const int devices = static_cast<int>(cuda::devices().size());
  for (int current = 0; current < devices; ++current) {
    for (int device = 0; device < devices; ++device) {
      DeviceCall there(call, Operation::chunk_forward, {}, device);
      check_cuda(cudaSetDevice(current), "cudaSetDevice");
      EXPECT_EQ(there.launch(), "") << "device " << device;
      int now = -1;
      check_cuda(cudaGetDevice(&now), "cudaGetDevice");
      EXPECT_EQ(now, current) << "the call changed the caller's device";
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
      check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
      expect_same_bits(there.results(), expected, "device " + std::to_string(device));
      check_cuda(cudaSetDevice(0), "cudaSetDevice");
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
