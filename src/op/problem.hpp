// A checked call: what every backend gets. Made by op/check.hpp only, so a backend may rely on every line below.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "flashdelta/flashdelta.h"

namespace flashdelta::op {

enum class DType : std::uint8_t { f64, f32, bf16, f16, i32 };

constexpr std::int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 || t == DType::i32 ? 4 : 2; }

// A strided view, strides in elements. data is null where the argument is absent (or has no elements: see `present`).
// Axes: q, k, v, o and their gradients (b, t, head, channel); g, beta, saved_c (b, t, head); states (n, head, k, v) whatever
// state_v_first said (the view's strides hold it); saved_T (b, t, head, j); A_log, dt_bias (head); segment_counts (i).
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool present = false;
  int rank = 0;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> stride{};

  explicit operator bool() const { return present; }

  [[nodiscard]] std::int64_t offset(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0, std::int64_t l = 0) const {
    return i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
  }
  // The element's address. Bytes, because the dtype is a run-time value.
  [[nodiscard]] std::byte* at(std::int64_t i, std::int64_t j = 0, std::int64_t k = 0, std::int64_t l = 0) const {
    return static_cast<std::byte*>(data) + offset(i, j, k, l) * size_of(dtype);
  }
};

enum class Operation : std::uint8_t { chunk_forward, chunk_backward, recurrent_forward };
enum class Backend : std::uint8_t { cpu, cuda, reference };

struct Problem {
  Operation operation{};
  Backend backend{};  // resolved: never "auto"
  int device_id = 0;  // CUDA ordinal; 0 on CPU
  std::int64_t B = 0, T = 0, H = 0, HV = 0, K = 0, V = 0, N = 0;
  double scale = 0;  // resolved
  bool qk_l2norm = false, gate_in_kernel = false, beta_sigmoid = false, neg_eigval = false, batch_invariant = false;
  flashdelta_context_parallel context_parallel{};
  double tolerance = 0;       // resolved
  int num_segments = 0;       // 0: the plan's choice
  int num_threads = 0;        // as given
  int checkpoint_chunks = 1;  // resolved
  flashdelta_instruction_set instruction_set{};
  void* stream = nullptr;

  // cu_seqlens: null for B sequences of T tokens. Host memory for the cpu and reference backends, and already checked there.
  const void* cu_seqlens = nullptr;
  std::int64_t cu_seqlens_stride = 1;
  bool cu_seqlens_int64 = false;

  Tensor q, k, v, g, beta, initial_state, A_log, dt_bias;
  Tensor o, final_state;                                             // forward, recurrent
  bool states_overlap = false;                                       // initial_state and final_state may share bytes
  Tensor segment_counts;                                             // forward: contiguous; op/segment_counts.hpp
  Tensor saved_c, saved_T, saved_states;                             // out of forward, into backward
  Tensor d_o, d_final_state;                                         // backward, in
  Tensor dq, dk, dv, dg, dbeta, d_initial_state, dA_log, d_dt_bias;  // backward, out

  void* workspace = nullptr;
  std::size_t workspace_size = 0;
};

// Tokens [begin, end) of batch row `row`. Host-readable cu_seqlens only.
struct Sequence {
  std::int64_t row = 0, begin = 0, end = 0;
  [[nodiscard]] std::int64_t length() const { return end - begin; }
};

inline std::int64_t cu_seqlen(const Problem& p, std::int64_t i) {
  const std::int64_t at = i * p.cu_seqlens_stride;
  return p.cu_seqlens_int64 ? static_cast<const std::int64_t*>(p.cu_seqlens)[at] : static_cast<const std::int32_t*>(p.cu_seqlens)[at];
}

inline Sequence sequence(const Problem& p, std::int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T};
  return {0, cu_seqlen(p, n), cu_seqlen(p, n + 1)};
}

// Where saved_states keeps the state before a sequence's first chunk (flashdelta.h says why no scan is needed).
inline std::int64_t saved_states_base(const Problem& p, std::int64_t n) {
  const Sequence s = sequence(p, n);
  return (s.row * p.T + s.begin) / (FLASHDELTA_CHUNK * p.checkpoint_chunks) + n;
}

inline std::int64_t saved_states_slots(const Problem& p) {
  return p.B * p.T / (FLASHDELTA_CHUNK * static_cast<std::int64_t>(p.checkpoint_chunks)) + p.N;
}

}  // namespace flashdelta::op
