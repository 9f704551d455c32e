// Quantization of rows, and the way back. Layout and formulas are those of kernels/quantization.py, and so is every bit of the result.
#include <algorithm>
#include <vector>

#include "numbers.h"
#include "threads.h"

namespace {

constexpr int64_t PIECE_VALUES = 1 << 16;  // what a thread takes at once

template <class T>
void dequantize_rows(const Matrix& w, T* out, int64_t start, int64_t stop) {
    std::vector<float> values(w.group + 64);
    for (int64_t row = start; row < stop; ++row) {
        T* to = out + row * w.columns;
        for (int64_t first = 0; first < w.columns; first += w.group) {
            const int64_t count = w.columns - first < w.group ? w.columns - first : w.group;
            read_row<float>(w, row, first, count, values.data());
            for (int64_t j = 0; j < count; ++j) to[first + j] = narrow<T>(values[j]);
        }
    }
}

constexpr float LARGEST = 65504;  // of float16

inline float within_float16(float x) { return std::min(std::max(x, -LARGEST), LARGEST); }

// Scale and smallest value of a group of ``count`` numbers, from its two ends. One unit less of scale where rounding would put the largest code
// beyond float16's largest number.
inline void line_of(const float* __restrict numbers, int64_t count, float levels, _Float16* params) {
    float low = numbers[0], high = numbers[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t j = 0; j < count; ++j) {
        low = numbers[j] < low ? numbers[j] : low;
        high = numbers[j] > high ? numbers[j] : high;
    }
    const _Float16 smallest = static_cast<_Float16>(within_float16(low));
    const _Float16 largest = static_cast<_Float16>(within_float16(high));
    _Float16 scale = static_cast<_Float16>((widen(largest) - widen(smallest)) / levels);
    if (widen(smallest) + widen(scale) * levels > LARGEST)
        scale = std::bit_cast<_Float16>(static_cast<uint16_t>(std::bit_cast<uint16_t>(scale) - 1));
    params[0] = scale, params[1] = smallest;
}

// Of m values, m a multiple of 8; a NaN is code 0.
inline void codes_of(const float* __restrict numbers, int64_t m, float levels, const _Float16* params, uint8_t* __restrict codes) {
    const float smallest = widen(params[1]), scale = widen(params[0]);
    const float divisor = scale == 0 ? __builtin_inff() : scale;
    // Adding and taking away this rounds a small number to the nearest integer, ties to even.
    constexpr float magic = 3 << 22;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) {
        float code = (numbers[j] - smallest) / divisor;
        code = code > 0 ? code : 0;
        code = code < levels ? code : levels;
        codes[j] = static_cast<uint8_t>(static_cast<int32_t>((code + magic) - magic));
    }
}

// m codes, a multiple of 8 -> m / 8 * bits bytes.
inline void pack(const uint8_t* __restrict codes, int64_t m, int bits, uint8_t* __restrict out) {
    if (bits == 8) {
        std::memcpy(out, codes, m);
    } else if (bits == 4) {
        for (int64_t j = 0; j < m / 2; ++j) out[j] = codes[j] | codes[j + m / 2] << 4;
    } else {
        const int64_t e = m / 8;
        for (int64_t j = 0; j < e; ++j) {
            const auto code = [=](int part) { return codes[part * e + j]; };
            out[j] = code(0) | code(1) << 3 | code(6) << 6;
            out[e + j] = code(2) | code(3) << 3 | (code(6) & 4) << 4 | (code(7) & 4) << 5;
            out[2 * e + j] = code(4) | code(5) << 3 | code(7) << 6;
        }
    }
}

template <class T>
void quantize_rows(const Matrix& from, const Matrix& to, int64_t start, int64_t stop) {
    std::vector<float> numbers(to.group + 64);
    std::vector<uint8_t> codes(to.group + 64);
    const float levels = static_cast<float>((1 << to.bits) - 1);
    for (int64_t row = start; row < stop; ++row) {
        uint8_t* out = static_cast<uint8_t*>(const_cast<void*>(to.data)) + row * to.row;
        _Float16* params = const_cast<_Float16*>(to.params) + row * to.params_row;
        for (int64_t first = 0; first < to.columns; first += to.group, params += 2) {
            const int64_t count = std::min(to.columns - first, static_cast<int64_t>(to.group)), m = filled(count);
            read_row<T>(from, row, first, count, numbers.data());
            line_of(numbers.data(), count, levels, params);
            codes_of(numbers.data(), count, levels, params, codes.data());
            std::fill(codes.begin() + count, codes.begin() + m, 0);
            pack(codes.data(), m, to.bits, out);
            out += m / 8 * to.bits;
        }
    }
}

// part(start, stop) over all rows, on up to so many threads.
template <class F>
void share(int64_t rows, int64_t columns, int64_t threads, F part) {
    Pieces pieces(rows, std::max<int64_t>(1, PIECE_VALUES / std::max<int64_t>(1, columns)));
    const auto work = [&] { pieces.take(part); };
    Crew::ours().run(threads, work);
}

}  // namespace

// All rows of plain values into the codes and parameters of ``to``, a line through the ends of each group.
extern "C" void quantize(const Matrix* from, const Matrix* to, int64_t rows, int64_t threads) {
    share(rows, to->columns, threads, [&](int64_t start, int64_t stop) {
        switch (from->type) {
            case FLOAT32: return quantize_rows<float>(*from, *to, start, stop);
            case BFLOAT16: return quantize_rows<bfloat>(*from, *to, start, stop);
            default: return quantize_rows<_Float16>(*from, *to, start, stop);
        }
    });
}

// All rows of w into out (rows, columns), contiguous, of type w.type.
extern "C" void dequantize(const Matrix* w, void* out, int64_t rows, int64_t threads) {
    share(rows, w->columns, threads, [&](int64_t start, int64_t stop) {
        switch (w->type) {
            case FLOAT32: return dequantize_rows(*w, static_cast<float*>(out), start, stop);
            case BFLOAT16: return dequantize_rows(*w, static_cast<bfloat*>(out), start, stop);
            default: return dequantize_rows(*w, static_cast<_Float16*>(out), start, stop);
        }
    });
}
