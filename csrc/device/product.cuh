// Rows of a given product: bf16, or float32 still to be multiplied by a scale per row and one per column. Lanes read
// 16 bytes, VALUES elements: 8 of bf16, or 4 of float32 with scales.
#pragma once

#include "numerics.cuh"

constexpr int ROW_TILE = 128;

// Rows of a launch: `table` [tiles, 3] on the device, or where that is null rows first..end-1 of one expert.
struct RowTiles {
  const int* table;
  int expert;
  int first;
  int end;
};

struct RowTile {
  int expert, first, end;
};

HH_DEVICE RowTile row_tile(const RowTiles& rows, u32 index) {
  if (rows.table != nullptr) {
    const int* const entry = rows.table + 3 * index;
    return {entry[0], entry[1], entry[2]};
  }
  const int first = rows.first + ROW_TILE * static_cast<int>(index);
  return {rows.expert, first, min(first + ROW_TILE, rows.end)};
}

// Loads the 16 bytes from `element` of a row of bf16 (VALUES 8) or float32 (VALUES 4).
template <int VALUES>
HH_DEVICE uint4 load_vector(const void* row, int element) {
  return static_cast<const uint4*>(row)[element / VALUES];
}

template <int VALUES>
HH_DEVICE void widen(const uint4& raw, float (&x)[VALUES]) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (VALUES == 8) {
      x[2 * i] = low_bf16(words[i]);
      x[2 * i + 1] = high_bf16(words[i]);
    } else {
      x[i] = float_of(words[i]);
    }
  }
}

// Loads N floats, aligned to 16 bytes, or to 8 bytes for 2 floats.
template <int N>
HH_DEVICE void load_floats(const float* from, float (&x)[N]) {
  if constexpr (N == 2) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    x[0] = pair.x;
    x[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from)[i];
      x[4 * i] = four.x;
      x[4 * i + 1] = four.y;
      x[4 * i + 2] = four.z;
      x[4 * i + 3] = four.w;
    }
  }
}

// Multiplies by the row's scale, then by the columns'. The order matters, because each product is rounded.
template <int N>
HH_DEVICE void scale_values(float (&x)[N], float row_scale, const float (&column_scale)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = x[i] * row_scale * column_scale[i];
}

// Stores N values in one store; the address is aligned to its size.
template <int N>
HH_DEVICE void store_bf16(bf16* to, const float (&x)[N]) {
  if constexpr (N == 2) {
    *reinterpret_cast<u32*>(to) = pack_bf16(x[0], x[1]);
  } else if constexpr (N == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
  } else {
    static_assert(N == 8, "2, 4 or 8 values");
    *reinterpret_cast<uint4*>(to) = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                                               pack_bf16(x[6], x[7]));
  }
}

template <int N>
HH_DEVICE void store_e4m3(e4m3* to, const float (&x)[N]) {
  if constexpr (N == 2) {
    *reinterpret_cast<u16*>(to) = static_cast<u16>(to_e4m3(x[0]).bits | to_e4m3(x[1]).bits << 8);
  } else if constexpr (N == 4) {
    *reinterpret_cast<u32*>(to) = pack_e4m3(x[0], x[1], x[2], x[3]);
  } else {
    static_assert(N == 8, "2, 4 or 8 values");
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_e4m3(x[0], x[1], x[2], x[3]), pack_e4m3(x[4], x[5], x[6], x[7]));
  }
}

template <int N>
HH_DEVICE void store_int8(int8* to, const float (&x)[N]) {
  static_assert(N == 4 || N == 8, "4 or 8 values");
  if constexpr (N == 4) {
    *reinterpret_cast<u32*>(to) = pack_int8(x[0], x[1], x[2], x[3]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack_int8(x[0], x[1], x[2], x[3]), pack_int8(x[4], x[5], x[6], x[7]));
  }
}
