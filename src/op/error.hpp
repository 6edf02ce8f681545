// The one exception of the library: a status of the public API and a text that names the argument.
#pragma once

#include <stdexcept>
#include <string>

#include "flashdelta/flashdelta.h"

namespace flashdelta::op {

class Error : public std::runtime_error {
 public:
  Error(flashdelta_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  [[nodiscard]] flashdelta_status status() const noexcept { return status_; }

 private:
  flashdelta_status status_;
};

}  // namespace flashdelta::op
