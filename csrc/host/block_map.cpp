#include "block_map.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace host {

BlockMap::BlockMap(std::int64_t queries, std::int64_t keys) : queries_(queries), keys_(keys) {
  check_size("queries", queries);
  check_size("keys", keys);
}

void BlockMap::add(std::int64_t first, std::int64_t end, const Spans& keys) {
  if (keys.empty()) return;
  while (first < end) {
    const std::int64_t row = first / BLOCK, origin = row * BLOCK;
    if (row != row_) flush();
    row_ = row;
    if (first == origin && end - first >= BLOCK) {
      const std::int64_t rows = (end - first) / BLOCK;
      stash(0, BLOCK, keys);
      add_rows(row, rows);
      first += rows * BLOCK;
    } else {
      const std::int64_t stop = std::min(end, origin + BLOCK);
      stash(first - origin, stop - origin, keys);
      first = stop;
    }
  }
}

void BlockMap::stash(std::int64_t top, std::int64_t bottom, const Spans& keys) {
  const std::size_t begin = spans_.size();
  spans_.insert(spans_.end(), keys.begin(), keys.end());
  fragments_.push_back({top, bottom, begin, spans_.size(), begin});
}

void BlockMap::flush() {
  if (!fragments_.empty()) add_rows(row_, 1);
}

// Turns the fragments of a row into runs of blocks, for `rows` equal rows. The bounds are the block borders at or
// around both ends of every span. So a block in which a span begins or ends stands alone between two neighbouring
// bounds, and several blocks between two neighbouring bounds are equal.
void BlockMap::add_rows(std::int64_t row, std::int64_t rows) {
  const std::int64_t height = std::min(BLOCK, queries_ - row * BLOCK);
  bounds_.clear();
  for (const Span& span : spans_) {
    for (const std::int64_t key : {span.first, span.end}) {
      bounds_.push_back(key / BLOCK);
      bounds_.push_back(ceil_div(key, BLOCK));
    }
  }
  std::sort(bounds_.begin(), bounds_.end());
  bounds_.erase(std::unique(bounds_.begin(), bounds_.end()), bounds_.end());

  Group group{row, rows, runs_.size(), 0, 0, 0};
  for (std::size_t i = 0; i + 1 < bounds_.size(); ++i) {
    bool seen = false;
    const std::int32_t mask = kind(bounds_[i], bounds_[i + 1], height, seen);
    if (!seen) continue;
    const auto first = static_cast<std::int32_t>(bounds_[i]), end = static_cast<std::int32_t>(bounds_[i + 1]);
    if (runs_.size() > group.first_run && runs_.back().end == first && runs_.back().mask == mask) {
      runs_.back().end = end;
    } else {
      runs_.push_back({first, end, mask});
    }
    group.all += end - first;
    if (mask == FULL) group.full += end - first;
  }
  group.end_run = runs_.size();
  entries_ += rows * group.all;
  if (entries_ > MOST) {
    refuse("ranges must give at most " + std::to_string(MOST) + " blocks in use, got at least " +
           std::to_string(entries_));
  }
  groups_.push_back(group);
  fragments_.clear();
  spans_.clear();
}

// Returns FULL or the mask's number of the equal blocks first_block..end_block-1. Sets `seen` where a query sees one.
std::int32_t BlockMap::kind(std::int64_t first_block, std::int64_t end_block, std::int64_t height, bool& seen) {
  const std::int64_t low = first_block * BLOCK, high = end_block * BLOCK;
  std::int64_t covered = 0;  // queries that see every key
  for (Fragment& fragment : fragments_) {
    while (fragment.span < fragment.end_span && spans_[fragment.span].end <= low) ++fragment.span;
    if (fragment.span == fragment.end_span || spans_[fragment.span].first >= high) continue;
    seen = true;
    const Span& span = spans_[fragment.span];
    if (span.first <= low && span.end >= high) covered += fragment.bottom - fragment.top;
  }
  return !seen || covered == height ? FULL : draw(low);
}

// Returns the number of the mask of the block of keys that starts at `low`.
std::int32_t BlockMap::draw(std::int64_t low) {
  Mask mask{};
  for (const Fragment& fragment : fragments_) {
    std::array<std::uint32_t, WORDS> words{};
    for (std::size_t i = fragment.span; i < fragment.end_span && spans_[i].first < low + BLOCK; ++i) {
      for (int w = 0; w < WORDS; ++w) {
        const std::int64_t origin = low + 32 * w;
        const std::int64_t from = std::clamp<std::int64_t>(spans_[i].first - origin, 0, 32);
        const std::int64_t to = std::clamp<std::int64_t>(spans_[i].end - origin, 0, 32);
        words[w] |= static_cast<std::uint32_t>((std::uint64_t{1} << to) - (std::uint64_t{1} << from));
      }
    }
    std::fill(mask.begin() + fragment.top, mask.begin() + fragment.bottom, words);
  }
  return number(masks_, mask);
}

void BlockMap::write(const BlockMapArrays& out) const {
  std::fill_n(out.counts, 2 * rows(), 0);
  std::int64_t row = 0;
  std::int32_t at = 0;
  for (const Group& group : groups_) {
    std::fill(out.starts + row, out.starts + group.first_row, at);  // rows without a key
    const std::int32_t pattern = at;
    for (const bool full : {true, false}) {
      for (std::size_t i = group.first_run; i < group.end_run; ++i) {
        const Run& run = runs_[i];
        if ((run.mask == FULL) != full) continue;
        std::iota(out.columns + at, out.columns + at + (run.end - run.first), run.first);
        std::fill_n(out.mask_ids + at, run.end - run.first, run.mask);
        at += run.end - run.first;
      }
    }
    row = group.first_row;
    for (std::int64_t i = 0; i < group.rows; ++i, ++row) {
      if (i > 0) {
        std::copy_n(out.columns + pattern, group.all, out.columns + at);
        std::copy_n(out.mask_ids + pattern, group.all, out.mask_ids + at);
        at += group.all;
      }
      out.starts[row] = at - group.all;
      out.counts[2 * row] = group.full;
      out.counts[2 * row + 1] = group.all;
    }
  }
  std::fill(out.starts + row, out.starts + rows(), at);
  std::iota(out.order, out.order + rows(), 0);
  std::stable_sort(out.order, out.order + rows(),
                   [&out](std::int32_t a, std::int32_t b) { return out.counts[2 * a + 1] > out.counts[2 * b + 1]; });
  for (const auto& [mask, id] : masks_) std::memcpy(out.mask_bits + id * WORDS * BLOCK, &mask, sizeof mask);
}

}  // namespace host
