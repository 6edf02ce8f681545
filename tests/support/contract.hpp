// The numerics contract (docs/numerics.md): relative error ||x - x64|| / ||x64|| of a whole tensor against the float64 oracle, by the
// dtype of q, k and v.
#pragma once

#include "op/problem.hpp"

namespace flashdelta::testing {

struct Contract {
  double o, final_state;
  double vectors;  // dq, dk, dv, d_initial_state
  double scalars;  // dg, dbeta, and the sums over tokens that they feed: dA_log, d_dt_bias
};

constexpr Contract contract(op::DType dtype) {
  switch (dtype) {
    case op::DType::bf16: return {5e-3, 4e-3, 8e-3, 1.5e-2};
    case op::DType::f16: return {1e-3, 1e-3, 3e-3, 6e-3};
    default: return {1e-5, 1e-5, 5e-5, 1e-4};
  }
}

// Half a unit in the last place: the most that storing a tensor in a dtype costs by itself.
constexpr double rounding(op::DType dtype) {
  switch (dtype) {
    case op::DType::bf16: return 0x1p-8;
    case op::DType::f16: return 0x1p-11;
    case op::DType::f32: return 0x1p-24;
    default: return 0x1p-53;
  }
}

// What becomes zero when it is stored or computed in a dtype: an error of this size in an element says nothing. 16-bit floats with a short
// exponent keep subnormals; fp32 arithmetic may flush them.
constexpr double underflow(op::DType dtype) { return dtype == op::DType::f16 ? 0x1p-24 : 0x1p-126; }

}  // namespace flashdelta::testing
