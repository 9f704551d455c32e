// Products for more rows of x: vectors hold one word of as many rows, words of W are broadcast, so W need not be transposed.
//
// x is packed for that beforehand, once for all of W: panels of up to PANEL vectors side by side, one line for each word. A piece of W
// becomes words in a buffer that stays in the core's own caches, where all rows of x use it.
#pragma once

#include "words.h"

constexpr int PANEL = 4;           // vectors of x side by side in a panel
constexpr int64_t TILE_ROWS = 48;  // rows of W between two stores to y: a multiple of SUMS, as CODE_SUMS divides it too
constexpr int64_t CHUNK = 512;     // values of SUMS rows of W that are words at a time; long, since memory gives neighbouring lines sooner

inline int64_t chunk_of(const Matrix& w) {
    return w.bits ? std::max<int64_t>(1, CHUNK / w.group) * w.group : CHUNK;
}
inline int64_t whole_lanes(int64_t rows) { return (rows + L - 1) / L * L; }

// What is brought near while something else is computed: ``lines`` cache lines of each of some rows. All at once they would keep the
// core from its own loads until they are there.
class Later {
  public:
    Later(const uint8_t* first, int64_t row, int64_t rows, int64_t lines) : at_(first), first_(first), row_(row), rows_(rows), lines_(rows ? lines : 0) {}
    void one() {
        if (lines_ == 0) return;
        __builtin_prefetch(at_);
        at_ += row_;
        if (++done_ == rows_) done_ = 0, --lines_, at_ = first_ += 64;
    }

  private:
    const uint8_t *at_, *first_;
    int64_t row_, rows_, lines_, done_ = 0;
};

// sums (R, P vectors) += W (R, depth words) times a panel of x (depth, P vectors), R = SUMS / P.
template <class A, int P>
void outer(const typename A::Word* w, int64_t stride, const typename A::Word* x, int64_t depth, float* sums, int64_t sums_row, Later later) {
    constexpr int R = SUMS / P;
    Floats c[R][P];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) c[r][p] = load<Floats>(sums + r * sums_row + p * L);
    for (int64_t k = 0; k < depth; ++k) {
        later.one();
        typename A::Vec v[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) v[p] = load<typename A::Vec>(x + (k * P + p) * L);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
            const auto u = A::wide(w[r * stride + k]);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) c[r][p] = A::add(c[r][p], v[p], u);
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store(sums + r * sums_row + p * L, c[r][p]);
}

inline int64_t bits_of(const Matrix& w) { return w.bits ? w.bits : w.type == FLOAT32 ? 32 : 16; }

// Where the next piece of W begins: at row ``row`` of a tile of ``count`` rows, or for the tile's next values, or below the tile.
inline const uint8_t* next_piece(const Matrix& w, int64_t tile, int64_t count, int64_t row, int64_t k, int64_t step) {
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + tile * w.row;
    if (row < count) return data + row * w.row + k * bits_of(w) / 8;
    return k + step < w.columns ? data + (k + step) * bits_of(w) / 8 : data + TILE_ROWS * w.row;
}

// Columns start .. stop of x (rows, K), start a multiple of 32, into panels; crossed: so many of them are in the order of crossed.h.
template <class A>
void pack_panels(const typename A::T* x, int64_t x_row, int64_t rows, int64_t K, int64_t crossed, typename A::Word* out, int64_t start, int64_t stop) {
    constexpr int64_t V = A::VALUES, line = 16 * V;
    const int64_t padded = whole_lanes(rows), words = (K + V - 1) / V;
    for (int64_t m = 0; m < padded; m += PANEL * L) {
        const int64_t width = std::min<int64_t>(PANEL * L, padded - m), full = std::min(width, rows - m);
        typename A::Word* panel = out + m * words;
        for (int64_t k = start; k < stop; k += line) {  // a cache line of x each, lines of the panel stay
            for (int64_t i = 0; i < full; ++i) A::pack(x + (m + i) * x_row, k, std::min(k + line, stop), K, crossed, panel + i, width);
        }
        if (full < width)
            for (int64_t k = start; k < stop; k += V)
                for (int64_t i = full; i < width; ++i) panel[k / V * width + i] = {};
    }
}

// panel<P>() for a panel of P = 1 .. MOST vectors.
template <int MOST, class Panel>
void by_vectors(int64_t vectors, const Panel& panel) {
    if constexpr (MOST > 1)
        if (vectors < MOST) return by_vectors<MOST - 1>(vectors, panel);
    panel.template operator()<MOST>();
}

// Rows tile .. stop of W (at most TILE_ROWS) times all rows of packed x: finish(sums, whole_lanes(rows), stop - tile) gets them, W's rows first.
template <class A, class Finish>
void outers(const Matrix& w, const typename A::Word* x, int64_t rows, int64_t tile, int64_t stop, Finish finish) {
    typedef typename A::Word Word;
    constexpr int64_t V = A::VALUES;
    static thread_local Buffer buffer, held;
    const int64_t step = chunk_of(w), stride = step / V + L, K = w.columns, words = (K + V - 1) / V;
    const int64_t padded = whole_lanes(rows), count = stop - tile;
    Word* const values = reinterpret_cast<Word*>(buffer.get(SUMS * stride));
    float* const sums = held.get(TILE_ROWS * padded);
    std::fill(sums, sums + TILE_ROWS * padded, 0.0f);
    for (int64_t k = 0; k < K; k += step) {
        const int64_t depth = std::min(step, K - k), deep = (depth + V - 1) / V, lines = (step * bits_of(w) / 8 + 63) / 64;
        for (int64_t block = 0; block < count; block += SUMS) {
            const int64_t some = std::min<int64_t>(SUMS, count - block);
            for (int64_t r = 0; r < some; ++r) A::read(w, tile + block + r, k, depth, values + r * stride);
            const uint8_t* next = next_piece(w, tile, count, block + SUMS, k, step);
            for (int64_t m = 0; m < padded; m += PANEL * L) {
                const int64_t vectors = std::min<int64_t>(PANEL, (padded - m) / L);
                const Word* part = x + m * words + k / V * vectors * L;
                const auto panel = [&]<int P>() {
                    constexpr int64_t R = SUMS / P;
                    for (int64_t r = 0; r < some; r += R)
                        outer<A, P>(values + r * stride, stride, part, deep, sums + (block + r) * padded + m, padded,
                                    {next + r * w.row, w.row, m ? 0 : R, lines});
                };
                by_vectors<PANEL>(vectors, panel);
            }
        }
    }
    finish(sums, padded, count);
}
