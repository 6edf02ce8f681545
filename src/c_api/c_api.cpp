// The C ABI: statuses for exceptions, and nothing else.
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "c_api/info.hpp"
#include "flashdelta/flashdelta.h"
#include "op/check.hpp"
#include "op/error.hpp"
#include "plan/plan.hpp"

namespace {

namespace op = flashdelta::op;
namespace plan = flashdelta::plan;

// A fixed buffer: reporting an error must not itself need memory.
thread_local char last_error[1024] = "";

flashdelta_status fail(flashdelta_status status, const char* text) noexcept {
  const std::size_t length = strnlen(text, sizeof(last_error) - 1);
  std::memmove(last_error, text, length);
  last_error[length] = '\0';
  return status;
}

// Runs `body` and turns whatever it throws into a status and the thread's message.
template <typename Body>
flashdelta_status guarded(Body&& body) noexcept {
  try {
    body();
    return FLASHDELTA_OK;
  } catch (const op::Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(FLASHDELTA_RUNTIME_ERROR, "out of host memory");
  } catch (const std::exception& error) {
    return fail(FLASHDELTA_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(FLASHDELTA_INTERNAL_ERROR, "unknown exception");
  }
}

void answer(const op::Problem& problem, std::size_t* bytes) {
  if (bytes == nullptr) throw op::Error(FLASHDELTA_VALUE_ERROR, "bytes: is null; the answer needs a place");
  *bytes = plan::workspace_size(problem);
}

void write_info(char* buffer, std::size_t size, std::size_t* needed) {
  if (buffer == nullptr && size > 0) throw op::Error(FLASHDELTA_VALUE_ERROR, "buffer: is null, but size is " + std::to_string(size));
  const std::string text = flashdelta::info_json();
  if (needed != nullptr) *needed = text.size() + 1;
  if (size == 0) return;
  if (size <= text.size()) {
    throw op::Error(FLASHDELTA_VALUE_ERROR, "size: is " + std::to_string(size) + "; the text needs " + std::to_string(text.size() + 1));
  }
  std::memcpy(buffer, text.c_str(), text.size() + 1);
}

#define FLASHDELTA_TEXT_OF(x) #x
#define FLASHDELTA_TEXT(x) FLASHDELTA_TEXT_OF(x)
constexpr const char* kVersion =
    FLASHDELTA_TEXT(FLASHDELTA_VERSION_MAJOR) "." FLASHDELTA_TEXT(FLASHDELTA_VERSION_MINOR) "." FLASHDELTA_TEXT(FLASHDELTA_VERSION_PATCH);

}  // namespace

extern "C" {

flashdelta_status flashdelta_chunk_forward_workspace_size(const flashdelta_forward_args* args, size_t* bytes) {
  return guarded([&] { answer(op::check_forward(args, op::Operation::chunk_forward, false), bytes); });
}

flashdelta_status flashdelta_chunk_forward(const flashdelta_forward_args* args) {
  return guarded([&] { plan::run(op::check_forward(args, op::Operation::chunk_forward, true)); });
}

flashdelta_status flashdelta_chunk_backward_workspace_size(const flashdelta_backward_args* args, size_t* bytes) {
  return guarded([&] { answer(op::check_backward(args, false), bytes); });
}

flashdelta_status flashdelta_chunk_backward(const flashdelta_backward_args* args) {
  return guarded([&] { plan::run(op::check_backward(args, true)); });
}

flashdelta_status flashdelta_recurrent_forward_workspace_size(const flashdelta_forward_args* args, size_t* bytes) {
  return guarded([&] { answer(op::check_forward(args, op::Operation::recurrent_forward, false), bytes); });
}

flashdelta_status flashdelta_recurrent_forward(const flashdelta_forward_args* args) {
  return guarded([&] { plan::run(op::check_forward(args, op::Operation::recurrent_forward, true)); });
}

const char* flashdelta_last_error(void) { return last_error; }

const char* flashdelta_version(void) { return kVersion; }

flashdelta_status flashdelta_info(char* buffer, size_t size, size_t* needed) {
  return guarded([&] { write_info(buffer, size, needed); });
}

}  // extern "C"
