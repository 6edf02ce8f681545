#include "c_api/call.hpp"

#include <algorithm>
#include <set>

namespace flashdelta::abi_test {

const char* name_of(Entry entry) {
  switch (entry) {
    case Entry::chunk_forward: return "chunk_forward";
    case Entry::recurrent_forward: return "recurrent_forward";
    case Entry::chunk_backward: return "chunk_backward";
    case Entry::chunk_forward_workspace_size: return "chunk_forward_workspace_size";
    case Entry::recurrent_forward_workspace_size: return "recurrent_forward_workspace_size";
    case Entry::chunk_backward_workspace_size: return "chunk_backward_workspace_size";
  }
  return "";
}

bool is_backward(Entry entry) { return entry == Entry::chunk_backward || entry == Entry::chunk_backward_workspace_size; }
bool is_recurrent(Entry entry) { return entry == Entry::recurrent_forward || entry == Entry::recurrent_forward_workspace_size; }
bool is_query(Entry entry) {
  return entry == Entry::chunk_forward_workspace_size || entry == Entry::recurrent_forward_workspace_size ||
         entry == Entry::chunk_backward_workspace_size;
}

CallTensor::CallTensor(DLDataType dtype, std::vector<std::int64_t> size, std::byte fill) { reset(dtype, std::move(size), fill); }

void CallTensor::reset(DLDataType dtype, std::vector<std::int64_t> size, std::byte fill) {
  shape = std::move(size);
  strides.clear();
  std::int64_t bytes = dtype.bits / 8;
  for (const std::int64_t s : shape) bytes *= s;
  bytes_.assign(static_cast<std::size_t>(bytes) + kSlack, fill);
  dl = {};
  dl.data = bytes_.data();
  dl.device = {kDLCPU, 0};
  dl.ndim = static_cast<int>(shape.size());
  dl.dtype = dtype;
}

const DLTensor* CallTensor::view() {
  dl.shape = null_shape ? nullptr : shape.data();
  dl.strides = strides.empty() ? nullptr : strides.data();
  return &dl;
}

std::vector<std::int64_t>& CallTensor::explicit_strides() {
  strides.assign(shape.size(), 1);
  for (std::size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

Call::Call(Entry entry, flashdelta_backend backend) : entry_(entry) {
  struct_size = is_backward(entry) ? sizeof(flashdelta_backward_args) : sizeof(flashdelta_forward_args);
  options.backend = backend;
  options.use_gate_in_kernel = 1;
  options.use_beta_sigmoid_in_kernel = 1;
  options.allow_neg_eigval = 1;
  options.num_threads = 1;
  make_tensors(B, T, H, HV, K, V, N);
  add("cu_seqlens", kInt32, {N + 1});
  auto* offsets = (*this)["cu_seqlens"].as<std::int32_t>();
  offsets[0] = 0;
  offsets[1] = 4;
  offsets[2] = 6;
}

void Call::make_tensors(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t hv, std::int64_t k, std::int64_t v, std::int64_t n) {
  tensors_.clear();
  const std::vector<std::int64_t> key{b, t, h, k}, value{b, t, hv, v}, gate{b, t, hv}, state{n, hv, k, v}, head{hv};
  add("q", kBF16, key);
  add("k", kBF16, key);
  add("v", kBF16, value);
  add("g", kF32, gate);
  add("beta", kBF16, gate);
  add("initial_state", kF32, state);
  add("A_log", kF32, head);
  add("dt_bias", kBF16, head);
  if (!is_recurrent(entry_)) {
    add("saved_c", kF32, gate);
    add("saved_T", kF32, {b, t, hv, FLASHDELTA_CHUNK});
    add("saved_states", kF32, {b * t / FLASHDELTA_CHUNK + n, hv, k, v});
  }
  if (!is_backward(entry_)) {
    add("o", kBF16, value);
    add("final_state", kF32, state);
    if (!is_recurrent(entry_)) add("segment_counts", kInt32, {4});
    return;
  }
  add("d_o", kBF16, value);
  add("d_final_state", kF32, state);
  add("dq", kBF16, key);
  add("dk", kBF16, key);
  add("dv", kBF16, value);
  add("dg", kF32, gate);
  add("dbeta", kBF16, gate);
  add("d_initial_state", kF32, state);
  add("dA_log", kF32, head);
  add("d_dt_bias", kBF16, head);
}

void Call::add(const std::string& name, DLDataType dtype, std::vector<std::int64_t> shape) {
  drop(name);
  tensors_.emplace(name, CallTensor(dtype, std::move(shape), is_output(name, entry_) ? kPoison : kInput));
}

void Call::resize(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t hv, std::int64_t k, std::int64_t v) {
  make_tensors(b, t, h, hv, k, v, b);
}

void Call::drop_gate_in_kernel() {
  options.use_gate_in_kernel = 0;
  for (const char* name : {"A_log", "dt_bias", "dA_log", "d_dt_bias"}) drop(name);
}

void Call::move_to_cuda(int device) {
  options.backend = FLASHDELTA_BACKEND_AUTO;
  for (auto& [name, tensor] : tensors_) {
    tensor.dl.device = {kDLCUDA, device};
    const auto misfit = static_cast<std::size_t>(reinterpret_cast<std::uintptr_t>(tensor.dl.data) % 16);
    if (misfit != 0) tensor.dl.byte_offset = 16 - misfit;
  }
}

std::vector<std::string> Call::names() const {
  std::vector<std::string> all;
  for (const auto& [name, tensor] : tensors_) all.push_back(name);
  return all;
}

bool Call::is_output(const std::string& name, Entry entry) {
  static const std::set<std::string> forward{"o", "final_state", "saved_c", "saved_T", "saved_states", "segment_counts"};
  static const std::set<std::string> backward{"dq", "dk", "dv", "dg", "dbeta", "d_initial_state", "dA_log", "d_dt_bias"};
  return (is_backward(entry) ? backward : forward).count(name) != 0;
}

const DLTensor* Call::in(const char* name) {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : found->second.view();
}

DLTensor* Call::out(const char* name) { return const_cast<DLTensor*>(in(name)); }

template <typename Args>
void Call::fill(Args* args) {
  args->struct_size = struct_size;
  args->options = options;
  args->q = in("q");
  args->k = in("k");
  args->v = in("v");
  args->g = in("g");
  args->beta = in("beta");
  args->initial_state = in("initial_state");
  args->cu_seqlens = in("cu_seqlens");
  args->A_log = in("A_log");
  args->dt_bias = in("dt_bias");
  args->saved_c = out("saved_c");
  args->saved_T = out("saved_T");
  args->saved_states = out("saved_states");
  args->workspace = workspace;
  args->workspace_size = workspace_size;
}

flashdelta_forward_args Call::forward_args() {
  flashdelta_forward_args args{};
  fill(&args);
  args.o = out("o");
  args.final_state = out("final_state");
  args.segment_counts = out("segment_counts");
  return args;
}

flashdelta_backward_args Call::backward_args() {
  flashdelta_backward_args args{};
  fill(&args);
  args.d_o = in("d_o");
  args.d_final_state = in("d_final_state");
  args.dq = out("dq");
  args.dk = out("dk");
  args.dv = out("dv");
  args.dg = out("dg");
  args.dbeta = out("dbeta");
  args.d_initial_state = out("d_initial_state");
  args.dA_log = out("dA_log");
  args.d_dt_bias = out("d_dt_bias");
  return args;
}

bool Call::provide_workspace() {
  std::size_t bytes = 0;
  flashdelta_status status = FLASHDELTA_OK;
  if (is_backward(entry_)) {
    const flashdelta_backward_args args = backward_args();
    status = flashdelta_chunk_backward_workspace_size(&args, &bytes);
  } else {
    const flashdelta_forward_args args = forward_args();
    status = is_recurrent(entry_) ? flashdelta_recurrent_forward_workspace_size(&args, &bytes)
                                  : flashdelta_chunk_forward_workspace_size(&args, &bytes);
  }
  if (status != FLASHDELTA_OK) return false;
  workspace_bytes_.assign(bytes + 128, kPoison);
  const auto address = reinterpret_cast<std::uintptr_t>(workspace_bytes_.data());
  workspace = workspace_bytes_.data() + (64 - address % 64) % 64;
  workspace_size = bytes;
  return true;
}

flashdelta_status Call::run() {
  std::size_t* const bytes = null_bytes ? nullptr : &answered;
  if (is_backward(entry_)) {
    const flashdelta_backward_args args = backward_args();
    const flashdelta_backward_args* const p = null_args ? nullptr : &args;
    return is_query(entry_) ? flashdelta_chunk_backward_workspace_size(p, bytes) : flashdelta_chunk_backward(p);
  }
  const flashdelta_forward_args args = forward_args();
  const flashdelta_forward_args* const p = null_args ? nullptr : &args;
  switch (entry_) {
    case Entry::chunk_forward: return flashdelta_chunk_forward(p);
    case Entry::recurrent_forward: return flashdelta_recurrent_forward(p);
    case Entry::chunk_forward_workspace_size: return flashdelta_chunk_forward_workspace_size(p, bytes);
    default: return flashdelta_recurrent_forward_workspace_size(p, bytes);
  }
}

std::vector<std::vector<std::byte>> Call::snapshot() const {
  std::vector<std::vector<std::byte>> all;
  for (const auto& [name, tensor] : tensors_) all.push_back(tensor.bytes());
  all.push_back(workspace_bytes_);
  return all;
}

}  // namespace flashdelta::abi_test
