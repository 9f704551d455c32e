// Norms of rows, in float32, rounded once. torch takes seven operators for an RMSNorm.
#include <cmath>

#include "threads.h"
#include "words.h"

namespace {

constexpr int64_t PIECE_VALUES = 1 << 15;  // what a thread takes at once

enum Kind : int32_t { RMS = 0, RMS_AROUND_ONE = 1, LAYER = 2 };

// y (outer, inner, columns) without gaps of x, whose rows lie x_outer and x_inner values apart.
struct Norm {
    const void *x, *weight, *bias;  // weight and bias of a layer norm may be null
    void* y;
    int64_t outer, inner, columns, x_outer, x_inner, threads;
    float eps;
    int32_t type, kind;
};

// The sum of f(x) over a row.
template <class T, class F>
float total(const T* x, int64_t n, F f) {
    const int64_t whole = n / L * L;
    Floats found{};
    for (int64_t i = 0; i < whole; i += L) found += f(widened_from(x + i));
    float rest = 0;
    for (int64_t i = whole; i < n; ++i) rest += f(all(widen(x[i])))[0];
    return sum(found) + rest;
}

template <class T>
void rms(const T* x, const T* weight, T* y, int64_t n, float eps, float less) {
    const float squares = total(x, n, [](Floats v) { return v * v; });
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < n; ++i) y[i] = narrow<T>(widen(x[i]) * factor * (less + widen(weight[i])));
}

// mean((x - mean)^2), lest a large mean takes the digits of the variance.
template <class T>
void layer(const T* x, const T* weight, const T* bias, T* y, int64_t n, float eps) {
    const float mean = total(x, n, [](Floats v) { return v; }) / static_cast<float>(n);
    const float variance = total(x, n, [=](Floats v) { return (v - mean) * (v - mean); }) / static_cast<float>(n);
    const float factor = 1.0f / std::sqrt(variance + eps);
    for (int64_t i = 0; i < n; ++i)
        y[i] = narrow<T>((widen(x[i]) - mean) * factor * (weight ? widen(weight[i]) : 1.0f) + (bias ? widen(bias[i]) : 0.0f));
}

template <class T>
void run(const Norm& job) {
    const T *weight = static_cast<const T*>(job.weight), *bias = static_cast<const T*>(job.bias);
    Pieces pieces(job.outer * job.inner, std::max<int64_t>(1, PIECE_VALUES / std::max<int64_t>(1, job.columns)));
    const auto work = [&] {
        pieces.take([&](int64_t start, int64_t stop) {
            for (int64_t r = start; r < stop; ++r) {
                const T* x = static_cast<const T*>(job.x) + r / job.inner * job.x_outer + r % job.inner * job.x_inner;
                T* y = static_cast<T*>(job.y) + r * job.columns;
                if (job.kind == LAYER) layer(x, weight, bias, y, job.columns, job.eps);
                else rms(x, weight, y, job.columns, job.eps, job.kind == RMS_AROUND_ONE ? 1.0f : 0.0f);
            }
        });
    };
    Crew::ours().run(std::min(job.threads, job.outer * job.inner * job.columns / PIECE_VALUES), work);
}

}  // namespace

// x, weight, bias and y of one type.
extern "C" void norm(const Norm* job) {
    switch (job->type) {
        case FLOAT32: return run<float>(*job);
        case BFLOAT16: return run<bfloat>(*job);
        default: return run<_Float16>(*job);
    }
}
