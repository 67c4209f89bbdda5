// Sizes that the int32 arrays of a block map can hold, and how a caller is told of one that they cannot.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace host {

constexpr std::int64_t BLOCK = 128;  // queries and keys of one block
// Tokens, rows and blocks in use: what int32 numbers.
constexpr std::int64_t MOST = std::numeric_limits<std::int32_t>::max();

// An argument out of range: what came and what is allowed. Python gets it as a ValueError.
[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline void check_size(const char* name, std::int64_t size) {
  if (size < 0) refuse(std::string(name) + " must be at least 0, got " + std::to_string(size));
  if (size > MOST) {
    refuse(std::string(name) + " must be at most " + std::to_string(MOST) + ", got " + std::to_string(size));
  }
}

constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t d) { return n / d + (n % d != 0); }

}  // namespace host
