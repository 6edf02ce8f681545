// The functions that torch tensors go through: one per operation, over the public C ABI, by the calling convention of tvm-ffi.
//
// Arguments are positional: the tensors of flashdelta_forward_args or flashdelta_backward_args in that struct's order (None: absent),
// the options in flashdelta_options' order (scale None: has_scale = 0; the stream as an integer), and last the workspace (uint8, or
// None). Each returns 0 when it ran; otherwise the workspace bytes that it needs, having touched nothing. One call thus serves both
// for asking and for running, and operations that need no workspace take a single one.
//
// check_cu_seqlens(offsets on the host, T) raises what the operations would: for offsets that are about to leave for a device, where
// nobody reads them.
//
// Beside them stand plain C functions for the program's benchmarks, which the public ABI has no use for.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "cpu/cpu.hpp"
#include "flashdelta/flashdelta.h"
#include "op/check.hpp"
#include "op/check_sequences.hpp"
#include "op/error.hpp"
#include "plan/plan.hpp"

namespace {

namespace ffi = tvm::ffi;

const char* error_kind(flashdelta_status status) {
  switch (status) {
    case FLASHDELTA_VALUE_ERROR: return "ValueError";
    case FLASHDELTA_TYPE_ERROR: return "TypeError";
    default: return "RuntimeError";
  }
}

void check(flashdelta_status status) {
  if (status != FLASHDELTA_OK) throw ffi::Error(error_kind(status), flashdelta_last_error(), "");
}

// The arguments of one call, taken in order.
class Arguments {
 public:
  Arguments(const TVMFFIAny* args, std::int32_t size) : args_(reinterpret_cast<const ffi::AnyView*>(args)), size_(size) {}

  DLTensor* tensor() {
    const ffi::AnyView argument = next();
    return argument == nullptr ? nullptr : argument.cast<DLTensor*>();
  }
  std::optional<double> optional_number() {
    const ffi::AnyView argument = next();
    return argument == nullptr ? std::nullopt : std::optional<double>(argument.cast<double>());
  }
  double number() { return next().cast<double>(); }
  // Saturated: what an int32 cannot hold is far outside every option's range, so the library refuses it by name.
  std::int32_t integer() {
    using Limits = std::numeric_limits<std::int32_t>;
    const auto value = next().cast<std::int64_t>();
    return static_cast<std::int32_t>(value < Limits::min() ? Limits::min() : value > Limits::max() ? Limits::max() : value);
  }
  std::int64_t wide_integer() { return next().cast<std::int64_t>(); }
  void* address() { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(next().cast<std::int64_t>())); }

  void done() const {
    if (at_ != size_)
      throw ffi::Error("TypeError", "flashdelta_ffi: " + std::to_string(size_) + " arguments given; one takes " + std::to_string(at_), "");
  }

 private:
  ffi::AnyView next() {
    if (at_ == size_) throw ffi::Error("TypeError", "flashdelta_ffi: only " + std::to_string(size_) + " arguments given", "");
    return args_[at_++];
  }

  const ffi::AnyView* args_;
  std::int32_t size_;
  std::int32_t at_ = 0;
};

flashdelta_options take_options(Arguments& in) {
  flashdelta_options options{};
  const std::optional<double> scale = in.optional_number();
  options.has_scale = scale.has_value() ? 1 : 0;
  options.scale = scale.value_or(0);
  for (std::int32_t* option :
       {&options.use_qk_l2norm_in_kernel, &options.use_gate_in_kernel, &options.use_beta_sigmoid_in_kernel, &options.allow_neg_eigval,
        &options.state_v_first, &options.context_parallel, &options.num_segments, &options.batch_invariant, &options.backend,
        &options.num_threads, &options.instruction_set, &options.checkpoint_chunks}) {
    *option = in.integer();
  }
  options.context_parallel_tolerance = in.number();
  options.stream = in.address();
  return options;
}

// Runs the operation if the workspace suffices; otherwise the bytes that it needs.
template <typename Args>
std::int64_t run(Arguments& in, Args& args, flashdelta_status (*size_of)(const Args*, std::size_t*),
                 flashdelta_status (*operation)(const Args*)) {
  args.struct_size = sizeof(Args);
  args.options = take_options(in);
  const DLTensor* workspace = in.tensor();
  in.done();
  if (workspace != nullptr) {
    args.workspace = static_cast<std::byte*>(workspace->data) + workspace->byte_offset;
    args.workspace_size = static_cast<std::size_t>(workspace->shape[0]);
  } else {
    std::size_t needed = 0;
    check(size_of(&args, &needed));
    if (needed > 0) return static_cast<std::int64_t>(needed);
  }
  check(operation(&args));
  return 0;
}

std::int64_t run_forward(Arguments in, flashdelta_status (*size_of)(const flashdelta_forward_args*, std::size_t*),
                         flashdelta_status (*operation)(const flashdelta_forward_args*)) {
  flashdelta_forward_args args{};
  for (const DLTensor** tensor :
       {&args.q, &args.k, &args.v, &args.g, &args.beta, &args.initial_state, &args.cu_seqlens, &args.A_log, &args.dt_bias}) {
    *tensor = in.tensor();
  }
  for (DLTensor** tensor : {&args.o, &args.final_state, &args.saved_c, &args.saved_T, &args.saved_states, &args.segment_counts}) {
    *tensor = in.tensor();
  }
  return run(in, args, size_of, operation);
}

std::int64_t run_backward(Arguments in) {
  flashdelta_backward_args args{};
  for (const DLTensor** tensor : {&args.q, &args.k, &args.v, &args.g, &args.beta, &args.initial_state, &args.cu_seqlens, &args.A_log,
                                  &args.dt_bias, &args.saved_c, &args.saved_T, &args.saved_states, &args.d_o, &args.d_final_state}) {
    *tensor = in.tensor();
  }
  for (DLTensor** tensor : {&args.dq, &args.dk, &args.dv, &args.dg, &args.dbeta, &args.d_initial_state, &args.dA_log, &args.d_dt_bias}) {
    *tensor = in.tensor();
  }
  return run(in, args, flashdelta_chunk_backward_workspace_size, flashdelta_chunk_backward);
}

std::int64_t check_cu_seqlens(Arguments in) {
  flashdelta::op::Problem packed;
  packed.B = 1;
  const DLTensor* offsets = in.tensor();
  packed.T = in.wide_integer();
  in.done();
  if (offsets == nullptr || !flashdelta::op::on_host(offsets->device)) {
    throw ffi::Error("ValueError", "cu_seqlens: is not on the CPU; its values cannot be read here", "");
  }
  try {
    flashdelta::op::Footprint footprint;
    flashdelta::op::check_sequences(offsets, &packed, &footprint);
  } catch (const flashdelta::op::Error& error) {
    throw ffi::Error(error_kind(error.status()), error.what(), "");
  }
  return 0;
}

template <typename Body>
int answer(TVMFFIAny* result, Body body) {
  TVM_FFI_SAFE_CALL_BEGIN();
  *reinterpret_cast<ffi::Any*>(result) = body();
  TVM_FFI_SAFE_CALL_END();
}

}  // namespace

extern "C" {

TVM_FFI_DLL_EXPORT int __tvm_ffi_chunk_forward(void*, const TVMFFIAny* args, std::int32_t size, TVMFFIAny* result) {
  return answer(result, [&] { return run_forward({args, size}, flashdelta_chunk_forward_workspace_size, flashdelta_chunk_forward); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_recurrent_forward(void*, const TVMFFIAny* args, std::int32_t size, TVMFFIAny* result) {
  return answer(result,
                [&] { return run_forward({args, size}, flashdelta_recurrent_forward_workspace_size, flashdelta_recurrent_forward); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_chunk_backward(void*, const TVMFFIAny* args, std::int32_t size, TVMFFIAny* result) {
  return answer(result, [&] { return run_backward({args, size}); });
}

TVM_FFI_DLL_EXPORT int __tvm_ffi_check_cu_seqlens(void*, const TVMFFIAny* args, std::int32_t size, TVMFFIAny* result) {
  return answer(result, [&] { return check_cu_seqlens({args, size}); });
}

// cpu::peak_gflops; negative where it could not be measured (out of memory or threads).
TVM_FFI_DLL_EXPORT double flashdelta_ffi_cpu_peak_gflops(std::int32_t instruction_set, std::int32_t threads) {
  if (instruction_set < FLASHDELTA_INSTRUCTION_SET_BEST || instruction_set > FLASHDELTA_INSTRUCTION_SET_AVX512) return 0;
  try {
    return flashdelta::cpu::peak_gflops(static_cast<flashdelta_instruction_set>(instruction_set), threads);
  } catch (...) {
    return -1;
  }
}

// cpu::separate_passes_forward. Takes what flashdelta_recurrent_forward takes, and what its workspace query has accepted; 1 when it ran.
TVM_FFI_DLL_EXPORT std::int32_t flashdelta_ffi_cpu_separate_passes(const flashdelta_forward_args* args) {
  try {
    const flashdelta::op::Problem problem = flashdelta::op::check_forward(args, flashdelta::op::Operation::recurrent_forward, true);
    const bool fits = problem.workspace_size >= flashdelta::plan::workspace_size(problem);
    if (!fits || problem.backend != flashdelta::op::Backend::cpu) return 0;
    flashdelta::cpu::separate_passes_forward(problem);
    return 1;
  } catch (...) {
    return 0;
  }
}

}  // extern "C"
