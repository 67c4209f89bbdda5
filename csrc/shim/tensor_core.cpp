#include <array>

#include "cuda.hpp"

namespace shim {
namespace {

constexpr int DEPTH = 16;

struct Operands {
  unsigned a[4], b[2];
};

double value(unsigned pair, int half) {
  const unsigned bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace

void multiply_bf16(Site site, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Operands mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const unsigned char* const table = exchange(site, 0xffffffffu, &mine, sizeof mine);
  const int g = lane() / 4, t = lane() % 4;
  double sums[4] = {d[0], d[1], d[2], d[3]};  // of rows g and g + 8, columns 2t and 2t + 1
  for (int k = 0; k < DEPTH; ++k) {
    const int from = k % 8 / 2, half = k % 2, upper = k / 8;
    const Operands row = read<Operands>(table, 4 * g + from);
    const Operands columns[2] = {read<Operands>(table, 8 * t + from), read<Operands>(table, 8 * t + 4 + from)};
    for (int i = 0; i < 4; ++i) {
      sums[i] += value(row.a[i / 2 + 2 * upper], half) * value(columns[i % 2].b[upper], half);
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(sums[i]);
}

void load_matrices(Site site, unsigned (&r)[4], const void* row, bool transposed) {
  if (!aligned(row)) fail(site, "a row must be aligned to 16 bytes");
  check_shared(site, row, "a row outside shared memory");
  const unsigned char* const table = exchange(site, 0xffffffffu, row, VECTOR);
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int matrix_row, int column) -> unsigned {
      return read<std::array<std::uint16_t, 8>>(table, 8 * i + matrix_row)[column];
    };
    r[i] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                      : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}

}  // namespace shim
