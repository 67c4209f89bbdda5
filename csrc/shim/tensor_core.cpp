#include "tensor_core.hpp"

#include <cstring>

namespace shim {
namespace {

constexpr int ROWS = 16, COLUMNS = 8, DEPTH = 16;

struct Operands {
  unsigned a[4], b[2];
};

double value(unsigned pair, int half) {
  const unsigned bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

const unsigned char* of_lane(const unsigned char* table, int lane) {
  return table + static_cast<std::size_t>(lane) * PAYLOAD;
}

}  // namespace

void multiply_bf16(Site site, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const unsigned char* const table = exchange(site, 0xffffffffu, &mine, sizeof mine);
  double left[ROWS][DEPTH], right[DEPTH][COLUMNS];
  for (int lane = 0; lane < LANES; ++lane) {
    Operands given;
    std::memcpy(&given, of_lane(table, lane), sizeof given);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][2 * t + half + i / 2 * 8] = value(given.a[i], half);
      for (int i = 0; i < 2; ++i) right[2 * t + half + i * 8][g] = value(given.b[i], half);
    }
  }
  const int g = static_cast<int>(thread_index().x) % LANES / 4, t = static_cast<int>(thread_index().x) % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = d[i];
    for (int k = 0; k < DEPTH; ++k) sum += left[g + i / 2 * 8][k] * right[k][2 * t + i % 2];
    d[i] = static_cast<float>(sum);
  }
}

void load_matrices(Site site, unsigned (&r)[4], const void* row, bool transposed) {
  const auto* const at = static_cast<const unsigned char*>(row);
  if (reinterpret_cast<std::uintptr_t>(at) % 16 != 0) fail(site, "a row must be aligned to 16 bytes");
  if (at < shared_memory() || at + 16 > shared_memory() + shared_bytes()) fail(site, "a row outside shared memory");
  const unsigned char* const table = exchange(site, 0xffffffffu, at, 16);
  const int g = static_cast<int>(thread_index().x) % LANES / 4, t = static_cast<int>(thread_index().x) % 4;
  for (int i = 0; i < 4; ++i) {
    std::uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const int matrix_row = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
      std::memcpy(&pair[half], of_lane(table, 8 * i + matrix_row) + 2 * column, 2);
    }
    r[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
  }
}

}  // namespace shim
