// The definition: one token of the gated delta rule, and its adjoint.
#pragma once

#include "reference/token.hpp"

namespace flashdelta::reference {

//     S <- decay * S;   r = v - k S;   u = beta * r;   S <- S + k^T u;   o = scale * q S
struct Step {
  Vector read;     // r
  Vector written;  // u
  Vector o;
};
void step_forward(const Token& token, double scale, Vector& state, Step& step);

struct TokenGradient {
  Vector q, k, v;  // of the normed q and k
  double log_gate = 0, beta = 0;
};
// `before` and `after` are S around the token, d_o the gradient of o (empty: zero), `d_state` that of `after`, turned into that
// of `before`.
void step_backward(const Token& token, const Step& step, double scale, const double* before, const double* after, const Vector& d_o,
                   Vector& d_state, TokenGradient& gradient);

}  // namespace flashdelta::reference
