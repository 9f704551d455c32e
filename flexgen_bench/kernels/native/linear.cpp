// Products with a matrix whose values are narrower than float32, computed in float32 without ever keeping it as such.
//
// y (M, N) = x (M, K) times W (N, K) transposed, plus bias. Two ways, by the number of rows M:
// - dot products along K for up to 8 rows: vectors hold neighbouring values of a row of W;
// - for more, outer products: vectors hold one column of x for neighbouring rows m, values of W are broadcast, so W need not
//   be transposed. x is packed for that beforehand, once for all of W.
// Either way a piece of W becomes float32 in a buffer that stays in the core's own caches.
#include <algorithm>
#include <atomic>
#include <vector>

#include "numbers.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;  // of 32 registers, 24 hold sums
#elif defined(__AVX2__)
constexpr int LANES = 8, SUMS = 12;  // of 16
#else
constexpr int LANES = 4, SUMS = 24;  // of 32
#endif
constexpr int PANEL = 4;       // vectors of x side by side in a panel
constexpr int DOT_ROWS = 8;    // rows of x up to which dot products are taken
constexpr int64_t TILE_ROWS = 48;  // rows of W between two stores to y: a multiple of SUMS / p for p = 1 .. PANEL
constexpr int64_t CHUNK = 256;     // values of a row of W that are float32 at a time

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

// float32 numbers that start on a cache line: a vector that lies across two is written at half the speed.
class Buffer {
  public:
    explicit Buffer(int64_t size) : lines_(size / 16 + 2) {}
    float* data() { return lines_.front().values; }

  private:
    struct alignas(64) Line {
        float values[16];
    };
    std::vector<Line> lines_;
};

inline Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }

// Sum of a vector's values, in halves: one after the other they would take as long as the products.
template <int WIDTH>
inline float total(const float* x) {
    if constexpr (WIDTH == 1) return *x;
    else {
        typedef float Half __attribute__((vector_size(WIDTH / 2 * sizeof(float)), aligned(sizeof(float)), may_alias));
        const Half sum = *reinterpret_cast<const Half*>(x) + *reinterpret_cast<const Half*>(x + WIDTH / 2);
        return total<WIDTH / 2>(reinterpret_cast<const float*>(&sum));
    }
}

// sums (R, P vectors) += W (R, depth) times a panel of x (depth, P vectors), R = SUMS / P.
template <int P>
void outer(const float* w, int64_t stride, const float* x, int64_t depth, float* sums, int64_t sums_row) {
    constexpr int R = SUMS / P;
    Vec c[R][P];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) c[r][p] = at(sums + r * sums_row + p * LANES);
    for (int64_t k = 0; k < depth; ++k) {
        Vec v[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) v[p] = at(x + (k * P + p) * LANES);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) c[r][p] += v[p] * w[r * stride + k];
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) at(sums + r * sums_row + p * LANES) = c[r][p];
}

// sums (R, M) vectors += W (R, depth) times x (M, depth), element by element; depth is a multiple of LANES.
template <int M, int R>
void inner(const float* w, int64_t stride, const float* x, int64_t x_row, int64_t depth, Vec* sums) {
    Vec c[R][M];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) c[r][m] = sums[r * M + m];
    for (int64_t k = 0; k < depth; k += LANES) {
        // The shorter side waits in registers, the longer one is read as it is needed.
        if constexpr (M <= R) {
            Vec v[M];
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) v[m] = at(x + m * x_row + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Vec u = at(w + r * stride + k);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) c[r][m] += v[m] * u;
            }
        } else {
            Vec u[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) u[r] = at(w + r * stride + k);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const Vec v = at(x + m * x_row + k);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) c[r][m] += v * u[r];
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r * M + m] = c[r][m];
}

constexpr int dot_rows_of_w(int m) { return std::min(8, std::max(1, SUMS / m)); }

// A row of x for dot products: filled up to whole vectors, and one more, lest rows of 4096 bytes compete for the same lines.
inline int64_t dot_row(int64_t K) { return ((K + LANES - 1) / LANES + 1) * LANES; }

inline void fetch(const Matrix& w, int64_t row, int64_t first, int64_t count) {
    if (row >= 0 && first < w.columns) {
        const int64_t width = w.type == FLOAT32 ? 32 : 16;
        const int64_t bits = w.bits ? w.bits : width;
        const char* bytes = static_cast<const char*>(w.data) + row * w.row + first * bits / 8;
        for (int64_t i = 0; i < count * bits / 8; i += 64) __builtin_prefetch(bytes + i);
    }
}

template <class T>
struct Task {
    Matrix w;
    const float* x;  // dot products: (M, K filled up to LANES with 0); else panels
    int64_t rows, outputs;
    const T* bias;
    T* y;
    int64_t y_row;
    std::atomic<int64_t>* next;

    int64_t chunk() const { return w.bits ? std::max<int64_t>(1, CHUNK / w.group) * w.group : CHUNK; }

    void store(int64_t m, int64_t n, float sum) const {
        y[m * y_row + n] = narrow<T>(bias ? sum + widen(bias[n]) : sum);
    }

    template <int M>
    void dots() const {
        constexpr int R = dot_rows_of_w(M);
        constexpr int64_t block = M <= 2 ? R : 24 / R * R;  // rows of W that a piece of x serves while it is close
        const int64_t step = chunk() * (M <= 2 ? 4 : M <= 4 ? 2 : 1), stride = step + LANES, K = w.columns;
        const int64_t x_row = dot_row(K);
        Buffer values(block * stride);
        for (int64_t tile; (tile = next->fetch_add(TILE_ROWS)) < outputs;) {
            const int64_t end = std::min(tile + TILE_ROWS, outputs);
            for (int64_t n = tile; n < end; n += block) {
                const int64_t count = std::min(block, end - n);
                Vec sums[block * M] = {};
                for (int64_t k = 0; k < K; k += step) {
                    const int64_t depth = std::min(step, K - k), whole = (depth + LANES - 1) / LANES * LANES;
                    for (int64_t r = 0; r < count; ++r) {
                        float* row = values.data() + r * stride;
                        if (k + step < K) fetch(w, n + r, k + step, step);
                        else if (n + r + block < outputs) fetch(w, n + r + block, 0, step);
                        read_row<T>(w, n + r, k, depth, row);
                        std::fill(row + depth, row + whole, 0.0f);
                    }
                    for (int64_t r = 0; r < count; r += R)
                        inner<M, R>(values.data() + r * stride, stride, x + k, x_row, whole, sums + r * M);
                }
                for (int64_t r = 0; r < count; ++r)
                    for (int m = 0; m < M; ++m) store(m, n + r, total<LANES>(reinterpret_cast<const float*>(sums + r * M + m)));
            }
        }
    }

    template <int P>
    void panel(const float* values, int64_t stride, int64_t count, const float* part, int64_t depth, float* sums,
               int64_t sums_row) const {
        for (int64_t r = 0; r < count; r += SUMS / P)
            outer<P>(values + r * stride, stride, part, depth, sums + r * sums_row, sums_row);
    }

    void outers() const {
        const int64_t step = chunk(), stride = step + LANES, K = w.columns;
        const int64_t padded = (rows + LANES - 1) / LANES * LANES;
        Buffer values(TILE_ROWS * stride), held(TILE_ROWS * padded);
        float* const sums = held.data();
        for (int64_t tile; (tile = next->fetch_add(TILE_ROWS)) < outputs;) {
            const int64_t count = std::min(TILE_ROWS, outputs - tile);
            std::fill(sums, sums + TILE_ROWS * padded, 0.0f);
            for (int64_t k = 0; k < K; k += step) {
                const int64_t depth = std::min(step, K - k);
                for (int64_t r = 0; r < count; ++r) {
                    if (k + step < K) fetch(w, tile + r, k + step, step);
                    else if (tile + r + TILE_ROWS < outputs) fetch(w, tile + r + TILE_ROWS, 0, step);
                    read_row<T>(w, tile + r, k, depth, values.data() + r * stride);
                }
                for (int64_t m = 0; m < padded; m += PANEL * LANES) {
                    const int64_t vectors = std::min<int64_t>(PANEL, (padded - m) / LANES);
                    const float* part = x + m * K + k * vectors * LANES;
                    float* into = sums + m;
                    switch (vectors) {
                        case 1: panel<1>(values.data(), stride, count, part, depth, into, padded); break;
                        case 2: panel<2>(values.data(), stride, count, part, depth, into, padded); break;
                        case 3: panel<3>(values.data(), stride, count, part, depth, into, padded); break;
                        default: panel<4>(values.data(), stride, count, part, depth, into, padded);
                    }
                }
            }
            for (int64_t m = 0; m < rows; ++m)
                for (int64_t r = 0; r < count; ++r) store(m, tile + r, sums[r * padded + m]);
        }
    }

    template <int M = 1>
    void run() const {
        if constexpr (M > DOT_ROWS) return outers();
        else return rows == M ? dots<M>() : run<M + 1>();
    }
};

template <class T>
void pack_rows(const T* x, int64_t x_row, int64_t rows, int64_t K, float* out, int64_t start, int64_t stop) {
    if (rows <= DOT_ROWS) {
        const int64_t whole = dot_row(K);
        for (int64_t m = 0; m < rows; ++m)
            widen_all(x + m * x_row + start, stop - start, out + m * whole + start);
        return;
    }
    const int64_t padded = (rows + LANES - 1) / LANES * LANES;
    for (int64_t m = 0; m < padded; m += PANEL * LANES) {
        const int64_t width = std::min<int64_t>(PANEL * LANES, padded - m);
        float* panel = out + m * K;
        for (int64_t k0 = start; k0 < stop; k0 += 16)  // 16 by 16: a cache line of x each, lines of the panel stay
            for (int64_t i = 0; i < width; ++i)
                for (int64_t k = k0; k < std::min(k0 + 16, stop); ++k)
                    panel[k * width + i] = m + i < rows ? widen(x[(m + i) * x_row + k]) : 0.0f;
    }
}

template <class T>
void run(const Matrix* w, const float* x, int64_t rows, int64_t outputs, const void* bias, void* y, int64_t y_row,
         int64_t* next) {
    const Task<T> task{*w, x, rows, outputs, static_cast<const T*>(bias), static_cast<T*>(y), y_row,
                       reinterpret_cast<std::atomic<int64_t>*>(next)};
    task.run();
}

}  // namespace

// float32 numbers that x takes when packed.
extern "C" int64_t packed_size(int64_t rows, int64_t K) {
    if (rows <= DOT_ROWS) return rows * dot_row(K);
    return (rows + LANES - 1) / LANES * LANES * K;
}

// Columns start .. stop of x (rows, K) of a type into out, which holds zeros before.
extern "C" void pack(const void* x, int32_t type, int64_t x_row, int64_t rows, int64_t K, float* out, int64_t start,
                     int64_t stop) {
    switch (type) {
        case FLOAT32: return pack_rows(static_cast<const float*>(x), x_row, rows, K, out, start, stop);
        case BFLOAT16: return pack_rows(static_cast<const bfloat*>(x), x_row, rows, K, out, start, stop);
        default: return pack_rows(static_cast<const _Float16*>(x), x_row, rows, K, out, start, stop);
    }
}

// The product for rows of W that nobody has taken: next counts them, shared by all threads and 0 at first. bias (or null)
// and y are of w's type.
extern "C" void linear(const Matrix* w, const float* x, int64_t rows, int64_t outputs, const void* bias, void* y,
                       int64_t y_row, int64_t* next) {
    switch (w->type) {
        case FLOAT32: return run<float>(w, x, rows, outputs, bias, y, y_row, next);
        case BFLOAT16: return run<bfloat>(w, x, rows, outputs, bias, y, y_row, next);
        default: return run<_Float16>(w, x, rows, outputs, bias, y, y_row, next);
    }
}

// Whether products of a type are faster here than torch's on the processor this was compiled for. Not where it has units for
// bfloat16 (AMX; Zen 4 and 5 do twice as many bfloat16 as float32 operations), not with plain float16 where torch does the same
// as this (AVX512-FP16), and not where nobody measured.
extern "C" int32_t beats_torch([[maybe_unused]] int32_t type, [[maybe_unused]] int32_t quantized) {
#if !(defined(__AVX2__) && defined(__FMA__))
    return 0;
#endif
#if defined(__AMX_BF16__) || defined(__znver4__) || defined(__znver5__)
    if (type == BFLOAT16) return 0;
#endif
#if defined(__AVX512FP16__)
    if (type == FLOAT16) return quantized;
#endif
    return 1;
}
