#include "support/host_tensor.hpp"

#include <gtest/gtest.h>

#include <cmath>

namespace flashdelta::testing {
namespace {

TEST(HostTensor, StartsAsNaNInEveryDtypeAndLayout) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (const Layout layout : {Layout::contiguous, Layout::padded, Layout::transposed}) {
      const HostTensor tensor(dtype, {2, 3, 5}, layout);
      for (const double value : tensor.values()) EXPECT_TRUE(std::isnan(value));
      EXPECT_TRUE(tensor.guards_intact());
    }
  }
}

TEST(HostTensor, NoticesAWriteBetweenItsElements) {
  HostTensor tensor(DType::f32, {2, 3}, Layout::padded);
  tensor.fill(1);
  EXPECT_TRUE(tensor.guards_intact());
  static_cast<float*>(tensor.dl()->data)[3] = 0;
  EXPECT_FALSE(tensor.guards_intact());
}

TEST(HostTensor, HoldsTheSameValuesInEveryLayout) {
  HostTensor tensor(DType::bf16, {2, 3, 4});
  for (std::int64_t i = 0; i < tensor.size(); ++i) tensor.put(i, static_cast<double>(i));
  EXPECT_EQ(tensor.with_layout(Layout::transposed).values(), tensor.values());
  EXPECT_EQ(tensor.with_layout(Layout::padded).bits(), tensor.bits());
  EXPECT_EQ(tensor.swapped_last_two().get({1, 3, 2}), tensor.get({1, 2, 3}));
  EXPECT_EQ(tensor.slice(1, 1, 3).get({0, 1, 2}), tensor.get({0, 2, 2}));
}

TEST(HostTensor, CopiesAreTheirOwn) {
  HostTensor tensor(DType::f32, {3});
  tensor.fill(1);
  HostTensor copy = tensor;
  copy.put(0, 2);
  EXPECT_EQ(tensor[0], 1);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(copy.dl()->data) % 64, 0U);
}

}  // namespace
}  // namespace flashdelta::testing
