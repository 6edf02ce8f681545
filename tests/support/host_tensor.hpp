// A tensor in host memory that knows every byte of its buffer: elements start as NaN, all else is a guard pattern.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "op/element.hpp"

namespace flashdelta::testing {

using op::DType;
using Shape = std::vector<std::int64_t>;

enum class Layout {
  contiguous,
  padded,      // every axis but the last strides over some guard bytes
  transposed,  // the first axis is the densest
};

Shape strides_of(const Shape& shape, Layout layout);

// Copies are deep; `view` shares the buffer.
class HostTensor {
 public:
  HostTensor() = default;
  HostTensor(DType dtype, Shape shape, Layout layout = Layout::contiguous);
  HostTensor(const HostTensor& other);
  HostTensor& operator=(const HostTensor& other);
  HostTensor(HostTensor&&) = default;
  HostTensor& operator=(HostTensor&&) = default;
  ~HostTensor() = default;

  // A view of this tensor's buffer; `offset` in elements from this tensor's first.
  [[nodiscard]] HostTensor view(Shape shape, Shape strides, std::int64_t offset) const;
  // The same values (rounded to `dtype`) in a new buffer.
  [[nodiscard]] HostTensor converted(DType dtype, Layout layout = Layout::contiguous) const;
  [[nodiscard]] HostTensor with_layout(Layout layout) const { return converted(dtype_, layout); }
  [[nodiscard]] HostTensor swapped_last_two() const;
  // Entries [begin, end) of one axis: a view, and a new tensor.
  [[nodiscard]] HostTensor part(std::size_t axis, std::int64_t begin, std::int64_t end) const;
  [[nodiscard]] HostTensor slice(std::size_t axis, std::int64_t begin, std::int64_t end) const;

  [[nodiscard]] bool present() const { return buffer_ != nullptr; }
  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] const Shape& shape() const { return shape_; }
  [[nodiscard]] std::int64_t size() const;

  // Elements by index or by position in row-major order, whatever the layout.
  [[nodiscard]] double get(const Shape& index) const;
  void set(const Shape& index, double value);
  [[nodiscard]] double operator[](std::int64_t position) const { return op::load_element(dtype_, at(position)); }
  void put(std::int64_t position, double value) { op::store_element(dtype_, at(position), value); }
  [[nodiscard]] std::vector<double> values() const;
  void fill(double value);
  void assign(const std::vector<double>& values);

  // The elements' bytes in row-major order.
  [[nodiscard]] std::vector<std::byte> bits() const;
  // The whole buffer, guards included.
  [[nodiscard]] const std::vector<std::byte>& buffer() const { return buffer_->bytes; }
  [[nodiscard]] bool guards_intact() const;

  // Valid while this object is; null when absent.
  [[nodiscard]] DLTensor* dl() const;

 private:
  struct Buffer {
    std::vector<std::byte> bytes;
    std::size_t first = 0;  // byte of element 0: 64-byte aligned
  };
  static std::shared_ptr<Buffer> make_buffer(std::size_t bytes);

  [[nodiscard]] std::byte* at(const Shape& index) const;
  [[nodiscard]] std::byte* at(std::int64_t position) const;

  DType dtype_ = DType::f32;
  Shape shape_, strides_;
  std::int64_t offset_ = 0;
  std::shared_ptr<Buffer> buffer_;
  mutable DLTensor dl_{};
};

// cu_seqlens and the like.
class HostOffsets {
 public:
  HostOffsets() = default;
  HostOffsets(std::vector<std::int64_t> values, bool is_int64);
  [[nodiscard]] const std::vector<std::int64_t>& values() const { return values_; }
  [[nodiscard]] DLTensor* dl() const;

 private:
  std::vector<std::int64_t> values_;
  std::vector<std::int32_t> values32_;
  bool is_int64_ = true;
  mutable std::int64_t length_ = 0;
  mutable DLTensor dl_{};
};

// Scratch memory: 64-byte aligned, NaN all over, guarded.
class Workspace {
 public:
  explicit Workspace(std::size_t size);
  [[nodiscard]] void* data() { return size_ == 0 ? nullptr : bytes_.data() + first_; }
  [[nodiscard]] std::size_t size() const { return size_; }
  [[nodiscard]] bool guards_intact() const;

 private:
  std::size_t size_, first_;
  std::vector<std::byte> bytes_;
};

}  // namespace flashdelta::testing
