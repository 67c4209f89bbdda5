#include <algorithm>
#include <iterator>
#include <utility>

#include "block_map.hpp"

namespace host {
namespace {

struct Pair {
  Span q, k;
};

void check_ranges(const char* name, const Spans& ranges, std::int64_t total) {
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const auto [first, end] = ranges[i];
    if (first >= 0 && first <= end && end <= total) continue;
    refuse(std::string(name) + "[" + std::to_string(i) + "] must satisfy 0 <= start <= end <= " +
           std::to_string(total) + ", got [" + std::to_string(first) + ", " + std::to_string(end) + "]");
  }
}

// Merges the keys of the pairs in `active`, ordered by first key, into spans that neither overlap nor touch.
void merge_keys(const std::vector<Pair>& pairs, const std::vector<std::size_t>& active, Spans& merged) {
  merged.clear();
  for (const std::size_t i : active) {
    const Span& k = pairs[i].k;
    if (!merged.empty() && k.first <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, k.end);
    } else {
      merged.push_back(k);
    }
  }
}

}  // namespace

// Sweeps over the queries: between two neighbouring ends of ranges, all queries see the keys of the same pairs.
BlockMap from_ranges(const Spans& q_ranges, const Spans& k_ranges, std::int64_t queries, std::int64_t keys) {
  BlockMap map(queries, keys);
  check_ranges("q_ranges", q_ranges, queries);
  check_ranges("k_ranges", k_ranges, keys);
  if (q_ranges.size() != k_ranges.size()) {
    refuse("q_ranges and k_ranges must have as many rows, got " + std::to_string(q_ranges.size()) + " and " +
           std::to_string(k_ranges.size()));
  }
  std::vector<Pair> pairs;
  for (std::size_t i = 0; i < q_ranges.size(); ++i) {
    const Pair pair{q_ranges[i], k_ranges[i]};
    if (pair.q.first < pair.q.end && pair.k.first < pair.k.end) pairs.push_back(pair);
  }
  std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.k.first < b.k.first; });

  std::vector<std::size_t> by_query(pairs.size());
  std::vector<std::int64_t> cuts;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    by_query[i] = i;
    cuts.push_back(pairs[i].q.first);
    cuts.push_back(pairs[i].q.end);
  }
  std::sort(by_query.begin(), by_query.end(), [&pairs](std::size_t a, std::size_t b) {
    return std::pair(pairs[a].q.first, a) < std::pair(pairs[b].q.first, b);
  });
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());

  std::vector<std::size_t> active, next;  // in the order of their keys, as `pairs` are
  Spans visible, changed;
  std::int64_t since = 0;
  auto arriving = by_query.begin();
  for (const std::int64_t cut : cuts) {
    const auto leaves = [&pairs, cut](std::size_t i) { return pairs[i].q.end <= cut; };
    active.erase(std::remove_if(active.begin(), active.end(), leaves), active.end());
    const auto arrived = std::find_if(
        arriving, by_query.end(), [&pairs, cut](std::size_t i) { return pairs[i].q.first > cut; });
    next.clear();
    std::merge(active.begin(), active.end(), arriving, arrived, std::back_inserter(next));
    active.swap(next);
    arriving = arrived;
    merge_keys(pairs, active, changed);
    if (changed == visible) continue;
    map.add(since, cut, visible);
    since = cut;
    visible.swap(changed);
  }
  map.finish();  // no range goes past the last cut, so every piece has been added
  return map;
}

}  // namespace host
