// What flashdelta_info tells.
#pragma once

#include <string>

namespace flashdelta {

// JSON: version, backends, cpu {processor, instruction_sets, threads}, cuda {built, devices [...], problem}.
std::string info_json();

}  // namespace flashdelta
