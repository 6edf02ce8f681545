// What one sequence, one head, or memory that is nobody's holds never shows in another's results: not in a single bit.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "gpu/device_call.hpp"

namespace flashdelta::testing {
namespace {

constexpr DType kDTypes[] = {DType::bf16, DType::f16};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Ends inside of chunks, an empty sequence, and tokens of nobody before and behind.
const Case kPacked{.name = "Packed", .T = 330, .H = 2, .HV = 4, .cu_seqlens = {4, 44, 120, 120, 290}};

Case with_dtype(Case c, DType dtype) {
  c.dtype = dtype;
  return c;
}

double largest(DType dtype) { return dtype == DType::f16 ? 65504 : dtype == DType::bf16 ? 3.3895e38 : 3.4028e38; }

std::vector<double> garbage(DType dtype) { return {std::nan(""), kInfinity, -kInfinity, largest(dtype)}; }

// Inputs with one row a token.
constexpr const char* kTokenInputs[] = {"q", "k", "v", "g", "beta"};

void fill_tokens(Call& call, std::int64_t begin, std::int64_t end, std::size_t kind) {
  for (const char* name : kTokenInputs) {
    HostTensor& tensor = call.inputs[name];
    tensor.part(1, begin, end).fill(garbage(tensor.dtype())[kind]);
  }
}

class CudaIsolation : public GpuTest, public ::testing::WithParamInterface<DType> {
 protected:
  // What sequences other than `sick` gave, against what they gave in a clean call.
  static void expect_others_clean(const Call& call, const Tensors& found, const Tensors& expected, std::int64_t sick,
                                  const std::string& context) {
    ASSERT_FALSE(found.empty());
    for (std::int64_t n = 0; n < call.sequences(); ++n) {
      if (n == sick) continue;
      expect_same_bits(results_of_sequence(call, found, n), results_of_sequence(call, expected, n), context);
    }
  }
};
INSTANTIATE_TEST_SUITE_P(, CudaIsolation, ::testing::ValuesIn(kDTypes),
                         [](const auto& param_info) { return short_name(param_info.param); });

TEST_P(CudaIsolation, NothingOfOneSequenceShowsInTheOthers) {
  const Call clean = cuda_call(with_dtype(kPacked, GetParam()));
  const Tensors expected = cuda_forward(clean);
  ASSERT_FALSE(expected.empty());
  const auto& offsets = clean.made_from.cu_seqlens;
  for (const std::int64_t sick : {0, 1, 3}) {
    for (std::size_t kind = 0; kind < 4; ++kind) {
      Call call = clean;
      fill_tokens(call, offsets[sick], offsets[sick + 1], kind);
      call.inputs["initial_state"].part(0, sick, sick + 1).fill(garbage(DType::f32)[kind]);
      expect_others_clean(call, cuda_forward(call), expected, sick, "sequence " + std::to_string(sick) + " is bad");
    }
  }
}

TEST_P(CudaIsolation, EachInputOfOneSequenceAloneStaysThere) {
  const Call clean = cuda_call(with_dtype(kPacked, GetParam()));
  const Tensors expected = cuda_forward(clean);
  ASSERT_FALSE(expected.empty());
  for (const auto& [name, unused] : clean.inputs) {
    for (const double bad : {std::nan(""), kInfinity}) {
      Call call = clean;
      HostTensor& tensor = call.inputs[name];
      (name == "initial_state" ? tensor.part(0, 1, 2) : tensor.part(1, 44, 120)).fill(bad);
      expect_others_clean(call, cuda_forward(call), expected, 1, name + " of sequence 1 is bad");
    }
  }
}

TEST_P(CudaIsolation, ASingleBadTokenStaysInItsSequence) {
  const Call clean = cuda_call(with_dtype(kPacked, GetParam()));
  const Tensors expected = cuda_forward(clean);
  ASSERT_FALSE(expected.empty());
  for (const std::int64_t t : {44, 63, 64, 107, 108, 119}) {
    Call call = clean;
    fill_tokens(call, t, t + 1, 0);
    expect_others_clean(call, cuda_forward(call), expected, 1, "token " + std::to_string(t));
  }
}

TEST_P(CudaIsolation, TokensOfNoSequenceAreNeverReadAndGiveZeroRows) {
  const Call clean = cuda_call_saving(with_dtype(kPacked, GetParam()));
  const Tensors expected = cuda_forward(clean);
  for (std::size_t kind = 0; kind < 4; ++kind) {
    Call call = clean;
    fill_tokens(call, 0, 4, kind);
    fill_tokens(call, 290, 330, kind);
    const Tensors out = cuda_forward(call);
    ASSERT_FALSE(out.empty());
    expect_same_bits(out, expected);
    for (const char* name : {"o", "saved_c", "saved_T"}) {
      for (const double value : out.at(name).slice(1, 0, 4).values()) ASSERT_EQ(value, 0) << name;
      for (const double value : out.at(name).slice(1, 290, 330).values()) ASSERT_EQ(value, 0) << name;
    }
  }
}

// Tensors that are the first rows of larger ones, as a cache's or a padded batch's are.
TEST_P(CudaIsolation, WhatStandsBehindTheLastTokenNeverShows) {
  for (const std::int64_t T : {1, 63, 64, 65, 100}) {
    const Call exact = cuda_call({.name = "Behind", .T = T, .H = 2, .HV = 4, .dtype = GetParam()});
    const Tensors expected = cuda_forward(exact);
    for (std::size_t kind = 0; kind < 4; ++kind) {
      Call call = exact;
      for (const char* name : kTokenInputs) {
        const HostTensor& tensor = exact.inputs.at(name);
        Shape longer = tensor.shape();
        longer[1] = T + 80;
        HostTensor room(tensor.dtype(), longer);
        room.fill(garbage(tensor.dtype())[kind]);
        HostTensor front = room.part(1, 0, T);
        front.assign(tensor.values());
        call.inputs[name] = std::move(front);
      }
      expect_same_bits(cuda_forward(call), expected, "T = " + std::to_string(T));
    }
  }
}

TEST_P(CudaIsolation, RowsOfABatchAreAlone) {
  const Call clean = cuda_call({.name = "Rows", .B = 3, .T = 100, .HV = 2, .dtype = GetParam()});
  const Tensors expected = cuda_forward(clean);
  ASSERT_FALSE(expected.empty());
  for (std::size_t kind = 0; kind < 4; ++kind) {
    Call call = clean;
    for (const char* name : kTokenInputs) {
      HostTensor& tensor = call.inputs[name];
      tensor.part(0, 1, 2).fill(garbage(tensor.dtype())[kind]);
    }
    const Tensors out = cuda_forward(call);
    ASSERT_FALSE(out.empty());
    for (const std::int64_t row : {0, 2}) {
      for (const char* name : {"o", "final_state"}) {
        EXPECT_TRUE(out.at(name).slice(0, row, row + 1).bits() == expected.at(name).slice(0, row, row + 1).bits()) << name << ' ' << row;
      }
    }
  }
}

void expect_head_clean(const Tensors& found, const Tensors& expected, std::int64_t head, const std::string& context) {
  ASSERT_FALSE(found.empty());
  EXPECT_TRUE(found.at("o").slice(2, head, head + 1).bits() == expected.at("o").slice(2, head, head + 1).bits()) << context << head;
  EXPECT_TRUE(found.at("final_state").slice(1, head, head + 1).bits() == expected.at("final_state").slice(1, head, head + 1).bits())
      << context << head;
}

TEST_P(CudaIsolation, ABadValueHeadIsAlone) {
  constexpr std::int64_t kSick = 1;  // shares key head 0 with value head 0
  const Call clean = cuda_call(with_dtype(kPacked, GetParam()));
  const Tensors expected = cuda_forward(clean);
  ASSERT_FALSE(expected.empty());
  for (const std::string name : {"v", "g", "beta", "initial_state"}) {
    for (std::size_t kind = 0; kind < 4; ++kind) {
      Call call = clean;
      HostTensor& tensor = call.inputs[name];
      tensor.part(name == "initial_state" ? 1 : 2, kSick, kSick + 1).fill(garbage(tensor.dtype())[kind]);
      const Tensors out = cuda_forward(call);
      for (const std::int64_t head : {0, 2, 3}) expect_head_clean(out, expected, head, name + " of head 1 is bad; head ");
    }
  }
}

TEST_P(CudaIsolation, ABadKeyHeadStaysInItsGroup) {
  const Call clean = cuda_call(with_dtype(kPacked, GetParam()));
  const Tensors expected = cuda_forward(clean);
  ASSERT_FALSE(expected.empty());
  for (const std::string name : {"q", "k"}) {
    for (std::size_t kind = 0; kind < 4; ++kind) {
      Call call = clean;
      call.inputs[name].part(2, 0, 1).fill(garbage(GetParam())[kind]);
      const Tensors out = cuda_forward(call);
      for (const std::int64_t head : {2, 3}) expect_head_clean(out, expected, head, name + " of key head 0 is bad; head ");
    }
  }
}

TEST_P(CudaIsolation, ANaNReachesTheOutputsItBelongsTo) {
  Call call = cuda_call({.name = "Honest", .T = 100, .dtype = GetParam()});
  call.inputs["v"].part(1, 70, 71).fill(std::nan(""));
  const Tensors out = cuda_forward(call);
  ASSERT_FALSE(out.empty());
  for (const double value : out.at("o").slice(1, 0, 64).values()) ASSERT_TRUE(std::isfinite(value));
  for (const double value : out.at("o").slice(1, 70, 100).values()) ASSERT_TRUE(std::isnan(value));
  for (const double value : out.at("final_state").values()) ASSERT_TRUE(std::isnan(value));
}

}  // namespace
}  // namespace flashdelta::testing
