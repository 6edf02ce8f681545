// The C ABI around the calls: messages, version, info.
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "c_api/call.hpp"
#include "c_api/json.hpp"

namespace flashdelta::abi_test {
namespace {

std::string info_text() {
  std::size_t needed = 0;
  EXPECT_EQ(flashdelta_info(nullptr, 0, &needed), FLASHDELTA_OK);
  std::string text(needed, '?');
  EXPECT_EQ(flashdelta_info(text.data(), text.size(), nullptr), FLASHDELTA_OK);
  EXPECT_EQ(text.back(), '\0');
  text.pop_back();
  return text;
}

TEST(CApi, TheMessageOutlivesSuccessfulCalls) {
  EXPECT_EQ(flashdelta_chunk_forward(nullptr), FLASHDELTA_VALUE_ERROR);
  Call call(Entry::chunk_forward);
  EXPECT_EQ(call.run(), FLASHDELTA_OK) << flashdelta_last_error();
  EXPECT_STREQ(flashdelta_last_error(), "args: is null");
}

TEST(CApi, MessagesBelongToTheirThread) {
  EXPECT_EQ(flashdelta_chunk_forward(nullptr), FLASHDELTA_VALUE_ERROR);
  std::string before = "unset", after;
  std::thread([&] {
    before = flashdelta_last_error();
    Call call(Entry::chunk_forward);
    call.drop("q");
    call.run();
    after = flashdelta_last_error();
  }).join();
  EXPECT_EQ(before, "");
  EXPECT_EQ(after.rfind("q: ", 0), 0U);
  EXPECT_STREQ(flashdelta_last_error(), "args: is null");
}

TEST(CApi, ThreadsCallAtOnceWithoutSharing) {
  std::vector<std::thread> threads;
  std::vector<int> failures(4, 0);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&failures, i] {
      for (int round = 0; round < 20; ++round) {
        Call good(Entry::chunk_backward), bad(Entry::recurrent_forward);
        bad["o"].shape[i] += 1;
        const std::int64_t spoilt = bad["o"].shape[i];
        if (good.run() != FLASHDELTA_OK || bad.run() != FLASHDELTA_VALUE_ERROR) ++failures[i];
        if (std::string(flashdelta_last_error()).find(std::to_string(spoilt)) == std::string::npos) ++failures[i];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, std::vector<int>(4, 0));
}

TEST(CApi, CallsAreRepeatableBitForBit) {
  Call first(Entry::chunk_forward), second(Entry::chunk_forward);
  ASSERT_EQ(first.run(), FLASHDELTA_OK);
  ASSERT_EQ(second.run(), FLASHDELTA_OK);
  EXPECT_EQ(first["o"].bytes(), second["o"].bytes());
  EXPECT_EQ(first["final_state"].bytes(), second["final_state"].bytes());
}

TEST(CApi, VersionIsThatOfTheHeader) {
  const std::string version = std::to_string(FLASHDELTA_VERSION_MAJOR) + "." + std::to_string(FLASHDELTA_VERSION_MINOR) + "." +
                              std::to_string(FLASHDELTA_VERSION_PATCH);
  EXPECT_EQ(flashdelta_version(), version);
}

TEST(CApi, InfoIsJsonThatNamesTheParts) {
  const std::string text = info_text();
  EXPECT_TRUE(is_json(text)) << text;
  for (const char* key : {"\"version\": \"0.1.0\"", "\"backends\": [", "\"cpu\": {", "\"processor\": ", "\"instruction_sets\": [",
                          "\"threads\": ", "\"cuda\": {", "\"built\": ", "\"devices\": [", "\"problem\": "}) {
    EXPECT_NE(text.find(key), std::string::npos) << key << " is not in " << text;
  }
}

TEST(CApi, InfoRefusesABufferThatDoesNotSufficeAndLeavesIt) {
  const std::size_t needed = info_text().size() + 1;
  std::string buffer(needed, '?');
  std::size_t told = 0;
  EXPECT_EQ(flashdelta_info(buffer.data(), needed - 1, &told), FLASHDELTA_VALUE_ERROR);
  EXPECT_EQ(std::string(flashdelta_last_error()), "size: is " + std::to_string(needed - 1) + "; the text needs " + std::to_string(needed));
  EXPECT_EQ(told, needed);
  EXPECT_EQ(buffer, std::string(needed, '?'));
}

TEST(CApi, InfoRefusesANullBufferWithASize) {
  EXPECT_EQ(flashdelta_info(nullptr, 8, nullptr), FLASHDELTA_VALUE_ERROR);
  EXPECT_STREQ(flashdelta_last_error(), "buffer: is null, but size is 8");
  EXPECT_EQ(flashdelta_info(nullptr, 0, nullptr), FLASHDELTA_OK);
}

}  // namespace
}  // namespace flashdelta::abi_test
