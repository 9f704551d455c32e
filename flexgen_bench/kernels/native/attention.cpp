// Decode attention over a cache in segments: one query token of each sequence against all of its keys.
//
// Every row of K and then of V is read once, in the order in which it lies in memory. Between the two sweeps the scores of one
// sequence and KV head are all there (4 bytes for each token and query head, which stay in cache), so softmax and the choice of
// value rows are exact, and there are long sequential reads for the hardware to prefetch.
//
// R query heads to a KV head, D head dim. Sizes in bytes are called so, other sizes count elements.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "packed_rows.h"
#include "row_kernels.h"
#include "scalars.h"
#include "threads.h"

namespace {

constexpr int ROWS_AHEAD = 16;  // rows that are prefetched where they do not follow each other

struct Job {
  const void* q;           // (rows, heads, dim), q_row values from one row to the next
  void* out;               // (rows, heads, dim) without gaps, of q's type
  const Rows *keys, *values;  // the segments of each
  const void *new_k, *new_v;  // (rows, kv_heads, dim), of the cache's type: written to it as the last token first; null: it is there
  const int32_t* slots;    // (rows,): sequence of each row
  const int32_t* lengths;  // (sequences,): tokens in the first segment; null: all
  const int32_t* keep;     // (rows,): value rows to use; null: all
  float* partial;          // (rows, kv_heads, splits, R, dim + 2); null if splits is 1
  int64_t rows, heads, kv_heads, dim, segments, splits;
  int64_t q_row, k_row, v_row;  // values from one row to the next
  int64_t type;         // of q, as of a cache
  int64_t threads;
  int64_t window;       // the last so many tokens are seen; 0: all
  const float* slopes;  // (heads,): times a token's distance from the last one, taken off its score; null: none
  const float* sinks;   // (heads,): scores that take part in the sum of the softmax and have no value; null: none
  float scale;
  float soft_cap;  // c * tanh(score / c); 0: none
};

// What one thread needs for one KV head of one sequence.
struct Scratch {
  Queries queries;
  Buffer q, scores, acc, tile;
  std::vector<int32_t> bits, chosen;
};

// The rows of one segment that belong to one KV head of one sequence, from a token on.
struct Run {
  const uint8_t *data, *params;
  int64_t tokens;
};

Run run_of(const Rows& rows, int64_t sequence, int64_t head, int64_t first, int64_t tokens) {
  const uint8_t* data =
      rows.data + sequence * rows.stride[0] + head * rows.stride[1] + first * rows.stride[2];
  const uint8_t* params = rows.params ? rows.params + sequence * rows.param_stride[0] +
                                            head * rows.param_stride[1] + first * rows.param_stride[2]
                                      : nullptr;
  return {data, params, tokens};
}

// What a query head's exponentials, taken relative to ``largest``, are divided by.
float whole(const Job& job, int64_t head, float largest, float total) {
  return job.sinks ? total + std::exp(job.sinks[head] - largest) : total;
}

// Calls f(rows, run, tokens before it) for the parts of [start, stop) in each segment.
template <class F>
void over_segments(const Job& job, const Rows* rows, int64_t sequence, int64_t head, int64_t start,
                   int64_t stop, F f) {
  int64_t before = 0;
  for (int64_t i = 0; i < job.segments; i++) {
    const int64_t tokens = i == 0 && job.lengths ? job.lengths[sequence] : rows[i].tokens;
    const int64_t a = std::max(start, before), b = std::min(stop, before + tokens);
    if (a < b) f(rows[i], run_of(rows[i], sequence, head, a - before, b - a), a - start);
    before += tokens;
  }
}

int64_t tokens_of(const Job& job, const Rows* rows, int64_t sequence) {
  int64_t tokens = job.lengths ? job.lengths[sequence] : rows[0].tokens;
  for (int64_t i = 1; i < job.segments; i++) tokens += rows[i].tokens;
  return tokens;
}

// Scores of R queries against a run of keys.
void score_run(const Rows& rows, const Run& run, const Shape& shape, Scratch& scratch, float* out,
               int64_t ld) {
  const Packed packed = {run.data, run.params, rows.stride[2], rows.param_stride[2]};
  if (from_codes(rows, shape, [&]<class C>() {
        score_codes<C>(packed, run.tokens, static_cast<int>(shape.dim / rows.group),
                       scratch.queries.plain.get(), out);
      }))
    return;
  for (int64_t t = 0; t < run.tokens; t += TILE) {
    const int64_t n = std::min<int64_t>(TILE, run.tokens - t);
    const Plain tile = unpacked(rows, run.data, run.params, t, n, shape, scratch.tile);
    for (int r = 0; r < shape.queries;) {
      const int many = std::min(shape.queries - r, MOST);
      score_tile(tile, scratch.queries, r, many, n, shape, out + r * ld + t, ld);
      r += many;
    }
  }
}

// acc (R, padded) += weights times a run of values.
void add_run(const Rows& rows, const Run& run, const Shape& shape, Scratch& scratch,
             const float* weights, int64_t ld) {
  float* acc = scratch.acc.get();
  const Packed packed = {run.data, run.params, rows.stride[2], rows.param_stride[2]};
  if (from_codes(rows, shape, [&]<class C>() {
        add_codes<C>(packed, run.tokens, static_cast<int>(shape.dim / rows.group), weights, acc);
      }))
    return;
  for (int64_t t = 0; t < run.tokens; t += TILE) {
    const int64_t n = std::min<int64_t>(TILE, run.tokens - t);
    const Plain tile = unpacked(rows, run.data, run.params, t, n, shape, scratch.tile);
    for (int r = 0; r < shape.queries;) {
      const int many = std::min(shape.queries - r, MOST);
      add_tile(tile, weights + r * ld + t, ld, many, n, shape, acc + r * shape.padded);
      r += many;
    }
  }
}

// Scores (n, then room up to whole vectors) -> e^(score * scale - largest). Returns {largest, sum}.
std::pair<float, float> exponentials(float* x, int64_t n, float scale) {
  const int64_t whole = (n + L - 1) / L * L;
  Floats high = all(-std::numeric_limits<float>::infinity());
  for (int64_t i = n; i < whole; i++) x[i] = x[n - 1];
  for (int64_t i = 0; i < whole; i += L) {
    const Floats v = load<Floats>(x + i) * scale;
    high = v > high ? v : high;
    store(x + i, v);
  }
  std::fill(x + n, x + whole, -std::numeric_limits<float>::infinity());
  float largest = high[0];
  for (int i = 1; i < L; i++) largest = std::max(largest, high[i]);
  Floats total{};
  for (int64_t i = 0; i < whole; i += L) {
    const Floats v = exp_negative(load<Floats>(x + i) - largest);
    total += v;
    store(x + i, v);
  }
  return {largest, sum(total)};
}

// Scores (n) -> what the exponentials are taken of: scaled, capped, less what their distance takes off. before: tokens behind the last
// of them.
void change(float* x, int64_t n, float scale, float cap, float slope, int64_t before) {
  if (cap > 0)
    for (int64_t i = 0; i < n; i += L) {  // there is room up to whole vectors; tanh(y) = (1 - e) / (1 + e), e = exp(-2 |y|)
      const Floats y = load<Floats>(x + i) * (scale / cap), e = exp_negative(y < 0 ? y + y : -y - y);
      const Floats t = cap * (1 - e) / (1 + e);
      store(x + i, y < 0 ? -t : t);
    }
  else
    for (int64_t i = 0; i < n; i++) x[i] *= scale;
  if (slope != 0)
    for (int64_t i = 0; i < n; i++) x[i] -= slope * static_cast<float>(before + n - 1 - i);
}

int64_t count_from(const int32_t* bits, int64_t n, int32_t least) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; i++) found += bits[i] >= least;
  return found;
}

// The last token and the keep - 1 others of largest weight, of equal ones the earlier, in ascending order. Weights lie in 0..1,
// where the bits of floats are ordered as they are: the smallest that stays is found by halving the range, one vectorised count
// each time, several times as fast as a partial sort.
void choose(const float* weights, int64_t n, int64_t keep, Scratch& scratch) {
  const int64_t others = n - 1, wanted = keep - 1;
  auto& bits = scratch.bits;
  bits.resize(static_cast<size_t>(others));
  std::memcpy(bits.data(), weights, static_cast<size_t>(others) * sizeof(float));
  int32_t least = 0, beyond = 0x3f800001;  // the bits of 1.0, plus 1
  for (int64_t found = others; found != wanted && beyond - least > 1;) {
    const int32_t middle = least + (beyond - least) / 2;
    const int64_t count = count_from(bits.data(), others, middle);
    if (count >= wanted) least = middle, found = count;
    else beyond = middle;
  }
  int64_t equal = wanted - count_from(bits.data(), others, least + 1);  // how many that are exactly the smallest
  auto& chosen = scratch.chosen;
  chosen.resize(static_cast<size_t>(n));
  size_t kept = 0;
  for (int64_t i = 0; i < others && kept < static_cast<size_t>(wanted); i++) {
    const int32_t weight = bits[static_cast<size_t>(i)];
    chosen[kept] = static_cast<int32_t>(i);
    kept += weight > least || (weight == least && equal-- > 0);
  }
  chosen[kept++] = static_cast<int32_t>(others);
  chosen.resize(kept);
}

// acc += weights times values, of the chosen rows of each query only, of the n from start on.
void add_chosen(const Job& job, const Rows* values, int64_t sequence, int64_t head, int64_t start, int64_t n,
                int64_t keep, const Shape& shape, Scratch& scratch, int64_t ld) {
  for (int r = 0; r < shape.queries; r++) {
    const float* weights = scratch.scores.get() + r * ld;
    choose(weights, n, keep, scratch);
    auto next = scratch.chosen.begin();
    const auto end = scratch.chosen.end();
    over_segments(job, values, sequence, head, start, start + n, [&](const Rows& rows, const Run& run, int64_t before) {
      const auto stop = std::lower_bound(next, end, before + run.tokens);
      const int64_t row_bytes = shape.dim * bits_of(rows.kind) / 8;
      const auto fetch_row = [&](auto at) {
        fetch(run.data + (*at - before) * rows.stride[2], row_bytes);
      };
      const auto near = next + std::min<int64_t>(ROWS_AHEAD, stop - next);
      for (auto at = next; at < near; at++) fetch_row(at);
      for (; next != stop; next++) {
        if (stop - next > ROWS_AHEAD) fetch_row(next + ROWS_AHEAD);
        const Plain row = unpacked(rows, run.data, run.params, *next - before, 1, shape, scratch.tile);
        add_tile(row, weights + *next, ld, 1, 1, shape, scratch.acc.get() + r * shape.padded);
      }
    });
  }
}

// f.template operator()<T>() for the type of q.
template <class F>
void with_type(const Job& job, F f) {
  if (job.type == FLOAT32) return f.template operator()<float>();
  if (job.type == BFLOAT16) return f.template operator()<bfloat>();
  f.template operator()<_Float16>();
}

// Values of a result from place `to` on.
void put(const Job& job, int64_t to, const float* from, int64_t n, float scale) {
  with_type(job, [&]<class T>() {
    T* out = static_cast<T*>(job.out) + to;
    for (int64_t d = 0; d < n; d++) out[d] = narrow<T>(from[d] * scale);
  });
}

// The new token's keys or values go to where the last token of each row lies.
void append(const Job& job, const Rows* rows, const void* from, int64_t from_row) {
  const Rows& last = rows[job.segments - 1];
  const int64_t row_bytes = job.dim * bits_of(last.kind) / 8, step = from_row * bits_of(last.kind) / 8;
  for (int64_t i = 0; i < job.rows * job.kv_heads; i++) {
    const int64_t row = i / job.kv_heads, head = i % job.kv_heads;
    uint8_t* const to = const_cast<uint8_t*>(last.data) + job.slots[row] * last.stride[0] + head * last.stride[1] + (last.tokens - 1) * last.stride[2];
    std::memcpy(to, static_cast<const uint8_t*>(from) + row * step + head * row_bytes, static_cast<size_t>(row_bytes));
  }
}

void attend_one(const Job& job, const Rows* keys, const Rows* values, int64_t item, Scratch& scratch) {
  const int64_t split = item % job.splits, pair = item / job.splits;
  const int64_t row = pair / job.kv_heads, head = pair % job.kv_heads;
  const int64_t sequence = job.slots[row], queries = job.heads / job.kv_heads;
  const Shape shape(static_cast<int>(job.dim), static_cast<int>(queries));
  const int64_t tokens = tokens_of(job, keys, sequence);
  const int64_t seen = job.window ? std::min(job.window, tokens) : tokens, first = tokens - seen;
  const int64_t start = first + seen * split / job.splits, stop = first + seen * (split + 1) / job.splits;
  const int64_t n = stop - start, ld = (n + L - 1) / L * L + L;
  const int64_t first_head = row * job.heads + head * queries;

  float* q = scratch.q.get(queries * job.dim);
  with_type(job, [&]<class T>() {
    widen_all(static_cast<const T*>(job.q) + row * job.q_row + head * queries * job.dim, queries * job.dim, q);
  });
  scratch.queries.set(q, shape);
  float* acc = scratch.acc.get(queries * shape.padded);
  std::fill(acc, acc + queries * shape.padded, 0.0f);
  float* scores = scratch.scores.get(queries * ld + L);  // room for the last vector of the last query

  over_segments(job, keys, sequence, head, start, stop, [&](const Rows& rows, const Run& run, int64_t before) {
    score_run(rows, run, shape, scratch, scores + before, ld);
  });
  // The values are on their way while there is nothing to read for the exponentials.
  over_segments(job, values, sequence, head, start, stop, [](const Rows& rows, const Run& run, int64_t before) {
    if (before == 0) fetch(run.data, std::min<int64_t>(AHEAD, run.tokens * rows.stride[2]));
  });
  std::vector<std::pair<float, float>> totals;
  const bool changed = job.slopes || job.soft_cap > 0;
  for (int64_t r = 0; r < queries && n; r++) {
    float* x = scores + r * ld;
    if (changed) change(x, n, job.scale, job.soft_cap, job.slopes ? job.slopes[head * queries + r] : 0, tokens - stop);
    totals.push_back(exponentials(x, n, changed ? 1.0f : job.scale));
  }
  if (job.keep && job.keep[row] < n)
    add_chosen(job, values, sequence, head, start, n, job.keep[row], shape, scratch, ld);
  else
    over_segments(job, values, sequence, head, start, stop, [&](const Rows& rows, const Run& run, int64_t before) {
      add_run(rows, run, shape, scratch, scores + before, ld);
    });

  for (int64_t r = 0; r < queries; r++) {
    const float* found = acc + r * shape.padded;
    if (job.splits > 1) {
      float* to = job.partial + (item * queries + r) * (job.dim + 2);
      to[0] = n ? totals[static_cast<size_t>(r)].first : -std::numeric_limits<float>::infinity();
      to[1] = n ? totals[static_cast<size_t>(r)].second : 0.0f;
      std::copy(found, found + job.dim, to + 2);
    } else {
      const auto [largest, total] = n ? totals[static_cast<size_t>(r)] : std::pair(0.0f, 1.0f);
      put(job, (first_head + r) * job.dim, found, job.dim, 1 / whole(job, head * queries + r, largest, total));
    }
  }
}

// Joins what the splits of each head found.
void join_splits(const Job* job) {
  const int64_t queries = job->heads / job->kv_heads, width = job->dim + 2;
  std::vector<float> joined(static_cast<size_t>(job->dim));
  for (int64_t h = 0; h < job->rows * job->heads; h++) {
    const int64_t pair = h / queries, r = h % queries;
    const auto part = [&](int64_t split) {
      return job->partial + ((pair * job->splits + split) * queries + r) * width;
    };
    float largest = part(0)[0], total = 0;
    for (int64_t i = 1; i < job->splits; i++) largest = std::max(largest, part(i)[0]);
    float* out = joined.data();
    std::fill(out, out + job->dim, 0.0f);
    for (int64_t i = 0; i < job->splits; i++) {
      const float weight = part(i)[1] > 0 ? std::exp(part(i)[0] - largest) : 0.0f;
      total += weight * part(i)[1];
      for (int64_t d = 0; d < job->dim; d++) out[d] += weight * part(i)[2 + d];
    }
    total = whole(*job, h % job->heads, largest, total);
    for (int64_t d = 0; d < job->dim; d++) out[d] /= total;
    put(*job, h * job->dim, out, job->dim, 1.0f);
  }
}

}  // namespace

// All of a job.
extern "C" void attend(const Job* job) {
  if (job->new_k) append(*job, job->keys, job->new_k, job->k_row), append(*job, job->values, job->new_v, job->v_row);
  Pieces pieces(job->rows * job->kv_heads * job->splits, 1);
  const auto work = [&] {
    static thread_local Scratch scratch;
    pieces.take([&](int64_t item, int64_t) { attend_one(*job, job->keys, job->values, item, scratch); });
  };
  Crew::ours().run(job->threads, work);
  if (job->splits > 1) join_splits(job);
}
