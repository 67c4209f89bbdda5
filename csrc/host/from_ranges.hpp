// The exact block map of a union of ranges of queries x ranges of keys.
#pragma once

#include "block_map.hpp"

namespace host {

// Makes the map of the union of q_ranges[i] x k_ranges[i], which may overlap, be empty and come in any order. Refuses
// ranges that are reversed or leave 0..queries or 0..keys, and lists of different lengths.
BlockMap from_ranges(const Spans& q_ranges, const Spans& k_ranges, std::int64_t queries, std::int64_t keys);

}  // namespace host
