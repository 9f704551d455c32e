// Products with a matrix that is stored narrowly: y (M, N) = x (M, K) times W (N, K) transposed, plus bias, summed in float32.
//
// One call does all of it, over threads that wait in here. Few rows of x read W straight from how it is stored (few_rows.h); for
// more, pieces of it become numbers in the cores' own caches, once for all rows (many_rows.h).
#include "few_codes.h"
#include "few_rows.h"
#include "micro_rows.h"
#include "many_rows.h"
#include "threads.h"

namespace {

constexpr int64_t BLOCK_ROWS = 256;      // rows of x that are packed at a time
constexpr int64_t PIECE_BYTES = 1 << 16;  // of W, for few rows: what a thread takes at once
constexpr int64_t PACK_VALUES = 1 << 14;  // of x, the same

struct Product {
    Matrix w;
    const void* x;  // (rows, w.columns), x_row values from one row to the next
    const void* bias;  // (outputs) or null
    void* y;  // (rows, outputs), y_row values from one row to the next
    int64_t x_row, y_row, rows, outputs, threads;
    int64_t activations;  // 8: x is quantized to so many bits, W is in 4; 0: x as it is
};

// Rows of W that a thread takes at once, for few rows of x.
int64_t piece_of(const Product& job) {
    const int64_t fair = (job.outputs + 4 * job.threads - 1) / (4 * job.threads);
    return std::clamp<int64_t>(PIECE_BYTES / std::max<int64_t>(1, job.w.columns * bits_of(job.w) / 8), 1, fair);
}

template <class T>
void put(const Product& job, T* y, int64_t rows, int m, int64_t n, float sum) {
    const T* bias = static_cast<const T*>(job.bias);
    if (m < rows) y[m * job.y_row + n] = narrow<T>(bias ? sum + widen(bias[n]) : sum);
}

// f.template operator()<M>() for a power of two that so many rows fit into: each M is compiled for each way to read W.
template <int M = DOT_ROWS, class F>
void with_rows(int64_t rows, F f) {
    if constexpr (M > 1)
        if (rows <= M / 2) return with_rows<M / 2>(rows, f);
    f.template operator()<M>();
}

// Up to DOT_ROWS rows of x.
template <class A>
void few(const Product& job, const typename A::T* x, typename A::T* y, int64_t rows) {
    typedef typename A::Word Word;
    const Matrix& w = job.w;
    static thread_local Buffer packed;
    const int64_t x_row = dot_words(w.columns, A::VALUES);
    const int64_t padded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows)));
    Word* const words = reinterpret_cast<Word*>(packed.get(padded * x_row));
    std::fill(words, words + padded * x_row, Word{});
    for (int64_t m = 0; m < rows; ++m) A::pack(x + m * job.x_row, 0, w.columns, w.columns, crossed_columns(w), words + m * x_row, 1);
    Pieces pieces(job.outputs, piece_of(job));
    const auto work = [&] {
        static thread_local Buffer room;
        with_rows(rows, [&]<int M>() {
            const auto read = [&](auto reader) {
                pieces.take([&](int64_t start, int64_t stop) {
                    dots<A, M>(reader, words, x_row, start, stop, [&](int m, int64_t n, float sum) { put(job, y, rows, m, n, sum); });
                });
            };
            if (Plainly<A>::can(w)) read(Plainly<A>{w, room});
            else if (Microscaled<A>::can(w)) read(Microscaled<A>{w});
            else if (Coded<A, 4>::can(w)) read(Coded<A, 4>{w, room});
            else if (Coded<A, 8>::can(w)) read(Coded<A, 8>{w, room});
            else read(Slowly<A>{w, room});
        });
    };
    Crew::ours().run(std::min(job.threads, job.outputs), work);
}

// A tile's sums (count, padded) into y, turned around: rounded as vectors first, moved one by one then.
template <class T>
void finish(const Product& job, T* y, int64_t rows, int64_t tile, const float* sums, int64_t padded, int64_t count) {
    const T* bias = static_cast<const T*>(job.bias);
    static thread_local Buffer buffer;
    T* const found = reinterpret_cast<T*>(buffer.get(TILE_ROWS * padded));
    for (int64_t r = 0; r < count; ++r) {
        const float more = bias ? widen(bias[tile + r]) : 0.0f;
        const float* from = sums + r * padded;
        T* to = found + r * padded;
        if (bias)
            for (int64_t m = 0; m < padded; ++m) to[m] = narrow<T>(from[m] + more);
        else
            for (int64_t m = 0; m < padded; ++m) to[m] = narrow<T>(from[m]);
    }
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t r = 0; r < count; ++r) y[m * job.y_row + tile + r] = found[r * padded + m];
}

// More rows of x.
template <class A>
void many(const Product& job, const typename A::T* x, typename A::T* y, int64_t rows) {
    typedef typename A::Word Word;
    const int64_t K = job.w.columns;
    static thread_local Buffer packed;
    Word* const words = reinterpret_cast<Word*>(packed.get(whole_lanes(rows) * ((K + A::VALUES - 1) / A::VALUES)));
    Pieces packing(K, std::max<int64_t>(32, PACK_VALUES / rows / 32 * 32)), tiles(job.outputs, TILE_ROWS);
    const auto work = [&] {
        packing.take([&](int64_t start, int64_t stop) { pack_panels<A>(x, job.x_row, rows, K, crossed_columns(job.w), words, start, stop); });
        packing.wait();
        tiles.take([&](int64_t start, int64_t stop) {
            outers<A>(job.w, words, rows, start, stop, [&](const float* sums, int64_t padded, int64_t count) {
                finish(job, y, rows, start, sums, padded, count);
            });
        });
    };
    Crew::ours().run(job.threads, work);
}

// x in 8 bits, W in 4.
template <class T>
void codes(const Product& job, const T* x, T* y, int64_t rows) {
    const Matrix& w = job.w;
    static thread_local Buffer packed, numbers;
#if HAS_FEW_CODES
    if (rows <= DOT_ROWS && w.group == CODE_GROUP) {
        const int64_t padded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(rows))), line = numbers_row(w);
        // 64 bytes more, lest rows of 4096 bytes compete for the same lines.
        const int64_t codes_row = groups_of(w) * CODE_GROUP + 64;
        const Rows8 to{reinterpret_cast<Signed*>(packed.get(padded * codes_row / 4)), numbers.get(2 * padded * line), numbers.get() + padded * line, codes_row, line};
        std::fill(to.codes, to.codes + padded * codes_row, Signed{0});
        std::fill(to.scales, to.scales + 2 * padded * line, 0.0f);
        pack_rows8(w, x, job.x_row, rows, to);
        Pieces pieces(job.outputs, piece_of(job));
        const auto work = [&] {
            with_rows(rows, [&]<int M>() {
                pieces.take([&](int64_t start, int64_t stop) {
                    dots_of_codes<M>(w, to, start, stop, [&](int m, int64_t n, float sum) { put(job, y, rows, m, n, sum); });
                });
            });
        };
        return Crew::ours().run(std::min(job.threads, job.outputs), work);
    }
#endif
    const int64_t padded = whole_lanes(rows), groups = groups_of(w);
    const Panels to{reinterpret_cast<uint32_t*>(packed.get(padded * panel_words(w))), numbers.get(2 * padded * groups), numbers.get() + padded * groups};
    Pieces packing(groups, std::max<int64_t>(1, PACK_VALUES / rows / w.group)), tiles(job.outputs, TILE_ROWS);
    const auto work = [&] {
        packing.take([&](int64_t start, int64_t stop) { pack_codes(w, x, job.x_row, rows, to, start, stop); });
        packing.wait();
        tiles.take([&](int64_t start, int64_t stop) {
            outers_of_codes(w, to, rows, start, stop, [&](const float* sums, int64_t wide, int64_t count) {
                finish(job, y, rows, start, sums, wide, count);
            });
        });
    };
    Crew::ours().run(job.threads, work);
}

template <class A>
void run(const Product& job) {
    typedef typename A::T T;
    for (int64_t first = 0; first < job.rows; first += BLOCK_ROWS) {
        const int64_t rows = std::min(BLOCK_ROWS, job.rows - first);
        const T* x = static_cast<const T*>(job.x) + first * job.x_row;
        T* y = static_cast<T*>(job.y) + first * job.y_row;
        if (job.activations) codes<T>(job, x, y, rows);
        else if (rows <= DOT_ROWS) few<A>(job, x, y, rows);
        else many<A>(job, x, y, rows);
    }
}

}  // namespace

// The product. W, x, bias and y are of W's type; the caller has at least one row and one output.
extern "C" void linear(const Product* job) {
    switch (job->w.type) {
        case FLOAT32: return run<Singles<float>>(*job);
#if HAS_PAIRS
        case BFLOAT16: return run<Pairs>(*job);
#else
        case BFLOAT16: return run<Singles<bfloat>>(*job);
#endif
        default: return run<Singles<_Float16>>(*job);
    }
}

// Bytes that are kept for the calling thread: x, packed.
extern "C" int64_t packed_bytes(int32_t type, int64_t rows, int64_t K) {
    const int64_t values = HAS_PAIRS && type == BFLOAT16 ? 2 : 1;
    if (rows <= DOT_ROWS) return 4 * DOT_ROWS * dot_words(K, static_cast<int>(values));
    return 4 * whole_lanes(std::min(rows, BLOCK_ROWS)) * ((K + values - 1) / values);
}

// Whether products of a type are faster here than torch's on the processor this was compiled for. Not where it has a matrix unit for
// bfloat16 (AMX), not with plain float16 where torch does the same as this (AVX512-FP16), and not where nobody measured.
extern "C" int32_t beats_torch([[maybe_unused]] int32_t type, [[maybe_unused]] int32_t quantized) {
#if !(defined(__AVX2__) && defined(__FMA__))
    return 0;
#endif
#if defined(__AMX_BF16__)
    if (type == BFLOAT16) return 0;
#endif
#if defined(__AVX512FP16__)
    if (type == FLOAT16) return quantized;
#endif
    return 1;
}
