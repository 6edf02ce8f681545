// record.json: what the GPU tests saw, on which GPU, of which sources. tools/check_gpu_record.py reads it.
#pragma once

#include <string>

namespace flashdelta::test {

// Notes the error of one output of one test; the record keeps the worst of each name.
void record_error(const std::string& name, double error);

// Has the coming test run written to `path` as JSON. Call between InitGoogleTest and RUN_ALL_TESTS.
void write_record_to(const std::string& path);

}  // namespace flashdelta::test
