#include "schedule.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <queue>
#include <string>
#include <tuple>

#include "limits.hpp"

namespace host {
namespace {

constexpr int DIGIT_BITS = 11;  // one pass for up to 2,048 blocks a row, 262,144 tokens
constexpr std::int64_t DIGIT = (std::int64_t{1} << DIGIT_BITS) - 1;
constexpr std::int64_t MOST_PROGRAMS = 1 << 20;

void check(const std::vector<std::int64_t>& lengths, std::int64_t programs, std::int64_t query_heads) {
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0 || lengths[i] > MOST) {
      refuse("lengths[" + std::to_string(i) + "] must satisfy 0 <= length <= " + std::to_string(MOST) + ", got " +
             std::to_string(lengths[i]));
    }
  }
  if (programs < 1 || programs > MOST_PROGRAMS) {
    refuse("programs must satisfy 1 <= programs <= " + std::to_string(MOST_PROGRAMS) + ", got " +
           std::to_string(programs));
  }
  const auto rows = static_cast<std::int64_t>(lengths.size());
  if (query_heads < 1 || query_heads > MOST / std::max<std::int64_t>(rows, 1)) {
    refuse("query_heads must be at least 1, and at most " + std::to_string(MOST) + " / " + std::to_string(rows) +
           " rows, got " + std::to_string(query_heads));
  }
}

}  // namespace

// Radix sort by the distance to the longest row, lowest digit first.
std::vector<std::int32_t> longest_first(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int32_t> order(lengths.size()), sorted(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  if (lengths.empty()) return order;
  const auto [shortest, longest] = std::minmax_element(lengths.begin(), lengths.end());
  const std::int64_t most = *longest, range = *longest - *shortest;
  for (int shift = 0; shift < 63 && range >> shift > 0; shift += DIGIT_BITS) {
    const auto digit = [&](std::int32_t row) {
      return static_cast<std::size_t>((most - lengths[static_cast<std::size_t>(row)]) >> shift & DIGIT);
    };
    std::array<std::size_t, DIGIT + 2> place{};
    for (const std::int32_t row : order) ++place[digit(row) + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (const std::int32_t row : order) sorted[place[digit(row)]++] = row;
    order.swap(sorted);
  }
  return order;
}

Schedule schedule(const std::vector<std::int64_t>& lengths, std::int64_t programs, std::int64_t query_heads) {
  check(lengths, programs, query_heads);
  const std::size_t heads = static_cast<std::size_t>(query_heads), items = lengths.size() * heads;
  Schedule result{longest_first(lengths), std::vector<std::int32_t>(static_cast<std::size_t>(programs) + 1, 0),
                  std::vector<std::int32_t>(items)};

  using Load = std::tuple<std::int64_t, std::int32_t, std::int32_t>;  // work so far, items, program
  std::vector<Load> idle;
  for (std::int32_t p = 0; p < programs; ++p) idle.emplace_back(0, 0, p);
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads(std::greater<Load>(), std::move(idle));
  std::vector<std::int32_t> program_of(items);
  for (std::size_t i = 0; i < items; ++i) {
    auto [work, count, program] = loads.top();
    loads.pop();
    program_of[i] = program;
    ++result.starts[static_cast<std::size_t>(program) + 1];
    loads.emplace(work + lengths[static_cast<std::size_t>(result.order[i / heads])], count + 1, program);
  }
  std::partial_sum(result.starts.begin(), result.starts.end(), result.starts.begin());
  std::vector<std::int32_t> end(result.starts.begin(), result.starts.end() - 1);
  for (std::size_t i = 0; i < items; ++i) {
    const std::size_t item = static_cast<std::size_t>(result.order[i / heads]) * heads + i % heads;
    result.items[static_cast<std::size_t>(end[static_cast<std::size_t>(program_of[i])]++)] =
        static_cast<std::int32_t>(item);
  }
  return result;
}

}  // namespace host
