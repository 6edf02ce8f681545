// Barriers and copies of src/cuda/device: who may go on when, and which bytes lie where afterwards.
#include <gtest/gtest.h>

#include "cuda/device/barrier.cuh"
#include "cuda/device/copy.cuh"
#include "cuda/tensor_map.hpp"
#include "gpu/device_call.hpp"
#include "gpu/device_words.hpp"

namespace flashdelta::testing {
namespace {

namespace device = cuda::device;
using device::Barrier;

class CudaCopies : public GpuTest {};

// --- barriers

constexpr int kThreads = 128;

// Warps 0 and 1 write, 2 and 3 read what they wrote, round after round through one buffer.
__global__ void hand_over(int rounds, bool patient, int* found) {
  __shared__ Barrier full, empty;
  __shared__ int data[64];
  const int t = threadIdx.x % 64;
  if (threadIdx.x == 0) {
    device::barrier_init(full, 64 + 2);
    device::barrier_init(empty, 64);
    device::barrier_init_fence();
  }
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 64) {
      device::barrier_wait(empty, round % 2 ^ 1);
      data[t] = 1000 * round + t;
      device::barrier_arrive(full);
      device::barrier_arrive_if(full, t % 32 == 5);  // two of them
    } else {
      if (patient) {
        device::barrier_wait_long(full, round % 2);
      } else {
        device::barrier_wait(full, round % 2);
      }
      found[round * 64 + t] = data[63 - t];
      device::barrier_arrive(empty);
    }
  }
}

TEST_F(CudaCopies, BarriersHandABufferToAndFro) {
  constexpr int kRounds = 9;
  for (const bool patient : {false, true}) {
    const Numbers<int> found(kRounds * 64);
    hand_over<<<1, kThreads>>>(kRounds, patient, found.device());
    const std::vector<int> values = found.host();
    for (int i = 0; i < kRounds * 64; ++i) EXPECT_EQ(values[i], 1000 * (i / 64) + 63 - i % 64);
  }
}

// Warp 0 writes and goes on, warp 1 waits for it; then both meet at another barrier.
__global__ void meet(int* found) {
  __shared__ int data[64];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    data[lane] = lane + 7;
    device::named_arrive(3, 64);
  } else {
    device::named_sync(3, 64);
    data[32 + lane] = 2 * data[31 - lane];
  }
  device::named_sync(4, 64);
  found[threadIdx.x] = data[63 - threadIdx.x];
}

TEST_F(CudaCopies, NamedBarriersCountThoseThatWaitAndThoseThatGoOn) {
  const Numbers<int> found(64);
  meet<<<1, 64>>>(found.device());
  const std::vector<int> values = found.host();
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(values[63 - i], i + 7);
    EXPECT_EQ(values[31 - i], 2 * (31 - i + 7));
  }
}

__global__ void write_late(int* data) {
  device::allow_dependent_launch();
  const long long start = clock64();
  while (clock64() - start < 1000000) {
  }
  data[blockIdx.x * blockDim.x + threadIdx.x] = 5;
}
__global__ void read_behind(const int* data, int* found) {
  device::wait_for_previous_launch();
  found[threadIdx.x] = data[threadIdx.x];
}

TEST_F(CudaCopies, ADependentLaunchSeesWhatThePreviousOneWroteLast) {
  const Numbers<int> data(64), found(64);
  const Stream stream;
  write_late<<<2, 32, 0, stream.get()>>>(data.device());
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1), config.blockDim = dim3(64), config.stream = stream.get();
  config.attrs = &overlap, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, read_behind, static_cast<const int*>(data.device()), found.device()), "cudaLaunchKernelEx");
  EXPECT_EQ(found.host(), std::vector<int>(64, 5));
}

// --- runs of bytes

constexpr int kMostBytes = 16384;

// Two loads announced at once, 1 added to every byte, and back.
__global__ void there_and_back(const unsigned char* from, unsigned char* to, int bytes) {
  __shared__ alignas(128) unsigned char data[kMostBytes];
  __shared__ Barrier full;
  if (threadIdx.x == 0) {
    device::barrier_init(full, 1);
    device::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    device::prefetch_bytes(from, bytes);
    device::barrier_arrive_expect(full, bytes);
    device::load_bytes(data, from, 16, full);
    if (bytes > 16) device::load_bytes(data + 16, from + 16, bytes - 16, full);
  }
  device::barrier_wait(full, 0);
  for (int i = threadIdx.x; i < bytes; i += kThreads) data[i] += 1;
  device::fence_shared_to_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    device::store_bytes(to, device::shared_address(data), bytes);
    device::wait_stores_read();
    data[0] = 99;  // too late to be seen
    device::wait_stores_done();
  }
}

TEST_F(CudaCopies, BytesGoToSharedMemoryAndBack) {
  for (const int bytes : {16, 32, 256, 5120, kMostBytes}) {
    std::vector<std::uint8_t> values(kMostBytes);
    for (int i = 0; i < kMostBytes; ++i) values[i] = static_cast<std::uint8_t>(i * 37 + i / 256);
    const Numbers<std::uint8_t> from(values), to(kMostBytes);
    there_and_back<<<1, kThreads>>>(from.device(), to.device(), bytes);
    const std::vector<std::uint8_t> found = to.host();
    for (int i = 0; i < kMostBytes; ++i) {
      ASSERT_EQ(found[i], i < bytes ? static_cast<std::uint8_t>(values[i] + 1) : 0xff) << i << " of " << bytes;
    }
  }
}

// --- boxes

// Two tiles of 64 channels, one behind the other.
constexpr int kBoxBytes = 2 * kTileBytes;
int in_box(int token, std::int64_t channel) {
  return static_cast<int>(channel / 64) * kTileBytes + in_tile(token, static_cast<int>(channel % 64));
}

struct Box {
  int head, token, row;
};

__device__ void load_one(unsigned char* tile, Barrier& full, const CUtensorMap* map, Box at) {
  if (threadIdx.x == 0) {
    device::barrier_init(full, 1);
    device::barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    device::barrier_arrive_expect(full, kBoxBytes);
    device::load_box(tile, map, full, 0, at.head, at.token, at.row);
  }
  device::barrier_wait(full, 0);
}

__device__ void store_one(const unsigned char* from, const CUtensorMap* map, Box at, bool condition, unsigned char* tile) {
  for (int i = threadIdx.x; i < kBoxBytes; i += kThreads) tile[i] = from[i];
  device::fence_shared_to_async();
  __syncthreads();
  if (threadIdx.x == 0 && condition) device::store_box(map, tile, 0, at.head, at.token, at.row);
  if (threadIdx.x == 0) device::wait_stores_done();
}

__global__ void read_box(const __grid_constant__ CUtensorMap map, Box at, unsigned char* found) {
  __shared__ alignas(1024) unsigned char tile[kBoxBytes];
  __shared__ Barrier full;
  if (threadIdx.x == 0) device::prefetch_map(&map);
  load_one(tile, full, &map, at);
  for (int i = threadIdx.x; i < kBoxBytes; i += kThreads) found[i] = tile[i];
}

__global__ void write_box(const __grid_constant__ CUtensorMap map, Box at, bool condition, const unsigned char* from) {
  __shared__ alignas(1024) unsigned char tile[kBoxBytes];
  store_one(from, &map, at, condition, tile);
}

__global__ void bound_map(const __grid_constant__ CUtensorMap map, CUtensorMap* bounded, int end) {
  __shared__ alignas(128) std::uint32_t scratch[32];
  device::write_bounded_map(bounded, map, end, scratch, threadIdx.x);
}

// With a map that an earlier kernel has written.
__global__ void read_box_by(const CUtensorMap* map, Box at, unsigned char* found) {
  __shared__ alignas(1024) unsigned char tile[kBoxBytes];
  __shared__ Barrier full;
  if (threadIdx.x == 0) device::acquire_map(map);
  load_one(tile, full, map, at);
  for (int i = threadIdx.x; i < kBoxBytes; i += kThreads) found[i] = tile[i];
}

__global__ void write_box_by(const CUtensorMap* map, Box at, const unsigned char* from) {
  __shared__ alignas(1024) unsigned char tile[kBoxBytes];
  if (threadIdx.x == 0) device::acquire_map(map);
  store_one(from, map, at, true, tile);
}

constexpr std::int64_t kRows = 2, kTokens = 150, kHeads = 3, kChannels = 128;

// [2, 150, 3, 128], contiguous or with `padding` elements behind every token; each element holds its own number.
class Tiled {
 public:
  explicit Tiled(std::int64_t padding)
      : token_(kHeads * kChannels + padding), row_(kTokens * token_), numbers_(all_numbers(row_)), memory_(numbers_) {
    tensor_.data = memory_.device();
    tensor_.dtype = op::DType::bf16;
    tensor_.present = true;
    tensor_.rank = 4;
    tensor_.shape = {kRows, kTokens, kHeads, kChannels};
    tensor_.stride = {row_, token_, kChannels, 1};
  }
  [[nodiscard]] CUtensorMap map() const { return cuda::make_tensor_map(tensor_, 2, "x"); }
  [[nodiscard]] std::int64_t offset(std::int64_t row, std::int64_t token, std::int64_t head, std::int64_t channel) const {
    return row * row_ + token * token_ + head * kChannels + channel;
  }
  [[nodiscard]] const std::vector<std::uint16_t>& numbers() const { return numbers_; }
  [[nodiscard]] std::vector<std::uint16_t> now() const { return memory_.host(); }

  // A tile as a load must leave it, zero from token `end` on.
  [[nodiscard]] std::vector<std::uint8_t> tile(const Box& at, std::int64_t end) const {
    std::vector<std::uint8_t> bytes(kBoxBytes);
    for (int t = 0; t < 64; ++t) {
      for (int c = 0; c < kChannels; ++c) {
        put(bytes, in_box(t, c), at.token + t < end ? numbers_[offset(at.row, at.token + t, at.head, c)] : 0);
      }
    }
    return bytes;
  }
  // All numbers after a tile was stored, nothing from token `end` on.
  [[nodiscard]] std::vector<std::uint16_t> after_store(const std::vector<std::uint8_t>& tile, const Box& at, std::int64_t end) const {
    std::vector<std::uint16_t> values = numbers_;
    for (int t = 0; t < 64 && at.token + t < end; ++t) {
      for (int c = 0; c < kChannels; ++c) values[offset(at.row, at.token + t, at.head, c)] = get(tile, in_box(t, c));
    }
    return values;
  }

 private:
  static std::vector<std::uint16_t> all_numbers(std::int64_t row) {
    std::vector<std::uint16_t> values(static_cast<std::size_t>(kRows * row));
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::uint16_t>(i * 40503 >> 3 | 1);
    return values;
  }

  std::int64_t token_, row_;
  std::vector<std::uint16_t> numbers_;
  Numbers<std::uint16_t> memory_;
  op::Tensor tensor_;
};

// Inside, across the last token, and at the last token of the last row.
constexpr Box kBoxes[] = {{0, 0, 0}, {2, 13, 0}, {1, 100, 0}, {2, 128, 1}, {1, 149, 1}};

std::vector<std::uint8_t> some_tile() {
  std::vector<std::uint8_t> bytes(kBoxBytes);
  for (int i = 0; i < kBoxBytes; ++i) bytes[i] = static_cast<std::uint8_t>(i * 91 + i / 128);
  return bytes;
}

TEST_F(CudaCopies, BoxesAreReadSwizzledAndZeroPastTheLastToken) {
  for (const std::int64_t padding : {0, 24}) {
    const Tiled x(padding);
    for (const Box& at : kBoxes) {
      const Numbers<std::uint8_t> found(kBoxBytes);
      read_box<<<1, kThreads>>>(x.map(), at, found.device());
      EXPECT_EQ(found.host(), x.tile(at, kTokens)) << "token " << at.token << ", padding " << padding;
    }
  }
}

TEST_F(CudaCopies, BoxesAreWrittenWhereTheTensorIsAndNowhereElse) {
  const std::vector<std::uint8_t> tile = some_tile();
  const Numbers<std::uint8_t> from(tile);
  for (const std::int64_t padding : {0, 24}) {
    for (const Box& at : kBoxes) {
      const Tiled x(padding);
      write_box<<<1, kThreads>>>(x.map(), at, false, from.device());
      EXPECT_EQ(x.now(), x.numbers()) << "the condition was false";
      write_box<<<1, kThreads>>>(x.map(), at, true, from.device());
      EXPECT_EQ(x.now(), x.after_store(tile, at, kTokens)) << "token " << at.token << ", padding " << padding;
    }
  }
}

TEST_F(CudaCopies, BoundedMapsEndWhereTheyAreTold) {
  const std::vector<std::uint8_t> tile = some_tile();
  const Numbers<std::uint8_t> from(tile);
  const Numbers<CUtensorMap> bounded(1);
  for (const std::int64_t padding : {0, 24}) {
    for (const int end : {1, 14, 64, 101, 149, 150}) {
      for (const Box& at : kBoxes) {
        const Tiled x(padding);
        const Numbers<std::uint8_t> found(kBoxBytes);
        bound_map<<<1, 32>>>(x.map(), bounded.device(), end);
        read_box_by<<<1, kThreads>>>(bounded.device(), at, found.device());
        EXPECT_EQ(found.host(), x.tile(at, end)) << "token " << at.token << ", end " << end;
        write_box_by<<<1, kThreads>>>(bounded.device(), at, from.device());
        EXPECT_EQ(x.now(), x.after_store(tile, at, end)) << "token " << at.token << ", end " << end;
      }
    }
  }
}

}  // namespace
}  // namespace flashdelta::testing
