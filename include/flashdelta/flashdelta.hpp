// flashdelta: the gated delta rule (Gated DeltaNet). C++20 face, header only, over the C ABI of flashdelta.h.
//
// Shapes: B batch rows, T tokens, H query/key heads, HV value heads (HV % H == 0; value head h reads key head h / (HV / H)),
// K key width, V value width, N sequences (B, or len(cu_seqlens) - 1). What each tensor may be: flashdelta.h. A failed call throws a
// subclass of flashdelta::Error whose text names the argument, what it was and what is allowed; it has written nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta {

/// Tokens of a chunk.
inline constexpr std::int64_t chunk_size = FLASHDELTA_CHUNK;

/// A failed call. status() is the C ABI's status, what() the text.
class Error : public std::runtime_error {
 public:
  Error(flashdelta_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  [[nodiscard]] flashdelta_status status() const noexcept { return status_; }

 private:
  flashdelta_status status_;
};

/// An argument's value, shape, stride or presence is not allowed.
class ValueError : public Error {
 public:
  explicit ValueError(const std::string& text) : Error(FLASHDELTA_VALUE_ERROR, text) {}
};

/// An argument's dtype is not allowed.
class TypeError : public Error {
 public:
  explicit TypeError(const std::string& text) : Error(FLASHDELTA_TYPE_ERROR, text) {}
};

/// The backend is not in this build, has no usable device, or lacks the operation.
class UnavailableError : public Error {
 public:
  explicit UnavailableError(const std::string& text) : Error(FLASHDELTA_UNAVAILABLE, text) {}
};

enum class Backend : std::int32_t {
  automatic = FLASHDELTA_BACKEND_AUTO,
  cpu = FLASHDELTA_BACKEND_CPU,
  cuda = FLASHDELTA_BACKEND_CUDA,
  reference = FLASHDELTA_BACKEND_REFERENCE
};

enum class ContextParallel : std::int32_t {
  automatic = FLASHDELTA_CONTEXT_PARALLEL_AUTO,
  exact = FLASHDELTA_CONTEXT_PARALLEL_EXACT,
  off = FLASHDELTA_CONTEXT_PARALLEL_OFF
};

enum class InstructionSet : std::int32_t {
  best = FLASHDELTA_INSTRUCTION_SET_BEST,
  baseline = FLASHDELTA_INSTRUCTION_SET_BASELINE,
  avx2 = FLASHDELTA_INSTRUCTION_SET_AVX2,
  avx512 = FLASHDELTA_INSTRUCTION_SET_AVX512
};

enum class DType : std::uint8_t { float64, float32, bfloat16, float16, int64, int32 };

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64: return 8;
    case DType::float32:
    case DType::int32: return 4;
    default: return 2;
  }
}

/// The DLPack dtype of `dtype`.
constexpr DLDataType dl_dtype(DType dtype) {
  const auto code = dtype == DType::bfloat16 ? kDLBfloat : dtype == DType::int64 || dtype == DType::int32 ? kDLInt : kDLFloat;
  return {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(8 * size_of(dtype)), 1};
}

/// The dtype of a C++ element type that has one: double, float, int64_t, int32_t. 16-bit floats have no C++20 type: name their DType.
template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) {
    return DType::float64;
  } else if constexpr (std::is_same_v<T, float>) {
    return DType::float32;
  } else if constexpr (std::is_integral_v<T> && std::is_signed_v<T> && sizeof(T) == 8) {
    return DType::int64;
  } else {
    static_assert(std::is_integral_v<T> && std::is_signed_v<T> && sizeof(T) == 4, "no flashdelta dtype for this type");
    return DType::int32;
  }
}

/// Someone else's memory seen as a tensor. Copyable; owns its shape and strides, never the data. Strides count elements and are
/// row-major where none are given. The library decides what is allowed: any view can be made, calls check it.
class TensorView {
 public:
  /// The tensor at `data`. ValueError where strides are given and are not as many as the axes.
  TensorView(const void* data, DType dtype, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides = {},
             DLDevice device = {kDLCPU, 0})
      : data_(const_cast<void*>(data)), dtype_(dl_dtype(dtype)), shape_(std::move(shape)), strides_(std::move(strides)), device_(device) {
    check_strides();
  }

  /// The same with the dtype of the pointer's element type.
  template <typename T>
    requires(std::is_arithmetic_v<T>)
  TensorView(T* data, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides = {}, DLDevice device = {kDLCPU, 0})
      : TensorView(static_cast<const void*>(data), dtype_of<std::remove_cv_t<T>>(), std::move(shape), std::move(strides), device) {}

  /// A copy of what `tensor` says. Its shape and strides need not outlive the view.
  explicit TensorView(const DLTensor& tensor)
      : data_(tensor.data),
        byte_offset_(tensor.byte_offset),
        dtype_(tensor.dtype),
        shape_(tensor.shape, tensor.shape + tensor.ndim),
        strides_(tensor.strides == nullptr ? std::vector<std::int64_t>() : std::vector(tensor.strides, tensor.strides + tensor.ndim)),
        device_(tensor.device) {}

  [[nodiscard]] const std::vector<std::int64_t>& shape() const noexcept { return shape_; }
  /// Empty: row-major.
  [[nodiscard]] const std::vector<std::int64_t>& strides() const noexcept { return strides_; }
  [[nodiscard]] DLDataType dtype() const noexcept { return dtype_; }
  [[nodiscard]] DLDevice device() const noexcept { return device_; }
  [[nodiscard]] void* data() const noexcept { return static_cast<std::byte*>(data_) + byte_offset_; }

  /// This view for the C ABI. Valid as long as the view lives and is not assigned to.
  [[nodiscard]] DLTensor dl_tensor() const noexcept {
    DLTensor t{};
    t.data = data_;
    t.device = device_;
    t.ndim = static_cast<decltype(t.ndim)>(shape_.size());
    t.dtype = dtype_;
    t.shape = const_cast<std::int64_t*>(shape_.data());
    t.strides = strides_.empty() ? nullptr : const_cast<std::int64_t*>(strides_.data());
    t.byte_offset = byte_offset_;
    return t;
  }

 private:
  void check_strides() const {
    if (strides_.empty() || strides_.size() == shape_.size()) return;
    throw ValueError("strides: " + std::to_string(strides_.size()) + " given; the shape has " + std::to_string(shape_.size()) + " axes");
  }

  void* data_;
  std::uint64_t byte_offset_ = 0;
  DLDataType dtype_;
  std::vector<std::int64_t> shape_, strides_;
  DLDevice device_;
};

/// Options of every operation; flashdelta.h explains each.
struct Options {
  std::optional<double> scale{};  ///< factor on q; none: K^-0.5
  bool use_qk_l2norm_in_kernel = false;
  bool use_gate_in_kernel = false;
  bool use_beta_sigmoid_in_kernel = false;
  bool allow_neg_eigval = false;
  bool state_v_first = false;
  ContextParallel context_parallel = ContextParallel::automatic;
  int num_segments = 0;
  bool batch_invariant = false;
  Backend backend = Backend::automatic;
  int num_threads = 0;
  InstructionSet instruction_set = InstructionSet::best;
  int checkpoint_chunks = 1;
  double context_parallel_tolerance = 0;  ///< below 1; 0: 1e-6, with 16-bit q 1e-5
  void* stream = nullptr;

  /// The same for the C ABI.
  [[nodiscard]] flashdelta_options c_options() const {
    flashdelta_options o{};
    o.scale = scale.value_or(0);
    o.has_scale = scale.has_value() ? 1 : 0;
    o.use_qk_l2norm_in_kernel = use_qk_l2norm_in_kernel ? 1 : 0;
    o.use_gate_in_kernel = use_gate_in_kernel ? 1 : 0;
    o.use_beta_sigmoid_in_kernel = use_beta_sigmoid_in_kernel ? 1 : 0;
    o.allow_neg_eigval = allow_neg_eigval ? 1 : 0;
    o.state_v_first = state_v_first ? 1 : 0;
    o.context_parallel = static_cast<std::int32_t>(context_parallel);
    o.num_segments = num_segments;
    o.batch_invariant = batch_invariant ? 1 : 0;
    o.backend = static_cast<std::int32_t>(backend);
    o.num_threads = num_threads;
    o.instruction_set = static_cast<std::int32_t>(instruction_set);
    o.checkpoint_chunks = checkpoint_chunks;
    o.context_parallel_tolerance = context_parallel_tolerance;
    o.stream = stream;
    return o;
  }
};

/// Arguments of chunk_forward and recurrent_forward. q, k, v and o are required, the others may be left empty.
struct ForwardArgs {
  Options options{};
  std::optional<TensorView> q{}, k{};            ///< [B, T, H, K]
  std::optional<TensorView> v{};                 ///< [B, T, HV, V]
  std::optional<TensorView> g{}, beta{};         ///< [B, T, HV]
  std::optional<TensorView> initial_state{};     ///< [N, HV, K, V]
  std::optional<TensorView> cu_seqlens{};        ///< [N + 1] int32 or int64
  std::optional<TensorView> A_log{}, dt_bias{};  ///< [HV]
  std::optional<TensorView> o{};                 ///< [B, T, HV, V], written completely
  std::optional<TensorView> final_state{};       ///< [N, HV, K, V]; may be initial_state itself
  std::optional<TensorView> saved_c{};           ///< [B, T, HV] fp32
  std::optional<TensorView> saved_T{};           ///< [B, T, HV, 64] fp32
  std::optional<TensorView> saved_states{};      ///< [saved_states_slots(...), HV, K, V] fp32 or bf16
  std::optional<TensorView> segment_counts{};    ///< [4] int32: segments, boundaries warmed up, boundaries exact, warm-up chunks
};

/// Arguments of chunk_backward. q, k, v are required, saved_states too except by the reference backend.
struct BackwardArgs {
  Options options{};
  std::optional<TensorView> q{}, k{}, v{}, g{}, beta{}, initial_state{}, cu_seqlens{}, A_log{}, dt_bias{};  ///< as in the forward call
  std::optional<TensorView> saved_c{}, saved_T{}, saved_states{};                                           ///< what the forward call wrote
  std::optional<TensorView> d_o{}, d_final_state{};                                                         ///< empty: zero
  /// Wanted gradients: shape and dtype of the argument each belongs to.
  std::optional<TensorView> dq{}, dk{}, dv{}, dg{}, dbeta{}, d_initial_state{}, dA_log{}, d_dt_bias{};
};

/// First axis of saved_states for B rows of T tokens in N sequences.
constexpr std::int64_t saved_states_slots(std::int64_t B, std::int64_t T, std::int64_t N, std::int64_t checkpoint_chunks = 1) {
  return B * T / (chunk_size * checkpoint_chunks) + N;
}

namespace detail {

/// Throws the exception that belongs to a failed status of the calling thread.
inline void check(flashdelta_status status) {
  switch (status) {
    case FLASHDELTA_OK: return;
    case FLASHDELTA_VALUE_ERROR: throw ValueError(flashdelta_last_error());
    case FLASHDELTA_TYPE_ERROR: throw TypeError(flashdelta_last_error());
    case FLASHDELTA_UNAVAILABLE: throw UnavailableError(flashdelta_last_error());
    default: throw Error(status, flashdelta_last_error());
  }
}

/// The C struct of a call and the DLTensors it points to.
template <typename CArgs, std::size_t kTensors>
class Call {
 public:
  Call(const Options& options, std::span<std::byte> workspace) {
    args.struct_size = sizeof(CArgs);
    args.options = options.c_options();
    args.workspace = workspace.data();
    args.workspace_size = workspace.size();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  DLTensor* tensor(const std::optional<TensorView>& view) {
    if (!view) return nullptr;
    tensors_[used_] = view->dl_tensor();
    return &tensors_[used_++];
  }

  CArgs args{};

 private:
  std::array<DLTensor, kTensors> tensors_{};
  std::size_t used_ = 0;
};

template <typename CArgs, std::size_t kTensors, typename Args>
void set_inputs(Call<CArgs, kTensors>& call, const Args& a) {
  call.args.q = call.tensor(a.q);
  call.args.k = call.tensor(a.k);
  call.args.v = call.tensor(a.v);
  call.args.g = call.tensor(a.g);
  call.args.beta = call.tensor(a.beta);
  call.args.initial_state = call.tensor(a.initial_state);
  call.args.cu_seqlens = call.tensor(a.cu_seqlens);
  call.args.A_log = call.tensor(a.A_log);
  call.args.dt_bias = call.tensor(a.dt_bias);
  call.args.saved_c = call.tensor(a.saved_c);
  call.args.saved_T = call.tensor(a.saved_T);
  call.args.saved_states = call.tensor(a.saved_states);
}

struct ForwardCall : Call<flashdelta_forward_args, 15> {
  explicit ForwardCall(const ForwardArgs& a, std::span<std::byte> workspace = {}) : Call(a.options, workspace) {
    set_inputs(*this, a);
    args.o = tensor(a.o);
    args.final_state = tensor(a.final_state);
    args.segment_counts = tensor(a.segment_counts);
  }
};

struct BackwardCall : Call<flashdelta_backward_args, 22> {
  explicit BackwardCall(const BackwardArgs& a, std::span<std::byte> workspace = {}) : Call(a.options, workspace) {
    set_inputs(*this, a);
    args.d_o = tensor(a.d_o);
    args.d_final_state = tensor(a.d_final_state);
    args.dq = tensor(a.dq);
    args.dk = tensor(a.dk);
    args.dv = tensor(a.dv);
    args.dg = tensor(a.dg);
    args.dbeta = tensor(a.dbeta);
    args.d_initial_state = tensor(a.d_initial_state);
    args.dA_log = tensor(a.dA_log);
    args.d_dt_bias = tensor(a.d_dt_bias);
  }
};

/// Host memory, aligned as workspaces must be.
class HostWorkspace {
 public:
  explicit HostWorkspace(std::size_t size) : data_(size == 0 ? nullptr : ::operator new(size, kAlignment)), size_(size) {}
  [[nodiscard]] std::span<std::byte> bytes() const { return {static_cast<std::byte*>(data_.get()), size_}; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Free> data_;
  std::size_t size_;
};

inline HostWorkspace allocate_workspace(const std::optional<TensorView>& q, std::size_t size) {
  if (size > 0 && q && q->device().device_type == kDLCUDA) {
    throw ValueError("workspace: tensors are on a CUDA device; pass " + std::to_string(size) + " bytes of that device's memory");
  }
  return HostWorkspace(size);
}

}  // namespace detail

/// Bytes of workspace that the call with these arguments needs. Checks every argument.
inline std::size_t chunk_forward_workspace_size(const ForwardArgs& args) {
  const detail::ForwardCall call(args);
  std::size_t bytes = 0;
  detail::check(flashdelta_chunk_forward_workspace_size(&call.args, &bytes));
  return bytes;
}

/// Bytes of workspace that the call with these arguments needs. Checks every argument.
inline std::size_t chunk_backward_workspace_size(const BackwardArgs& args) {
  const detail::BackwardCall call(args);
  std::size_t bytes = 0;
  detail::check(flashdelta_chunk_backward_workspace_size(&call.args, &bytes));
  return bytes;
}

/// Bytes of workspace that the call with these arguments needs. Checks every argument.
inline std::size_t recurrent_forward_workspace_size(const ForwardArgs& args) {
  const detail::ForwardCall call(args);
  std::size_t bytes = 0;
  detail::check(flashdelta_recurrent_forward_workspace_size(&call.args, &bytes));
  return bytes;
}

/// Chunked gated delta rule, forward: writes o and, where given, final_state, the saved tensors and segment_counts. `workspace`: 64-byte
/// aligned, at least chunk_forward_workspace_size(args) bytes on the tensors' device. Throws ValueError, TypeError, UnavailableError or
/// Error.
inline void chunk_forward(const ForwardArgs& args, std::span<std::byte> workspace) {
  const detail::ForwardCall call(args, workspace);
  detail::check(flashdelta_chunk_forward(&call.args));
}

/// The same with a workspace of its own for the time of the call (CPU tensors).
inline void chunk_forward(const ForwardArgs& args) {
  chunk_forward(args, detail::allocate_workspace(args.q, chunk_forward_workspace_size(args)).bytes());
}

/// Chunked gated delta rule, backward: writes every gradient that is given. `workspace` and errors as for chunk_forward.
inline void chunk_backward(const BackwardArgs& args, std::span<std::byte> workspace) {
  const detail::BackwardCall call(args, workspace);
  detail::check(flashdelta_chunk_backward(&call.args));
}

/// The same with a workspace of its own for the time of the call (CPU tensors).
inline void chunk_backward(const BackwardArgs& args) {
  chunk_backward(args, detail::allocate_workspace(args.q, chunk_backward_workspace_size(args)).bytes());
}

/// The rule token by token (decode): writes o and, where given, final_state, which may be initial_state itself. `workspace` and errors
/// as for chunk_forward.
inline void recurrent_forward(const ForwardArgs& args, std::span<std::byte> workspace) {
  const detail::ForwardCall call(args, workspace);
  detail::check(flashdelta_recurrent_forward(&call.args));
}

/// The same with a workspace of its own for the time of the call (CPU tensors).
inline void recurrent_forward(const ForwardArgs& args) {
  recurrent_forward(args, detail::allocate_workspace(args.q, recurrent_forward_workspace_size(args)).bytes());
}

/// The library's version, "0.1.0".
inline std::string version() { return flashdelta_version(); }

/// What this build holds and this machine offers, as JSON text.
inline std::string info() {
  std::size_t needed = 0;
  detail::check(flashdelta_info(nullptr, 0, &needed));
  std::string text(needed, '\0');
  detail::check(flashdelta_info(text.data(), text.size(), nullptr));
  text.pop_back();
  return text;
}

}  // namespace flashdelta
