// Every malformed call gives the documented error, writes nothing, and leaves the library usable. docs/bad_input.md lists them:
// FLASHDELTA_WRITE_DOCS=1 writes it anew.
#include "c_api/bad_input.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

namespace flashdelta::abi_test {
namespace {

// A valid call of each of these must still succeed after every refused one.
constexpr flashdelta_backend kBackendsAfter[] = {FLASHDELTA_BACKEND_REFERENCE};

std::vector<BadCase> all_cases() {
  std::vector<BadCase> all;
  for (const auto& group : {bad_structs(), bad_options(), bad_combinations(), bad_sequences(), bad_memory(), bad_cuda(), bad_tensors()}) {
    all.insert(all.end(), group.begin(), group.end());
  }
  return all;
}

void expect_refused(const BadCase& bad, Entry entry, flashdelta_backend backend) {
  SCOPED_TRACE(bad.name + ", " + name_of(entry) + ", backend " + std::to_string(backend));
  Call call(entry, backend);
  ASSERT_TRUE(call.provide_workspace()) << flashdelta_last_error();
  bad.spoil(call);
  const auto before = call.snapshot();
  ASSERT_EQ(call.run(), bad.status) << flashdelta_last_error();
  const std::string text = flashdelta_last_error();
  EXPECT_EQ(text.rfind(bad.text.front(), 0), 0U) << text << "\nshould begin with: " << bad.text.front();
  for (const std::string& part : bad.text) EXPECT_NE(text.find(part), std::string::npos) << text << "\nlacks: " << part;
  EXPECT_TRUE(call.snapshot() == before) << "a refused call wrote to memory";
  EXPECT_EQ(call.answered, Call::kUnanswered) << "a refused query answered";
}

void expect_usable(Entry entry, flashdelta_backend backend) {
  Call call(entry, backend);
  ASSERT_TRUE(call.provide_workspace()) << flashdelta_last_error();
  ASSERT_EQ(call.run(), FLASHDELTA_OK) << flashdelta_last_error();
  if (is_query(entry)) return;
  for (const std::string& name : call.names()) {
    if (!Call::is_output(name, entry)) continue;
    const std::vector<std::byte> poison(call[name].bytes().size(), Call::kPoison);
    EXPECT_NE(call[name].bytes(), poison) << name << " was not written";
  }
}

void expect_all_refused(const std::vector<BadCase>& cases) {
  for (const BadCase& bad : cases) {
    for (const Entry entry : bad.entries) {
      expect_refused(bad, entry, FLASHDELTA_BACKEND_AUTO);
      if (!bad.cpu_only) expect_refused(bad, entry, FLASHDELTA_BACKEND_REFERENCE);
      SCOPED_TRACE("a valid " + std::string(name_of(entry)) + " after: " + bad.name);
      for (const flashdelta_backend backend : kBackendsAfter) expect_usable(entry, backend);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(BadInput, StructsAreRefused) { expect_all_refused(bad_structs()); }
TEST(BadInput, OptionsAreRefused) { expect_all_refused(bad_options()); }
TEST(BadInput, CombinationsAreRefused) { expect_all_refused(bad_combinations()); }
TEST(BadInput, SequencesAreRefused) { expect_all_refused(bad_sequences()); }
TEST(BadInput, MemoryIsRefused) { expect_all_refused(bad_memory()); }
TEST(BadInput, WhatCudaDoesNotTakeIsRefused) { expect_all_refused(bad_cuda()); }
TEST(BadInput, TensorsAreRefused) { expect_all_refused(bad_tensors()); }

TEST(BadInput, EveryCaseHasItsOwnName) {
  std::set<std::string> names;
  for (const BadCase& bad : all_cases()) EXPECT_TRUE(names.insert(bad.name).second) << bad.name;
  EXPECT_GE(names.size(), 150U);
}

const char* status_text(flashdelta_status status) {
  switch (status) {
    case FLASHDELTA_VALUE_ERROR: return "value";
    case FLASHDELTA_TYPE_ERROR: return "type";
    case FLASHDELTA_UNAVAILABLE: return "unavailable";
    default: return "other";
  }
}

// The table of docs/bad_input.md as this library answers it now.
std::string document() {
  std::ostringstream out;
  const std::vector<BadCase> cases = all_cases();
  std::size_t calls = 0;
  for (const BadCase& bad : cases) calls += bad.entries.size();
  out << "# Malformed calls\n\n"
      << cases.size() << " ways to spoil a valid call, tried on every entry point where they apply (" << calls
      << " calls, on the CPU backend and the oracle; the cuda backend's own with descriptions of memory on a GPU, which need none). Each "
         "gives the status and the text below, writes nothing, and leaves the library "
         "usable: "
         "`tests/c_api/bad_input*.cpp`. The text is that of the first entry point. Python raises ValueError for `value`, TypeError for "
         "`type`, "
         "RuntimeError for `unavailable`.\n\n| case | entry points | status | text |\n|---|---|---|---|\n";
  for (const BadCase& bad : cases) {
    Call call(bad.entries.front(), FLASHDELTA_BACKEND_AUTO);
    call.provide_workspace();
    bad.spoil(call);
    const flashdelta_status status = call.run();
    out << "| " << bad.name << " | ";
    if (bad.entries.size() == kEntries.size()) {
      out << "all";
    } else {
      for (std::size_t i = 0; i < bad.entries.size(); ++i) out << (i == 0 ? "" : ", ") << name_of(bad.entries[i]);
    }
    out << " | " << status_text(status) << " | `" << flashdelta_last_error() << "` |\n";
  }
  return out.str();
}

TEST(BadInput, TheDocumentListsTheErrorsAsTheyAre) {
  const std::string path = FLASHDELTA_DOCS "/bad_input.md";
  if (std::getenv("FLASHDELTA_WRITE_DOCS") != nullptr) std::ofstream(path) << document();
  std::ifstream file(path);
  if (!file) GTEST_SKIP() << "the source tree is not here";
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_TRUE(text.str() == document()) << "run this test with FLASHDELTA_WRITE_DOCS=1";
}

}  // namespace
}  // namespace flashdelta::abi_test
