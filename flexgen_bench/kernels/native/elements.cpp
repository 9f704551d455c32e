// What stands between the products of a layer: rotary positions, activations, sums and products element by element, of the few rows
// that a decode pass has. In float32, rounded where torch rounds.
#include <cmath>

#include "threads.h"
#include "words.h"

namespace {

constexpr int64_t PIECE_VALUES = 1 << 15;  // what a thread takes at once

enum Operation : int32_t { ADD = 0, MULTIPLY = 1, RELU = 2, SILU = 3, GELU = 4, GELU_TANH = 5 };

// y = a (operation) b, or operation of a; rows of columns values, so many values from one to the next.
struct Elements {
    const void *a, *b;
    void* y;
    int64_t rows, columns, a_row, b_row, threads;
    int32_t type, operation;
};

// The first `rotated` values of each head, in pairs of one of their first half and one of their second, or of neighbours.
struct Rotation {
    const void *x, *cos, *sin;  // x (rows, heads, dim); cos and sin (rows, rotated)
    void* y;                    // (rows, heads, dim) without gaps
    int64_t rows, heads, dim, rotated, x_row, x_head, threads;
    int32_t type, interleaved;
};

inline Floats sigmoid(Floats x) {
    const Floats e = exp_negative(x < 0 ? x : -x);
    return (x < 0 ? e : all(1.0f)) / (1.0f + e);
}

inline Floats tanh_of(Floats y) {
    const Floats e = exp_negative(y < 0 ? y + y : -y - y), t = (1.0f - e) / (1.0f + e);
    return y < 0 ? -t : t;
}

template <int32_t OPERATION>
inline Floats apply(Floats a, Floats b) {
    if constexpr (OPERATION == ADD) return a + b;
    if constexpr (OPERATION == MULTIPLY) return a * b;
    if constexpr (OPERATION == RELU) return a < 0 ? all(0.0f) : a;  // NaN stays
    if constexpr (OPERATION == SILU) return a * sigmoid(a);
    if constexpr (OPERATION == GELU_TANH) return 0.5f * a * (1.0f + tanh_of(0.7978845608f * (a + 0.044715f * a * a * a)));
    if constexpr (OPERATION == GELU) {
        for (int i = 0; i < L; ++i) a[i] = 0.5f * a[i] * (1.0f + std::erf(a[i] * 0.7071067812f));
        return a;
    }
    return a;
}

template <class T, int32_t OPERATION>
void row(const T* a, const T* b, T* y, int64_t n) {
    float part[L], other[L];
    for (int64_t i = 0; i < n; i += L) {
        const int64_t m = std::min<int64_t>(L, n - i);
        Floats left, right{};
        if (m == L) {
            left = widened_from(a + i);
            if constexpr (OPERATION <= MULTIPLY) right = widened_from(b + i);
        } else {
            std::fill(part, part + L, 0.0f), std::fill(other, other + L, 0.0f);
            widen_all(a + i, m, part);
            if constexpr (OPERATION <= MULTIPLY) widen_all(b + i, m, other);
            left = load<Floats>(part), right = load<Floats>(other);
        }
        store(part, apply<OPERATION>(left, right));
        for (int64_t j = 0; j < m; ++j) y[i + j] = narrow<T>(part[j]);
    }
}

template <class T, int32_t OPERATION>
void rows(const Elements& job) {
    Pieces pieces(job.rows, std::max<int64_t>(1, PIECE_VALUES / std::max<int64_t>(1, job.columns)));
    const auto work = [&] {
        pieces.take([&](int64_t start, int64_t stop) {
            for (int64_t r = start; r < stop; ++r)
                row<T, OPERATION>(static_cast<const T*>(job.a) + r * job.a_row, static_cast<const T*>(job.b) + r * job.b_row,
                                  static_cast<T*>(job.y) + r * job.columns, job.columns);
        });
    };
    Crew::ours().run(std::min(job.threads, job.rows * job.columns / PIECE_VALUES), work);
}

template <class T>
void run(const Elements& job) {
    switch (job.operation) {
        case ADD: return rows<T, ADD>(job);
        case MULTIPLY: return rows<T, MULTIPLY>(job);
        case RELU: return rows<T, RELU>(job);
        case SILU: return rows<T, SILU>(job);
        case GELU: return rows<T, GELU>(job);
        default: return rows<T, GELU_TANH>(job);
    }
}

// Rounded as torch does: halves by addcmul, whose second product is not rounded by itself, neighbours by two products and a sum.
template <class T>
void turn(const T* x, const T* cos, const T* sin, T* y, const Rotation& job) {
    const auto round = [](float v) { return widen(narrow<T>(v)); };
    const int64_t half = job.rotated / 2;
    if (job.interleaved)
        for (int64_t i = 0; i < job.rotated; i += 2) {
            const float a = widen(x[i]), b = widen(x[i + 1]);
            y[i] = narrow<T>(round(a * widen(cos[i])) + round(-b * widen(sin[i])));
            y[i + 1] = narrow<T>(round(b * widen(cos[i + 1])) + round(a * widen(sin[i + 1])));
        }
    else
        for (int64_t i = 0; i < half; ++i) {
            const float a = widen(x[i]), b = widen(x[half + i]);
            y[i] = narrow<T>(round(a * widen(cos[i])) - b * widen(sin[i]));
            y[half + i] = narrow<T>(round(b * widen(cos[half + i])) + a * widen(sin[half + i]));
        }
    std::copy(x + job.rotated, x + job.dim, y + job.rotated);
}

template <class T>
void run(const Rotation& job) {
    const int64_t width = job.heads * job.dim;
    Pieces pieces(job.rows, std::max<int64_t>(1, PIECE_VALUES / std::max<int64_t>(1, width)));
    const auto work = [&] {
        pieces.take([&](int64_t start, int64_t stop) {
            for (int64_t r = start; r < stop; ++r)
                for (int64_t h = 0; h < job.heads; ++h)
                    turn(static_cast<const T*>(job.x) + r * job.x_row + h * job.x_head,
                         static_cast<const T*>(job.cos) + r * job.rotated, static_cast<const T*>(job.sin) + r * job.rotated,
                         static_cast<T*>(job.y) + r * width + h * job.dim, job);
        });
    };
    Crew::ours().run(std::min(job.threads, job.rows * width / PIECE_VALUES), work);
}

template <class Job>
void of_type(const Job* job) {
    switch (job->type) {
        case FLOAT32: return run<float>(*job);
        case BFLOAT16: return run<bfloat>(*job);
        default: return run<_Float16>(*job);
    }
}

}  // namespace

// All tensors of a call have one type.
extern "C" void elements(const Elements* job) { of_type(job); }
extern "C" void rotation(const Rotation* job) { of_type(job); }
