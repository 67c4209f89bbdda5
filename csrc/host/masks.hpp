// Masks of partial blocks, one copy of each.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "limits.hpp"

namespace host {

constexpr int WORDS = BLOCK / 32;  // words of one query's bits in a block

// Key 32 * w + b of query i is bit b of word [i][w].
using Mask = std::array<std::array<std::uint32_t, WORDS>, BLOCK>;

class MaskTable {
 public:
  // Returns the mask's number, a new one where the mask is new. Numbers count up from 0.
  std::int32_t number(const Mask& mask);
  const std::vector<Mask>& masks() const { return masks_; }

 private:
  std::vector<Mask> masks_;
  std::unordered_multimap<std::uint64_t, std::int32_t> known_;  // by hash
};

}  // namespace host
