// Tensors too large for the host: made, compared and looked through on the GPU.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gpu/device_memory.hpp"

namespace flashdelta::testing {

// A contiguous tensor that exists on the device alone; NaN until it is filled.
class Array {
 public:
  Array(DType dtype, Shape shape);
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  [[nodiscard]] DLTensor* dl() { return &dl_; }
  [[nodiscard]] const DLTensor& tensor() const { return dl_; }
  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] const Shape& shape() const { return shape_; }
  void poison() { buffer_.fill(kNaNByte); }
  [[nodiscard]] bool guards_intact() const { return buffer_.guards_intact(); }

 private:
  DType dtype_;
  Shape shape_, strides_;
  DeviceBuffer buffer_;
  DLTensor dl_{};
};

// Entries [begin, end) of one axis of a tensor, which must outlive it.
class Part {
 public:
  Part(const DLTensor& of, int axis, std::int64_t begin, std::int64_t end);
  Part(const Part&) = delete;
  Part& operator=(const Part&) = delete;
  [[nodiscard]] DLTensor* dl() { return &dl_; }
  [[nodiscard]] const DLTensor& tensor() const { return dl_; }

 private:
  Shape shape_;
  DLTensor dl_;
};

// Log gates of heads along the last of three axes.
enum class Gates : int {
  benchmark,   // logsigmoid(randn) / 16, every fourth head 0: those of published benchmarks
  zero,        //
  minus_5,     //
  slight,      // -1e-5
  minus_1000,  //
  burst,       // 0, and -50 at a few tokens five sixths of the way
  turns,       // by stretches of 1024 tokens 0 and -1 in turn
  raw,         // randn: for the in-kernel gate
};

// Each sets every element, by its index alone: the same on every run.
void fill_constant(const DLTensor& tensor, double value);
void fill_normal(const DLTensor& tensor, std::uint64_t seed, double factor = 1);
// factor * sigmoid(randn).
void fill_sigmoid(const DLTensor& tensor, std::uint64_t seed, double factor = 1);
void fill_gates(const DLTensor& tensor, std::uint64_t seed, Gates kind = Gates::benchmark);
// Vectors of one length along the last axis, of which any two have (about) one cosine.
void fill_vectors(const DLTensor& tensor, std::uint64_t seed, double length = 1, double cosine = 0);
// What stands at token t of the second axis becomes what stands at t % period.
void repeat_tokens(const DLTensor& tensor, std::int64_t period);
// `value` at every `period`-th token of the second axis, `other` elsewhere.
void fill_in_turn(const DLTensor& tensor, std::int64_t period, double value, double other);

// One tensor's elements into another of the same shape and dtype.
void copy(const DLTensor& from, const DLTensor& to);

// Elements that are not finite.
std::int64_t count_not_finite(const DLTensor& tensor);
// Elements whose bits differ; one shape, one dtype.
std::int64_t count_different(const DLTensor& a, const DLTensor& b);
// ||a - b|| / ||b||: NaN where either holds one, 0 where they are equal.
double relative_difference(const DLTensor& a, const DLTensor& b);

}  // namespace flashdelta::testing
