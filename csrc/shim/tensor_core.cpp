#include "tensor_core.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace shim {
namespace {

constexpr int DEPTH = 16;
constexpr int BANKS = 8;  // of 16 bytes, as ldmatrix sees them

struct Operands {
  unsigned a[4], b[2];
};

double value(unsigned pair, int half) {
  const unsigned bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A lane's share in ldmatrix.
struct MatrixRow {
  std::uintptr_t address;
  unsigned char bytes[16];
};

unsigned long long conflicts = 0;

const unsigned char* of_lane(const unsigned char* table, int lane) {
  return table + static_cast<std::size_t>(lane) * PAYLOAD;
}

// Counts bank conflicts of 8 rows of 16 bytes. Shared memory serves rows of different banks at once, those of one bank
// one after another.
void count_conflicts(const unsigned char* table, int first_lane) {
  std::uintptr_t seen[BANKS];
  int in_bank[BANKS] = {}, found = 0;
  for (int i = 0; i < BANKS; ++i) {
    MatrixRow row;
    std::memcpy(&row, of_lane(table, first_lane + i), sizeof row);
    if (std::find(seen, seen + found, row.address) != seen + found) continue;  // one read serves both lanes
    seen[found++] = row.address;
    ++in_bank[row.address / sizeof row.bytes % BANKS];
  }
  conflicts += static_cast<unsigned>(*std::max_element(in_bank, in_bank + BANKS) - 1);
}

}  // namespace

void multiply_bf16(Site site, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const unsigned char* const table = exchange(site, 0xffffffffu, &mine, sizeof mine);
  const int g = static_cast<int>(thread_index().x) % LANES / 4, t = static_cast<int>(thread_index().x) % 4;
  double left[2][DEPTH], right[2][DEPTH];  // rows g and g + 8, columns 2t and 2t + 1: this lane's operands
  for (int from = 0; from < 4; ++from) {
    Operands row, columns[2];
    std::memcpy(&row, of_lane(table, 4 * g + from), sizeof row);
    for (int i = 0; i < 2; ++i) std::memcpy(&columns[i], of_lane(table, 4 * (2 * t + i) + from), sizeof columns[i]);
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * from + half;
      for (int i = 0; i < 4; ++i) left[i % 2][k + i / 2 * 8] = value(row.a[i], half);
      for (int i = 0; i < 4; ++i) right[i % 2][k + i / 2 * 8] = value(columns[i % 2].b[i / 2], half);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < DEPTH; ++k) sum += left[i / 2][k] * right[i % 2][k];
    d[i] = static_cast<float>(sum);
  }
}

void load_matrices(Site site, unsigned (&r)[4], const void* row, bool transposed) {
  const auto* const at = static_cast<const unsigned char*>(row);
  if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) fail(site, "a row must be aligned to 16 bytes");
  if (at < shared_memory() || at + 16 > shared_memory() + shared_bytes()) fail(site, "a row outside shared memory");
  MatrixRow mine;
  mine.address = reinterpret_cast<std::uintptr_t>(at);
  std::memcpy(mine.bytes, at, sizeof mine.bytes);
  const unsigned char* const table = exchange(site, 0xffffffffu, &mine, sizeof mine);
  const int lane = static_cast<int>(thread_index().x) % LANES;
  if (lane % 8 == 0) count_conflicts(table, lane);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    std::uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int matrix_row = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
      std::memcpy(&pair[half], of_lane(table, 8 * i + matrix_row) + offsetof(MatrixRow, bytes) + 2 * column, 2);
    }
    r[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
}

}  // namespace shim

extern "C" unsigned long long shim_bank_conflicts() { return shim::conflicts; }
