// Dot products of queries with rows of keys, and weighted sums of rows of values, for a few query heads at a time.
#pragma once

#include <algorithm>

#include "row_types.h"

constexpr int MOST = L < 8 ? L : 8;  // query heads at a time
constexpr int TILE = 64;             // rows that several sweeps read; they stay in the first-level cache
constexpr int AHEAD = 4096;          // bytes between what is read and what is prefetched

// Has these bytes brought near, into the second-level cache: more of such reads than into the first can be under way.
inline void fetch(const uint8_t* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
}

// Keys or values (S, G, T, D): where they are, strides in bytes of sequence, head and token, the type of an element.
struct Rows {
  const uint8_t* data;
  int64_t stride[3];
  const uint8_t* params;
  int64_t param_stride[3];
  int64_t tokens;
  int64_t kind;   // 32: float32, 16: bfloat16, 15: float16, otherwise bits of a code
  int64_t group;  // values to a group of codes
};
constexpr int64_t FLOAT32 = 32, BFLOAT16 = 16, FLOAT16 = 15;
inline int64_t bits_of(int64_t kind) { return kind == FLOAT16 ? 16 : kind; }

struct Shape {
  int dim, queries, units, rest, padded;  // units: full ones; rest: elements after them; padded: elements in whole units
  Shape(int d, int r) : dim(d), queries(r), units(d / U), rest(d % U), padded((d + U - 1) / U * U) {}
};

// Rows of plain numbers.
struct Plain {
  const uint8_t* data;
  int64_t stride;
  int64_t kind;
};

// Queries (R, padded) in the order that a type of keys wants them in.
struct Queries {
  Buffer plain, split;

  void set(const float* q, const Shape& shape) {
    const int size = shape.queries * shape.padded;
    float *in_order = plain.get(size), *apart = split.get(size);
    std::fill(in_order, in_order + size, 0.0f);
    for (int r = 0; r < shape.queries; r++)
      std::copy(q + r * shape.dim, q + (r + 1) * shape.dim, in_order + r * shape.padded);
    for (int at = 0; at < size; at += U) {
      const Pair pair = ::split(in_order + at);
      store(apart + at, pair.a), store(apart + at + L, pair.b);
    }
  }
};

// acc[r * K + j] += q[r] * a unit of row j.
template <class E, int R, int K, bool PART>
inline void score_unit(Floats* acc, const uint8_t* const* row, int64_t offset, int part, const float* q,
                       int64_t padded) {
  const auto read = [&](int j) {
    const uint8_t* at = row[j] + offset * E::size;
    fetch(at + AHEAD, U * E::size);
    return PART ? E::pair(beginning<E::size>(at, part).bytes) : E::pair(at);
  };
#pragma GCC unroll 16
  for (int j = 0; j < K; j++) {
    const Pair key = read(j);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      acc[r * K + j] += key.a * load<Floats>(q + r * padded + offset);
      acc[r * K + j] += key.b * load<Floats>(q + r * padded + offset + L);
    }
  }
}

// q (R, padded), n rows -> out[r * ld + t]. Writes up to L - 1 floats too many, which the caller has room for.
template <class E, int R>
void score_rows(const uint8_t* data, int64_t stride, int64_t n, const Shape& shape, const float* q,
                float* out, int64_t ld) {
  constexpr int K = L / R;  // keys at a time: one vector of scores
  for (int64_t t = 0; t < n; t += K) {
    Floats acc[L] = {};
    const uint8_t* row[K];
    for (int j = 0; j < K; j++) row[j] = data + (t + j < n ? t + j : n - 1) * stride;
    int u = 0;
    for (; u < shape.units; u++)
      score_unit<E, R, K, false>(acc, row, u * U, 0, q, shape.padded);
    if (shape.rest) score_unit<E, R, K, true>(acc, row, u * U, shape.rest, q, shape.padded);
    const Floats found = sums(acc);
    if (R == 1) {
      store(out + t, found);
    } else {
      float each[L];
      store(each, found);
      for (int r = 0; r < R; r++) std::memcpy(out + r * ld + t, each + r * K, K * sizeof(float));
    }
  }
}

// acc (R, padded) += weights[r * ld + t] * row t, for C units of each row from unit u on. PART: one unit, not full.
template <class E, int R, int C, bool PART>
void add_columns(const uint8_t* data, int64_t stride, int64_t n, const Shape& shape, int u, const float* weights, int64_t ld, float* acc) {
  Pair sum[R][C];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < C; i++) {
      const float* from = acc + r * shape.padded + (u + i) * U;
      sum[r][i] = E::split ? split(from) : Pair{load<Floats>(from), load<Floats>(from + L)};
    }
  // Where rows are read in parts, a whole tile is done before the next one is needed, and then sooner than AHEAD would notice.
  const int64_t ahead = C == shape.units ? AHEAD : TILE * stride;
  const uint8_t* at = data + u * U * E::size;
  for (int64_t t = 0; t < n; t++, at += stride) {
#pragma GCC unroll 4
    for (int i = 0; i < C; i++) {
      const uint8_t* from = at + i * U * E::size;
      fetch(from + ahead, U * E::size);
      const Pair value = PART ? E::pair(beginning<E::size>(from, shape.rest).bytes) : E::pair(from);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const float weight = weights[r * ld + t];
        sum[r][i].a += value.a * weight;
        sum[r][i].b += value.b * weight;
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < C; i++) {
      float* to = acc + r * shape.padded + (u + i) * U;
      if (E::split) {
        join(sum[r][i], to);
      } else {
        store(to, sum[r][i].a), store(to + L, sum[r][i].b);
      }
    }
}

template <class E, int R>
void add_rows(const uint8_t* data, int64_t stride, int64_t n, const Shape& shape,
              const float* weights, int64_t ld, float* acc) {
  constexpr int C = R <= 2 ? 4 : R <= 4 ? 2 : 1;  // at most 16 vectors of sums, so that they stay in registers
  int u = 0;
  for (; u + C <= shape.units; u += C)
    add_columns<E, R, C, false>(data, stride, n, shape, u, weights, ld, acc);
  for (; u < shape.units; u++) add_columns<E, R, 1, false>(data, stride, n, shape, u, weights, ld, acc);
  if (shape.rest) add_columns<E, R, 1, true>(data, stride, n, shape, u, weights, ld, acc);
}

// f.template operator()<R>() for a number of query heads that is known only now.
template <int R = MOST, class F>
void with_queries(int queries, F f) {
  if (queries == R) return f.template operator()<R>();
  if constexpr (R > 1) with_queries<R - 1>(queries, f);
}

// Scores of queries r to r + many against n rows.
inline void score_tile(const Plain& rows, const Queries& queries, int r, int many, int64_t n,
                       const Shape& shape, float* out, int64_t ld) {
  const int64_t offset = r * shape.padded;
  with_queries(many, [&]<int R>() {
    const auto score = [&]<class E>(const Buffer& q) {
      score_rows<E, R>(rows.data, rows.stride, n, shape, q.get() + offset, out, ld);
    };
    if (rows.kind == FLOAT32) return score.template operator()<Float32>(queries.plain);
    if (rows.kind == FLOAT16) return score.template operator()<Float16>(queries.plain);
    score.template operator()<BFloat16>(queries.split);
  });
}

inline void add_tile(const Plain& rows, const float* weights, int64_t ld, int many, int64_t n,
                     const Shape& shape, float* acc) {
  with_queries(many, [&]<int R>() {
    const auto add = [&]<class E>() {
      add_rows<E, R>(rows.data, rows.stride, n, shape, weights, ld, acc);
    };
    if (rows.kind == FLOAT32) return add.template operator()<Float32>();
    if (rows.kind == FLOAT16) return add.template operator()<Float16>();
    add.template operator()<BFloat16>();
  });
}
