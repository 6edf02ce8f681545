#include "op/float16.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "op/element.hpp"

namespace flashdelta::op {
namespace {

// Every pattern of 16 bits, NaNs apart, survives the way to float and back.
TEST(Float16, WideningIsExact) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    if (!std::isnan(float_from_f16(half))) ASSERT_EQ(f16_from_float(float_from_f16(half)), half) << bits;
    if (!std::isnan(float_from_bf16(half))) ASSERT_EQ(bf16_from_float(float_from_bf16(half)), half) << bits;
  }
}

TEST(Float16, KnowsSomeHalvesByHeart) {
  EXPECT_EQ(float_from_f16(0x3c00), 1);
  EXPECT_EQ(float_from_f16(0xc000), -2);
  EXPECT_EQ(float_from_f16(0x7bff), 65504);
  EXPECT_EQ(float_from_f16(0x0001), 0x1p-24F);
  EXPECT_EQ(float_from_f16(0x0400), 0x1p-14F);
  EXPECT_EQ(float_from_f16(0xfc00), -std::numeric_limits<float>::infinity());
}

// Between two neighbours of either format: below the middle down, above it up, in the middle to the even one.
template <class Widen, class Narrow>
void rounds_to_nearest_even(std::uint16_t last_finite, Widen widen, Narrow narrow) {
  for (std::uint16_t low = 0; low < last_finite; ++low) {
    const auto high = static_cast<std::uint16_t>(low + 1);
    const float middle = widen(low) + (widen(high) - widen(low)) / 2;
    if (middle == 0) continue;  // half of float's own smallest number
    ASSERT_EQ(narrow(middle), low % 2 == 0 ? low : high) << low;
    ASSERT_EQ(narrow(std::nextafter(middle, 0.0F)), low) << low;
    ASSERT_EQ(narrow(std::nextafter(middle, std::numeric_limits<float>::infinity())), high) << low;
    ASSERT_EQ(narrow(-middle), (low % 2 == 0 ? low : high) | 0x8000) << low;
  }
}

TEST(Float16, NarrowingRoundsToNearestEven) {
  rounds_to_nearest_even(0x7bff, float_from_f16, f16_from_float);
  rounds_to_nearest_even(0x7f7f, float_from_bf16, bf16_from_float);
}

TEST(Float16, WhatIsTooLargeBecomesInfinity) {
  EXPECT_EQ(f16_from_float(65519.996F), 0x7bff);
  EXPECT_EQ(f16_from_float(65520.0F), 0x7c00);
  EXPECT_EQ(f16_from_float(-1e30F), 0xfc00);
  EXPECT_EQ(bf16_from_float(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(bf16_from_float(-std::numeric_limits<float>::infinity()), 0xff80);
}

TEST(Float16, ANaNOfAnyPayloadStaysNaN) {
  for (const std::uint32_t payload : {0x1U, 0x1fffU, 0x2000U, 0xffffU, 0x400000U, 0x7fffffU}) {
    for (const std::uint32_t sign : {0U, 0x80000000U}) {
      const auto nan = std::bit_cast<float>(sign | 0x7f800000U | payload);
      EXPECT_TRUE(std::isnan(float_from_f16(f16_from_float(nan)))) << payload;
      EXPECT_TRUE(std::isnan(float_from_bf16(bf16_from_float(nan)))) << payload;
    }
  }
}

TEST(Element, StoresAndLoadsEveryDtype) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    alignas(8) std::byte bytes[8] = {};
    store_element(dtype, bytes, -1.5);
    EXPECT_EQ(load_element(dtype, bytes), -1.5);
  }
}

}  // namespace
}  // namespace flashdelta::op
