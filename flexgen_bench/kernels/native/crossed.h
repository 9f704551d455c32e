// 4-bit codes of two groups of 64 at a time as vectors of bfloat16 values, for processors that multiply those in pairs.
//
// A word of 16 bits holds four codes, so 32 words, shifted by 0, 4, 8 and 12 bits, choose four vectors of values out of a table of both
// groups: bytes need not be spread first. Values come in another order then, and x is packed in the same one.
#pragma once

#include "vectors.h"
#include "numbers.h"

constexpr int64_t CROSSED_GROUP = 64, CROSSED = 2 * CROSSED_GROUP;  // values

// How many values at the beginning of each row are read so.
inline int64_t crossed_columns(const Matrix& w) {
    return w.bits == 4 && !w.micro && w.group == CROSSED_GROUP ? w.columns / CROSSED * CROSSED : 0;
}

// Where 32 values of x from ``k`` on, a multiple of 32, belong: pairs of values 0 and 2, 4 and 6 .. follow each other from here on, and pairs of
// values 1 and 3, 5 and 7 .. from CROSSED_ODD values further on.
constexpr int64_t CROSSED_ODD = 64;
inline int64_t crossed_place(int64_t k) {
    return k / CROSSED * CROSSED + k % CROSSED / CROSSED_GROUP * 16 + k % CROSSED_GROUP / 32 * 32;
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// Calls f(place, turn, vector) for four vectors of each two of the groups first .. stop, an even number of them, of a row.
template <class F>
__attribute__((always_inline)) inline void crossed(const uint8_t* codes, const _Float16* params, int64_t first, int64_t stop, F f) {
    const __m512 each = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_set1_epi16(15), second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const auto two = [=](int64_t g, const float* numbers) __attribute__((always_inline)) {
        const __m512 a = _mm512_fmadd_ps(each, _mm512_set1_ps(numbers[0]), _mm512_set1_ps(numbers[1]));
        const __m512 b = _mm512_fmadd_ps(each, _mm512_set1_ps(numbers[2]), _mm512_set1_ps(numbers[3]));
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(b, a), words = _mm512_loadu_si512(codes + g * (CROSSED_GROUP / 2));
        const auto values = [=](__m512i chosen) __attribute__((always_inline)) {  // (chosen & low) | second
            return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(chosen, low, second, 0xea), table);
        };
        f(g * CROSSED_GROUP, 0, values(words));
        f(g * CROSSED_GROUP + 32, 1, values(_mm512_srli_epi16(words, 4)));
        f(g * CROSSED_GROUP + 64, 2, values(_mm512_srli_epi16(words, 8)));
        f(g * CROSSED_GROUP + 96, 3, values(_mm512_srli_epi16(words, 12)));
    };
    alignas(32) float numbers[8];
    int64_t g = first;
    for (; g + 4 <= stop; g += 4) {
        _mm256_store_ps(numbers, _mm256_cvtph_ps(load<__m128i>(params + 2 * g)));
        two(g, numbers), two(g + 2, numbers + 4);
    }
    if (g < stop) {
        _mm_store_ps(numbers, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(params + 2 * g))));
        two(g, numbers);
    }
}
#endif
