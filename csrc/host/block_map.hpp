// A block map: the blocks of 128 keys that every block of 128 queries attends to, as compressed rows.
//
// happyhorse_fast/block_map/map.py says what the arrays hold; from_ranges.py beside it makes the same ones in Python.
// Rows that see the same keys are kept as one group, so that memory grows with the groups until the map is written.
#pragma once

#include <cstdint>
#include <vector>

#include "limits.hpp"
#include "masks.hpp"

namespace host {

struct Span {
  std::int64_t first, end;  // half open
};

inline bool operator==(const Span& a, const Span& b) { return a.first == b.first && a.end == b.end; }

using Spans = std::vector<Span>;

// Destination of a map; sizes as in happyhorse_fast/block_map/map.py, with one head.
struct BlockMapArrays {
  std::int32_t* counts;
  std::int32_t* starts;
  std::int32_t* columns;
  std::int32_t* mask_ids;
  std::int32_t* mask_bits;
  std::int32_t* order;
};

class BlockMap {
 public:
  // Refuses negative sizes and those that int32 cannot hold.
  BlockMap(std::int64_t queries, std::int64_t keys);

  // Adds a piece: queries first..end-1 see `keys`, spans that ascend and do not touch. Pieces must ascend and not
  // overlap. A query of no piece sees no key.
  void add(std::int64_t first, std::int64_t end, const Spans& keys);
  // Ends the map after its last piece. Refuses, as add() does, a map of more blocks than int32 can number.
  void finish() { flush(); }

  std::int64_t rows() const { return ceil_div(queries_, BLOCK); }
  std::int64_t entries() const { return entries_; }
  std::size_t masks() const { return masks_.size(); }

  void write(const BlockMapArrays& out) const;

 private:
  // Queries top..bottom-1 of a row, and the keys they see, spans_[first_span .. end_span-1]. `span` is the first of
  // these that kind() has not passed.
  struct Fragment {
    std::int64_t top, bottom;
    std::size_t first_span, end_span, span;
  };
  // Equal key blocks first..end-1; `mask` is FULL or a mask's number.
  struct Run {
    std::int32_t first, end, mask;
  };
  // Equal rows first_row .. first_row+rows-1, each with the runs first_run .. end_run-1.
  struct Group {
    std::int64_t first_row, rows;
    std::size_t first_run, end_run;
    std::int32_t full, all;
  };
  static constexpr std::int32_t FULL = -1;

  void stash(std::int64_t top, std::int64_t bottom, const Spans& keys);
  void flush();
  void add_rows(std::int64_t row, std::int64_t rows);
  std::int32_t kind(std::int64_t first_block, std::int64_t end_block, std::int64_t height, bool& seen);
  std::int32_t draw(std::int64_t low);

  std::int64_t queries_, keys_;
  std::int64_t entries_ = 0;
  std::vector<Group> groups_;
  std::vector<Run> runs_;
  Masks masks_;
  // The row under construction.
  std::int64_t row_ = 0;
  std::vector<Fragment> fragments_;
  Spans spans_;
  std::vector<std::int64_t> bounds_;
};

// Makes the map of the union of q_ranges[i] x k_ranges[i], which may overlap, be empty and come in any order. Refuses
// ranges that are reversed or leave 0..queries or 0..keys, and lists of different lengths.
BlockMap from_ranges(const Spans& q_ranges, const Spans& k_ranges, std::int64_t queries, std::int64_t keys);

}  // namespace host
