#include "gpu/device_oracle.hpp"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <vector>

#include "gpu/device_memory.hpp"

namespace flashdelta::testing {
namespace {

constexpr int kWidth = 128;  // K, V, and threads of a block: one a value column

enum class Type : int { f64, f32, bf16, f16, i64, i32 };

struct View {
  const void* data;
  Type type;
  std::int64_t shape[4], stride[4];
};

Type type_of(const DLDataType& t) {
  if (t.code == kDLInt) return t.bits == 64 ? Type::i64 : Type::i32;
  if (t.code == kDLBfloat) return Type::bf16;
  return t.bits == 64 ? Type::f64 : t.bits == 32 ? Type::f32 : Type::f16;
}

View view_of(const DLTensor* tensor) {
  if (tensor == nullptr) return {};
  View view{static_cast<const std::byte*>(tensor->data) + tensor->byte_offset, type_of(tensor->dtype), {1, 1, 1, 1}, {0, 0, 0, 0}};
  std::int64_t inner = 1;
  for (int axis = tensor->ndim - 1; axis >= 0; --axis) {
    view.shape[axis] = tensor->shape[axis];
    view.stride[axis] = tensor->strides != nullptr ? tensor->strides[axis] : inner;
    inner *= tensor->shape[axis];
  }
  return view;
}

__device__ double load(const View& x, std::int64_t i, std::int64_t j = 0, std::int64_t k = 0, std::int64_t l = 0) {
  const std::int64_t at = i * x.stride[0] + j * x.stride[1] + k * x.stride[2] + l * x.stride[3];
  switch (x.type) {
    case Type::f64: return static_cast<const double*>(x.data)[at];
    case Type::f32: return static_cast<const float*>(x.data)[at];
    case Type::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(x.data)[at]);
    case Type::f16: return __half2float(static_cast<const __half*>(x.data)[at]);
    case Type::i64: return static_cast<double>(static_cast<const std::int64_t*>(x.data)[at]);
    default: return static_cast<const std::int32_t*>(x.data)[at];
  }
}

__device__ void store(const View& x, std::int64_t at, float value) {
  void* data = const_cast<void*>(x.data);
  switch (x.type) {
    case Type::f64: static_cast<double*>(data)[at] = value; return;
    case Type::f32: static_cast<float*>(data)[at] = value; return;
    case Type::bf16: static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16(value); return;
    default: static_cast<__half*>(data)[at] = __float2half(value); return;
  }
}

struct Recurrence {
  View q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, o, final_state;
  std::int64_t T, H, HV, N, tokens;
  double scale;
  bool l2norm, gate_in_kernel, beta_sigmoid, neg_eigval, v_first;
};

struct Sums {
  double o_difference, o_square, state_difference, state_square;
};

__device__ double block_sum(double value, double* scratch) {
  __syncthreads();
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int half = kWidth / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  return scratch[0];
}

__device__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }
__device__ double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

__device__ double log_gate(const Recurrence& p, std::int64_t row, std::int64_t t, std::int64_t head) {
  if (p.g.data == nullptr) return 0;
  const double g = load(p.g, row, t, head);
  if (!p.gate_in_kernel) return g;
  return -exp(load(p.A_log, head)) * softplus(g + (p.dt_bias.data != nullptr ? load(p.dt_bias, head) : 0));
}

__device__ double write_strength(const Recurrence& p, std::int64_t row, std::int64_t t, std::int64_t head) {
  if (p.beta.data == nullptr) return 1;
  const double beta = load(p.beta, row, t, head);
  return p.beta_sigmoid ? sigmoid(beta) * (p.neg_eigval ? 2 : 1) : beta;
}

__device__ double load_state(const Recurrence& p, const View& states, std::int64_t n, std::int64_t head, int k, int v) {
  return p.v_first ? load(states, n, head, v, k) : load(states, n, head, k, v);
}

// The element of a row that this thread owns, normalised if the call says so.
__device__ double load_normed(const Recurrence& p, const View& x, std::int64_t row, std::int64_t t, std::int64_t head, double* scratch) {
  const double value = load(x, row, t, head, threadIdx.x);
  return p.l2norm ? value * rsqrt(block_sum(value * value, scratch) + 1e-6) : value;
}

__device__ double squared_difference(double a, double b) { return (a - b) * (a - b); }

// One block a (sequence, value head); shared memory holds S, K x V, of which a thread owns a column.
__global__ void __launch_bounds__(kWidth) recurrence(Recurrence p, Sums* sums) {
  extern __shared__ double S[];
  __shared__ double k_row[kWidth], q_row[kWidth], scratch[kWidth];
  const std::int64_t n = blockIdx.x / p.HV, head = blockIdx.x % p.HV, key_head = head / (p.HV / p.H);
  const bool packed = p.cu_seqlens.data != nullptr;
  const std::int64_t row = packed ? 0 : n;
  const std::int64_t begin = packed ? static_cast<std::int64_t>(load(p.cu_seqlens, n)) : 0;
  const std::int64_t end = packed ? static_cast<std::int64_t>(load(p.cu_seqlens, n + 1)) : p.T;
  const std::int64_t stop = p.tokens > 0 && begin + p.tokens < end ? begin + p.tokens : end;
  const int v = threadIdx.x;
  for (int k = 0; k < kWidth; ++k) S[k * kWidth + v] = p.initial_state.data != nullptr ? load_state(p, p.initial_state, n, head, k, v) : 0;

  Sums own{};
  for (std::int64_t t = begin; t < stop; ++t) {
    const double k_own = load_normed(p, p.k, row, t, key_head, scratch);
    const double q_own = load_normed(p, p.q, row, t, key_head, scratch);
    __syncthreads();
    k_row[v] = k_own;
    q_row[v] = q_own;
    __syncthreads();
    const double decay = exp(log_gate(p, row, t, head));
    double read = 0, o = 0;
    for (int k = 0; k < kWidth; ++k) read += k_row[k] * S[k * kWidth + v];
    const double u = write_strength(p, row, t, head) * (load(p.v, row, t, head, v) - decay * read);
    for (int k = 0; k < kWidth; ++k) {
      const double s = decay * S[k * kWidth + v] + k_row[k] * u;
      S[k * kWidth + v] = s;
      o += q_row[k] * s;
    }
    o *= p.scale;
    own.o_difference += squared_difference(load(p.o, row, t, head, v), o);
    own.o_square += o * o;
  }
  if (p.final_state.data != nullptr && stop == end) {
    for (int k = 0; k < kWidth; ++k) {
      const double s = S[k * kWidth + v];
      own.state_difference += squared_difference(load_state(p, p.final_state, n, head, k, v), s);
      own.state_square += s * s;
    }
  }
  const Sums all{block_sum(own.o_difference, scratch), block_sum(own.o_square, scratch), block_sum(own.state_difference, scratch),
                 block_sum(own.state_square, scratch)};
  if (v == 0) sums[blockIdx.x] = all;
}

double ratio(double difference, double square) { return difference == 0 ? 0 : std::sqrt(difference / square); }

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

enum class Fill : int { normal, unit, sigmoid, gate };

// One thread an element at a time.
__global__ void fill_elements(View x, Fill kind, std::uint64_t seed, float factor) {
  const std::int64_t last = x.shape[3], count = x.shape[0] * x.shape[1] * x.shape[2] * last;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t l = i % last, row = i / last;
    const std::int64_t k = row % x.shape[2], j = row / x.shape[2] % x.shape[1], h = row / x.shape[2] / x.shape[1];
    const float n = normal(seed, i);
    float value = n * factor;
    if (kind == Fill::sigmoid) value = 1 / (1 + expf(-n));
    // Three axes: the heads are axis 2.
    if (kind == Fill::gate) value = k % 4 == 3 ? 0 : -log1pf(expf(-n)) / 16;
    store(x, h * x.stride[0] + j * x.stride[1] + k * x.stride[2] + l * x.stride[3], value);
  }
}

// One warp a row.
__global__ void fill_rows(View x, std::uint64_t seed) {
  const std::int64_t rows = x.shape[0] * x.shape[1] * x.shape[2], width = x.shape[3];
  const int lane = threadIdx.x % 32;
  for (std::int64_t row = blockIdx.x * std::int64_t{blockDim.x / 32} + threadIdx.x / 32; row < rows;
       row += std::int64_t{gridDim.x} * (blockDim.x / 32)) {
    const std::int64_t k = row % x.shape[2], j = row / x.shape[2] % x.shape[1], h = row / x.shape[2] / x.shape[1];
    const std::int64_t base = h * x.stride[0] + j * x.stride[1] + k * x.stride[2];
    float squares = 0;
    for (std::int64_t l = lane; l < width; l += 32) {
      const float n = normal(seed, row * width + l);
      squares += n * n;
    }
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffff, squares, step);
    for (std::int64_t l = lane; l < width; l += 32) store(x, base + l * x.stride[3], normal(seed, row * width + l) * rsqrtf(squares));
  }
}

__global__ void count_bad(View x, unsigned long long* found) {
  const std::int64_t last = x.shape[3], count = x.shape[0] * x.shape[1] * x.shape[2] * last;
  unsigned long long own = 0;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < count; i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t row = i / last;
    own += isfinite(load(x, row / x.shape[2] / x.shape[1], row / x.shape[2] % x.shape[1], row % x.shape[2], i % last)) ? 0 : 1;
  }
  if (own > 0) atomicAdd(found, own);
}

constexpr int kFillBlocks = 4096, kFillThreads = 256;

void finish(const char* what) {
  check_cuda(cudaGetLastError(), what);
  check_cuda(cudaDeviceSynchronize(), what);
}

void fill(const DLTensor& tensor, Fill kind, std::uint64_t seed, double factor = 1) {
  if (kind == Fill::unit) {
    fill_rows<<<kFillBlocks, kFillThreads>>>(view_of(&tensor), seed);
  } else {
    fill_elements<<<kFillBlocks, kFillThreads>>>(view_of(&tensor), kind, seed, static_cast<float>(factor));
  }
  finish("filling a tensor");
}

}  // namespace

DeviceErrors device_errors(const flashdelta_forward_args& args, std::int64_t tokens) {
  const flashdelta_options& options = args.options;
  const std::int64_t sequences = args.cu_seqlens != nullptr ? args.cu_seqlens->shape[0] - 1 : args.q->shape[0];
  const Recurrence problem{.q = view_of(args.q),
                           .k = view_of(args.k),
                           .v = view_of(args.v),
                           .g = view_of(args.g),
                           .beta = view_of(args.beta),
                           .initial_state = view_of(args.initial_state),
                           .cu_seqlens = view_of(args.cu_seqlens),
                           .A_log = view_of(args.A_log),
                           .dt_bias = view_of(args.dt_bias),
                           .o = view_of(args.o),
                           .final_state = view_of(args.final_state),
                           .T = args.q->shape[1],
                           .H = args.q->shape[2],
                           .HV = args.v->shape[2],
                           .N = sequences,
                           .tokens = tokens,
                           .scale = options.has_scale != 0 ? options.scale : 1 / std::sqrt(static_cast<double>(kWidth)),
                           .l2norm = options.use_qk_l2norm_in_kernel != 0,
                           .gate_in_kernel = options.use_gate_in_kernel != 0,
                           .beta_sigmoid = options.use_beta_sigmoid_in_kernel != 0,
                           .neg_eigval = options.allow_neg_eigval != 0,
                           .v_first = options.state_v_first != 0};
  const auto items = static_cast<std::size_t>(sequences * problem.HV);
  if (items == 0) return {};
  DeviceBuffer device_sums(items * sizeof(Sums), kNaNByte);
  constexpr int kStateBytes = kWidth * kWidth * sizeof(double);
  check_cuda(cudaFuncSetAttribute(recurrence, cudaFuncAttributeMaxDynamicSharedMemorySize, kStateBytes), "cudaFuncSetAttribute");
  recurrence<<<static_cast<unsigned>(items), kWidth, kStateBytes>>>(problem, reinterpret_cast<Sums*>(device_sums.data()));
  finish("the oracle's kernel");
  std::vector<Sums> sums(items);
  check_cuda(cudaMemcpy(sums.data(), device_sums.data(), device_sums.size(), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  Sums all{};
  for (const Sums& s : sums) {
    all.o_difference += s.o_difference;
    all.o_square += s.o_square;
    all.state_difference += s.state_difference;
    all.state_square += s.state_square;
  }
  return {ratio(all.o_difference, all.o_square), ratio(all.state_difference, all.state_square), std::sqrt(all.o_square)};
}

std::int64_t count_not_finite(const DLTensor& tensor) {
  DeviceBuffer found(sizeof(unsigned long long), std::byte{0});
  count_bad<<<kFillBlocks, kFillThreads>>>(view_of(&tensor), reinterpret_cast<unsigned long long*>(found.data()));
  finish("counting what is not finite");
  unsigned long long count = 0;
  check_cuda(cudaMemcpy(&count, found.data(), sizeof(count), cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
  return static_cast<std::int64_t>(count);
}

void fill_normal(const DLTensor& tensor, std::uint64_t seed, double factor) { fill(tensor, Fill::normal, seed, factor); }
void fill_unit(const DLTensor& tensor, std::uint64_t seed) { fill(tensor, Fill::unit, seed); }
void fill_sigmoid(const DLTensor& tensor, std::uint64_t seed) { fill(tensor, Fill::sigmoid, seed); }
void fill_gates(const DLTensor& tensor, std::uint64_t seed) { fill(tensor, Fill::gate, seed); }

}  // namespace flashdelta::testing
