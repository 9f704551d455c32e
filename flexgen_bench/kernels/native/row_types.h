// How rows of each type are read: in units of 2 L elements, each as two vectors, in an order that is the type's own.
#pragma once

#include "vectors.h"

constexpr int U = 2 * L;  // elements of a unit

struct Pair {
  Floats a, b;
};

// The first n (up to U) elements of SIZE bytes, zeros after them: nothing behind them is read.
template <int SIZE>
struct Unit {
  uint8_t bytes[U * SIZE];
};

template <int SIZE>
inline Unit<SIZE> beginning(const uint8_t* from, int n) {
  Unit<SIZE> unit = {};
#if defined(__AVX512BW__)
  if constexpr (SIZE == 2) {
    store(&unit, _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), from));
    return unit;
  }
#endif
  std::memcpy(unit.bytes, from, static_cast<size_t>(n) * SIZE);
  return unit;
}

// Each type has: its size; where element i of a unit goes (even ones first, or all in order); a unit as floats; a unit of keys
// as it is multiplied with queries; that product, added to acc.

template <class E>
struct Products {
  using Key = Pair;
  static Key key(const uint8_t* from) { return E::pair(from); }
  static void multiply(Floats& acc, const Key& key, const float* query) {
    acc += key.a * load<Floats>(query);
    acc += key.b * load<Floats>(query + L);
  }
};

struct Float32 : Products<Float32> {
  static constexpr int size = 4;
  static constexpr bool split = false;
  static Pair pair(const uint8_t* from) { return {load<Floats>(from), load<Floats>(from + 4 * L)}; }
};

// Even and odd elements apart: the upper half of a word is a float as it stands, the lower half after a shift.
struct BFloat16 : Products<BFloat16> {
  static constexpr int size = 2;
  static constexpr bool split = true;
  static Pair pair(const uint8_t* from) {
    const Words words = load<Words>(from);
    return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
  }
};

struct Float16 : Products<Float16> {
  static constexpr int size = 2;
  static constexpr bool split = false;
  static Floats vector(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Floats found;
    for (int i = 0; i < L; i++) found[i] = half_to_float(load<uint16_t>(from + 2 * i));
    return found;
#endif
  }
  static Pair pair(const uint8_t* from) { return {vector(from), vector(from + 2 * L)}; }
};

#if defined(__AVX512BF16__)
// bfloat16 keys with queries that are bfloat16 too, U of them in the room of the first L floats: exact products, two at once.
struct BFloat16Dot {
  static constexpr int size = 2;
  using Key = Words;
  static Key key(const uint8_t* from) { return load<Words>(from); }
  static void multiply(Floats& acc, const Key& key, const float* query) {
    acc = (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)key, (__m512bh)load<Words>(query));
  }
};
#endif

// A row of U floats in the order of a type with split units, and back.
inline void split_unit(const float* from, float* to) {
  for (int i = 0; i < L; i++) to[i] = from[2 * i], to[L + i] = from[2 * i + 1];
}
inline void join_unit(const float* from, float* to) {
  for (int i = 0; i < L; i++) to[2 * i] = from[i], to[2 * i + 1] = from[L + i];
}
