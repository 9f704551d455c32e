// Attention over quantized rows: tiles of them as floats for several query heads, straight from their codes for a single one.
#pragma once

#include <algorithm>

#include "codes.h"
#include "row_kernels.h"

inline float scale_of(const uint8_t* params) { return half_to_float(load<uint16_t>(params)); }
inline float smallest_of(const uint8_t* params) { return half_to_float(load<uint16_t>(params + 2)); }

// Rows that belong together: codes and parameters with their strides in bytes.
struct Packed {
  const uint8_t *data, *params;
  int64_t stride, param_stride;
  const uint8_t* row(int64_t t) const { return data + t * stride; }
  const uint8_t* row_params(int64_t t) const { return params + t * param_stride; }
};

// Full groups of n rows, in order; out is a matrix of shape.padded columns.
template <class C>
void unpack_groups(const Packed& rows, int64_t n, int groups, int64_t padded, float* out) {
  constexpr int M = C::vectors * L;
  for (int64_t t = 0; t < n; t++, out += padded)
    for (int g = 0; g < groups; g++) {
      Floats values[C::vectors];
      fetch(rows.row(t) + g * C::bytes + AHEAD, C::bytes);
      C::read(rows.row(t) + g * C::bytes, values);
      const uint8_t* params = rows.row_params(t) + 4 * g;
      const float scale = scale_of(params), smallest = smallest_of(params);
#pragma GCC unroll 8
      for (int i = 0; i < C::vectors; i++) store(out + g * M + i * L, values[i] * scale + smallest);
    }
}

// Values from ``start`` on, the beginning of a group, of n rows.
inline void unpack_slowly(const Packed& rows, int64_t n, int bits, int group, int start, int dim,
                          int64_t padded, float* out) {
  for (int64_t t = 0; t < n; t++, out += padded)
    for (int from = start; from < dim; from += group) {
      const int size = std::min(group, dim - from), m = (size + 7) / 8 * 8;
      const uint8_t *codes = rows.row(t) + from / 8 * bits, *params = rows.row_params(t) + from / group * 4;
      const float scale = scale_of(params), smallest = smallest_of(params);
      for (int j = 0; j < size; j++)
        out[from + j] = static_cast<float>(code_at(codes, bits, m, j)) * scale + smallest;
    }
}

// n rows from row t on as plain ones: themselves, or unpacked into ``tile``.
inline Plain unpacked(const Rows& rows, const uint8_t* data, const uint8_t* params, int64_t t,
                      int64_t n, const Shape& shape, Buffer& tile) {
  data += t * rows.stride[2];
  if (!params) return {data, rows.stride[2], rows.kind};
  const Packed part = {data, params + t * rows.param_stride[2], rows.stride[2], rows.param_stride[2]};
  float* out = tile.get(int64_t{TILE} * shape.padded);
  const int bits = static_cast<int>(rows.kind), group = static_cast<int>(rows.group);
  const int groups = shape.dim / group;
  const bool fast = with_codes(bits, group, [&]<class C>() {
    unpack_groups<C>(part, n, groups, shape.padded, out);
  });
  unpack_slowly(part, n, bits, group, fast ? groups * group : 0, shape.dim, shape.padded, out);
  return {reinterpret_cast<const uint8_t*>(out), shape.padded * 4, FLOAT32};
}

// Scores of one query: of each group scale * (codes . q) + smallest * (sum of q). L keys at a time.
template <class C>
void score_codes(const Packed& rows, int64_t n, int groups, const float* q, float* out) {
  constexpr int M = C::vectors * L;
  for (int64_t t = 0; t < n; t += L) {
    Floats acc[L];
    float offsets[L] = {};
    const auto key = [&](int j) { return t + j < n ? t + j : n - 1; };
    for (int g = 0; g < groups; g++) {
      Floats query[C::vectors], total{};
#pragma GCC unroll 8
      for (int i = 0; i < C::vectors; i++) query[i] = load<Floats>(q + g * M + i * L), total += query[i];
      const float whole = sum(total);
#pragma GCC unroll 16
      for (int j = 0; j < L; j++) {
        const uint8_t *codes = rows.row(key(j)) + g * C::bytes, *params = rows.row_params(key(j)) + 4 * g;
        fetch(codes + AHEAD, C::bytes);
        Floats values[C::vectors], product{};
        C::read(codes, values);
#pragma GCC unroll 8
        for (int i = 0; i < C::vectors; i++) product += values[i] * query[i];
        acc[j] = g ? acc[j] + product * scale_of(params) : product * scale_of(params);
        offsets[j] += smallest_of(params) * whole;
      }
    }
    store(out + t, sums(acc) + load<Floats>(offsets));
  }
}

// acc += weights times the values of the rows, for one query.
template <class C>
void add_codes(const Packed& rows, int64_t n, int groups, const float* weights, float* acc) {
  constexpr int M = C::vectors * L;
  for (int64_t start = 0; start < n; start += TILE)
    for (int g = 0; g < groups; g++) {
      Floats total[C::vectors] = {};
      float offset = 0;
      for (int64_t t = start; t < std::min(n, start + TILE); t++) {
        const uint8_t *codes = rows.row(t) + g * C::bytes, *params = rows.row_params(t) + 4 * g;
        fetch(codes + AHEAD, C::bytes);
        Floats values[C::vectors];
        C::read(codes, values);
        const float scale = scale_of(params) * weights[t];
        offset += smallest_of(params) * weights[t];
#pragma GCC unroll 8
        for (int i = 0; i < C::vectors; i++) total[i] += values[i] * scale;
      }
      for (int i = 0; i < C::vectors; i++) {
        float* to = acc + g * M + i * L;
        store(to, load<Floats>(to) + total[i] + offset);
      }
    }
}

// Whether one query's scores or sums were found straight from codes: full groups only, of a size that is known here.
template <class F>
inline bool from_codes(const Rows& rows, const Shape& shape, F f) {
  return rows.params && shape.queries == 1 && shape.dim % rows.group == 0 &&
         with_codes(rows.kind, rows.group, f);
}
