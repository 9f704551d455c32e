// Numbers of 16 and 32 bits as C++ has them, and back.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

struct bfloat {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(_Float16 x) { return static_cast<float>(x); }
inline float widen(bfloat x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN whatever its payload.
template <class T>
inline T narrow(float x) {
    return static_cast<T>(x);
}
template <>
inline bfloat narrow<bfloat>(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0 : rounded)};
}

template <class T>
inline void widen_all(const T* from, int64_t count, float* __restrict to) {
    for (int64_t j = 0; j < count; ++j) to[j] = widen(from[j]);
}
#if defined(__F16C__)
// Compilers do not vectorise this conversion by themselves.
template <>
inline void widen_all<_Float16>(const _Float16* from, int64_t count, float* __restrict to) {
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= count; j += 16)
        _mm512_storeu_ps(to + j, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + j))));
#endif
    for (; j + 8 <= count; j += 8)
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
    for (; j < count; ++j) to[j] = widen(from[j]);
}
#endif
