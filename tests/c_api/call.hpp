// A small valid call of any entry point with every argument given, each field of which a test may spoil before it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "flashdelta/flashdelta.h"

namespace flashdelta::abi_test {

enum class Entry : std::uint8_t {
  chunk_forward,
  recurrent_forward,
  chunk_backward,
  chunk_forward_workspace_size,
  recurrent_forward_workspace_size,
  chunk_backward_workspace_size
};

const char* name_of(Entry entry);
bool is_backward(Entry entry);
bool is_recurrent(Entry entry);
bool is_query(Entry entry);

constexpr DLDataType kF64{kDLFloat, 64, 1}, kF32{kDLFloat, 32, 1}, kF16{kDLFloat, 16, 1}, kBF16{kDLBfloat, 16, 1}, kInt32{kDLInt, 32, 1},
    kInt64{kDLInt, 64, 1};

// A tensor as a caller describes it. The bytes are there for the shape it was made with, whatever the description says later.
class CallTensor {
 public:
  CallTensor() = default;
  CallTensor(DLDataType dtype, std::vector<std::int64_t> shape, std::byte fill);

  std::vector<std::int64_t> shape, strides;  // strides empty: a null pointer
  bool null_shape = false;
  DLTensor dl{};  // shape and strides are filled in when the call is made

  [[nodiscard]] const DLTensor* view();
  // The same with new bytes.
  void reset(DLDataType dtype, std::vector<std::int64_t> shape, std::byte fill);
  [[nodiscard]] const std::vector<std::byte>& bytes() const { return bytes_; }
  // Row-major strides of the present shape, to be spoilt.
  std::vector<std::int64_t>& explicit_strides();
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(dl.data);
  }

 private:
  // Keeps tensors apart, so that another one's description put on this memory overlaps no third.
  static constexpr std::size_t kSlack = 4096;
  std::vector<std::byte> bytes_;
};

class Call {
 public:
  static constexpr std::int64_t B = 1, T = 6, H = 2, HV = 4, K = 3, V = 5, N = 2;
  static constexpr std::byte kPoison{0xa5}, kInput{0x3c};  // 0x3c3c is about 0.011 in every dtype but float64

  // Every optional argument given: raw gate with A_log and dt_bias, beta logits, packed sequences, states, saved tensors or gradients.
  explicit Call(Entry entry, flashdelta_backend backend = FLASHDELTA_BACKEND_REFERENCE);
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  CallTensor& operator[](const std::string& name) { return tensors_.at(name); }
  [[nodiscard]] bool has(const std::string& name) const { return tensors_.count(name) != 0; }
  void drop(const std::string& name) { tensors_.erase(name); }
  void add(const std::string& name, DLDataType dtype, std::vector<std::int64_t> shape);
  void drop_gate_in_kernel();
  void drop_cu_seqlens() { drop("cu_seqlens"); }
  // Other sizes, every tensor made anew to fit (saved_states and the states of N sequences included); cu_seqlens is dropped.
  void resize(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t hv, std::int64_t k, std::int64_t v);
  // Every tensor at its address on cuda:0, where it is not: for what must be told from descriptions alone. The backend becomes "auto".
  void move_to_cuda(int device = 0);
  [[nodiscard]] std::vector<std::string> names() const;
  // Also of tensors that were dropped.
  [[nodiscard]] static bool is_output(const std::string& name, Entry entry);

  [[nodiscard]] Entry entry() const { return entry_; }
  flashdelta_options options{};
  std::size_t struct_size;
  bool null_args = false, null_bytes = false;
  void* workspace = nullptr;
  std::size_t workspace_size = 0;
  std::size_t answered = kUnanswered;  // what a query wrote
  static constexpr std::size_t kUnanswered = 0x5a5a5a5a;

  // Makes a workspace as large as the query says. False where the query fails.
  bool provide_workspace();
  flashdelta_status run();
  // Every byte of every tensor and of the workspace, to compare before and after.
  [[nodiscard]] std::vector<std::vector<std::byte>> snapshot() const;

  [[nodiscard]] flashdelta_forward_args forward_args();
  [[nodiscard]] flashdelta_backward_args backward_args();

 private:
  void make_tensors(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t hv, std::int64_t k, std::int64_t v, std::int64_t n);
  const DLTensor* in(const char* name);
  DLTensor* out(const char* name);
  template <typename Args>
  void fill(Args* args);

  Entry entry_;
  std::map<std::string, CallTensor> tensors_;
  std::vector<std::byte> workspace_bytes_;
};

}  // namespace flashdelta::abi_test
