// Every argument of every entry point is checked here, once, by name, before anything is read or written.
#pragma once

#include "op/problem.hpp"

namespace flashdelta::op {

// Throws op::Error. `with_workspace` false: a workspace query, whose workspace fields are not looked at. The workspace's size is
// checked by plan (which knows what is needed), its pointer's alignment here.
Problem check_forward(const flashdelta_forward_args* args, Operation operation, bool with_workspace);
Problem check_backward(const flashdelta_backward_args* args, bool with_workspace);

}  // namespace flashdelta::op
