// Products of 4-bit codes with x in 8 bits, in whole numbers: faster, and another result than with x as it is.
//
// Every group of a row of x gets its own scale, largest magnitude / 127, and codes -127 .. 127, rounded to nearest, ties to even (all 0
// where the largest is at most 1e-30). A group adds
//   scale of x * (scale of W * sum(code of W * code of x) + smallest of W * sum(code of x)),
// whose sums of codes are exact whatever instructions find them; groups are added in float32.
#pragma once

#include <cmath>

#include "many_rows.h"

typedef int8_t Signed;

// Vectors side by side in a panel: what a chunk of it and of W's tile take stays in the first-level cache.
constexpr int CODE_PANEL = 2;
constexpr int64_t CODE_CHUNK = 1024;  // codes of CODE_SUMS rows of W that are unpacked at a time

// Words of 4 codes: of W without sign, the same for all lanes, of x with sign, a row in each lane.
#if defined(__AVX512VNNI__)
struct Fours {
    typedef Ints Part;
    static constexpr int MOST = 1 << 16;  // words that a part can take
    static Part add(Part part, uint32_t w, const uint32_t* x) {
        return (Part)_mm512_dpbusd_epi32((__m512i)part, _mm512_set1_epi32(static_cast<int>(w)), load<__m512i>(x));
    }
    static Ints whole(Part part) { return part; }
};
#elif defined(__AVX512BW__)
struct Fours {
    typedef __m512i Part;  // of pairs, in 16 bits: up to 2 * 15 * 127 each
    static constexpr int MOST = 8;
    static Part add(Part part, uint32_t w, const uint32_t* x) {
        return _mm512_add_epi16(part, _mm512_maddubs_epi16(_mm512_set1_epi32(static_cast<int>(w)), load<__m512i>(x)));
    }
    static Ints whole(Part part) { return (Ints)_mm512_madd_epi16(part, _mm512_set1_epi16(1)); }
};
#elif defined(__AVX2__)
struct Fours {
    typedef __m256i Part;
    static constexpr int MOST = 8;
    static Part add(Part part, uint32_t w, const uint32_t* x) {
        return _mm256_add_epi16(part, _mm256_maddubs_epi16(_mm256_set1_epi32(static_cast<int>(w)), load<__m256i>(x)));
    }
    static Ints whole(Part part) { return (Ints)_mm256_madd_epi16(part, _mm256_set1_epi16(1)); }
};
#else
struct Fours {
    typedef Ints Part;
    static constexpr int MOST = 1 << 16;
    static Part add(Part part, uint32_t w, const uint32_t* x) {
        const auto* codes = reinterpret_cast<const Signed*>(x);
        for (int i = 0; i < L; ++i)
            for (int j = 0; j < 4; ++j) part[i] += static_cast<int>(w >> 8 * j & 255) * codes[4 * i + j];
        return part;
    }
    static Ints whole(Part part) { return part; }
};
#endif

// A group of x in 8 bits: count values, then zeros up to ``filled`` of them. room: for whole_lanes(filled) floats. Returns {scale, scale * sum of codes}, not numbers where
// a value of x is not finite.
struct Eighths {
    float scale, sum;
};
template <class T>
Eighths quantize_group(const T* x, int64_t count, int64_t filled, float* room, Signed* codes) {
    widen_all(x, count, room);
    // As whole numbers, since magnitudes are ordered as their bits are, and what is not finite comes last.
    Ints most{};
    std::fill(room + count, room + whole_lanes(count), 0.0f);
    for (int64_t j = 0; j < count; j += L) {
        const Ints size = (Ints)load<Floats>(room + j) & 0x7fffffff;
        most = size > most ? size : most;
    }
    const int32_t bits = ::largest(most);
    const float largest = bits < 0x7f800000 ? std::bit_cast<float>(bits) : NAN;
    const float scale = largest / 127, turns = largest > 1e-30f ? 127 / largest : 0;
    for (int64_t j = 0; j < count; ++j) room[j] *= turns;
    asm volatile("" : : "r"(room) : "memory");  // one instruction for this and the addition would round halves in another way
    Ints sums{};
    for (int64_t j = 0; j < count; j += L) {
        // 1.5 * 2^23 and the number: its lowest bits are the nearest whole one.
        const Ints found = (Ints)(load<Floats>(room + j) + 12582912.0f) - 0x4b400000;
        sums += found;
        store(room + j, found);
    }
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + L <= count; j += L) store(codes + j, _mm512_cvtepi32_epi8(load<__m512i>(room + j)));
#endif
    for (; j < count; ++j) codes[j] = static_cast<Signed>(load<int32_t>(room + j));
    std::fill(codes + count, codes + filled, Signed{0});
    return {scale, scale * static_cast<float>(sum(sums))};
}

// x in 8 bits, packed for many rows: panels as in many_rows.h; of words of codes, and of both numbers of each group.
struct Panels {
    uint32_t* codes;
    float *scales, *sums;
};
inline int64_t panel_words(const Matrix& w) { return (w.columns + w.group - 1) / w.group * (w.group / 4); }
inline int64_t groups_of(const Matrix& w) { return (w.columns + w.group - 1) / w.group; }

template <class T>
void pack_codes(const Matrix& w, const T* x, int64_t x_row, int64_t rows, const Panels& to, int64_t start, int64_t stop) {
    static thread_local Buffer buffer;
    const int64_t group = w.group, words = group / 4, padded = whole_lanes(rows);
    float* const room = buffer.get(whole_lanes(group) + words);
    uint32_t* const found = reinterpret_cast<uint32_t*>(room + whole_lanes(group));
    for (int64_t g = start; g < stop; ++g)
        for (int64_t m = 0; m < padded; ++m) {
            const int64_t first = m / (CODE_PANEL * L) * (CODE_PANEL * L), width = std::min<int64_t>(CODE_PANEL * L, padded - first);
            const int64_t count = m < rows ? std::min(group, w.columns - g * group) : 0;
            const Eighths numbers = quantize_group(x + m * x_row + g * group, count, group, room, reinterpret_cast<Signed*>(found));
            const int64_t place = (first * groups_of(w)) + g * width + m - first;
            to.scales[place] = count ? numbers.scale : 0.0f;
            to.sums[place] = count ? numbers.sum : 0.0f;
            uint32_t* out = to.codes + first * panel_words(w) + g * words * width + m - first;
            for (int64_t k = 0; k < words; ++k) out[k * width] = found[k];
        }
}

// 4-bit codes of a group, half of their number in bytes, one to a byte.
inline void unpack_codes(const uint8_t* from, int64_t half, uint8_t* to) {
    typedef uint8_t Some __attribute__((vector_size(32)));
    int64_t j = 0;
    for (; j + 32 <= half; j += 32) {
        const Some both = load<Some>(from + j);
        store(to + j, both & 15), store(to + j + half, both >> 4);
    }
    for (; j < half; ++j) to[j] = from[j] & 15, to[j + half] = from[j] >> 4;
}

// Groups of a row of W from the first on that its columns (from there on) leave, each filled up with zeros.
inline void unpack_groups(const uint8_t* from, int64_t group, int64_t columns, int64_t groups, uint8_t* to) {
    for (int64_t i = 0; i < groups; ++i, from += group / 2, to += group, columns -= group) {
        if (columns >= group && group == 64) {
            unpack_codes(from, 32, to);  // a size that the compiler knows
        } else {
            const int64_t m = columns < group ? filled(columns) : group;
            unpack_codes(from, m / 2, to);
            std::fill(to + m, to + group, uint8_t{0});
        }
    }
}

// Sums that stay in registers, beside as many of codes.
constexpr int CODE_SUMS = 12;

// sums (R, P vectors) += groups of W (R, words for each) times the same of a panel, R = CODE_SUMS / P. numbers: scale and smallest
// value of each group of W.
template <int P>
void outer_codes(const uint32_t* w, int64_t stride, const float* numbers, int64_t numbers_stride, const uint32_t* x, const float* x_scales,
                 const float* x_sums, int64_t groups, int64_t words, float* sums, int64_t sums_row, Later later) {
    constexpr int R = CODE_SUMS / P;
    Floats found[R][P];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) found[r][p] = load<Floats>(sums + r * sums_row + p * L);
    for (int64_t g = 0; g < groups; ++g, w += words, x += words * P * L, numbers += 2, x_scales += P * L, x_sums += P * L) {
        for (int64_t first = 0; first < words; first += Fours::MOST) {
            const int64_t stop = std::min<int64_t>(words, first + Fours::MOST);
            typename Fours::Part c[R][P] = {};
            for (int64_t k = first; k < stop; ++k) {
                later.one();
#pragma GCC unroll 32
                for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                    for (int p = 0; p < P; ++p) c[r][p] = Fours::add(c[r][p], w[r * stride + k], x + (k * P + p) * L);
            }
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) {
                const Floats scale = load<Floats>(x_scales + p * L);
#pragma GCC unroll 32
                for (int r = 0; r < R; ++r)
                    found[r][p] += __builtin_convertvector(Fours::whole(c[r][p]), Floats) * (scale * numbers[r * numbers_stride]);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
            const Floats sum = load<Floats>(x_sums + p * L);
#pragma GCC unroll 32
            for (int r = 0; r < R; ++r) found[r][p] += sum * numbers[r * numbers_stride + 1];
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store(sums + r * sums_row + p * L, found[r][p]);
}

// As ``outers`` of many_rows.h, for x in 8 bits.
template <class Finish>
void outers_of_codes(const Matrix& w, const Panels& x, int64_t rows, int64_t tile, int64_t stop, Finish finish) {
    static thread_local Buffer buffer, read, held;
    const int64_t group = w.group, words = group / 4, groups = groups_of(w), some = std::max<int64_t>(1, CODE_CHUNK / group);
    const int64_t padded = whole_lanes(rows), count = stop - tile, bytes = group / 8 * 4, stride = some * words + 16;
    uint32_t* const codes = reinterpret_cast<uint32_t*>(buffer.get(CODE_SUMS * stride));
    float* const numbers = read.get(CODE_SUMS * 2 * some);
    float* const sums = held.get(TILE_ROWS * padded);
    std::fill(sums, sums + TILE_ROWS * padded, 0.0f);
    for (int64_t g = 0; g < groups; g += some) {
        const int64_t many = std::min(some, groups - g);
        for (int64_t block = 0; block < count; block += CODE_SUMS) {
            const int64_t deep = std::min<int64_t>(CODE_SUMS, count - block);
            for (int64_t r = 0; r < deep; ++r) {
                const int64_t row = tile + block + r;
                const uint8_t* from = static_cast<const uint8_t*>(w.data) + row * w.row + g * bytes;
                unpack_groups(from, group, w.columns - g * group, many, reinterpret_cast<uint8_t*>(codes + r * stride));
                widen_all(w.params + row * w.params_row + 2 * g, 2 * many, numbers + r * 2 * some);
            }
            const uint8_t* next = next_piece(w, tile, count, block + CODE_SUMS, g * group, some * group);
            for (int64_t m = 0; m < padded; m += CODE_PANEL * L) {
                const int64_t vectors = std::min<int64_t>(CODE_PANEL, (padded - m) / L);
                const auto panel = [&]<int P>() {
                    constexpr int64_t R = CODE_SUMS / P;
                    const int64_t place = m * groups + g * P * L;
                    const uint32_t* x_codes = x.codes + m * panel_words(w) + g * words * P * L;
                    for (int64_t r = 0; r < deep; r += R)
                        outer_codes<P>(codes + r * stride, stride, numbers + r * 2 * some, 2 * some, x_codes, x.scales + place, x.sums + place,
                                       many, words, sums + (block + r) * padded + m, padded,
                                       {next + r * w.row, w.row, m ? 0 : R, (some * bytes + 63) / 64});
                };
                by_vectors<CODE_PANEL>(vectors, panel);
            }
        }
    }
    finish(sums, padded, count);
}
