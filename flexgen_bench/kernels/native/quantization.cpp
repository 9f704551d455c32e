// Dequantization of rows. The layout and the formula are those of kernels/quantization.py, and so is every bit of the result.
#include <vector>

#include "numbers.h"

namespace {

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

}  // namespace

// Rows start .. stop of w into out (rows, columns), contiguous, of type w.type.
extern "C" void dequantize(const Matrix* w, void* out, int64_t start, int64_t stop) {
    switch (w->type) {
        case FLOAT32: return dequantize_rows(*w, static_cast<float*>(out), start, stop);
        case BFLOAT16: return dequantize_rows(*w, static_cast<bfloat*>(out), start, stop);
        default: return dequantize_rows(*w, static_cast<_Float16*>(out), start, stop);
    }
}
