// happyhorse_fast._C: block maps from ranges. happyhorse_fast/block_map/from_ranges.py checks what it is given, and makes
// the same arrays in Python where there is no compiler; map.py beside it says what they hold.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using i32 = std::int32_t;
using i64 = std::int64_t;
using Array = py::array_t<i32>;

constexpr i64 BLOCK = 128;                             // queries and keys of one block
constexpr i64 WORDS = BLOCK / 32;                      // words of one query's bits in a block
constexpr i64 MOST = std::numeric_limits<i32>::max();  // blocks in use, since int32 numbers them
// 2 GiB of masks. A clip of 15 s at 1080p has 120; a map that needs more than 2^20 is not sparse by blocks.
constexpr std::size_t MOST_MASKS = std::size_t{1} << 20;

struct Span {
  i64 first, end;  // half open
};
bool operator==(const Span& a, const Span& b) { return a.first == b.first && a.end == b.end; }
using Spans = std::vector<Span>;

// Queries that see the same keys: spans that ascend and do not touch.
struct Piece {
  Span queries;
  Spans keys;
};

// Cuts all queries into pieces: between two neighbouring ends of ranges, they see the keys of the same ranges.
std::vector<Piece> cut(const Spans& q, const Spans& k, i64 queries) {
  std::map<i64, std::vector<std::size_t>> changes;  // query -> ranges that begin or end there
  for (std::size_t i = 0; i < q.size(); ++i) {
    if (q[i].first == q[i].end || k[i].first == k[i].end) continue;
    changes[q[i].first].push_back(i);
    changes[q[i].end].push_back(i);
  }
  std::vector<Piece> pieces{{{0, 0}, {}}};
  std::set<std::pair<i64, std::size_t>> active;  // ranges by their first key
  for (const auto& [query, ranges] : changes) {
    for (const std::size_t i : ranges) {
      const std::pair range{k[i].first, i};
      if (!active.insert(range).second) active.erase(range);
    }
    Spans keys;
    for (const auto& [first, i] : active) {
      if (keys.empty() || first > keys.back().end) keys.push_back(k[i]);
      keys.back().end = std::max(keys.back().end, k[i].end);
    }
    if (keys == pieces.back().keys) continue;
    pieces.back().queries.end = query;
    pieces.push_back({{query, query}, std::move(keys)});
  }
  pieces.back().queries.end = queries;
  return pieces;
}

// Equal rows of blocks, first..end-1.
struct Rows {
  i64 first, end;
  std::size_t full;
  std::vector<i32> columns, mask_ids;  // of one of them
};

class BlockMap {
 public:
  BlockMap(const Spans& q, const Spans& k, i64 queries, i64 keys)
      : rows_((queries + BLOCK - 1) / BLOCK), covered_((keys + BLOCK - 1) / BLOCK) {
    const std::vector<Piece> pieces = cut(q, k, queries);
    auto piece = pieces.begin();
    for (i64 row = 0, end; row < rows_; row = end) {
      const i64 top = row * BLOCK, height = std::min(BLOCK, queries - top);
      while (piece->queries.end <= top) ++piece;
      fragments_.clear();
      for (auto next = piece; next != pieces.end() && next->queries.first < top + height; ++next) {
        const i64 first = std::max<i64>(next->queries.first - top, 0);
        fragments_.push_back({{first, std::min(next->queries.end - top, height)}, next->keys});
      }
      end = std::max(row + 1, piece->queries.end / BLOCK);  // whole rows of one piece are equal
      add(row, end, height);
    }
  }

  // Returns the arrays; called with the GIL.
  py::tuple arrays() const {
    const auto masks = static_cast<py::ssize_t>(masks_.size());
    Array counts({py::ssize_t{1}, rows_, py::ssize_t{2}}), starts({py::ssize_t{1}, rows_}), columns(entries_),
        mask_ids(entries_), mask_bits({masks, py::ssize_t{BLOCK}, py::ssize_t{WORDS}}), order(rows_);
    const py::tuple all = py::make_tuple(counts, starts, columns, mask_ids, mask_bits, order);
    i32 *const length = counts.mutable_data(), *const start = starts.mutable_data(), *column = columns.mutable_data(),
        *id = mask_ids.mutable_data(), *const rank = order.mutable_data();
    std::copy(mask_bits_.begin(), mask_bits_.end(), mask_bits.mutable_data());
    i32 at = 0;
    const py::gil_scoped_release release;
    for (const Rows& rows : row_groups_) {
      for (i64 row = rows.first; row < rows.end; ++row) {
        length[2 * row] = static_cast<i32>(rows.full);
        length[2 * row + 1] = static_cast<i32>(rows.columns.size());
        start[row] = at;
        column = std::copy(rows.columns.begin(), rows.columns.end(), column);
        id = std::copy(rows.mask_ids.begin(), rows.mask_ids.end(), id);
        at += length[2 * row + 1];
      }
    }
    std::iota(rank, rank + rows_, 0);
    std::stable_sort(rank, rank + rows_, [length](i32 a, i32 b) { return length[2 * a + 1] > length[2 * b + 1]; });
    return all;
  }

 private:
  // Queries of a row, counted from its first, and the keys that they see.
  struct Fragment {
    Span queries;
    const Spans& keys;
  };
  static constexpr i32 FULL = -1, ABSENT = -1;

  // Adds the equal rows first..end-1 of `fragments_`, which have `height` queries.
  void add(i64 first, i64 end, i64 height) {
    std::fill(covered_.begin(), covered_.end(), ABSENT);
    for (const auto& [queries, keys] : fragments_) {
      for (const Span& span : keys) {
        for (i64 block = span.first / BLOCK; block * BLOCK < span.end; ++block) {
          const bool whole = span.first <= block * BLOCK && (block + 1) * BLOCK <= span.end;
          covered_[block] = std::max(covered_[block], 0) + (whole ? static_cast<i32>(queries.end - queries.first) : 0);
        }
      }
    }
    std::vector<i32> columns, partial;
    for (std::size_t block = 0; block < covered_.size(); ++block) {
      if (covered_[block] == ABSENT) continue;
      (covered_[block] == height ? columns : partial).push_back(static_cast<i32>(block));
    }
    const std::size_t full = columns.size();
    columns.insert(columns.end(), partial.begin(), partial.end());
    entries_ += (end - first) * static_cast<i64>(columns.size());
    if (entries_ > MOST) {
      throw std::invalid_argument("ranges must give at most " + std::to_string(MOST) +
                                  " blocks in use, got at least " + std::to_string(entries_));
    }
    std::vector<i32> mask_ids(full, FULL);
    for (const i32 block : partial) mask_ids.push_back(mask(block * BLOCK));
    row_groups_.push_back({first, end, full, std::move(columns), std::move(mask_ids)});
  }

  // Returns the number of the mask of the block of keys that starts at `low`, a new one where the mask is new.
  i32 mask(i64 low) {
    std::array<std::array<std::uint32_t, WORDS>, BLOCK> bits{};
    for (const auto& [queries, keys] : fragments_) {
      std::array<std::uint32_t, WORDS> words{};
      auto span = std::partition_point(keys.begin(), keys.end(), [low](const Span& s) { return s.end <= low; });
      for (; span != keys.end() && span->first < low + BLOCK; ++span) {
        for (i64 w = 0; w < WORDS; ++w) {
          const i64 origin = low + 32 * w, from = std::clamp<i64>(span->first - origin, 0, 32);
          const i64 to = std::clamp<i64>(span->end - origin, 0, 32);
          words[w] |= static_cast<std::uint32_t>((std::uint64_t{1} << to) - (std::uint64_t{1} << from));
        }
      }
      std::fill(bits.begin() + queries.first, bits.begin() + queries.end, words);
    }
    const std::string key(reinterpret_cast<const char*>(&bits), sizeof bits);
    const auto [known, added] = masks_.try_emplace(key, static_cast<i32>(masks_.size()));
    if (added) {
      for (const auto& words : bits) mask_bits_.insert(mask_bits_.end(), words.begin(), words.end());
    }
    if (masks_.size() > MOST_MASKS) {
      throw std::invalid_argument("ranges must give at most " + std::to_string(MOST_MASKS) +
                                  " different masks of partial blocks, got more");
    }
    return known->second;
  }

  i64 rows_, entries_ = 0;
  std::vector<Rows> row_groups_;
  std::vector<Fragment> fragments_;  // of the row under construction
  std::vector<i32> covered_;         // its queries that see every key of a block, or ABSENT
  std::vector<i32> mask_bits_;
  std::unordered_map<std::string, i32> masks_;
};

using Ranges = py::array_t<i64, py::array::c_style | py::array::forcecast>;

Spans spans(const Ranges& ranges) {
  if (ranges.ndim() != 2 || ranges.shape(1) != 2) throw py::value_error("ranges must be of shape [rows, 2]");
  Spans found;
  for (py::ssize_t row = 0; row < ranges.shape(0); ++row) found.push_back({ranges.at(row, 0), ranges.at(row, 1)});
  return found;
}

py::tuple from_ranges(const Ranges& q_ranges, const Ranges& k_ranges, i64 queries, i64 keys) {
  const Spans q = spans(q_ranges), k = spans(k_ranges);  // copies: another thread may then write to the arrays
  const BlockMap map = [&] {
    const py::gil_scoped_release release;
    return BlockMap(q, k, queries, keys);
  }();
  return map.arrays();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Block maps, made on the host without the GIL; see happyhorse_fast/_C.pyi.";
  m.def("from_ranges", &from_ranges, py::arg("q_ranges"), py::arg("k_ranges"), py::arg("queries"), py::arg("keys"));
}
