// One element of any dtype as a double. For code where clarity comes before speed: the oracle and the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "op/float16.hpp"
#include "op/problem.hpp"

namespace flashdelta::op {

template <class T>
T read_bits(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

inline double load_element(DType dtype, const void* at) {
  switch (dtype) {
    case DType::f64: return read_bits<double>(at);
    case DType::f32: return read_bits<float>(at);
    case DType::bf16: return float_from_bf16(read_bits<std::uint16_t>(at));
    case DType::i32: return read_bits<std::int32_t>(at);
    case DType::f16: break;
  }
  return float_from_f16(read_bits<std::uint16_t>(at));
}

// Rounds to nearest, to 16 bits by way of float. NaN becomes the integer whose bits are those of a NaN: -1.
inline void store_element(DType dtype, void* at, double value) {
  const auto single = static_cast<float>(value);
  const auto put = [at](auto bits) { std::memcpy(at, &bits, sizeof(bits)); };
  switch (dtype) {
    case DType::f64: return put(value);
    case DType::f32: return put(single);
    case DType::bf16: return put(bf16_from_float(single));
    case DType::f16: return put(f16_from_float(single));
    case DType::i32: return put(std::isnan(value) ? std::int32_t{-1} : static_cast<std::int32_t>(std::llround(value)));
  }
}

}  // namespace flashdelta::op
