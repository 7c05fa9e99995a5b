// Attention over listed blocks, forward only.
//
// What is computed stands in sparseprefill/contracts.py (AttentionInputs, BlockIndex). A work item is up to MOST_QUERIES
// queries of one row of the grid and one head. Queries lie across the lanes of a vector and stay in cache, transposed,
// for the whole item: logits are the products of a broadcast number of a key with vectors of queries, and the output,
// transposed too, grows by a broadcast number of a value times vectors of weights. So keys and values are read where
// they lie, in whatever order the list names them, the softmax needs no sum across lanes, and keys that nobody sees
// are left out one by one. PIECE keys are multiplied before the running maximum is raised.
//
// bfloat16 is multiplied in pairs where the processor can (vdpbf16ps), which takes pairs of values beside each other;
// else, as float16 always, it is widened piece by piece. Plain C interface, no dependencies.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "native_vectors.h"

namespace {

using namespace sparseprefill;

constexpr int64_t MOST_QUERIES = 64, PIECE = 256;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)
#define SPARSEPREFILL_PAIRS
#endif

enum Kind : int64_t { FLOAT32, BFLOAT16, FLOAT16 };

struct Problem {
    int64_t batch, query_heads, kv_heads, rows, queries, keys, block_q, block_k, head_dim, value_dim, query_start, kind;
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token;
    const uint8_t *query, *key, *value;  // [batch, heads, tokens, dim], channels beside each other
    uint8_t *output;                     // [batch, query_heads, queries, value_dim]; float32 where kind is FLOAT16
    float *lse;                          // [batch, query_heads, queries]
    const int32_t *columns, *count;      // see BlockIndex; count and start: [batch, query_heads, rows]
    const int64_t *start, *anchor;       // anchor: [batch]
    const int64_t *begin, *end;          // [batch, rows]: slots of the queries of a row
    const int32_t *low, *high;           // [batch, queries]: keys [low, high) are visible
    const uint8_t *valid;                // [batch, keys], or none
    const int32_t *before;               // [batch, keys + 1]: valid keys before each slot, or none
    const float *sinks;                  // [query_heads], or none
    const uint8_t *only;                 // [batch, query_heads], or none
    const int32_t *visit;                // as columns; the same where there is no order
    const float *skip;                   // [batch, query_heads, rows], or none
    int64_t *skipped;                    // [batch, query_heads, rows], or none
    float scale, softcap;                // softcap 0: none
    int64_t width() const { return kind == FLOAT32 ? 4 : 2; }
};

// aligned memory without a value
template <class T>
struct Room {
    std::unique_ptr<uint8_t[]> memory;
    T *at = nullptr;
    void hold(int64_t count) {
        memory.reset(new uint8_t[count * sizeof(T) + 64]);
        at = reinterpret_cast<T *>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    }
};

// what one thread works with
struct Scratch {
    int64_t piece;
    Room<float> query;               // [head_dim, MOST_QUERIES]; or pairs of bfloat16
    Room<float> logits;              // [piece, MOST_QUERIES], then weights, or pairs of bfloat16 in its first half
    Room<float> output;              // [value_dim, MOST_QUERIES]
    Room<float> wide_key, wide_value;  // [piece, dim] where they must be widened; pairs of values
    std::vector<int64_t> place;      // [piece] slots of the keys at hand
    std::vector<uint8_t> edge;       // [piece] must it be masked?
    std::vector<const float *> key, value;
    alignas(64) float low[MOST_QUERIES], high[MOST_QUERIES];       // from the row's first slot
    alignas(64) float most[MOST_QUERIES], base[MOST_QUERIES], mass[MOST_QUERIES], fade[MOST_QUERIES];
    alignas(64) float peak[MOST_QUERIES], tile_peak[MOST_QUERIES];  // where tiles may be skipped

    explicit Scratch(const Problem &p) : piece(p.skip ? std::max(PIECE, p.block_k) : PIECE) {
        query.hold((p.head_dim + 1) * MOST_QUERIES);
        logits.hold(piece * MOST_QUERIES);
        output.hold(p.value_dim * MOST_QUERIES);
        wide_key.hold(piece * p.head_dim);
        wide_value.hold((piece + 1) * p.value_dim);
        place.resize(piece), edge.resize(piece), key.resize(piece), value.resize(piece);
    }
};

// ---- products: R rows of the one operand, C vectors of queries; R x C sums are held in registers

template <int R, int C>
inline void score_rows(const float *const *key, int64_t dim, const float *query, int64_t width, float *out) {
    Float sum[R][C];
    const float *row[R];
    for (int r = 0; r < R; ++r) {
        row[r] = key[r];
        for (int c = 0; c < C; ++c) sum[r][c] = all(0.0f);
    }
    for (int64_t d = 0; d < dim; ++d) {
        Float q[C];
        for (int c = 0; c < C; ++c) q[c] = load(query + d * width + c * LANES);
        for (int r = 0; r < R; ++r) {
            const Float k = all(row[r][d]);
            for (int c = 0; c < C; ++c) sum[r][c] = times_plus(k, q[c], sum[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * width + c * LANES, sum[r][c]);
}

template <int R, int C>
inline void value_rows(const float *const *value, int64_t first, int64_t keys, const float *weight, int64_t width,
                       const float *fade, float *out) {
    Float sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = all(0.0f);
    for (int64_t n = 0; n < keys; ++n) {
        Float w[C];
        const float *row = value[n] + first;
        for (int c = 0; c < C; ++c) w[c] = load(weight + n * width + c * LANES);
        for (int r = 0; r < R; ++r) {
            const Float v = all(row[r]);
            for (int c = 0; c < C; ++c) sum[r][c] = times_plus(v, w[c], sum[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float *o = out + r * width + c * LANES;
            store(o, times_plus(load(o), load(fade + c * LANES), sum[r][c]));
        }
}

#ifdef SPARSEPREFILL_PAIRS

inline Float add_pairs(Float sum, Int a, Int b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

// `rows`: key pairs, one row a key, read 32 bits at a time
template <int R, int C>
inline void score_pairs(const float *const *key, int64_t pairs, const int32_t *query, int64_t width, float *out) {
    Float sum[R][C];
    const int32_t *row[R];
    for (int r = 0; r < R; ++r) {
        row[r] = reinterpret_cast<const int32_t *>(key[r]);
        for (int c = 0; c < C; ++c) sum[r][c] = all(0.0f);
    }
    for (int64_t d = 0; d < pairs; ++d) {
        Int q[C];
        for (int c = 0; c < C; ++c) q[c] = load_int(query + d * width + c * LANES);
        for (int r = 0; r < R; ++r) {
            const Int k = all_int(row[r][d]);
            for (int c = 0; c < C; ++c) sum[r][c] = add_pairs(sum[r][c], k, q[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * width + c * LANES, sum[r][c]);
}

template <int R, int C>
inline void value_pairs(const int32_t *value, int64_t dim, int64_t pairs, const int32_t *weight, int64_t width,
                        const float *fade, float *out) {
    Float sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = all(0.0f);
    for (int64_t n = 0; n < pairs; ++n) {
        Int w[C];
        const int32_t *row = value + n * dim;
        for (int c = 0; c < C; ++c) w[c] = load_int(weight + n * width + c * LANES);
        for (int r = 0; r < R; ++r) {
            const Int v = all_int(row[r]);
            for (int c = 0; c < C; ++c) sum[r][c] = add_pairs(sum[r][c], v, w[c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
            float *o = out + r * width + c * LANES;
            store(o, times_plus(load(o), load(fade + c * LANES), sum[r][c]));
        }
}

// two vectors as pairs of bfloat16, rounded to the nearest: `even` in the low halves
inline Int paired(Float even, Float odd) {
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const Int both = (Int)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
}

#endif

// calls work<R, C>(row, column) so that rows x columns are covered
template <template <int, int> class Work, int C, class... Given>
inline void some_rows(int64_t rows, int64_t column, const Given &...given) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) Work<ROWS, C>::run(row, column, given...);
    switch (rows - row) {
        case 5: if constexpr (ROWS > 5) Work<5, C>::run(row, column, given...); break;
        case 4: if constexpr (ROWS > 4) Work<4, C>::run(row, column, given...); break;
        case 3: if constexpr (ROWS > 3) Work<3, C>::run(row, column, given...); break;
        case 2: if constexpr (ROWS > 2) Work<2, C>::run(row, column, given...); break;
        case 1: Work<1, C>::run(row, column, given...); break;
    }
}

template <template <int, int> class Work, class... Given>
inline void all_rows(int64_t rows, int64_t columns, const Given &...given) {
    int64_t column = 0;
    for (; column + COLUMNS <= columns; column += COLUMNS) some_rows<Work, COLUMNS>(rows, column, given...);
    switch (columns - column) {
        case 3: if constexpr (COLUMNS > 3) some_rows<Work, 3>(rows, column, given...); break;
        case 2: if constexpr (COLUMNS > 2) some_rows<Work, 2>(rows, column, given...); break;
        case 1: if constexpr (COLUMNS > 1) some_rows<Work, 1>(rows, column, given...); break;
    }
}

struct Pass {  // one piece of one item
    Scratch &s;
    int64_t keys, columns, width, head_dim, value_dim;
};

template <int R, int C>
struct Scores {
    static void run(int64_t row, int64_t column, const Pass &at) {
        score_rows<R, C>(at.s.key.data() + row, at.head_dim, at.s.query.at + column * LANES, at.width,
                         at.s.logits.at + row * at.width + column * LANES);
    }
};

template <int R, int C>
struct Values {
    static void run(int64_t row, int64_t column, const Pass &at) {
        value_rows<R, C>(at.s.value.data(), row, at.keys, at.s.logits.at + column * LANES, at.width,
                         at.s.fade + column * LANES, at.s.output.at + row * at.width + column * LANES);
    }
};

#ifdef SPARSEPREFILL_PAIRS

template <int R, int C>
struct ScorePairs {
    static void run(int64_t row, int64_t column, const Pass &at) {
        score_pairs<R, C>(at.s.key.data() + row, at.head_dim / 2,
                          reinterpret_cast<const int32_t *>(at.s.query.at) + column * LANES, at.width,
                          at.s.logits.at + row * at.width + column * LANES);
    }
};

template <int R, int C>
struct ValuePairs {
    static void run(int64_t row, int64_t column, const Pass &at) {
        value_pairs<R, C>(reinterpret_cast<const int32_t *>(at.s.wide_value.at) + row, at.value_dim, (at.keys + 1) / 2,
                          reinterpret_cast<const int32_t *>(at.s.logits.at) + column * LANES, at.width,
                          at.s.fade + column * LANES, at.s.output.at + row * at.width + column * LANES);
    }
};

// values of two keys each as pairs [pairs, value_dim]; a last key without a partner gets zeros
void pair_values(const uint16_t *const *value, int64_t keys, int64_t dim, uint32_t *out) {
    alignas(64) uint16_t first[32], second[32];
    for (int n = 0; n < 32; ++n) {
        first[n] = static_cast<uint16_t>(n / 2 + n % 2 * 32);
        second[n] = static_cast<uint16_t>(16 + n / 2 + n % 2 * 32);
    }
    const Int front = load_int(first), back = load_int(second);
    for (int64_t n = 0; n < keys; n += 2, out += dim) {
        const uint16_t *even = value[n], *odd = n + 1 < keys ? value[n + 1] : nullptr;
        int64_t d = 0;
        for (; odd && d + 32 <= dim; d += 32) {
            const Int a = load_int(even + d), b = load_int(odd + d);
            store_int(out + d, _mm512_permutex2var_epi16(a, front, b));
            store_int(out + d + 16, _mm512_permutex2var_epi16(a, back, b));
        }
        for (; d < dim; ++d) out[d] = even[d] | (odd ? static_cast<uint32_t>(odd[d]) << 16 : 0u);
    }
}

#endif

constexpr bool pairs_of(int64_t kind) {
#ifdef SPARSEPREFILL_PAIRS
    return kind == BFLOAT16;
#else
    return kind != kind;
#endif
}

// ---- one item

// numbers of a row in float32, written with a step
void widen(const uint8_t *row, int64_t count, int64_t kind, int64_t step, float *out) {
    if (kind == FLOAT32) {
        const float *from = reinterpret_cast<const float *>(row);
        for (int64_t n = 0; n < count; ++n) out[n * step] = from[n];
    } else {
        const uint16_t *from = reinterpret_cast<const uint16_t *>(row);
        for (int64_t n = 0; n < count; ++n) out[n * step] = widened(from[n], kind == BFLOAT16);
    }
}

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

struct Item {
    const Problem &p;
    Scratch &s;
    int64_t b, h, row;
    int64_t from, to;  // slots of its queries
    int64_t width, columns;
    bool pairs;
    float factor;   // what logits in memory are multiplied by to be exponents of two
    int64_t keys = 0;  // at hand
    bool masked = false;

    Item(const Problem &problem, Scratch &scratch, int64_t batch, int64_t head, int64_t r, int64_t first, int64_t last)
        : p(problem), s(scratch), b(batch), h(head), row(r), from(first), to(last) {
        columns = (to - from + LANES - 1) / LANES, width = columns * LANES;
        pairs = pairs_of(p.kind);
        factor = p.softcap > 0 ? LOG2_E : p.scale * LOG2_E;
    }

    void run() {
        pack_query();
        int64_t low_most = 0, low_least = p.keys, high_most = 0, high_least = p.keys;
        for (int64_t n = 0; n < width; ++n) {
            s.most[n] = NOTHING, s.base[n] = 0, s.mass[n] = 0, s.peak[n] = NOTHING;
            s.low[n] = 1, s.high[n] = 0;  // beyond the item: nothing
            if (from + n >= to) continue;
            const int64_t i = b * p.queries + from + n - p.query_start;
            low_most = std::max<int64_t>(low_most, p.low[i]), low_least = std::min<int64_t>(low_least, p.low[i]);
            high_most = std::max<int64_t>(high_most, p.high[i]), high_least = std::min<int64_t>(high_least, p.high[i]);
        }
        const int64_t base = low_least;  // masks are in float, exact up to 2 ** 24 from here
        for (int64_t n = 0; n < to - from; ++n) {
            const int64_t i = b * p.queries + from + n - p.query_start;
            s.low[n] = static_cast<float>(std::min<int64_t>(p.low[i] - base, 1 << 24));
            s.high[n] = static_cast<float>(std::min<int64_t>(p.high[i] - base, 1 << 24));
        }
        if (p.output) std::fill_n(s.output.at, p.value_dim * width, 0.0f);
        const int64_t list = (b * p.query_heads + h) * p.rows + row;
        const float threshold = p.skip ? p.skip[list] : NOTHING;
        const bool skips = threshold > NOTHING;
        const int32_t *block = (skips ? p.visit : p.columns) + p.start[list];
        int64_t dropped = 0;
        for (int64_t t = 0; t < p.count[list]; ++t) {
            const int64_t begin = p.anchor[b] + block[t] * p.block_k, end = begin + p.block_k;
            const int64_t first = std::max(begin, low_least), last = std::min(end, high_most);
            const bool holes = p.valid && first < last &&
                               p.before[b * (p.keys + 1) + last] - p.before[b * (p.keys + 1) + first] < last - first;
            const bool edge = first < low_most || last > high_least;
            for (int64_t k = first; k < last; ++k) {
                if (holes && !p.valid[b * p.keys + k]) continue;
                if (keys == s.piece) add(base);
                s.place[keys] = k, s.edge[keys] = edge, ++keys;
                masked |= edge;
            }
            if (!skips) continue;
            if (matters(threshold, base))
                add(base, true);
            else
                dropped += pairs_in(first, last), keys = 0, masked = false;
        }
        if (keys) add(base);
        if (p.skipped) p.skipped[list] += dropped;
        finish();
    }

  private:
    const uint8_t *row_of(const uint8_t *tensor, int64_t sb, int64_t sh, int64_t st, int64_t head, int64_t t) const {
        return tensor + (b * sb + head * sh + t * st) * p.width();
    }

    void pack_query() {
        const int64_t dim = p.head_dim;
        if (pairs) {
            uint32_t *out = reinterpret_cast<uint32_t *>(s.query.at);
            for (int64_t n = 0; n < width; ++n) {
                if (from + n >= to) {
                    for (int64_t d = 0; d < dim / 2; ++d) out[d * width + n] = 0;
                    continue;
                }
                const uint8_t *q = row_of(p.query, p.q_batch, p.q_head, p.q_token, h, from + n - p.query_start);
                for (int64_t d = 0; d < dim / 2; ++d) std::memcpy(out + d * width + n, q + 4 * d, 4);
            }
            return;
        }
        for (int64_t n = 0; n < width; ++n)
            if (from + n < to)
                widen(row_of(p.query, p.q_batch, p.q_head, p.q_token, h, from + n - p.query_start), dim, p.kind, width,
                      s.query.at + n);
            else
                for (int64_t d = 0; d < dim; ++d) s.query.at[d * width + n] = 0;
    }

    // logits of the keys at hand, soft-capped and masked, before the scale where there is no soft-cap
    void score(int64_t base) {
        const int64_t head = h / (p.query_heads / p.kv_heads);
        for (int64_t n = 0; n < keys; ++n) {
            const uint8_t *k = row_of(p.key, p.k_batch, p.k_head, p.k_token, head, s.place[n]);
            if (p.kind != FLOAT32 && !pairs) {
                float *wide = s.wide_key.at + n * p.head_dim;
                widen(k, p.head_dim, p.kind, 1, wide);
                s.key[n] = wide;
            } else {
                s.key[n] = reinterpret_cast<const float *>(k);
            }
        }
        const Pass at{s, keys, columns, width, p.head_dim, p.value_dim};
#ifdef SPARSEPREFILL_PAIRS
        if (pairs)
            all_rows<ScorePairs>(keys, columns, at);
        else
#endif
            all_rows<Scores>(keys, columns, at);
        if (p.softcap > 0) {
            for (int64_t n = 0; n < keys; ++n)
                for (int64_t q = 0; q < width; ++q) {
                    float &x = s.logits.at[n * width + q];
                    x = p.softcap * std::tanh(x * p.scale / p.softcap);
                }
        }
        if (!masked) return;
        for (int64_t n = 0; n < keys; ++n) {
            if (!s.edge[n]) continue;
            const Float key = all(static_cast<float>(s.place[n] - base));
            for (int64_t c = 0; c < columns; ++c) {
                float *x = s.logits.at + n * width + c * LANES;
                store(x, visible(load(x), load(s.low + c * LANES), load(s.high + c * LANES), key));
            }
        }
    }

    // does any query have a logit above its maximum so far and the threshold? Leaves the logits for `add`.
    bool matters(float threshold, int64_t base) {
        score(base);
        const float unit = p.softcap > 0 ? 1.0f : p.scale;
        bool any = false;
        for (int64_t q = 0; q < to - from; ++q) {
            float top = NOTHING;
            for (int64_t n = 0; n < keys; ++n) {
                const float x = s.logits.at[n * width + q];
                if (!(x <= top)) top = x;  // NaN stays: nothing is not above it
                if (top != top) break;
            }
            s.tile_peak[q] = top * unit;
            const bool counts = !p.valid || p.valid[b * p.keys + from + q];
            any |= counts && top != NOTHING && !(s.tile_peak[q] <= s.peak[q] + threshold);
        }
        if (any)
            for (int64_t q = 0; q < to - from; ++q)
                if (!(s.tile_peak[q] <= s.peak[q]) && s.peak[q] == s.peak[q]) s.peak[q] = s.tile_peak[q];
        return any;
    }

    int64_t pairs_in(int64_t first, int64_t last) const {
        int64_t sum = 0;
        for (int64_t slot = from; slot < to; ++slot) {
            const int64_t i = b * p.queries + slot - p.query_start;
            const int64_t lower = std::max<int64_t>(first, p.low[i]), upper = std::min<int64_t>(last, p.high[i]);
            if (lower >= upper) continue;
            const int32_t *before = p.before ? p.before + b * (p.keys + 1) : nullptr;
            sum += before ? before[upper] - before[lower] : upper - lower;
        }
        return sum;
    }

    // one step of the online softmax over the keys at hand
    void add(int64_t base, bool scored = false) {
        if (!scored) score(base);
        for (int64_t c = 0; c < columns; ++c) weigh(c);
        if (p.output) {
            const int64_t head = h / (p.query_heads / p.kv_heads);
            const bool as_it_lies = p.kind == FLOAT32 || pairs;
            for (int64_t n = 0; n < keys; ++n) {
                const uint8_t *v = row_of(p.value, p.v_batch, p.v_head, p.v_token, head, s.place[n]);
                if (!as_it_lies) widen(v, p.value_dim, p.kind, 1, s.wide_value.at + n * p.value_dim);
                s.value[n] = as_it_lies ? reinterpret_cast<const float *>(v) : s.wide_value.at + n * p.value_dim;
            }
            const Pass at{s, keys, columns, width, p.head_dim, p.value_dim};
#ifdef SPARSEPREFILL_PAIRS
            if (pairs) {
                pair_values(reinterpret_cast<const uint16_t *const *>(s.value.data()), keys, p.value_dim,
                            reinterpret_cast<uint32_t *>(s.wide_value.at));
                all_rows<ValuePairs>(p.value_dim, columns, at);
            } else
#endif
                all_rows<Values>(p.value_dim, columns, at);
        }
        keys = 0, masked = false;
    }

    // raise the maximum of one vector of queries and turn their logits into weights
    void weigh(int64_t c) {
        float *x = s.logits.at + c * LANES;
        const Float unit = all(factor), before = load(s.most + c * LANES);
        Float top = before, other = before;
        int64_t n = 0;
        for (; n + 2 <= keys; n += 2) {
            top = larger(load(x + n * width), top);
            other = larger(load(x + (n + 1) * width), other);
        }
        if (n < keys) top = larger(load(x + n * width), top);
        top = larger(other, top);
        store(s.most + c * LANES, top);
        // Exponents are counted from `base`, kept as it was rounded, so that a maximum that stays fades nothing. A query
        // that has seen no key yet has -inf as its maximum, and -inf - -inf is NaN.
        alignas(64) float minus_base[LANES], rise[LANES], earlier[LANES];
        store(earlier, before);
        for (int q = 0; q < LANES; ++q) {
            float &base = s.base[c * LANES + q];
            const float now = s.most[c * LANES + q], exponent = now == NOTHING ? 0.0f : now * factor;
            rise[q] = earlier[q] == NOTHING ? NOTHING : base - exponent;
            base = exponent, minus_base[q] = -exponent;
        }
        const Float fade = two_to(load(rise)), shift = load(minus_base);
        store(s.fade + c * LANES, fade);
        // sums of a piece begin anew: fewer roundings than one long sum
        Float mass = all(0.0f), more = all(0.0f);
        float *sum = s.mass + c * LANES;
#ifdef SPARSEPREFILL_PAIRS
        if (pairs) {
            int32_t *out = reinterpret_cast<int32_t *>(s.logits.at) + c * LANES;
            for (n = 0; n < keys; n += 2) {
                const Float even = two_to(times_plus(load(x + n * width), unit, shift));
                const Float odd =
                    n + 1 < keys ? two_to(times_plus(load(x + (n + 1) * width), unit, shift)) : all(0.0f);
                mass = plus(mass, even), more = plus(more, odd);
                store_int(out + n / 2 * width, paired(even, odd));  // never ahead of what is still to be read
            }
            store(sum, times_plus(load(sum), fade, plus(mass, more)));
            return;
        }
#endif
        for (n = 0; n + 2 <= keys; n += 2) {
            const Float even = two_to(times_plus(load(x + n * width), unit, shift));
            const Float odd = two_to(times_plus(load(x + (n + 1) * width), unit, shift));
            mass = plus(mass, even), more = plus(more, odd);
            store(x + n * width, even), store(x + (n + 1) * width, odd);
        }
        if (n < keys) {
            const Float last = two_to(times_plus(load(x + n * width), unit, shift));
            mass = plus(mass, last);
            store(x + n * width, last);
        }
        store(sum, times_plus(load(sum), fade, plus(mass, more)));
    }

    void finish() {
        for (int64_t q = 0; q < to - from; ++q) {
            const int64_t i = from + q - p.query_start;
            const bool seen = !(s.mass[q] == 0);  // NaN is passed on
            const float lse = seen ? (s.base[q] + std::log2(s.mass[q])) * LN_2 : NOTHING;
            p.lse[(b * p.query_heads + h) * p.queries + i] = lse;
            if (!p.output) continue;
            float share = seen ? 1 / s.mass[q] : 0;
            if (p.sinks && seen) share /= 1 + std::exp(p.sinks[h] - lse);
            uint8_t *out = p.output + (b * p.o_batch + h * p.o_head + i * p.o_token) * (p.kind == BFLOAT16 ? 2 : 4);
            const float *sum = s.output.at + q;
            if (p.kind == BFLOAT16)
                for (int64_t d = 0; d < p.value_dim; ++d)
                    reinterpret_cast<uint16_t *>(out)[d] = to_bfloat16(seen ? sum[d * width] * share : 0);
            else
                for (int64_t d = 0; d < p.value_dim; ++d)
                    reinterpret_cast<float *>(out)[d] = seen ? sum[d * width] * share : 0;
        }
    }
};

}  // namespace

// Rows that have queries are written, others are left as they are. Returns 0, 1 for a shape that it cannot serve, 2 where
// memory or threads run out.
extern "C" int sparseprefill_attention(const int64_t *shape, const void *const *pointers, const float *numbers,
                                       int64_t threads) {
    Problem p;
    p.batch = shape[0], p.query_heads = shape[1], p.kv_heads = shape[2], p.rows = shape[3], p.queries = shape[4];
    p.keys = shape[5], p.block_q = shape[6], p.block_k = shape[7], p.head_dim = shape[8], p.value_dim = shape[9];
    p.query_start = shape[10], p.kind = shape[11];
    p.q_batch = shape[12], p.q_head = shape[13], p.q_token = shape[14];
    p.k_batch = shape[15], p.k_head = shape[16], p.k_token = shape[17];
    p.v_batch = shape[18], p.v_head = shape[19], p.v_token = shape[20];
    p.o_batch = shape[21], p.o_head = shape[22], p.o_token = shape[23];
    const auto bytes = [&](int n) { return static_cast<const uint8_t *>(pointers[n]); };
    const auto ints = [&](int n) { return static_cast<const int32_t *>(pointers[n]); };
    const auto longs = [&](int n) { return static_cast<const int64_t *>(pointers[n]); };
    const auto floats = [&](int n) { return static_cast<const float *>(pointers[n]); };
    p.query = bytes(0), p.key = bytes(1), p.value = bytes(2);
    p.columns = ints(3), p.start = longs(4), p.count = ints(5), p.anchor = longs(6), p.begin = longs(7);
    p.end = longs(8), p.low = ints(9), p.high = ints(10), p.valid = bytes(11), p.before = ints(12);
    p.sinks = floats(13), p.only = bytes(14), p.visit = ints(15), p.skip = floats(16);
    p.skipped = const_cast<int64_t *>(longs(17)), p.output = const_cast<uint8_t *>(bytes(18));
    p.lse = const_cast<float *>(floats(19));
    p.scale = numbers[0], p.softcap = numbers[1];
    if (p.kind < FLOAT32 || p.kind > FLOAT16 || p.query_heads % p.kv_heads || threads < 1) return 1;
    if (pairs_of(p.kind) && p.head_dim % 2) return 1;
    if (p.skip && p.block_q > MOST_QUERIES) return 1;
    const int64_t parts = (p.block_q + MOST_QUERIES - 1) / MOST_QUERIES, heads = p.batch * p.query_heads;
    const bool well = in_threads(heads * p.rows * parts, threads, [&] {
        return [&p, parts, heads, s = std::make_shared<Scratch>(p)](int64_t n) {
            const int64_t row = p.rows - 1 - n / (heads * parts), head = n % (heads * parts) / parts;
            const int64_t b = head / p.query_heads, h = head % p.query_heads;  // rows that see most first
            if (p.only && !p.only[head]) return;
            const int64_t first = p.begin[b * p.rows + row] + n % parts * MOST_QUERIES;
            const int64_t last = std::min(p.end[b * p.rows + row], first + MOST_QUERIES);
            if (first < last) Item(p, *s, b, h, row, first, last).run();
        };
    });
    return well ? 0 : 2;
}
