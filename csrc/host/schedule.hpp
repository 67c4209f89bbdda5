// Who computes what: rows longest first, and a list of work for every program of a persistent grid.
#pragma once

#include <cstdint>
#include <vector>

namespace host {

// Rows by falling length; equal lengths keep their order.
std::vector<std::int32_t> longest_first(const std::vector<std::int64_t>& lengths);

struct Schedule {
  std::vector<std::int32_t> order;   // rows, longest first
  std::vector<std::int32_t> starts;  // [programs + 1]: program p has items[starts[p]] .. items[starts[p + 1] - 1]
  std::vector<std::int32_t> items;   // row * query_heads + head
};

// Every item, longest first, to the program with the least work so far; of several to the one with the fewest items, then
// to the first. The heads of a row follow each other, so that they run side by side. Refuses lengths, programs and heads
// out of range.
Schedule schedule(const std::vector<std::int64_t>& lengths, std::int64_t programs, std::int64_t query_heads);

}  // namespace host
