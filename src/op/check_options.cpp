#include "op/check_options.hpp"

#include <fmt/format.h>

#include <cmath>

#include "op/check_tensor.hpp"

namespace flashdelta::op {
namespace {

// Small beside what the contract (docs/numerics.md) allows the final state: a tenth for fp32, a hundredth for fp16, 1/400 for bf16.
constexpr double kDefaultTolerance = 1e-6;
constexpr double kDefaultTolerance16Bit = 1e-5;

bool flag(const char* name, std::int32_t value) {
  if (value != 0 && value != 1) refuse_value(fmt::format("{}: is {}; it must be 0 or 1", name, value));
  return value == 1;
}

int within(const char* name, std::int32_t value, std::int32_t last, const char* meaning) {
  if (value < 0 || value > last) refuse_value(fmt::format("{}: is {}; it must be 0..{}{}", name, value, last, meaning));
  return value;
}

void check_scale(const flashdelta_options& options) {
  if (flag("has_scale", options.has_scale) && !std::isfinite(options.scale)) {
    refuse_value(fmt::format("scale: is {}; it must be finite", options.scale));
  }
}

void check_tolerance(double tolerance) {
  if (tolerance >= 0 && tolerance < 1) return;
  refuse_value(fmt::format("context_parallel_tolerance: is {}; it must be at least 0 and below 1 (0 means {}, for bf16 and fp16 inputs {})",
                           tolerance, kDefaultTolerance, kDefaultTolerance16Bit));
}

}  // namespace

void check_options(const flashdelta_options& options, Problem* problem) {
  Problem& p = *problem;
  check_scale(options);
  p.qk_l2norm = flag("use_qk_l2norm_in_kernel", options.use_qk_l2norm_in_kernel);
  p.gate_in_kernel = flag("use_gate_in_kernel", options.use_gate_in_kernel);
  p.beta_sigmoid = flag("use_beta_sigmoid_in_kernel", options.use_beta_sigmoid_in_kernel);
  p.neg_eigval = flag("allow_neg_eigval", options.allow_neg_eigval);
  flag("state_v_first", options.state_v_first);
  p.batch_invariant = flag("batch_invariant", options.batch_invariant);
  p.context_parallel = static_cast<flashdelta_context_parallel>(
      within("context_parallel", options.context_parallel, FLASHDELTA_CONTEXT_PARALLEL_OFF, " (auto, exact, off)"));
  within("backend", options.backend, FLASHDELTA_BACKEND_REFERENCE, " (auto, cpu, cuda, reference)");
  p.instruction_set = static_cast<flashdelta_instruction_set>(
      within("instruction_set", options.instruction_set, FLASHDELTA_INSTRUCTION_SET_AVX512, " (best, baseline, avx2, avx512)"));
  p.num_segments = within("num_segments", options.num_segments, 64, " (0: planned)");
  p.num_threads = within("num_threads", options.num_threads, 1024, " (0: all that the process may use)");
  const int checkpoint_chunks = within("checkpoint_chunks", options.checkpoint_chunks, 64, " (0 means 1)");
  p.checkpoint_chunks = checkpoint_chunks == 0 ? 1 : checkpoint_chunks;
  check_tolerance(options.context_parallel_tolerance);
  p.stream = options.stream;

  if (p.neg_eigval && !p.beta_sigmoid) refuse_value("allow_neg_eigval: is 1; it needs use_beta_sigmoid_in_kernel");
  if (p.context_parallel == FLASHDELTA_CONTEXT_PARALLEL_OFF && p.num_segments > 1) {
    refuse_value(fmt::format("num_segments: is {}; with context_parallel off it must be 0 or 1", p.num_segments));
  }
}

double resolve_tolerance(const flashdelta_options& options, DType q) {
  if (options.context_parallel_tolerance > 0) return options.context_parallel_tolerance;
  return q == DType::bf16 || q == DType::f16 ? kDefaultTolerance16Bit : kDefaultTolerance;
}

Backend check_backend(const flashdelta_options& options, const DLTensor& q) {
  const bool host = on_host(q.device);
  if (!host && device_type(q.device) != kDLCUDA) {
    refuse_value(fmt::format("q: is on {}; tensors must be on cpu, cuda_host or cuda", device_name(q.device)));
  }
  if (!host && q.device.device_id < 0) refuse_value(fmt::format("q: device id is {}; it cannot be negative", q.device.device_id));

  const auto refuse = [&](Backend backend) {
    refuse_value(fmt::format("backend: is {}, but q is on {}; it must be auto or a backend for that device", backend_name(backend),
                             device_name(q.device)));
  };
  switch (options.backend) {
    case FLASHDELTA_BACKEND_CPU:
      if (!host) refuse(Backend::cpu);
      return Backend::cpu;
    case FLASHDELTA_BACKEND_REFERENCE:
      if (!host) refuse(Backend::reference);
      return Backend::reference;
    case FLASHDELTA_BACKEND_CUDA:
      if (host) refuse(Backend::cuda);
      return Backend::cuda;
    default: return host ? Backend::cpu : Backend::cuda;
  }
}

const char* backend_name(Backend backend) {
  switch (backend) {
    case Backend::cpu: return "cpu";
    case Backend::cuda: return "cuda";
    case Backend::reference: return "reference";
  }
  return "unknown";
}

}  // namespace flashdelta::op
