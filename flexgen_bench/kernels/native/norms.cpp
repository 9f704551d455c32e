// RMSNorm of rows: y = x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once. torch takes seven operators for it.
#include <cmath>

#include "threads.h"
#include "words.h"

namespace {

constexpr int64_t PIECE_VALUES = 1 << 15;  // what a thread takes at once

struct Norm {
    const void *x, *weight;
    void* y;
    int64_t x_row, rows, columns, threads;
    float eps;
    int32_t type;
};

template <class T>
void row(const T* x, const T* weight, T* y, int64_t n, float eps) {
    const int64_t whole = n / L * L;
    Floats squares{};
    for (int64_t i = 0; i < whole; i += L) {
        const Floats v = widened_from(x + i);
        squares += v * v;
    }
    float total = sum(squares);
    for (int64_t i = whole; i < n; ++i) total += widen(x[i]) * widen(x[i]);
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < n; ++i) y[i] = narrow<T>(widen(x[i]) * factor * widen(weight[i]));
}

template <class T>
void run(const Norm& job) {
    Pieces pieces(job.rows, std::max<int64_t>(1, PIECE_VALUES / std::max<int64_t>(1, job.columns)));
    const auto work = [&] {
        pieces.take([&](int64_t start, int64_t stop) {
            for (int64_t r = start; r < stop; ++r)
                row(static_cast<const T*>(job.x) + r * job.x_row, static_cast<const T*>(job.weight),
                    static_cast<T*>(job.y) + r * job.columns, job.columns, job.eps);
        });
    };
    Crew::ours().run(std::min(job.threads, job.rows * job.columns / PIECE_VALUES), work);
}

}  // namespace

// x (rows, columns), weight (columns), y (rows, columns) of one type.
extern "C" void rms_norm(const Norm* job) {
    switch (job->type) {
        case FLOAT32: return run<float>(*job);
        case BFLOAT16: return run<bfloat>(*job);
        default: return run<_Float16>(*job);
    }
}
