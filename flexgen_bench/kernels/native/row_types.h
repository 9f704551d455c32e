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

// Each type has: the bytes of an element; whether it takes even and odd elements of a unit apart, or all in order; how to read a unit.

struct Float32 {
  static constexpr int size = 4;
  static constexpr bool split = false;
  static Pair pair(const uint8_t* from) { return {load<Floats>(from), load<Floats>(from + 4 * L)}; }
};

// Even and odd elements apart: the upper half of a word is a float as it stands, the lower half after a shift.
struct BFloat16 {
  static constexpr int size = 2;
  static constexpr bool split = true;
  static Pair pair(const uint8_t* from) {
    const Words words = load<Words>(from);
    return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
  }
};

struct Float16 {
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

// U floats in order to even and odd ones apart, and back.
inline Pair split(const float* from) {
  const Floats a = load<Floats>(from), b = load<Floats>(from + L);
  return {every_second<0>(a, b, Lanes{}), every_second<1>(a, b, Lanes{})};
}
inline void join(const Pair& from, float* to) {
  store(to, in_turn<0>(from.a, from.b, Lanes{}));
  store(to + L, in_turn<L / 2>(from.a, from.b, Lanes{}));
}
