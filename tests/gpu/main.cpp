// flashdelta_gpu_tests [--record=FILE] [GoogleTest options]. Needs an NVIDIA driver and nothing else.
// FLASHDELTA_TESTS_BARE_WORKSPACE=1 in the environment leaves workspaces as they are allocated, for compute-sanitizer --tool initcheck.
// With --child=NAME it does the work of a test that needs a fresh process (child.hpp).
#include <gtest/gtest.h>

#include <cstdio>
#include <string_view>

#include "cuda/cuda.hpp"
#include "gpu/child.hpp"
#include "gpu/record.hpp"

int main(int argc, char** argv) {
  if (argc == 2) {
    if (const auto child = flashdelta::testing::child_of(argv[1])) return flashdelta::testing::work_as_child(*child);
  }
  testing::InitGoogleTest(&argc, argv);
  constexpr std::string_view option = "--record=";
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (!argument.starts_with(option) || argument.size() == option.size()) {
      std::fprintf(stderr, "error: %s is not an option; allowed are --record=FILE and GoogleTest's\n", argv[i]);
      return 2;
    }
    flashdelta::test::write_record_to(std::string(argument.substr(option.size())));
  }
  for (const auto& device : flashdelta::cuda::devices()) {
    std::printf("%s, compute capability %d.%d, %d SMs\n", device.name.c_str(), device.major, device.minor, device.multiprocessors);
  }
  return RUN_ALL_TESTS();
}
