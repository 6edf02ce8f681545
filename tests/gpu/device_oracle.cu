#include "gpu/device_oracle.hpp"

#include <cmath>
#include <vector>

#include "gpu/tensor_view.cuh"

namespace flashdelta::testing {
namespace {

constexpr int kWidth = 128;  // K, V, and threads of a block: one a value column

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

}  // namespace flashdelta::testing
