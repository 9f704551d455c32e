// Products of 4-bit codes with few rows of x in 8 bits (see code_products.h), where vectors hold neighbouring codes of a row of W.
#pragma once

#include "code_products.h"
#include "few_rows.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#define HAS_FEW_CODES 1
constexpr int64_t CODE_GROUP = 64;  // the only size of groups for this

// x in 8 bits, row by row: codes (rows, groups, 64), both numbers of each group (rows, groups up to a multiple of 16).
struct Rows8 {
    Signed* codes;
    float *scales, *sums;
    int64_t codes_row, numbers_row;
};
inline int64_t numbers_row(const Matrix& w) { return (groups_of(w) + 15) / 16 * 16; }

// The 64 codes of a group, and their products with codes of x summed in some lanes.
struct Group {
#if defined(__AVX512VNNI__)
    __m512i codes;
    explicit Group(const uint8_t* packed) {
        const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
        codes = _mm512_and_si512(_mm512_mask_srli_epi16(twice, 0xffff0000u, twice, 4), _mm512_set1_epi8(15));
    }
    Floats times(const Signed* x) const {
        return __builtin_convertvector((Ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, load<__m512i>(x)), Floats);
    }
#else
    typedef float Eight __attribute__((vector_size(32)));
    __m256i low, high;
    explicit Group(const uint8_t* packed) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
        low = _mm256_and_si256(both, _mm256_set1_epi8(15));
        high = _mm256_and_si256(_mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
    }
    Floats times(const Signed* x) const {
        const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, load<__m256i>(x)), _mm256_maddubs_epi16(high, load<__m256i>(x + 32)));
        const __m256 found = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#if defined(__AVX512F__)
        return (Floats)_mm512_zextps256_ps512(found);
#else
        return (Floats)found;
#endif
    }
#endif
};

template <class T>
void pack_rows8(const Matrix& w, const T* x, int64_t x_row, int64_t rows, const Rows8& to) {
    float room[CODE_GROUP];
    for (int64_t m = 0; m < rows; ++m) {
        std::fill(to.scales + m * to.numbers_row, to.scales + (m + 1) * to.numbers_row, 0.0f);
        std::fill(to.sums + m * to.numbers_row, to.sums + (m + 1) * to.numbers_row, 0.0f);
        for (int64_t g = 0; g < groups_of(w); ++g) {
            const int64_t count = std::min(CODE_GROUP, w.columns - g * CODE_GROUP);
            Signed codes[CODE_GROUP], *out = to.codes + m * to.codes_row + g * CODE_GROUP;
            const Eighths numbers = quantize_group(x + m * x_row + g * CODE_GROUP, count, CODE_GROUP, room, codes);
            std::copy(codes, codes + CODE_GROUP, out);
            to.scales[m * to.numbers_row + g] = numbers.scale;
            to.sums[m * to.numbers_row + g] = numbers.sum;
        }
    }
}

// Rows start .. stop of W times M rows of x: store(m, row, sum) for every product.
template <int M, class Store>
void dots_of_codes(const Matrix& w, const Rows8& x, int64_t start, int64_t stop, Store store) {
    constexpr int64_t bytes = CODE_GROUP / 2;
    const int64_t groups = groups_of(w), whole = w.columns / CODE_GROUP;
    for (int64_t n = start; n < stop; ++n) {
        const uint8_t* codes = static_cast<const uint8_t*>(w.data) + n * w.row;
        const _Float16* params = w.params + n * w.params_row;
        Floats sums[M] = {}, offsets[M] = {};
        for (int64_t first = 0; first < groups; first += 16) {
            const int64_t many = std::min<int64_t>(16, groups - first);
            alignas(64) float numbers[32], both[M][16];
            if (many < 16) std::fill(numbers, numbers + 32, 0.0f);
            widen_all(params + 2 * first, 2 * many, numbers);
#pragma GCC unroll 4
            for (int i = 0; i < 16; i += L) {
                const Floats a = load<Floats>(numbers + 2 * i), b = load<Floats>(numbers + 2 * i + L);
                const Floats scale = every_second<0>(a, b, Lanes{}), least = every_second<1>(a, b, Lanes{});
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const int64_t place = m * x.numbers_row + first + i;
                    ::store(both[m] + i, scale * load<Floats>(x.scales + place));
                    offsets[m] += least * load<Floats>(x.sums + place);
                }
            }
            for (int64_t i = 0; i < many; ++i) {
                const int64_t g = first + i;
                uint8_t last[bytes] = {};
                const uint8_t* from = codes + g * bytes;
                if (g == whole) {  // not full: its halves lie closer together
                    const int64_t half = filled(w.columns - g * CODE_GROUP) / 2;
                    for (int64_t j = 0; j < 2 * half; ++j) {
                        const int code = j < half ? from[j] & 15 : from[j - half] >> 4;
                        last[j % bytes] = static_cast<uint8_t>(last[j % bytes] | code << (j < bytes ? 0 : 4));
                    }
                    from = last;
                } else if (i % 2 == 0) {
                    soon(from);
                }
                const Group group(from);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m)
                    sums[m] += group.times(x.codes + m * x.codes_row + g * CODE_GROUP) * both[m][i];
            }
        }
        for (int m = 0; m < M; ++m) store(m, n, sum(sums[m] + offsets[m]));
    }
}
#else
#define HAS_FEW_CODES 0
#endif
