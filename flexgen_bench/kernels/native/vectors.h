// Vectors of floats as wide as the processor's registers, and how rows of other types are read into them.
//
// GCC's and Clang's vector extensions: the same source becomes AVX-512, AVX2, NEON or plain code. Intrinsics only where the
// compilers do not find the instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
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

// Memory for floats that starts at a cache line: a vector that lies across two of them takes twice as long to load.
class Buffer {
 public:
  float* get() { return lines_.empty() ? nullptr : lines_[0].floats; }
  const float* get() const { return lines_.empty() ? nullptr : lines_[0].floats; }
  // At least this many floats; what was in them may be lost.
  float* get(int64_t floats) {
    const auto needed = static_cast<size_t>(floats + 15) / 16;
    if (lines_.size() < needed) lines_.resize(needed);
    return get();
  }

 private:
  struct alignas(64) Line {
    float floats[16];
  };
  std::vector<Line> lines_;
};

inline Floats all(float x) { return x - Floats{}; }

inline float half_to_float(uint16_t bits) { return static_cast<float>(load<_Float16>(&bits)); }

inline Words words_of(Bytes bytes) {
#if defined(__AVX512F__)  // GCC 12 takes convertvector of bytes apart
  return (Words)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load<int64_t>(&bytes)));
#else
  return __builtin_convertvector(bytes, Words);
#endif
}

inline Floats widened(Bytes bytes) {
  return __builtin_convertvector((Ints)words_of(bytes), Floats);
}

// Of halves first: additions one after the other would take as long as a product of some hundred values.
inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float part[L];
  store(part, x);
  for (int n = L / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) part[i] += part[i + n];
  return part[0];
#endif
}

inline int32_t sum(Ints x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)x);
#else
  int32_t total = 0;
  for (int i = 0; i < L; i++) total += x[i];
  return total;
#endif
}

inline int32_t largest(Ints x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t most = x[0];
  for (int i = 1; i < L; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

using Lanes = std::make_index_sequence<L>;

// Lanes 0, 2, 4 ... of a and then of b, plus OFFSET.
template <int OFFSET, size_t... I>
inline Floats every_second(Floats a, Floats b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(2 * I + OFFSET)...);
}

// Lanes of a and b in turn, from lane START on.
template <int START, size_t... I>
inline Floats in_turn(Floats a, Floats b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(I / 2 + START + I % 2 * L)...);
}

// Sums of L vectors, in order: two vectors become one as lanes are added in pairs, a's and b's in turn. Written as one expression
// because the vectors stay in registers only if no loop remains.
template <int I = 0, int N = 1>
inline Floats sums(const Floats* x) {
  if constexpr (N == L) {
    return x[I];
  } else {
    const Floats a = sums<I, 2 * N>(x), b = sums<I + N, 2 * N>(x);
    return in_turn<0>(a, b, Lanes{}) + in_turn<L / 2>(a, b, Lanes{});
  }
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
