#include <gtest/gtest.h>

#include "cuda/cuda.hpp"

namespace flashdelta {
namespace {

TEST(DeviceQuery, BuildSaysItHoldsCudaCode) { EXPECT_TRUE(cuda::built()); }

TEST(DeviceQuery, EitherADeviceOrAProblemIsReported) {
  EXPECT_NE(cuda::devices().empty(), cuda::problem().empty()) << "problem: " << cuda::problem();
}

TEST(DeviceQuery, DevicesAreDescribedCompletely) {
  const auto devices = cuda::devices();
  if (devices.empty()) GTEST_SKIP() << cuda::problem();
  for (const auto& device : devices) {
    EXPECT_FALSE(device.name.empty());
    EXPECT_GE(device.major, 9);
    EXPECT_GT(device.multiprocessors, 0);
    EXPECT_GT(device.memory, std::size_t{1} << 30);
  }
}

}  // namespace
}  // namespace flashdelta
