// Quantized rows (layout: kernels/quantization.py) turned into floats, a tile at a time.
#pragma once

#include <algorithm>

#include "row_kernels.h"

constexpr int LARGEST_GROUP = 4096;  // of values; Python asks for no larger one

// The codes of a group of m values, a multiple of 8, one byte each. W: what is handled at once, a word of bytes or one byte.
template <class W>
inline void codes_to_bytes(const uint8_t* codes, int bits, int m, int from, uint8_t* out) {
  const auto every = [](int byte) { return static_cast<W>(W(~W(0)) / 255 * byte); };
  if (bits == 4) {
    const W pair = load<W>(codes + from);
    store<W>(out + from, pair & every(15));
    store<W>(out + from + m / 2, pair >> 4 & every(15));
    return;
  }
  const int e = m / 8;
  const W p0 = load<W>(codes + from), p1 = load<W>(codes + e + from), p2 = load<W>(codes + 2 * e + from);
  const W low = every(7), high = every(4), two = every(3);
  const W values[] = {W(p0 & low), W(p0 >> 3 & low), W(p1 & low), W(p1 >> 3 & low), W(p2 & low), W(p2 >> 3 & low),
                      W((p0 >> 6 & two) | (p1 >> 4 & high)), W((p2 >> 6 & two) | (p1 >> 5 & high))};
  for (int i = 0; i < 8; i++) store<W>(out + i * e + from, values[i]);
}

inline void unpack_row(const uint8_t* codes, const uint8_t* params, int bits, int group, int dim,
                       float* out) {
  uint8_t room[LARGEST_GROUP];
  for (int start = 0; start < dim; start += group, params += 4, out += group) {
    const int n = std::min(group, dim - start), m = (n + 7) / 8 * 8;
    const float scale = half_to_float(load<uint16_t>(params)), smallest = half_to_float(load<uint16_t>(params + 2));
    const uint8_t* bytes = bits == 8 ? codes : room;
    if (bits != 8) {
      const int stored = bits == 4 ? m / 2 : m / 8;
      int j = 0;
      for (; j + 8 <= stored; j += 8) codes_to_bytes<uint64_t>(codes, bits, m, j, room);
      for (; j < stored; j++) codes_to_bytes<uint8_t>(codes, bits, m, j, room);
    }
    int j = 0;
    for (; j + L <= n; j += L) store(out + j, widened(load<Bytes>(bytes + j)) * scale + smallest);
    for (; j < n; j++) out[j] = static_cast<float>(bytes[j]) * scale + smallest;
    codes += m / 8 * bits;
  }
}

// n rows from row t on as plain ones: themselves, or unpacked into ``tile``.
inline Plain unpacked(const Rows& rows, const uint8_t* data, const uint8_t* params, int64_t t,
                      int64_t n, const Shape& shape, Buffer& tile) {
  data += t * rows.stride[2];
  if (!params) return {data, rows.stride[2], rows.kind};
  params += t * rows.param_stride[2];
  float* out = tile.get(int64_t{TILE} * shape.padded);
  for (int64_t i = 0; i < n; i++)
    unpack_row(data + i * rows.stride[2], params + i * rows.param_stride[2],
               static_cast<int>(rows.kind), static_cast<int>(rows.group), shape.dim, out + i * shape.padded);
  return {reinterpret_cast<const uint8_t*>(out), shape.padded * 4, FLOAT32};
}

// Keys and values of one query head straight from their codes, where a faster way than a tile is known.
inline bool fused_keys(const Rows&, const uint8_t*, const uint8_t*, int64_t, const Shape&, const Queries&,
                       Buffer&, float*) {
  return false;
}
inline bool fused_values(const Rows&, const uint8_t*, const uint8_t*, int64_t, const Shape&,
                         const float*, Buffer&, float*) {
  return false;
}
