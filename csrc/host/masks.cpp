#include "masks.hpp"

#include <cstring>

namespace host {
namespace {

// 2 GiB of masks. A clip of 15 s at 1080p has 120; a map that needs more than 2^20 is not sparse by blocks.
constexpr std::size_t MOST_MASKS = std::size_t{1} << 20;

[[maybe_unused]] std::uint64_t mix(std::uint64_t x) {
  x *= 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio, odd
  return x ^ x >> 32;        // the product carries upwards only, and masks may differ only in upper halves of words
}

std::uint64_t hash([[maybe_unused]] const Mask& mask) {
#if defined(HAPPYHORSE_MASKS_COLLIDE)  // set by sanitize.sh: only the comparison then tells masks apart
  return 0;
#else
  constexpr std::size_t LANES = 4;  // independent chains of products
  std::array<std::uint64_t, sizeof(Mask) / sizeof(std::uint64_t)> words;
  std::memcpy(words.data(), mask.data(), sizeof(Mask));
  // Lanes start differently, or two of them would cancel out: an even row and the next odd row often hold the same.
  std::array<std::uint64_t, LANES> state{1, 2, 3, 4};
  for (std::size_t i = 0; i < words.size(); i += LANES) {
    for (std::size_t lane = 0; lane < LANES; ++lane) state[lane] = mix(state[lane] ^ words[i + lane]);
  }
  return mix(mix(mix(mix(state[0]) ^ state[1]) ^ state[2]) ^ state[3]);
#endif
}

}  // namespace

std::int32_t MaskTable::number(const Mask& mask) {
  const std::uint64_t key = hash(mask);
  const auto [first, last] = known_.equal_range(key);
  for (auto candidate = first; candidate != last; ++candidate) {
    if (masks_[static_cast<std::size_t>(candidate->second)] == mask) return candidate->second;
  }
  if (masks_.size() == MOST_MASKS) {
    refuse("ranges must give at most " + std::to_string(MOST_MASKS) + " different masks of partial blocks, got more");
  }
  const auto id = static_cast<std::int32_t>(masks_.size());
  masks_.push_back(mask);
  known_.emplace(key, id);
  return id;
}

}  // namespace host
