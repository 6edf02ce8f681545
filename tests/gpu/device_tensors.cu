#include "gpu/device_tensors.hpp"

#include <cmath>

#include "gpu/tensor_view.cuh"

namespace flashdelta::testing {
namespace {

constexpr int kBlocks = 4096, kThreads = 256;

// A number in (0, 1) for a seed and an index: splitmix64.
__device__ double uniform(std::uint64_t seed, std::uint64_t index) {
  std::uint64_t x = seed * 0x9e3779b97f4a7c15 + index * 0xd1342543de82ef95 + 0x632be59bd9b4e019;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  x ^= x >> 31;
  return (static_cast<double>(x >> 40) + 0.5) * 0x1p-24;
}

__device__ float normal(std::uint64_t seed, std::uint64_t index) {
  const auto radius = static_cast<float>(uniform(seed, 2 * index)), angle = static_cast<float>(uniform(seed, 2 * index + 1));
  return sqrtf(-2 * logf(radius)) * cospif(2 * angle);
}

__device__ float gate(Gates kind, const View& x, const Index& at, float n) {
  const std::int64_t burst = x.shape[1] * 5 / 6;
  switch (kind) {
    case Gates::benchmark: return at.k % 4 == 3 ? 0 : -log1pf(expf(-n)) / 16;
    case Gates::minus_5: return -5;
    case Gates::slight: return -1e-5F;
    case Gates::minus_1000: return -1000;
    case Gates::burst: return at.j >= burst && at.j < burst + 3 ? -50 : 0;
    case Gates::turns: return at.j / 1024 % 2 == 0 ? 0 : -1;
    case Gates::raw: return n;
    default: return 0;
  }
}

enum class Fill : int { constant, normal, sigmoid, gate };

// One thread an element at a time.
__global__ void fill_elements(View x, Fill kind, Gates gates, std::uint64_t seed, float factor) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < size_of(x); i += std::int64_t{gridDim.x} * blockDim.x) {
    const Index at = index_at(x, i);
    const float n = normal(seed, i);
    float value = factor;
    if (kind == Fill::normal) value = factor * n;
    if (kind == Fill::sigmoid) value = factor / (1 + expf(-n));
    if (kind == Fill::gate) value = gate(gates, x, at, n);
    store(x, at.i * x.stride[0] + at.j * x.stride[1] + at.k * x.stride[2] + at.l * x.stride[3], value);
  }
}

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

// 1 / |row| of the random row `row`; one warp.
__device__ float inverse_norm(std::uint64_t seed, std::int64_t row, std::int64_t width, int lane) {
  float squares = 0;
  for (std::int64_t l = lane; l < width; l += 32) {
    const float n = normal(seed, row * width + l);
    squares += n * n;
  }
  return rsqrtf(warp_sum(squares));
}

// One warp a row: a direction shared by all rows, and one of its own.
__global__ void fill_rows(View x, std::uint64_t seed, float shared_weight, float own_weight) {
  const std::int64_t rows = x.shape[0] * x.shape[1] * x.shape[2], width = x.shape[3];
  const std::uint64_t shared_seed = seed ^ 0x5555;
  const int lane = threadIdx.x % 32;
  const float shared = shared_weight == 0 ? 0 : shared_weight * inverse_norm(shared_seed, 0, width, lane);
  for (std::int64_t row = blockIdx.x * std::int64_t{blockDim.x / 32} + threadIdx.x / 32; row < rows;
       row += std::int64_t{gridDim.x} * (blockDim.x / 32)) {
    const Index at = index_at(x, row * width);
    const std::int64_t base = at.i * x.stride[0] + at.j * x.stride[1] + at.k * x.stride[2];
    const float own = own_weight * inverse_norm(seed, row, width, lane);
    for (std::int64_t l = lane; l < width; l += 32) {
      store(x, base + l * x.stride[3], own * normal(seed, row * width + l) + (shared == 0 ? 0 : shared * normal(shared_seed, l)));
    }
  }
}

__device__ bool is_wide(Type type) { return type == Type::f32 || type == Type::i32; }

__device__ const char* address(const View& x, std::int64_t number) {
  const Index at = index_at(x, number);
  const int bytes = x.type == Type::f64 || x.type == Type::i64 ? 8 : is_wide(x.type) ? 4 : 2;
  return static_cast<const char*>(x.data) + bytes * (at.i * x.stride[0] + at.j * x.stride[1] + at.k * x.stride[2] + at.l * x.stride[3]);
}

// Bits of 16- and 32-bit elements.
__device__ unsigned bits(const View& x, std::int64_t number) {
  const char* at = address(x, number);
  return is_wide(x.type) ? *reinterpret_cast<const unsigned*>(at) : *reinterpret_cast<const unsigned short*>(at);
}

__global__ void copy_elements(View from, View to) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < size_of(to); i += std::int64_t{gridDim.x} * blockDim.x) {
    char* at = const_cast<char*>(address(to, i));
    if (is_wide(to.type)) {
      *reinterpret_cast<unsigned*>(at) = bits(from, i);
    } else {
      *reinterpret_cast<unsigned short*>(at) = static_cast<unsigned short>(bits(from, i));
    }
  }
}

__global__ void repeat_elements(View x, std::int64_t period) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < size_of(x); i += std::int64_t{gridDim.x} * blockDim.x) {
    const Index at = index_at(x, i);
    if (at.j < period) continue;
    const double value = load(x, at.i, at.j % period, at.k, at.l);
    store(x, at.i * x.stride[0] + at.j * x.stride[1] + at.k * x.stride[2] + at.l * x.stride[3], static_cast<float>(value));
  }
}

__global__ void fill_elements_in_turn(View x, std::int64_t period, float value, float other) {
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < size_of(x); i += std::int64_t{gridDim.x} * blockDim.x) {
    const Index at = index_at(x, i);
    store(x, at.i * x.stride[0] + at.j * x.stride[1] + at.k * x.stride[2] + at.l * x.stride[3], at.j % period == 0 ? value : other);
  }
}

__device__ double value_at(const View& x, std::int64_t number) {
  const Index at = index_at(x, number);
  return load(x, at.i, at.j, at.k, at.l);
}

__global__ void count_bad(View x, unsigned long long* found) {
  unsigned long long own = 0;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < size_of(x); i += std::int64_t{gridDim.x} * blockDim.x) {
    own += isfinite(value_at(x, i)) ? 0 : 1;
  }
  if (own > 0) atomicAdd(found, own);
}

__global__ void count_unequal(View a, View b, unsigned long long* found) {
  unsigned long long own = 0;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < size_of(a); i += std::int64_t{gridDim.x} * blockDim.x) {
    own += bits(a, i) == bits(b, i) ? 0 : 1;
  }
  if (own > 0) atomicAdd(found, own);
}

// sums[0] += |a - b|^2, sums[1] += |b|^2.
__global__ void add_squares(View a, View b, double* sums) {
  double difference = 0, square = 0;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < size_of(a); i += std::int64_t{gridDim.x} * blockDim.x) {
    const double x = value_at(a, i), y = value_at(b, i);
    difference += (x - y) * (x - y), square += y * y;
  }
  for (int step = 16; step > 0; step /= 2) {
    difference += __shfl_xor_sync(0xffffffff, difference, step), square += __shfl_xor_sync(0xffffffff, square, step);
  }
  if (threadIdx.x % 32 == 0) atomicAdd(sums, difference), atomicAdd(sums + 1, square);
}

void fill(const DLTensor& tensor, Fill kind, std::uint64_t seed, double factor, Gates gates = Gates::zero) {
  fill_elements<<<kBlocks, kThreads>>>(view_of(&tensor), kind, gates, seed, static_cast<float>(factor));
  finish("filling a tensor");
}

// Allocated once: tests compare by the thousand. Sums start at zero.
template <class Result, std::size_t N>
class Sums {
 public:
  Sums() { memory().fill(std::byte{0}); }
  [[nodiscard]] Result* device() const { return reinterpret_cast<Result*>(memory().data()); }
  void wait(const char* what) {
    finish(what);
    check_cuda(cudaMemcpy(values_, memory().data(), sizeof(values_), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  }
  Result operator[](std::size_t i) const { return values_[i]; }

 private:
  static DeviceBuffer& memory() {
    static auto& buffer = *new DeviceBuffer(N * sizeof(Result), std::byte{0});
    return buffer;
  }
  Result values_[N];
};

std::size_t bytes_of(DType dtype, const Shape& shape) {
  std::int64_t size = op::size_of(dtype);
  for (const std::int64_t axis : shape) size *= axis;
  return static_cast<std::size_t>(size);
}

}  // namespace

Array::Array(DType dtype, Shape shape)
    : dtype_(dtype),
      shape_(std::move(shape)),
      strides_(strides_of(shape_, Layout::contiguous)),
      buffer_(bytes_of(dtype, shape_), kNaNByte) {
  const auto bits = static_cast<std::uint8_t>(8 * op::size_of(dtype));
  dl_ = {.data = buffer_.data(),
         .device = {kDLCUDA, 0},
         .ndim = static_cast<int>(shape_.size()),
         .dtype = {static_cast<std::uint8_t>(dtype == DType::bf16  ? kDLBfloat
                                             : dtype == DType::i32 ? kDLInt
                                                                   : kDLFloat),
                   bits, 1},
         .shape = shape_.data(),
         .strides = strides_.data(),
         .byte_offset = 0};
}

Part::Part(const DLTensor& of, int axis, std::int64_t begin, std::int64_t end) : shape_(of.shape, of.shape + of.ndim), dl_(of) {
  shape_[axis] = end - begin;
  dl_.shape = shape_.data();
  dl_.data = static_cast<std::byte*>(of.data) + begin * of.strides[axis] * (of.dtype.bits / 8);
}

void fill_constant(const DLTensor& tensor, double value) { fill(tensor, Fill::constant, 0, value); }
void fill_normal(const DLTensor& tensor, std::uint64_t seed, double factor) { fill(tensor, Fill::normal, seed, factor); }
void fill_sigmoid(const DLTensor& tensor, std::uint64_t seed, double factor) { fill(tensor, Fill::sigmoid, seed, factor); }
void fill_gates(const DLTensor& tensor, std::uint64_t seed, Gates kind) { fill(tensor, Fill::gate, seed, 1, kind); }

void fill_vectors(const DLTensor& tensor, std::uint64_t seed, double length, double cosine) {
  fill_rows<<<kBlocks, kThreads>>>(view_of(&tensor), seed, static_cast<float>(length * std::sqrt(cosine)),
                                   static_cast<float>(length * std::sqrt(1 - cosine)));
  finish("filling a tensor");
}

void repeat_tokens(const DLTensor& tensor, std::int64_t period) {
  repeat_elements<<<kBlocks, kThreads>>>(view_of(&tensor), period);
  finish("repeating tokens");
}

void fill_in_turn(const DLTensor& tensor, std::int64_t period, double value, double other) {
  fill_elements_in_turn<<<kBlocks, kThreads>>>(view_of(&tensor), period, static_cast<float>(value), static_cast<float>(other));
  finish("filling a tensor");
}

void copy(const DLTensor& from, const DLTensor& to) {
  copy_elements<<<kBlocks, kThreads>>>(view_of(&from), view_of(&to));
  finish("copying a tensor");
}

std::int64_t count_not_finite(const DLTensor& tensor) {
  Sums<unsigned long long, 1> found;
  count_bad<<<kBlocks, kThreads>>>(view_of(&tensor), found.device());
  found.wait("counting what is not finite");
  return static_cast<std::int64_t>(found[0]);
}

std::int64_t count_different(const DLTensor& a, const DLTensor& b) {
  Sums<unsigned long long, 1> found;
  count_unequal<<<kBlocks, kThreads>>>(view_of(&a), view_of(&b), found.device());
  found.wait("comparing two tensors");
  return static_cast<std::int64_t>(found[0]);
}

double relative_difference(const DLTensor& a, const DLTensor& b) {
  Sums<double, 2> found;
  add_squares<<<kBlocks, kThreads>>>(view_of(&a), view_of(&b), found.device());
  found.wait("comparing two tensors");
  return found[0] == 0 ? 0 : std::sqrt(found[0] / found[1]);
}

}  // namespace flashdelta::testing
