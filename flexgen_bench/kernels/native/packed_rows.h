// Quantized rows (layout: kernels/quantization.py) turned into floats, a tile at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "row_kernels.h"

// Code of value j in a group of m values, m a multiple of 8.
inline int code_at(const uint8_t* codes, int bits, int m, int j) {
  if (bits == 8) return codes[j];
  if (bits == 4) return j < m / 2 ? codes[j] & 15 : codes[j - m / 2] >> 4;
  const int e = m / 8, plane = j / e, byte = j % e;
  const uint8_t *p0 = codes, *p1 = codes + e, *p2 = codes + 2 * e;
  if (plane == 6) return p0[byte] >> 6 | (p1[byte] >> 4 & 4);
  if (plane == 7) return p2[byte] >> 6 | (p1[byte] >> 5 & 4);
  const uint8_t pair = codes[plane / 2 * e + byte];
  return (plane % 2 ? pair >> 3 : pair) & 7;
}

inline void unpack_row(const uint8_t* codes, const uint8_t* params, int bits, int group, int dim,
                       float* out) {
  for (int start = 0; start < dim; start += group, params += 4) {
    const int n = std::min(group, dim - start), m = (n + 7) / 8 * 8;
    const float scale = half_to_float(load<uint16_t>(params)), smallest = half_to_float(load<uint16_t>(params + 2));
    int j = 0;
    if (bits == 8)
      for (; j + L <= n; j += L)
        store(out + start + j, widened(load<Bytes>(codes + j)) * scale + smallest);
    if (bits == 4 && n == m && m / 2 % L == 0)
      for (; j < m / 2; j += L) {
        const Bytes pair = load<Bytes>(codes + j);
        store(out + start + j, widened(pair & 15) * scale + smallest);
        store(out + start + j + m / 2, widened(pair >> 4) * scale + smallest);
        if (j + L == m / 2) { j = n; break; }
      }
    for (; j < n; j++) out[start + j] = static_cast<float>(code_at(codes, bits, m, j)) * scale + smallest;
    codes += m / 8 * bits;
  }
}

// n rows from row t on as plain ones: themselves, or unpacked into ``tile``.
inline Plain unpacked(const Rows& rows, const uint8_t* data, const uint8_t* params, int64_t t,
                      int64_t n, const Shape& shape, std::vector<float>& tile) {
  data += t * rows.stride[2];
  if (!params) return {data, rows.stride[2], rows.kind};
  params += t * rows.param_stride[2];
  tile.resize(static_cast<size_t>(TILE) * shape.padded);
  for (int64_t i = 0; i < n; i++)
    unpack_row(data + i * rows.stride[2], params + i * rows.param_stride[2],
               static_cast<int>(rows.kind), static_cast<int>(rows.group), shape.dim,
               tile.data() + i * shape.padded);
  return {reinterpret_cast<const uint8_t*>(tile.data()), shape.padded * 4, FLOAT32};
}

// Keys and values of one query head straight from their codes, where a faster way than a tile is known.
inline bool fused_keys(const Rows&, const uint8_t*, const uint8_t*, int64_t, const Shape&,
                       const Queries&, std::vector<float>&, float*) {
  return false;
}
inline bool fused_values(const Rows&, const uint8_t*, const uint8_t*, int64_t, const Shape&,
                         const float*, std::vector<float>&, float*) {
  return false;
}
