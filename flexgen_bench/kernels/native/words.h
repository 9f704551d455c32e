// How numbers are multiplied: float32 each for itself, or two bfloat16 ones at a time where the processor has an instruction for that.
//
// A word is 4 bytes of neighbouring values along K: one float32, or two bfloat16. Products of bfloat16 numbers are exact in
// float32 and so are summed in it either way; only the order of sums differs.
#pragma once

#include <algorithm>
#include <type_traits>

#include "crossed.h"

#if defined(__AVX512F__)
constexpr int SUMS = 24;  // of 32 registers, 24 hold sums
#elif defined(__AVX2__)
constexpr int SUMS = 12;  // of 16
#else
constexpr int SUMS = 24;  // of 32
#endif

template <class T>
inline Floats rounded_to(Floats x) {
    if constexpr (std::is_same_v<T, bfloat>) {
        Words bits = (Words)x;
        bits += 0x7fff + (bits >> 16 & 1);
        return (Floats)(bits & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, _Float16>) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < L; ++i) x[i] = static_cast<float>(static_cast<_Float16>(x[i]));
        return x;
#endif
    } else {
        return x;
    }
}

template <class T>
inline Floats widened_from(const T* from) {
    if constexpr (std::is_same_v<T, bfloat>) {
#if defined(__AVX512F__)
        return (Floats)(((Words)_mm512_cvtepu16_epi32(load<__m256i>(from))) << 16);
#elif defined(__AVX2__)
        return (Floats)(((Words)_mm256_cvtepu16_epi32(load<__m128i>(from))) << 16);
#else
        return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
    } else if constexpr (std::is_same_v<T, _Float16>) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else
        Floats found;
        for (int i = 0; i < L; ++i) found[i] = static_cast<float>(from[i]);
        return found;
#endif
    } else {
        return load<Floats>(from);
    }
}

// T: the type of x, W and y.
template <class Type>
struct Singles {
    typedef Type T;
    typedef float Word;
    typedef Floats Vec;  // of words
    static constexpr int VALUES = 1;
    static Vec wide(Word w) { return all(w); }
    static Floats add(Floats sum, Vec x, Vec w) { return sum + x * w; }
    // Words of values start .. stop of a row of K values of x, ``step`` words apart in ``to``. crossed: so many of them are in the
    // order of crossed.h.
    static void pack(const T* x, int64_t start, int64_t stop, int64_t, int64_t, Word* to, int64_t step) {
        for (int64_t k = start; k < stop; ++k) to[k * step] = widen(x[k]);
    }
    __attribute__((noinline)) static void read(const Matrix& w, int64_t row, int64_t first, int64_t count, Word* out) {
        read_row<T>(w, row, first, count, out);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PAIRS 1

inline __m512i pairs_of(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

// The values of codes 0 .. 15 in bfloat16, twice.
inline __m512i pairs_table(const float* scale, const float* smallest) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 values = _mm512_fmadd_ps(codes, _mm512_set1_ps(*scale), _mm512_set1_ps(*smallest));
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
}

// Calls f(group, scale, smallest) for groups first .. stop of a row; the numbers lie in memory, from where they are broadcast at no cost.
template <class F>
__attribute__((always_inline)) inline void by_group(const _Float16* params, int64_t first, int64_t stop, F f) {
    for (int64_t g = first; g < stop; g += 8) {
        const int64_t many = stop - g < 8 ? stop - g : 8;
        const __mmask16 some = static_cast<__mmask16>((1u << 2 * many) - 1);
        alignas(64) float numbers[16];
        _mm512_store_ps(numbers, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, params + 2 * g)));
        for (int64_t i = 0; i < many; ++i) f(g + i, numbers + 2 * i, numbers + 2 * i + 1);
    }
}

struct Pairs {
    typedef bfloat T;
    typedef uint32_t Word;
    typedef __m512i Vec;
    static constexpr int VALUES = 2;
    static Vec wide(Word w) { return _mm512_set1_epi32(static_cast<int>(w)); }
    static Floats add(Floats sum, Vec x, Vec w) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
    }
    // As Singles::pack; start is a multiple of 32, and stop too unless it is K.
    static void pack(const T* x, int64_t start, int64_t stop, int64_t K, int64_t crossed, Word* to, int64_t step) {
        int64_t k = start;
        for (; k < std::min(stop, crossed); k += 32) {
            Word* even = to + crossed_place(k) / 2 * step;
            Word* odd = even + CROSSED_ODD / 2 * step;
            for (int64_t i = 0; i < 8; ++i, even += step, odd += step) {
                const uint64_t four = load<uint64_t>(x + k + 4 * i);
                *even = static_cast<Word>((four & 0xffff) | (four >> 16 & 0xffff0000));
                *odd = static_cast<Word>((four >> 16 & 0xffff) | (four >> 32 & 0xffff0000));
            }
        }
        for (; k < stop; k += 2) to[k / 2 * step] = x[k].bits | (k + 1 < K ? static_cast<uint32_t>(x[k + 1].bits) << 16 : 0);
    }

    // Whether groups are read as whole vectors; others go through float32.
    static bool has_vectors(const Matrix& w) { return !w.micro && (w.bits == 4 || w.bits == 8) && w.group % 64 == 0; }

    // Calls f(value of the group, 0 or 1 in turn, vector from there on) for each 32 values of a full group.
    template <class F>
    static __attribute__((always_inline)) void four(const uint8_t* codes, int64_t m, const float* scale,
                                                    const float* smallest, F f) {
        const __m512i table = pairs_table(scale, smallest);
        for (int64_t j = 0; j < m / 2; j += 32) {
            // What lies beyond the lowest 4 bits chooses between equal halves of the table, or nothing.
            const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j)));
            f(j, 0, _mm512_permutexvar_epi16(bytes, table));
            f(j + m / 2, 1, _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
        }
    }
    template <class F>
    static __attribute__((always_inline)) void eight(const uint8_t* codes, int64_t m, const float* scale,
                                                     const float* smallest, F f) {
        const __m512 step = _mm512_set1_ps(*scale), least = _mm512_set1_ps(*smallest);
        const auto values = [=](int64_t j) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j));
            return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), step, least);
        };
        for (int64_t j = 0; j < m; j += 64) {
            f(j, 0, pairs_of(values(j), values(j + 16)));
            f(j + 32, 1, pairs_of(values(j + 32), values(j + 48)));
        }
    }

    // A group of MXFP4, in order.
    static __attribute__((always_inline)) __m512i micro(const uint8_t* codes, uint8_t exponent) {
        const __m512 values = _mm512_mul_ps(_mm512_load_ps(E2M1), _mm512_set1_ps(power_of(exponent)));
        const __m512i table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(values));
        const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_srli_epi16(low, 4), 1);
        return _mm512_permutexvar_epi16(both, table);  // the lowest 4 bits of each choose: above them lie equal halves
    }

    __attribute__((noinline)) static void read(const Matrix& w, int64_t row, int64_t first, int64_t count, Word* to) {
        uint16_t* out = reinterpret_cast<uint16_t*>(to);
        const uint8_t* data = static_cast<const uint8_t*>(w.data) + row * w.row;
        int64_t done = 0;
        if (w.bits == 0) {
            std::memcpy(out, data + 2 * first, 2 * static_cast<size_t>(count));
            done = count;
        } else if (w.micro) {
            for (; done < count; done += MICRO_GROUP)
                _mm512_storeu_si512(out + done, micro(data + (first + done) / 2, exponents_of(w, row)[(first + done) / MICRO_GROUP]));
        } else if (has_vectors(w)) {
            const _Float16* params = w.params + row * w.params_row;
            if (const int64_t stop = std::min(crossed_columns(w), first + count); stop > first) {
                const auto put = [=](int64_t place, int, __m512i v) { _mm512_storeu_si512(out + place - first, v); };
                crossed(data, params, first / CROSSED_GROUP, stop / CROSSED_GROUP, put);
                done = stop - first;
            }
            if (const int64_t full = (count - done) / w.group) {
                const int64_t bytes = w.group / 8 * w.bits, start = (first + done) / w.group;
                by_group(params, start, start + full, [=](int64_t g, const float* scale, const float* smallest) {
                    uint16_t* into = out + g * w.group - first;
                    const auto put = [=](int64_t j, int, __m512i v) { _mm512_storeu_si512(into + j, v); };
                    if (w.bits == 4) four(data + g * bytes, w.group, scale, smallest, put);
                    else eight(data + g * bytes, w.group, scale, smallest, put);
                });
                done += full * w.group;
            }
        }
        const int64_t step = w.bits ? w.group : 256;
        static thread_local Buffer buffer;
        float* room = done < count ? buffer.get(step) : nullptr;
        for (; done < count; done += step) {
            const int64_t part = count - done < step ? count - done : step;
            read_row<bfloat>(w, row, first + done, part, room);
            for (int64_t j = 0; j < part; ++j)  // exact: they are bfloat16 numbers already
                out[done + j] = static_cast<uint16_t>(std::bit_cast<uint32_t>(room[j]) >> 16);
        }
        if (count % 2) out[count] = 0;
    }
};
#else
#define HAS_PAIRS 0
#endif
