#include "c_api/bad_input.hpp"

namespace flashdelta::abi_test {
namespace {

constexpr auto kValue = FLASHDELTA_VALUE_ERROR;
constexpr auto kType = FLASHDELTA_TYPE_ERROR;
const std::vector<Entry> kForwards{Entry::chunk_forward, Entry::recurrent_forward, Entry::chunk_forward_workspace_size,
                                   Entry::recurrent_forward_workspace_size};
const std::vector<Entry> kBackwards{Entry::chunk_backward, Entry::chunk_backward_workspace_size};

// What `spoil` spoils is a call that the cuda backend takes; every tensor is of width `k`, `v`.
BadCase cuda(const std::string& name, const std::vector<Entry>& entries, const std::function<void(Call&)>& spoil, flashdelta_status status,
             std::vector<std::string> text, std::int64_t k = 128, std::int64_t v = 128) {
  return {"cuda: " + name, entries,
          [=](Call& c) {
            c.drop_cu_seqlens();
            c.resize(1, 6, 2, 4, k, v);
            c.move_to_cuda();
            spoil(c);
          },
          status, std::move(text)};
}

BadCase width(const std::string& name, std::int64_t k, std::int64_t v, const std::string& text) {
  return cuda(name, kEntries, [](Call&) {}, kValue, {text + "; the cuda backend takes 128"}, k, v);
}

std::vector<Entry> users_of(const std::string& name) { return name == "o" ? kForwards : kEntries; }

BadCase address(const std::string& name, std::uintptr_t bytes) {
  return cuda(name + " at 16 n + " + std::to_string(bytes) + " bytes", users_of(name),
              [=](Call& c) { c[name].dl.data = reinterpret_cast<void*>(std::uintptr_t{0x7000000000} + bytes); }, kValue,
              {name + ": data", "is not aligned to 16 bytes"});
}

BadCase offset(const std::string& name) {
  return cuda(name + " with a byte_offset of 8", users_of(name), [=](Call& c) { c[name].dl.byte_offset += 8; }, kValue,
              {name + ": data", "is not aligned to 16 bytes"});
}

BadCase stride(const std::string& name, const std::string& what, std::size_t axis, std::int64_t elements, const std::string& bytes) {
  return cuda(name + " with " + what, users_of(name),
              [=](Call& c) {
                c[name].explicit_strides()[axis] = elements;
                if (axis == 2) c[name].strides[1] = 8 * 512;  // keeps an output's tokens apart
              },
              kValue,
              {name + ": axis " + std::to_string(axis) + " has stride " + std::to_string(elements) + " = " + bytes + " bytes",
               "multiples of 16 bytes, none negative, each below 2^40"});
}

// float32 for all that must be of q's dtype.
void make_float32(Call& c) {
  for (const char* name : {"q", "k", "v", "o", "dq", "dk", "dv"}) {
    if (c.has(name)) c[name].dl.dtype = kF32;
  }
}

}  // namespace

std::vector<BadCase> bad_cuda() {
  constexpr std::int64_t k2To40 = std::int64_t{1} << 40;
  std::vector<BadCase> cases{
      width("K 96", 96, 128, "q: head dim K is 96"),
      width("K 64", 64, 128, "q: head dim K is 64"),
      width("K 256", 256, 128, "q: head dim K is 256"),
      width("V 64", 128, 64, "v: head dim V is 64"),
      width("V 256", 128, 256, "v: head dim V is 256"),
      width("K 1, V 1", 1, 1, "q: head dim K is 1"),
      cuda("q float32", kEntries, make_float32, kType, {"q: dtype is float32", "cuda backend (bfloat16 or float16)"}),
      cuda("k float32 beside q bfloat16", kEntries, [](Call& c) { c["k"].dl.dtype = kF32; }, kType,
           {"k: dtype is float32; it must be q's dtype (bfloat16)"}),
      cuda("v float32 beside q bfloat16", kEntries, [](Call& c) { c["v"].dl.dtype = kF32; }, kType,
           {"v: dtype is float32; it must be q's dtype (bfloat16)"}),
      cuda("g float64", kEntries, [](Call& c) { c["g"].dl.dtype = kF64; }, kType, {"g: dtype is float64"}),
      cuda("o with a last axis of stride 2", kForwards, [](Call& c) { c["o"].strides = {6 * 4 * 256, 4 * 256, 256, 2}; }, kValue,
           {"o: its last axis has stride 2; it must be contiguous"}),
      cuda("cu_seqlens on the CPU", kEntries, [](Call& c) { c.add("cu_seqlens", kInt32, {2}); }, kValue,
           {"cu_seqlens: is on cpu, but q is on cuda:0"}),
      cuda("initial_state on the CPU", kEntries, [](Call& c) { c["initial_state"].dl.device = {kDLCPU, 0}; }, kValue,
           {"initial_state: is on cpu, but q is on cuda:0"}),
      cuda("segment_counts on the CPU", {Entry::chunk_forward, Entry::chunk_forward_workspace_size},
           [](Call& c) { c["segment_counts"].dl.device = {kDLCPU, 0}; }, kValue, {"segment_counts: is on cpu, but q is on cuda:0"}),
      cuda("backward", kBackwards, [](Call&) {}, FLASHDELTA_UNAVAILABLE, {"backend: backward is not yet available on the cuda backend"}),
  };
  for (const char* name : {"q", "k", "v", "o"}) {
    for (const std::uintptr_t bytes : {2, 8}) cases.push_back(address(name, bytes));
    cases.push_back(offset(name));
    cases.push_back(stride(name, "rows of heads 1032 bytes apart", 1, 516, "1032"));
    cases.push_back(stride(name, "heads 264 bytes apart", 2, 132, "264"));
    cases.push_back(stride(name, "tokens 2^40 bytes apart", 1, k2To40 / 2, std::to_string(k2To40)));
  }
  for (const char* name : {"q", "k", "v"}) cases.push_back(stride(name, "tokens in reverse", 1, -512, "-1024"));
  return cases;
}

}  // namespace flashdelta::abi_test
