// Whether a text is JSON (RFC 8259), for tests: a grammar and no values.
#pragma once

#include <cctype>
#include <cstddef>
#include <string_view>

namespace flashdelta::abi_test {

class JsonGrammar {
 public:
  explicit JsonGrammar(std::string_view text) : text_(text) {}
  bool document() { return value() && (space(), at_ == text_.size()); }

 private:
  [[nodiscard]] char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') ++at_;
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  bool word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) return false;
    at_ += expected.size();
    return true;
  }
  bool digits() {
    const std::size_t begin = at_;
    while (std::isdigit(static_cast<unsigned char>(peek())) != 0) ++at_;
    return at_ > begin;
  }
  bool number() {
    take('-');
    if (!digits()) return false;
    if (take('.') && !digits()) return false;
    if (!take('e') && !take('E')) return true;
    if (!take('+')) take('-');
    return digits();
  }
  bool escape() {
    if (peek() != 'u') return std::string_view("\"\\/bfnrt").find(text_[at_++]) != std::string_view::npos;
    ++at_;
    for (int i = 0; i < 4; ++i, ++at_) {
      if (std::isxdigit(static_cast<unsigned char>(peek())) == 0) return false;
    }
    return true;
  }
  bool string() {
    if (!take('"')) return false;
    while (at_ < text_.size()) {
      const char c = text_[at_++];
      if (c == '"') return true;
      if (static_cast<unsigned char>(c) < 0x20) return false;
      if (c == '\\' && (at_ == text_.size() || !escape())) return false;
    }
    return false;
  }
  template <typename Item>
  bool list(char close, Item&& item) {
    ++at_;
    space();
    if (take(close)) return true;
    do {
      if (!item()) return false;
      space();
    } while (take(','));
    return take(close);
  }
  bool value() {
    space();
    switch (peek()) {
      case '{': return list('}', [this] { return space(), string() && (space(), take(':')) && value(); });
      case '[': return list(']', [this] { return value(); });
      case '"': return string();
      case 't': return word("true");
      case 'f': return word("false");
      case 'n': return word("null");
      default: return number();
    }
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

inline bool is_json(std::string_view text) { return JsonGrammar(text).document(); }

}  // namespace flashdelta::abi_test
