// Masks of partial blocks, one copy of each.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>

#include "limits.hpp"

namespace host {

constexpr int WORDS = BLOCK / 32;  // words of one query's bits in a block
// 2 GiB of masks. A clip of 15 s at 1080p has 120; a map that needs more than 2^20 is not sparse by blocks.
constexpr std::size_t MOST_MASKS = std::size_t{1} << 20;

// Key 32 * w + b of query i is bit b of word [i][w].
using Mask = std::array<std::array<std::uint32_t, WORDS>, BLOCK>;

struct Before {
  bool operator()(const Mask& a, const Mask& b) const { return std::memcmp(&a, &b, sizeof(Mask)) < 0; }
};

// Masks and their numbers, which count up from 0.
using Masks = std::map<Mask, std::int32_t, Before>;

// Returns the mask's number, a new one where the mask is new.
inline std::int32_t number(Masks& masks, const Mask& mask) {
  const auto [known, added] = masks.try_emplace(mask, static_cast<std::int32_t>(masks.size()));
  if (added && masks.size() > MOST_MASKS) {
    refuse("ranges must give at most " + std::to_string(MOST_MASKS) + " different masks of partial blocks, got more");
  }
  return known->second;
}

}  // namespace host
