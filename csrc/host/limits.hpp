// Sizes that the int32 arrays of a block map can hold, and the error for others.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace host {

constexpr std::int64_t BLOCK = 128;  // queries and keys of one block
// Most tokens, rows and blocks in use, since int32 numbers them.
constexpr std::int64_t MOST = std::numeric_limits<std::int32_t>::max();

// Refuses an argument; the message says what came and what is allowed. Python gets a ValueError.
[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline void check_size(const char* name, std::int64_t size) {
  if (size < 0) refuse(std::string(name) + " must be at least 0, got " + std::to_string(size));
  if (size > MOST) {
    refuse(std::string(name) + " must be at most " + std::to_string(MOST) + ", got " + std::to_string(size));
  }
}

constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return n / d + (n % d != 0); }

}  // namespace host
