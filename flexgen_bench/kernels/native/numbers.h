// Rows of a matrix as float32, whether they are stored plainly or quantized.
#pragma once

#include "scalars.h"

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A matrix of rows in memory; the layout of quantized ones is described in kernels/quantization.py.
struct Matrix {
    const void* data;       // values, or codes
    const _Float16* params; // scale and smallest value of each group; null for plain values
    int64_t row;            // bytes from one row of data to the next
    int64_t params_row;     // float16 numbers (bytes of MXFP4) from one row of params to the next
    int64_t columns;        // values in a row
    int32_t type;           // of plain values; what dequantized ones are rounded to
    int32_t bits;           // of a code; 0 for plain values
    int32_t group;          // values per group, a multiple of 8
    int32_t micro;          // MXFP4 (kernels/microscaling.py): codes of numbers E2M1, and params are a byte for each group, an exponent
};

constexpr int64_t MICRO_GROUP = 32;
alignas(64) constexpr float E2M1[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};

// Of a group of MXFP4: 2^(byte - 127), of which 2^-127 is no normal number.
inline float power_of(uint8_t exponent) { return std::bit_cast<float>(exponent ? static_cast<uint32_t>(exponent) << 23 : 0x400000u); }

inline const uint8_t* exponents_of(const Matrix& w, int64_t row) {
    return reinterpret_cast<const uint8_t*>(w.params) + row * w.params_row;
}

inline int64_t filled(int64_t values) { return (values + 7) / 8 * 8; }

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)

template <class T>
inline __m512 rounded(__m512 x);
template <>
inline __m512 rounded<float>(__m512 x) {
    return x;
}
template <>
inline __m512 rounded<bfloat>(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
template <>
inline __m512 rounded<_Float16>(__m512 x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Values of the codes 0 .. 15. Looking them up takes the low 4 bits of an index and rounds nothing anew.
template <class T>
inline __m512 table_of(__m512 scale, __m512 smallest) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return rounded<T>(_mm512_fmadd_ps(codes, scale, smallest));
}

inline __mmask16 first16(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// Calls f(j, load, store) for j = 0, 16, .. below count; load gives 16 bytes as numbers, store writes 16 values, or fewer at
// the end.
template <class F>
__attribute__((always_inline)) inline void by_16(int64_t count, F f) {
    int64_t j = 0;
    for (; j + 16 <= count; j += 16)
        f(j, [](const uint8_t* from) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); },
          [](float* to, __m512 values) { _mm512_storeu_ps(to, values); });
    if (j < count) {
        const __mmask16 some = first16(count - j);
        f(j, [=](const uint8_t* from) { return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, from)); },
          [=](float* to, __m512 values) { _mm512_mask_storeu_ps(to, some, values); });
    }
}

// The numbers of a group of MXFP4, by their codes.
template <class T>
inline __m512 micro_table(uint8_t exponent) {
    return rounded<T>(_mm512_mul_ps(_mm512_load_ps(E2M1), _mm512_set1_ps(power_of(exponent))));
}

template <class T>
inline void read_micro(const uint8_t* codes, uint8_t exponent, float* out) {
    const __m512 table = micro_table<T>(exponent);
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(both, table));
    _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table));
}

// One group of m values (a multiple of 8): smallest + code * scale, rounded to T.
template <class T>
inline void read_group(const uint8_t* packed, int64_t m, int bits, const _Float16* params, float* out) {
    int32_t both;
    std::memcpy(&both, params, sizeof both);
    const __m128 numbers = _mm_cvtph_ps(_mm_cvtsi32_si128(both));
    const __m512 scale = _mm512_broadcastss_ps(numbers), smallest = _mm512_broadcastss_ps(_mm_movehdup_ps(numbers));
    if (bits == 4) {
        const __m512 table = table_of<T>(scale, smallest);
        float* high = out + m / 2;
        by_16(m / 2, [=](int64_t j, auto load, auto store) {
            const __m512i codes = load(packed + j);
            store(out + j, _mm512_permutexvar_ps(codes, table));
            store(high + j, _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table));
        });
    } else if (bits == 3) {
        const __m512 values = table_of<T>(scale, smallest);
        const __m512 table = _mm512_shuffle_f32x4(values, values, 0x44);  // the first 8, twice: bit 3 says nothing
        const __m512i four = _mm512_set1_epi32(4);
        const int64_t e = m / 8;
        by_16(e, [=](int64_t j, auto load, auto store) {
            const __m512i p0 = load(packed + j), p1 = load(packed + e + j), p2 = load(packed + 2 * e + j);
            const __m512i codes[8] = {
                p0, _mm512_srli_epi32(p0, 3), p1, _mm512_srli_epi32(p1, 3), p2, _mm512_srli_epi32(p2, 3),
                _mm512_or_si512(_mm512_srli_epi32(p0, 6), _mm512_and_si512(_mm512_srli_epi32(p1, 4), four)),
                _mm512_or_si512(_mm512_srli_epi32(p2, 6), _mm512_and_si512(_mm512_srli_epi32(p1, 5), four))};
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) store(out + i * e + j, _mm512_permutexvar_ps(codes[i], table));
        });
    } else {
        by_16(m, [=](int64_t j, auto load, auto store) {
            const __m512 codes = _mm512_cvtepi32_ps(load(packed + j));
            store(out + j, rounded<T>(_mm512_fmadd_ps(codes, scale, smallest)));
        });
    }
}
#else
template <class T>
inline void read_micro(const uint8_t* codes, uint8_t exponent, float* __restrict out) {
    float table[16];
    for (int i = 0; i < 16; ++i) table[i] = widen(narrow<T>(E2M1[i] * power_of(exponent)));
    for (int j = 0; j < 16; ++j) out[j] = table[codes[j] & 15], out[j + 16] = table[codes[j] >> 4];
}

// The code of value j of a group of m values (a multiple of 8).
template <int BITS>
inline int code_of(const uint8_t* packed, int64_t m, int64_t j) {
    if constexpr (BITS == 8) return packed[j];
    if constexpr (BITS == 4) return j < m / 2 ? packed[j] & 15 : packed[j - m / 2] >> 4;
    const int64_t e = m / 8, part = j / e, i = j % e;
    if (part < 6) return packed[part / 2 * e + i] >> (part % 2 * 3) & 7;
    const int last = packed[e + i] >> part & 1;
    return packed[(part == 6 ? 0 : 2 * e) + i] >> 6 | last << 2;
}

template <class T, int BITS>
inline void read_codes(const uint8_t* packed, int64_t m, float scale, float smallest, float* __restrict out) {
    for (int64_t j = 0; j < m; ++j)
        out[j] = widen(narrow<T>(smallest + static_cast<float>(code_of<BITS>(packed, m, j)) * scale));
}

// One group of m values (a multiple of 8): smallest + code * scale, rounded to T. The product is exact in float32, so it
// does not matter whether the compiler contracts it with the sum.
template <class T>
inline void read_group(const uint8_t* packed, int64_t m, int bits, const _Float16* params, float* out) {
    const float scale = widen(params[0]), smallest = widen(params[1]);
    if (bits == 8) return read_codes<T, 8>(packed, m, scale, smallest, out);
    if (bits == 4) return read_codes<T, 4>(packed, m, scale, smallest, out);
    read_codes<T, 3>(packed, m, scale, smallest, out);
}
#endif

// Values first .. first + count of a row; a quantized row is read by whole groups, so first is a multiple of the group and
// out has room for filled(count).
template <class T>
inline void read_row(const Matrix& w, int64_t row, int64_t first, int64_t count, float* __restrict out) {
    const uint8_t* bytes = static_cast<const uint8_t*>(w.data) + row * w.row;
    if (w.bits == 0) {
        return widen_all(reinterpret_cast<const T*>(bytes) + first, count, out);
    }
    if (w.micro) {
        const uint8_t* exponents = exponents_of(w, row) + first / MICRO_GROUP;
        for (int64_t j = 0; j < count; j += MICRO_GROUP) read_micro<T>(bytes + (first + j) / 2, *exponents++, out + j);
        return;
    }
    const _Float16* params = w.params + row * w.params_row + first / w.group * 2;
    bytes += first / 8 * w.bits;
    for (int64_t j = 0; j < count; j += w.group, params += 2) {
        const int64_t m = count - j < w.group ? filled(count - j) : w.group;
        read_group<T>(bytes, m, w.bits, params, out + j);
        bytes += m / 8 * w.bits;
    }
}
