// Prefill and decode through the C++ face: 200 tokens at once, then 4 one by one from the state that the prefill left.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <flashdelta/flashdelta.hpp>
#include <random>
#include <vector>

namespace {

constexpr std::int64_t kHeads = 2, kValueHeads = 4, kKeyWidth = 32, kValueWidth = 48;
constexpr std::int64_t kPrefill = 200, kDecode = 4, kTokens = kPrefill + kDecode;

std::vector<float> uniform(std::int64_t count, float low, float high, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> distribution(low, high);
  std::vector<float> values(static_cast<std::size_t>(count));
  std::generate(values.begin(), values.end(), [&] { return distribution(generator); });
  return values;
}

struct Inputs {
  std::vector<float> q = uniform(kTokens * kHeads * kKeyWidth, -1, 1, 1);
  std::vector<float> k = uniform(kTokens * kHeads * kKeyWidth, -1, 1, 2);
  std::vector<float> v = uniform(kTokens * kValueHeads * kValueWidth, -1, 1, 3);
  std::vector<float> g = uniform(kTokens * kValueHeads, -0.2F, 0, 4);
  std::vector<float> beta = uniform(kTokens * kValueHeads, 0, 1, 5);
};

// The arguments of a call on `count` tokens from `first` on: views, nothing is copied.
flashdelta::ForwardArgs arguments(Inputs& in, std::vector<float>& o, std::int64_t first, std::int64_t count) {
  using flashdelta::TensorView;
  flashdelta::ForwardArgs args;
  args.options.use_qk_l2norm_in_kernel = true;
  args.q = TensorView(in.q.data() + first * kHeads * kKeyWidth, {1, count, kHeads, kKeyWidth});
  args.k = TensorView(in.k.data() + first * kHeads * kKeyWidth, {1, count, kHeads, kKeyWidth});
  args.v = TensorView(in.v.data() + first * kValueHeads * kValueWidth, {1, count, kValueHeads, kValueWidth});
  args.g = TensorView(in.g.data() + first * kValueHeads, {1, count, kValueHeads});
  args.beta = TensorView(in.beta.data() + first * kValueHeads, {1, count, kValueHeads});
  args.o = TensorView(o.data() + first * kValueHeads * kValueWidth, {1, count, kValueHeads, kValueWidth});
  return args;
}

int run() {
  Inputs in;
  std::vector<float> o(in.v.size()), o_at_once(in.v.size()), memory(kValueHeads * kKeyWidth * kValueWidth);
  const flashdelta::TensorView state(memory.data(), {1, kValueHeads, kKeyWidth, kValueWidth});

  auto prefill = arguments(in, o, 0, kPrefill);
  prefill.final_state = state;
  flashdelta::chunk_forward(prefill);
  for (std::int64_t token = kPrefill; token < kTokens; ++token) {
    auto decode = arguments(in, o, token, 1);
    decode.initial_state = state;
    decode.final_state = state;
    flashdelta::recurrent_forward(decode);
  }
  flashdelta::chunk_forward(arguments(in, o_at_once, 0, kTokens));

  float difference = 0, largest = 0;
  for (std::size_t i = 0; i < o.size(); ++i) {
    difference = std::max(difference, std::abs(o[i] - o_at_once[i]));
    largest = std::max(largest, std::abs(o_at_once[i]));
  }
  std::printf("flashdelta %s: %d tokens prefilled, %d decoded; differs from %d at once by %.1e (values up to %.2f)\n",
              flashdelta::version().c_str(), static_cast<int>(kPrefill), static_cast<int>(kDecode), static_cast<int>(kTokens), difference,
              largest);
  return difference <= 1e-5F * largest && largest > 0 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
