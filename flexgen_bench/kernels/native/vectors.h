// Vectors of floats as wide as the processor's registers, and how rows of other types are read into them.
//
// GCC's and Clang's vector extensions: the same source becomes AVX-512, AVX2, NEON or plain code. Intrinsics only where the
// compilers do not find the instruction.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int L = 16;  // lanes
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * L)));
typedef int32_t Ints __attribute__((vector_size(4 * L)));
typedef uint32_t Words __attribute__((vector_size(4 * L)));
typedef uint16_t Halves __attribute__((vector_size(2 * L)));
typedef uint8_t Bytes __attribute__((vector_size(L)));

template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
inline void store(void* to, const T& value) {
  std::memcpy(to, &value, sizeof(T));
}

inline Floats all(float x) { return x - Floats{}; }

inline float half_to_float(uint16_t bits) {
#if defined(__FLT16_MAX__)
  return static_cast<float>(load<_Float16>(&bits));
#else
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  const float scaled = load<float>(&(const uint32_t&)(rest << 13)) * 0x1p112f;  // exponent bias 127 - 15
  uint32_t word = load<uint32_t>(&scaled);
  if (rest >= 0x7c00u) word |= 0x7f800000u;
  word |= sign;
  return load<float>(&word);
#endif
}

inline Floats widened(Halves halves) { return (Floats)(__builtin_convertvector(halves, Words) << 16); }

// L bytes as floats.
inline Floats widened(Bytes bytes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
#endif
}

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < L; i++) total += x[i];
  return total;
}

// Two vectors to one: pairs of lanes added, a's and b's in turn.
inline Floats fold(Floats a, Floats b) {
#if defined(__AVX512F__)
  constexpr Ints low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const __m512 x = _mm512_permutex2var_ps((__m512)a, (__m512i)low, (__m512)b);
  const __m512 y = _mm512_permutex2var_ps((__m512)a, (__m512i)(low + 8), (__m512)b);
  return (Floats)(x + y);
#else
  Floats x, y;
  for (int i = 0; i < L / 2; i++) {
    x[2 * i] = a[i], x[2 * i + 1] = b[i];
    y[2 * i] = a[i + L / 2], y[2 * i + 1] = b[i + L / 2];
  }
  return x + y;
#endif
}

// Sums of L vectors, in order.
inline Floats sums(Floats* x) {
#pragma GCC unroll 8
  for (int n = L / 2; n >= 1; n /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) x[i] = fold(x[i], x[i + n]);
  return x[0];
}

// e^x for x <= 0 within 2 units in the last place; 0 below -87. Polynomial of degree 6 on [-ln2 / 2, ln2 / 2].
inline Floats exp_negative(Floats x) {
  const Floats round = all(12582912.0f);  // 1.5 * 2^23: adding it drops the fraction
  const Ints tiny = x < -87.0f;
  const Floats n = (x * 1.44269504088896f + round) - round;
  const Floats r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  Floats p = all(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Ints found = (Ints)(p * (Floats)power);
  return (Floats)(found & ~tiny);
}
