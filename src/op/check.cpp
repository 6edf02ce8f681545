#include "op/check.hpp"

#include <fmt/format.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "op/check_cuda.hpp"
#include "op/check_options.hpp"
#include "op/check_sequences.hpp"
#include "op/check_tensor.hpp"

namespace flashdelta::op {
namespace {

constexpr std::int64_t kWidestCpuHead = 256;

// One call being checked: the problem as far as it is known, and the memory seen so far.
class Call {
 public:
  Call(const flashdelta_options& options, Operation operation) : options_(options) {
    p_.operation = operation;
    check_options(options, &p_);
    footprints_.reserve(24);
  }

  Problem& problem() { return p_; }
  [[nodiscard]] const std::vector<Footprint>& footprints() const { return footprints_; }

  // Sizes come from q, v and cu_seqlens; every other shape follows.
  void sizes(const DLTensor* q, const DLTensor* v, const DLTensor* cu_seqlens);
  void inputs(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* g, const DLTensor* beta,
              const DLTensor* initial_state, const DLTensor* A_log, const DLTensor* dt_bias);
  void saved(const DLTensor* c, const DLTensor* T, const DLTensor* states, Use use);

  // A tensor of the axes a rule names, or nothing where it is absent.
  Tensor take(const Rule& rule, const DLTensor* tensor);
  Tensor take_state(const char* name, const DLTensor* tensor, Use use, DTypes dtypes, const char* wanted = "");
  // A gradient has its argument's shape; its dtype too, except that the reference backend writes any. No axes: a state.
  Tensor take_gradient(const char* name, const DLTensor* gradient, const char* argument_name, const Tensor& argument,
                       std::optional<Axes> axes);
  void workspace(void* data, std::size_t size);

  [[nodiscard]] Axes key_axes() const { return {{"B", p_.B}, {"T", p_.T}, {"H", p_.H}, {"K", p_.K}}; }
  [[nodiscard]] Axes value_axes() const { return {{"B", p_.B}, {"T", p_.T}, {"HV", p_.HV}, {"V", p_.V}}; }
  [[nodiscard]] Axes gate_axes() const { return {{"B", p_.B}, {"T", p_.T}, {"HV", p_.HV}}; }
  [[nodiscard]] Axes head_axes() const { return {{"HV", p_.HV}}; }
  [[nodiscard]] bool is_reference() const { return p_.backend == Backend::reference; }
  [[nodiscard]] bool is_cuda() const { return p_.backend == Backend::cuda; }
  [[nodiscard]] DTypes floats() const { return is_reference() ? kAllFloats : kFloats; }

 private:
  void widths();
  [[nodiscard]] bool takes_width(std::int64_t width) const;
  [[nodiscard]] std::string taken_widths() const;
  void device(const char* name, const DLTensor& tensor) const;
  [[nodiscard]] DTypes value_dtypes(DType q) const;

  const flashdelta_options& options_;
  DLDevice device_{};
  Problem p_;
  std::vector<Footprint> footprints_;
};

void require(const char* name, const DLTensor* tensor) {
  if (tensor == nullptr) refuse_value(fmt::format("{}: is null; it is required", name));
}

void Call::sizes(const DLTensor* q, const DLTensor* v, const DLTensor* cu_seqlens) {
  require("q", q);
  require("v", v);
  p_.backend = check_backend(options_, *q);
  device_ = q->device;
  p_.device_id = p_.backend == Backend::cuda ? device_.device_id : 0;
  device("v", *v);
  check_rank("q", *q, key_axes());
  check_rank("v", *v, value_axes());
  p_.B = q->shape[0];
  p_.T = q->shape[1];
  p_.H = q->shape[2];
  p_.K = q->shape[3];
  p_.HV = v->shape[2];
  p_.V = v->shape[3];
  widths();
  p_.scale = options_.has_scale != 0 ? options_.scale : 1 / std::sqrt(static_cast<double>(p_.K));

  if (cu_seqlens != nullptr) device("cu_seqlens", *cu_seqlens);
  Footprint footprint;
  check_sequences(cu_seqlens, &p_, &footprint);
  footprints_.push_back(footprint);
}

void Call::widths() {
  if (p_.H < 1) refuse_value("q: has 0 heads; it must have at least 1");
  if (p_.H > p_.HV) refuse_value(fmt::format("q: more q heads than v heads (H = {}, HV = {}); HV must be a multiple of H", p_.H, p_.HV));
  if (p_.HV % p_.H != 0) refuse_value(fmt::format("v: has {} heads; HV must be a multiple of q's H = {}", p_.HV, p_.H));
  for (const auto& [name, axis, width] : {std::tuple{"q", "K", p_.K}, {"v", "V", p_.V}}) {
    if (takes_width(width)) continue;
    refuse_value(
        fmt::format("{}: head dim {} is {}; the {} backend takes {}", name, axis, width, backend_name(p_.backend), taken_widths()));
  }
}

bool Call::takes_width(std::int64_t width) const {
  switch (p_.backend) {
    case Backend::cpu: return width >= 1 && width <= kWidestCpuHead;
    case Backend::cuda: return width == kCudaHead;
    case Backend::reference: return width >= 1;
  }
  return false;
}

std::string Call::taken_widths() const {
  switch (p_.backend) {
    case Backend::cpu: return fmt::format("1..{}", kWidestCpuHead);
    case Backend::cuda: return std::to_string(kCudaHead);
    case Backend::reference: return "1 and more";
  }
  return "";
}

void Call::device(const char* name, const DLTensor& tensor) const {
  if (on_host(tensor.device) && on_host(device_)) return;
  if (device_type(tensor.device) == device_type(device_) && tensor.device.device_id == device_.device_id) return;
  refuse_value(fmt::format("{}: is on {}, but q is on {}; all tensors must be on one device", name, device_name(tensor.device),
                           device_name(device_)));
}

Tensor Call::take(const Rule& rule, const DLTensor* tensor) {
  if (tensor == nullptr) return {};
  device(rule.name, *tensor);
  Footprint footprint;
  const Tensor taken = check_tensor(rule, *tensor, &footprint);
  footprints_.push_back(footprint);
  return taken;
}

Tensor Call::take_state(const char* name, const DLTensor* tensor, Use use, DTypes dtypes, const char* wanted) {
  const bool v_first = options_.state_v_first != 0;
  const Axis k{"K", p_.K}, v{"V", p_.V};
  Tensor state = take({name, use, {{"N", p_.N}, {"HV", p_.HV}, v_first ? v : k, v_first ? k : v}, dtypes, wanted}, tensor);
  if (v_first) {
    std::swap(state.shape[2], state.shape[3]);
    std::swap(state.stride[2], state.stride[3]);
  }
  return state;
}

// Decode may mix fp32 queries and keys with 16-bit values.
DTypes Call::value_dtypes(DType q) const {
  DTypes allowed{q};
  if (p_.operation == Operation::recurrent_forward && q == DType::f32) allowed = kFloats;
  return allowed;
}

void Call::inputs(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* g, const DLTensor* beta,
                  const DLTensor* initial_state, const DLTensor* A_log, const DLTensor* dt_bias) {
  require("k", k);
  if (p_.gate_in_kernel && g == nullptr) refuse_value("g: is null; use_gate_in_kernel needs it");
  if (p_.gate_in_kernel && A_log == nullptr) refuse_value("A_log: is null; use_gate_in_kernel needs it");
  if (!p_.gate_in_kernel && A_log != nullptr) refuse_value("A_log: is given; it is read only with use_gate_in_kernel");
  if (!p_.gate_in_kernel && dt_bias != nullptr) refuse_value("dt_bias: is given; it is read only with use_gate_in_kernel");
  if (p_.beta_sigmoid && beta == nullptr) refuse_value("beta: is null; use_beta_sigmoid_in_kernel needs it");

  p_.q = is_cuda() ? take({"q", Use::input, key_axes(), {DType::bf16, DType::f16}, "a dtype of the cuda backend", true}, q)
                   : take({"q", Use::input, key_axes(), floats(), "", true}, q);
  p_.tolerance = resolve_tolerance(options_, p_.q.dtype);
  p_.k = take({"k", Use::input, key_axes(), {p_.q.dtype}, "q's dtype", true}, k);
  p_.v = take({"v", Use::input, value_axes(), value_dtypes(p_.q.dtype), "q's dtype", true}, v);
  p_.g = take({"g", Use::input, gate_axes(), floats()}, g);
  p_.beta = take({"beta", Use::input, gate_axes(), floats()}, beta);
  p_.initial_state = take_state("initial_state", initial_state, Use::input, floats());
  p_.A_log = take({"A_log", Use::input, head_axes(), floats()}, A_log);
  p_.dt_bias = take({"dt_bias", Use::input, head_axes(), floats()}, dt_bias);
}

void Call::saved(const DLTensor* c, const DLTensor* T, const DLTensor* states, Use use) {
  const Axes rows{{"B", p_.B}, {"T", p_.T}, {"HV", p_.HV}, {"64", FLASHDELTA_CHUNK}};
  p_.saved_c = take({"saved_c", use, gate_axes(), {DType::f32}}, c);
  p_.saved_T = take({"saved_T", use, rows, {DType::f32}}, T);
  p_.saved_states = take(
      {"saved_states", use, {{"S", saved_states_slots(p_)}, {"HV", p_.HV}, {"K", p_.K}, {"V", p_.V}}, {DType::f32, DType::bf16}}, states);
}

Tensor Call::take_gradient(const char* name, const DLTensor* gradient, const char* argument_name, const Tensor& argument,
                           std::optional<Axes> axes) {
  if (gradient == nullptr) return {};
  if (!argument) refuse_value(fmt::format("{}: is given, but {} is null", name, argument_name));
  const std::string wanted = fmt::format("{}'s dtype", argument_name);
  const DTypes dtypes = is_reference() ? kAllFloats : DTypes{argument.dtype};
  return axes ? take({name, Use::output, *axes, dtypes, wanted.c_str()}, gradient)
              : take_state(name, gradient, Use::output, dtypes, wanted.c_str());
}

void Call::workspace(void* data, std::size_t size) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  if (data == nullptr && size > 0) refuse_value(fmt::format("workspace: is null, but workspace_size is {}", size));
  if (address % 64 != 0) refuse_value("workspace: is not aligned to 64 bytes");
  if (address > UINTPTR_MAX - size) refuse_value(fmt::format("workspace_size: is {}; the workspace would leave the address space", size));
  footprints_.push_back({"workspace", Use::output, address, address + size, 1, true});
  p_.workspace = data;
  p_.workspace_size = size;
}

bool same_view(const Tensor& a, const Tensor& b) {
  return a.present && b.present && a.data == b.data && a.dtype == b.dtype && a.shape == b.shape && a.stride == b.stride;
}

template <typename Args>
void check_struct(const Args* args, const char* type) {
  if (args == nullptr) refuse_value("args: is null");
  if (args->struct_size != sizeof(Args)) {
    refuse_value(fmt::format("struct_size: is {}; it must be sizeof({}) = {}", args->struct_size, type, sizeof(Args)));
  }
}

void refuse_outputs_of_chunks(const flashdelta_forward_args& args) {
  for (const auto& [name, tensor] : {std::pair{"saved_c", args.saved_c},
                                     {"saved_T", args.saved_T},
                                     {"saved_states", args.saved_states},
                                     {"segment_counts", args.segment_counts}}) {
    if (tensor != nullptr) refuse_value(fmt::format("{}: is given; only chunk_forward writes it", name));
  }
}

}  // namespace

Problem check_forward(const flashdelta_forward_args* args, Operation operation, bool with_workspace) {
  check_struct(args, "flashdelta_forward_args");
  Call call(args->options, operation);
  call.sizes(args->q, args->v, args->cu_seqlens);
  call.inputs(args->q, args->k, args->v, args->g, args->beta, args->initial_state, args->A_log, args->dt_bias);

  Problem& p = call.problem();
  require("o", args->o);
  if (operation == Operation::recurrent_forward) refuse_outputs_of_chunks(*args);
  const DTypes o_dtypes = call.is_reference() ? kAllFloats : DTypes{p.v.dtype};
  p.o = call.take({"o", Use::output, call.value_axes(), o_dtypes, "v's dtype", call.is_cuda()}, args->o);
  p.final_state = call.take_state("final_state", args->final_state, Use::output, call.floats());
  call.saved(args->saved_c, args->saved_T, args->saved_states, Use::output);
  p.segment_counts = call.take({"segment_counts", Use::output, {{"4", 4}}, {DType::i32}, "", true}, args->segment_counts);
  if (call.is_cuda()) check_cuda(p);
  if (with_workspace) call.workspace(args->workspace, args->workspace_size);
  check_overlap(call.footprints(), same_view(p.initial_state, p.final_state));
  p.states_overlap = may_overlap(call.footprints(), "initial_state", "final_state");
  return p;
}

Problem check_backward(const flashdelta_backward_args* args, bool with_workspace) {
  check_struct(args, "flashdelta_backward_args");
  Call call(args->options, Operation::chunk_backward);
  call.sizes(args->q, args->v, args->cu_seqlens);
  call.inputs(args->q, args->k, args->v, args->g, args->beta, args->initial_state, args->A_log, args->dt_bias);

  Problem& p = call.problem();
  if (args->saved_states == nullptr && !call.is_reference()) {
    refuse_value(fmt::format("saved_states: is null; the {} backend's backward needs it", backend_name(p.backend)));
  }
  call.saved(args->saved_c, args->saved_T, args->saved_states, Use::input);
  p.d_o = call.take({"d_o", Use::input, call.value_axes(), call.floats()}, args->d_o);
  p.d_final_state = call.take_state("d_final_state", args->d_final_state, Use::input, call.floats());
  p.dq = call.take_gradient("dq", args->dq, "q", p.q, call.key_axes());
  p.dk = call.take_gradient("dk", args->dk, "k", p.k, call.key_axes());
  p.dv = call.take_gradient("dv", args->dv, "v", p.v, call.value_axes());
  p.dg = call.take_gradient("dg", args->dg, "g", p.g, call.gate_axes());
  p.dbeta = call.take_gradient("dbeta", args->dbeta, "beta", p.beta, call.gate_axes());
  p.d_initial_state = call.take_gradient("d_initial_state", args->d_initial_state, "initial_state", p.initial_state, std::nullopt);
  p.dA_log = call.take_gradient("dA_log", args->dA_log, "A_log", p.A_log, call.head_axes());
  p.d_dt_bias = call.take_gradient("d_dt_bias", args->d_dt_bias, "dt_bias", p.dt_bias, call.head_axes());
  if (call.is_cuda()) check_cuda(p);
  if (with_workspace) call.workspace(args->workspace, args->workspace_size);
  check_overlap(call.footprints(), false);
  return p;
}

}  // namespace flashdelta::op
