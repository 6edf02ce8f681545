// The table of malformed calls: each spoils one thing of a valid call and names the error that must come back.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "c_api/call.hpp"

namespace flashdelta::abi_test {

struct BadCase {
  std::string name;
  std::vector<Entry> entries;  // where it is malformed
  std::function<void(Call&)> spoil;
  flashdelta_status status;
  std::vector<std::string> text;  // parts of the error text; the first begins it: the argument's name
  bool cpu_only = false;          // the reference backend takes it
};

inline const std::vector<Entry> kRuns{Entry::chunk_forward, Entry::recurrent_forward, Entry::chunk_backward};
inline const std::vector<Entry> kQueries{Entry::chunk_forward_workspace_size, Entry::recurrent_forward_workspace_size,
                                         Entry::chunk_backward_workspace_size};
inline const std::vector<Entry> kEntries{Entry::chunk_forward,
                                         Entry::recurrent_forward,
                                         Entry::chunk_backward,
                                         Entry::chunk_forward_workspace_size,
                                         Entry::recurrent_forward_workspace_size,
                                         Entry::chunk_backward_workspace_size};

std::vector<BadCase> bad_structs();
std::vector<BadCase> bad_options();
std::vector<BadCase> bad_combinations();
std::vector<BadCase> bad_sequences();
std::vector<BadCase> bad_tensors();  // every tensor of every entry point, field by field
std::vector<BadCase> bad_memory();
std::vector<BadCase> bad_cuda();  // what the cuda backend alone refuses, told from descriptions of memory that is not there

}  // namespace flashdelta::abi_test
