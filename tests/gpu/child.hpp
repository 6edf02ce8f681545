// Work that needs a process in which nothing ran before.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace flashdelta::testing {

enum class Child {
  first_call,       // prints the milliseconds of the process's first call
  checked_offsets,  // prints status and error of calls with good and with malformed cu_seqlens
};

// Runs this program again with the option for that work, `environment` ("NAME=VALUE" or "") set; gives what it printed.
// Throws std::runtime_error where it ends with a status other than 0.
std::string run_child(Child work, const std::string& environment = "");

// What the program's own option asks for, and the work: for main alone.
std::optional<Child> child_of(std::string_view argument);
int work_as_child(Child work);

}  // namespace flashdelta::testing
