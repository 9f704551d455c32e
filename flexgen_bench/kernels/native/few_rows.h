// Products for few rows of x, which wait for memory: every row of W goes through registers once, straight from how it is stored.
//
// Vectors hold neighbouring values of a row of W. Readers call f(k, turn, vector) for all of them; one that reaches beyond the row's
// end holds zeros there, and so does x. turn is 0 .. TURNS - 1 where the compiler knows it: sums of different turns are kept apart, since an
// addition takes longer than the next vector needs to arrive.
#pragma once

#include "words.h"

constexpr int TURNS = 4;
constexpr int DOT_ROWS = 8;         // rows of x up to which products are taken so
constexpr int64_t DOT_FILL = 64;    // values that rows of x are filled up to whole multiples of; and so much again, lest rows of 4096
                                    // bytes compete for the same lines
constexpr int64_t DOT_AHEAD = 2048;  // bytes between what is read and what is prefetched: the next rows follow

inline int64_t dot_words(int64_t K, int values) { return ((K + DOT_FILL - 1) / DOT_FILL + 1) * DOT_FILL / values; }

inline void soon(const void* from) { __builtin_prefetch(static_cast<const uint8_t*>(from) + DOT_AHEAD, 0, 0); }

// Any matrix, by way of a buffer.
template <class A>
struct Slowly {
    const Matrix& w;
    Buffer& room;

    // Values from ``first`` on, whole vectors of which some lie beyond the end.
    template <class F>
    __attribute__((always_inline)) void from(int64_t row, int64_t first, F f) const {
        constexpr int64_t width = L * A::VALUES;
        const int64_t step = w.bits ? std::max<int64_t>(1, 256 / w.group) * w.group : 256;
        typename A::Word* out = reinterpret_cast<typename A::Word*>(room.get(step + width + DOT_FILL));
        for (int64_t k = first; k < w.columns; k += step) {
            const int64_t count = std::min(step, w.columns - k), whole = (count + width - 1) / width * width;
            A::read(w, row, k, count, out);
            const int64_t words = (count + A::VALUES - 1) / A::VALUES;
            std::fill(out + words, out + whole / A::VALUES, typename A::Word{});
            for (int64_t j = 0; j < whole; j += width) f(k + j, 0, load<typename A::Vec>(out + j / A::VALUES));
        }
    }
    template <class F>
    __attribute__((always_inline)) void each(int64_t row, F f) const {
        from(row, 0, f);
    }
};

// Plain values.
template <class A>
struct Plainly {
    const Matrix& w;
    Buffer& room;

    static bool can(const Matrix& w) { return w.bits == 0; }
    static typename A::Vec vector(const typename A::T* from) {
        if constexpr (A::VALUES == 2) return load<typename A::Vec>(from);
        else return widened_from(from);
    }
    template <class F>
    __attribute__((always_inline)) void each(int64_t row, F f) const {
        constexpr int64_t width = L * A::VALUES;
        const auto* data = reinterpret_cast<const typename A::T*>(static_cast<const uint8_t*>(w.data) + row * w.row);
        int64_t k = 0;
        for (; k + 4 * width <= w.columns; k += 4 * width) {
            for (int64_t j = 0; j < 4 * width * static_cast<int64_t>(sizeof *data); j += 64)
                soon(reinterpret_cast<const uint8_t*>(data + k) + j);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) f(k + j * width, j, vector(data + k + j * width));
        }
        if (k < w.columns) Slowly<A>{w, room}.from(row, k, f);
    }
};

// Codes of 4 or 8 bits in groups of whole vectors.
template <class A, int BITS>
struct Coded;

template <class Type, int BITS>
struct Coded<Singles<Type>, BITS> {
    typedef Singles<Type> A;
    const Matrix& w;
    Buffer& room;

    static bool can(const Matrix& w) { return !w.micro && w.bits == BITS && w.group % (2 * L) == 0; }
    template <class F>
    __attribute__((always_inline)) void each(int64_t row, F f) const {
        const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * w.row;
        const _Float16* params = w.params + row * w.params_row;
        const int64_t groups = w.columns / w.group, m = w.group, bytes = m / 8 * BITS;
        for (int64_t g = 0; g < groups; ++g, codes += bytes) {
            for (int64_t j = 0; j < bytes; j += 64) soon(codes + j);
            const Floats scale = all(widen(params[2 * g])), smallest = all(widen(params[2 * g + 1]));
            const auto plain = [=](Words c) {
                return rounded_to<Type>(__builtin_convertvector((Ints)c, Floats) * scale + smallest);
            };
            if constexpr (BITS == 8) {
                for (int64_t j = 0; j < m; j += 2 * L) {
                    f(g * m + j, 0, plain(words_of(load<Bytes>(codes + j))));
                    f(g * m + j + L, 1, plain(words_of(load<Bytes>(codes + j + L))));
                }
            } else {
#if defined(__AVX512F__)
                const __m512i table = (__m512i)table_of<Type>((__m512)scale, (__m512)smallest);
                const auto value = [=](Words c) { return (Floats)_mm512_permutexvar_epi32((__m512i)c, table); };
#elif defined(__AVX2__)
                const Words eight = {0, 1, 2, 3, 4, 5, 6, 7};
                const __m256 low = (__m256)plain(eight), high = (__m256)plain(eight + 8);
                const auto value = [=](Words c) {  // the lowest 3 bits choose in a table, the fourth one chooses the table
                    const __m256 choice = (__m256)(c << 28);
                    const __m256 a = _mm256_permutevar8x32_ps(low, (__m256i)c), b = _mm256_permutevar8x32_ps(high, (__m256i)c);
                    return (Floats)_mm256_blendv_ps(a, b, choice);
                };
#else
                const auto value = [=](Words c) { return plain(c & 15u); };
#endif
                for (int64_t j = 0; j < m / 2; j += L) {
                    const Words both = words_of(load<Bytes>(codes + j));
                    f(g * m + j, 0, value(both));
                    f(g * m + j + m / 2, 1, value(both >> 4));
                }
            }
        }
        if (groups * m < w.columns) Slowly<A>{w, room}.from(row, groups * m, f);
    }
};

#if HAS_PAIRS
template <int BITS>
struct Coded<Pairs, BITS> {
    const Matrix& w;
    Buffer& room;

    static bool can(const Matrix& w) { return w.bits == BITS && Pairs::has_vectors(w); }
    template <class F>
    __attribute__((always_inline)) void each(int64_t row, F f) const {
        const uint8_t* codes = static_cast<const uint8_t*>(w.data) + row * w.row;
        const int64_t groups = w.columns / w.group, m = w.group, bytes = m / 8 * BITS;
        const _Float16* params = w.params + row * w.params_row;
        const int64_t plain = crossed_columns(w) / CROSSED_GROUP;
        if constexpr (BITS == 4)
            crossed(codes, params, 0, plain, [=](int64_t place, int turn, __m512i v) __attribute__((always_inline)) {
                if (turn == 0) soon(codes + place / 2);
                f(place, turn, v);
            });
        by_group(params, plain, groups, [=](int64_t g, const float* scale, const float* smallest) {
            const auto value = [=](int64_t j, int turn, __m512i v) __attribute__((always_inline)) { f(g * m + j, turn, v); };
            for (int64_t j = 0; j < bytes; j += 64) soon(codes + g * bytes + j);
            if constexpr (BITS == 4) Pairs::four(codes + g * bytes, m, scale, smallest, value);
            else Pairs::eight(codes + g * bytes, m, scale, smallest, value);
        });
        if (groups * m < w.columns) Slowly<Pairs>{w, room}.from(row, groups * m, f);
    }
};
#endif

// Rows start .. stop of W times M rows of x (dot_words words each): store(m, row, sum) for every product.
template <class A, int M, class Reader, class Store>
void dots(const Reader& reader, const typename A::Word* x, int64_t x_row, int64_t start, int64_t stop, Store store) {
    constexpr int turns = M == 1 ? TURNS : M <= 4 ? 2 : 1;
    for (int64_t n = start; n < stop; ++n) {
        Floats sums[M][turns] = {};
        reader.each(n, [&](int64_t k, int turn, typename A::Vec v) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                Floats& to = sums[m][turn % turns];
                to = A::add(to, load<typename A::Vec>(x + m * x_row + k / A::VALUES), v);
            }
        });
        for (int m = 0; m < M; ++m) {
            Floats whole = sums[m][0];
            for (int i = 1; i < turns; ++i) whole += sums[m][i];
            store(m, n, sum(whole));
        }
    }
}
