// Codes of quantized rows as floats (layout: kernels/quantization.py).
#pragma once

#include "vectors.h"

// L numbers of four bits, in the lower ends of words whose other bits do not matter.
inline Floats nibbles(Words words) {
#if defined(__AVX512F__)
  constexpr Floats table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (Floats)_mm512_permutexvar_ps((__m512i)words, (__m512)table);
#else
  return __builtin_convertvector((Ints)(words & 15u), Floats);
#endif
}

// The 8 values of each byte place of three planes of 3-bit codes, W bytes at a time.
template <class W>
inline void planes(const uint8_t* codes, int plane_bytes, W* values) {
  const auto every = [](int byte) { return static_cast<W>(static_cast<W>(~W{0}) / 255 * byte); };
  const W p0 = load<W>(codes), p1 = load<W>(codes + plane_bytes), p2 = load<W>(codes + 2 * plane_bytes);
  const W low = every(7), high = every(4), two = every(3);
  values[0] = p0 & low, values[1] = p0 >> 3 & low;
  values[2] = p1 & low, values[3] = p1 >> 3 & low;
  values[4] = p2 & low, values[5] = p2 >> 3 & low;
  values[6] = (p0 >> 6 & two) | (p1 >> 4 & high);
  values[7] = (p2 >> 6 & two) | (p1 >> 5 & high);
}

// A full group of M codes as M / L vectors, in order.
template <int BITS, int M>
struct Codes {
  static constexpr int vectors = M / L;
  static constexpr int bytes = M / 8 * BITS;
  static constexpr bool exists =
      BITS == 8 ? M % L == 0 : BITS == 4 ? M / 2 % L == 0 : M == 64 && L == 16;

  static void read(const uint8_t* codes, Floats* values) {
    if constexpr (BITS == 8) {
#pragma GCC unroll 8
      for (int i = 0; i < vectors; i++) values[i] = widened(load<Bytes>(codes + i * L));
    } else if constexpr (BITS == 4) {
#pragma GCC unroll 8
      for (int i = 0; i < vectors / 2; i++) {
        const Words pair = words_of(load<Bytes>(codes + i * L));
        values[i] = nibbles(pair), values[i + vectors / 2] = nibbles(pair >> 4);
      }
    } else {
      uint64_t found[8];
      planes(codes, 8, found);
#pragma GCC unroll 8
      for (int i = 0; i < 4; i++) {
        typedef uint64_t Two __attribute__((vector_size(16)));
        const Two two = {found[2 * i], found[2 * i + 1]};
        values[i] = widened(load<Bytes>(&two));
      }
    }
  }
};

// f.template operator()<Codes>() if full groups of this kind can be read so; whether it was called.
template <class F>
inline bool with_codes(int64_t bits, int64_t group, F f) {
  const auto sizes = [&]<int BITS>() {
    const auto size = [&]<int M>() {
      if constexpr (Codes<BITS, M>::exists)
        if (group == M) return f.template operator()<Codes<BITS, M>>(), true;
      return false;
    };
    return size.template operator()<32>() || size.template operator()<64>() ||
           size.template operator()<128>();
  };
  if (bits == 8) return sizes.template operator()<8>();
  if (bits == 4) return sizes.template operator()<4>();
  return sizes.template operator()<3>();
}

// Code j of a group of m values, m a multiple of 8.
inline int code_at(const uint8_t* codes, int bits, int m, int j) {
  if (bits == 8) return codes[j];
  if (bits == 4) return j < m / 2 ? codes[j] & 15 : codes[j - m / 2] >> 4;
  uint8_t values[8];
  planes(codes + j % (m / 8), m / 8, values);
  return values[j / (m / 8)];
}
