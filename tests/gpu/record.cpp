#include "gpu/record.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <map>
#include <sstream>

#include "cuda/cuda.hpp"
#include "gpu_source_hash.hpp"

namespace flashdelta::test {
namespace {

std::map<std::string, double>& worst_errors() {
  static std::map<std::string, double> errors;
  return errors;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + '"';
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  char text[16];
  return std::strftime(text, sizeof text, "%Y-%m-%d", gmtime_r(&now, &utc)) != 0 ? text : "";
}

std::string device_name() {
  const auto devices = cuda::devices();
  if (devices.empty()) return "";
  return devices[0].name + " (compute capability " + std::to_string(devices[0].major) + "." + std::to_string(devices[0].minor) + ")";
}

// JSON has no nan or infinity; a string in their place fails the check loudly.
std::string number(double value) {
  if (!std::isfinite(value)) return quoted(std::isnan(value) ? "nan" : "inf");
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

std::string record_of(const testing::UnitTest& run) {
  const std::string device = device_name();
  // A filtered, skipped or failed run vouches for nothing.
  const bool complete = run.test_to_run_count() == run.total_test_count() && run.successful_test_count() == run.total_test_count();
  const bool verified = !device.empty() && complete;
  std::ostringstream out;
  out << "{\n";
  out << "  \"source_hash\": " << quoted(kGpuSourceHash) << ",\n";
  out << "  \"verified\": " << (verified ? "true" : "false") << ",\n";
  if (!verified) {
    out << "  \"reason\": " << quoted(device.empty() ? "no usable GPU: " + cuda::problem() : "not every test ran and passed") << ",\n";
  }
  out << "  \"device\": " << quoted(device) << ",\n";
  out << "  \"date\": " << quoted(today()) << ",\n";
  out << "  \"tests\": { \"passed\": " << run.successful_test_count() << ", \"failed\": " << run.failed_test_count()
      << ", \"skipped\": " << run.skipped_test_count() << ", \"of\": " << run.total_test_count() << " },\n";
  out << "  \"worst_errors\": {";
  const char* separator = "";
  for (const auto& [name, error] : worst_errors()) {
    out << separator << "\n    " << quoted(name) << ": " << number(error);
    separator = ",";
  }
  out << (worst_errors().empty() ? "}\n" : "\n  }\n") << "}\n";
  return out.str();
}

class Recorder : public testing::EmptyTestEventListener {
 public:
  explicit Recorder(std::string path) : path_(std::move(path)) {}

  void OnTestProgramEnd(const testing::UnitTest& run) override {
    std::ofstream file(path_);
    file << record_of(run);
    file.close();
    if (!file) std::fprintf(stderr, "error: cannot write %s\n", path_.c_str());
  }

 private:
  std::string path_;
};

}  // namespace

void record_error(const std::string& name, double error) {
  auto [entry, added] = worst_errors().try_emplace(name, error);
  if (!added && !(error <= entry->second)) entry->second = error;
}

void write_record_to(const std::string& path) { testing::UnitTest::GetInstance()->listeners().Append(new Recorder(path)); }

}  // namespace flashdelta::test
