// The exact block map of a union of ranges of queries x ranges of keys.
#pragma once

#include "block_map.hpp"

namespace host {

// The union of queries[i] x keys[i]: overlapping, in any order, empty ones too. Refuses ranges that are reversed or leave
// their tokens, and lists of different lengths.
BlockMap from_ranges(const Spans& q_ranges, const Spans& k_ranges, std::int64_t queries, std::int64_t keys);

}  // namespace host
