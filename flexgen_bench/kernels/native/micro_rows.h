// Rows of MXFP4 (kernels/microscaling.py) for few rows of x, see few_rows.h: 16 numbers of each group lie in registers, and codes
// choose among them.
#pragma once

#include "few_rows.h"

template <class A>
struct Microscaled;

template <class Type>
struct Microscaled<Singles<Type>> {
    const Matrix& w;

    static bool can(const Matrix& w) { return w.micro && MICRO_GROUP % (2 * L) == 0; }
    template <class F>
    __attribute__((always_inline)) void each(int64_t row, F f) const {
        const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * w.row;
        const uint8_t* exponents = exponents_of(w, row);
        const int64_t half = MICRO_GROUP / 2;
        for (int64_t k = 0; k < w.columns; k += MICRO_GROUP, codes += half) {
            const float scale = power_of(*exponents++);
            if (k % 128 == 0) soon(codes);
            constexpr int parts = 16 / L;
            Floats numbers[parts];
#pragma GCC unroll 4
            for (int i = 0; i < parts; ++i) numbers[i] = rounded_to<Type>(load<Floats>(E2M1 + i * L) * scale);
            const auto value = [&](Words c) {
#if defined(__AVX512F__)
                return (Floats)_mm512_permutexvar_epi32((__m512i)c, (__m512i)numbers[0]);
#elif defined(__AVX2__)
                const __m256 a = _mm256_permutevar8x32_ps((__m256)numbers[0], (__m256i)c);
                const __m256 b = _mm256_permutevar8x32_ps((__m256)numbers[1], (__m256i)c);
                return (Floats)_mm256_blendv_ps(a, b, (__m256)(c << 28));
#else
                Floats found;
                for (int i = 0; i < L; ++i) found[i] = numbers[(c[i] & 15) / L][(c[i] & 15) % L];
                return found;
#endif
            };
#pragma GCC unroll 4
            for (int64_t j = 0; j < half; j += L) {
                const Words both = words_of(load<Bytes>(codes + j));
                f(k + j, 0, value(both));
                f(k + j + half, 1, value(both >> 4));
            }
        }
    }
};

#if HAS_PAIRS
template <>
struct Microscaled<Pairs> {
    const Matrix& w;

    static bool can(const Matrix& w) { return w.micro; }
    template <class F>
    __attribute__((always_inline)) void each(int64_t row, F f) const {
        const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * w.row;
        const uint8_t* exponents = exponents_of(w, row);
        const int64_t groups = w.columns / MICRO_GROUP;
        const auto group = [&](int64_t g, int turn) __attribute__((always_inline)) {
            f(g * MICRO_GROUP, turn, Pairs::micro(codes + g * (MICRO_GROUP / 2), exponents[g]));
        };
        int64_t g = 0;
        for (; g + TURNS <= groups; g += TURNS) {
            soon(codes + g * (MICRO_GROUP / 2));
#pragma GCC unroll 4
            for (int i = 0; i < TURNS; ++i) group(g + i, i);
        }
        for (; g < groups; ++g) group(g, 0);
    }
};
#endif
