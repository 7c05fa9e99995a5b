// Attention over listed blocks, forward only.
//
// What is computed stands in sparseprefill/contracts.py (AttentionInputs, BlockIndex). A work item is up to MOST_QUERIES
// queries of one row of the grid and one head. Queries lie across the lanes of a vector and stay in cache, transposed,
// for the whole item: logits are the products of a broadcast number of a key with vectors of queries, and the output,
// transposed too, grows by a broadcast number of a value times vectors of weights. So keys (and values, where an item is
// no more than COLUMNS vectors of queries) are read where they lie, in whatever order the list names them, the softmax needs
// no sum across lanes, and keys that nobody sees are left out one by one. PIECE keys are multiplied before the running
// maximum is raised.
//
// bfloat16 is multiplied in pairs where the processor can (vdpbf16ps), which takes pairs of values beside each other;
// else, as float16 always, it is widened piece by piece. Where the processor multiplies tiles (AMX), bfloat16 goes another
// way, as tiles want both operands in an order of their own: see Packed and TileItem. Plain C interface, no dependencies.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "native_tiles.h"
#include "native_vectors.h"

namespace {

using namespace sparseprefill;

constexpr int64_t MOST_QUERIES = 64;
constexpr int TALL = 6;  // TALL x COLUMNS sums stay in registers
// Where the queries of an item are more than COLUMNS vectors they lie in strips of that many, one after the other, so that what
// a product walks along lies together. A strip's weights and the values that it meets are to fit a core's first cache.
constexpr bool STRIPS = COLUMNS * LANES < MOST_QUERIES;
constexpr int64_t PIECE = STRIPS ? 128 : 256;
static_assert(PIECE >= MOST_QUERIES, "queries are widened where keys will be");
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

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

// asks for new memory in large pages: to touch it in small ones takes longer than to write it
inline void in_large_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr int64_t PAGE = 1 << 21;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
    if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#endif
}

// what one thread works with
struct Scratch {
    int64_t piece;
    Room<float> query;               // strips of [head_dim, width]; or pairs of bfloat16
    Room<float> logits;              // strips of [piece, width], then weights, or pairs of bfloat16 in its first half
    Room<float> output;              // strips of [value_dim, width]
    Room<float> wide_key;            // [piece, head_dim] where they must be widened; before that the queries
    Room<float> wide_value;          // [piece, value_row] where they are widened or copied; pairs of values
    int64_t value_row;               // an odd number of cache lines: rows a power of two apart would share a few places
    std::vector<int64_t> place;      // [2 * piece] slots of the keys at hand and of those that come after them
    std::vector<uint8_t> edge;       // [2 * piece] must it be masked?
    std::vector<const float *> key, value;
    std::vector<const uint8_t *> value_at, next_key;  // [piece] where they lie
    alignas(64) float low[MOST_QUERIES], high[MOST_QUERIES];       // from the row's first slot
    alignas(64) float most[MOST_QUERIES], base[MOST_QUERIES], mass[MOST_QUERIES], fade[MOST_QUERIES];
    alignas(64) float peak[MOST_QUERIES], tile_peak[MOST_QUERIES];  // where tiles may be skipped

    explicit Scratch(const Problem &p)
        : piece(p.skip ? std::max(PIECE, p.block_k) : PIECE), value_row(((p.value_dim + 15) / 16 | 1) * 16) {
        query.hold((p.head_dim + 1) * MOST_QUERIES);
        logits.hold(piece * MOST_QUERIES);
        output.hold(p.value_dim * MOST_QUERIES);
        wide_key.hold(piece * p.head_dim);
        wide_value.hold((piece + 1) * value_row);
        place.resize(2 * piece), edge.resize(2 * piece);
        key.resize(piece), value.resize(piece), value_at.resize(piece), next_key.resize(piece);
    }
};

#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)
#define SPARSEPREFILL_SQUARES  // 16 x 16 numbers can be transposed in registers

// rows and columns of 16 x 16 numbers of 32 bits exchanged
inline void transpose(Int *row) {
    alignas(64) static constexpr int32_t UPPER[4][16] = {
        {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
        {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
        {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
        {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
    };
    for (int step = 0, apart = 1; step < 4; ++step, apart *= 2) {
        const Int upper = load_int(UPPER[step]), lower = _mm512_add_epi32(upper, all_int(apart));
        for (int n = 0; n < 8; ++n) {
            const int r = n / apart * 2 * apart + n % apart;
            const Int a = row[r], b = row[r + apart];
            row[r] = _mm512_permutex2var_epi32(a, upper, b), row[r + apart] = _mm512_permutex2var_epi32(a, lower, b);
        }
    }
}

#elif defined(__AVX2__) && defined(__FMA__)
#define SPARSEPREFILL_SQUARES  // 8 x 8 numbers

inline void transpose(Int *row) {
    Float pairs[8], fours[8];  // numbers of two rows, then of four, beside each other
    for (int n = 0; n < 8; n += 2) {
        const Float a = _mm256_castsi256_ps(row[n]), b = _mm256_castsi256_ps(row[n + 1]);
        pairs[n] = _mm256_unpacklo_ps(a, b), pairs[n + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int n = 0; n < 8; n += 4)
        for (int m = 0; m < 2; ++m) {
            const Float a = pairs[n + m], b = pairs[n + 2 + m];
            fours[n + 2 * m] = _mm256_shuffle_ps(a, b, 0x44), fours[n + 2 * m + 1] = _mm256_shuffle_ps(a, b, 0xee);
        }
    for (int n = 0; n < 4; ++n) {
        row[n] = _mm256_castps_si256(_mm256_permute2f128_ps(fours[n], fours[n + 4], 0x20));
        row[n + 4] = _mm256_castps_si256(_mm256_permute2f128_ps(fours[n], fours[n + 4], 0x31));
    }
}

#endif

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
    if constexpr (C == 1)  // or too few sums are under way
        for (; row + 2 * TALL <= rows; row += 2 * TALL) Work<2 * TALL, C>::run(row, column, given...);
    for (; row + TALL <= rows && rows - row != 7 && rows - row != 8; row += TALL) Work<TALL, C>::run(row, column, given...);
    if (rows - row > TALL) Work<4, C>::run(row, column, given...), row += 4;  // 4 and 4 of 8, not 6 and 2
    switch (rows - row) {
        case 5: Work<5, C>::run(row, column, given...); break;
        case 4: Work<4, C>::run(row, column, given...); break;
        case 3: Work<3, C>::run(row, column, given...); break;
        case 2: Work<2, C>::run(row, column, given...); break;
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

// Rows that are fetched while something else is computed: a list jumps, so that no processor guesses its next tile. Loads that
// nobody waits for, not prefetches, which brought nothing where both were measured (Zen 3).
struct Ahead {
    const uint8_t *const *row;
    int64_t count, bytes;

    // the share of steps [from, to) of `all`
    void fetch(int64_t from, int64_t to, int64_t all) const {
        for (int64_t n = count * from / all; n < count * to / all; ++n)
            for (int64_t at = 0; at < bytes; at += 64) static_cast<void>(*static_cast<const volatile uint8_t *>(row[n] + at));
    }
};

struct Pass {  // one piece of one item
    Scratch &s;
    int64_t keys, columns, width, head_dim, value_dim;
    Ahead ahead = {};

    // where a column of vectors begins in strips of so many rows
    int64_t place(int64_t column, int64_t rows) const { return column / COLUMNS * rows * width + column % COLUMNS * LANES; }

    void fetch(int64_t row, int64_t count, int64_t rows, int64_t column) const {
        const int64_t from = column / COLUMNS * rows + row;
        ahead.fetch(from, from + count, (columns + COLUMNS - 1) / COLUMNS * rows);
    }
};

template <int R, int C>
struct Scores {
    static void run(int64_t row, int64_t column, const Pass &at) {
        at.fetch(row, R, at.keys, column);
        score_rows<R, C>(at.s.key.data() + row, at.head_dim, at.s.query.at + at.place(column, at.head_dim), at.width,
                         at.s.logits.at + at.place(column, at.s.piece) + row * at.width);
    }
};

template <int R, int C>
struct Values {
    static void run(int64_t row, int64_t column, const Pass &at) {
        at.fetch(row, R, at.value_dim, column);
        value_rows<R, C>(at.s.value.data(), row, at.keys, at.s.logits.at + at.place(column, at.s.piece), at.width,
                         at.s.fade + column * LANES, at.s.output.at + at.place(column, at.value_dim) + row * at.width);
    }
};

#ifdef SPARSEPREFILL_PAIRS

template <int R, int C>
struct ScorePairs {
    static void run(int64_t row, int64_t column, const Pass &at) {
        at.fetch(row, R, at.keys, column);
        score_pairs<R, C>(at.s.key.data() + row, at.head_dim / 2,
                          reinterpret_cast<const int32_t *>(at.s.query.at) + at.place(column, at.head_dim / 2), at.width,
                          at.s.logits.at + at.place(column, at.s.piece) + row * at.width);
    }
};

template <int R, int C>
struct ValuePairs {
    static void run(int64_t row, int64_t column, const Pass &at) {
        at.fetch(row, R, at.value_dim, column);
        value_pairs<R, C>(reinterpret_cast<const int32_t *>(at.s.wide_value.at) + row, at.value_dim, (at.keys + 1) / 2,
                          reinterpret_cast<const int32_t *>(at.s.logits.at) + at.place(column, at.s.piece), at.width,
                          at.s.fade + column * LANES, at.s.output.at + at.place(column, at.value_dim) + row * at.width);
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

constexpr bool in_pairs(int64_t kind) {
#ifdef SPARSEPREFILL_PAIRS
    return kind == BFLOAT16;
#else
    return kind != kind;
#endif
}

// ---- one item

// numbers of a row in float32
void widen(const uint8_t *row, int64_t count, int64_t kind, float *out) {
    if (kind == FLOAT32) {
        std::memcpy(out, row, 4 * count);
        return;
    }
    const uint16_t *from = reinterpret_cast<const uint16_t *>(row);
    int64_t n = 0;
#ifdef SPARSEPREFILL_HALVES
    if (kind == FLOAT16)
        for (; n + LANES <= count; n += LANES) store(out + n, load_halves(from + n));
#endif
#ifdef SPARSEPREFILL_BRAINS
    if (kind == BFLOAT16)
        for (; n + LANES <= count; n += LANES) store(out + n, load_brains(from + n));
#endif
    for (; n < count; ++n) out[n] = widened(from[n], kind == BFLOAT16);
}

uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// products soft-capped; a multiple of LANES
void cap(float *x, int64_t count, float scale, float softcap) {
    const Float unit = all(scale / softcap);
    for (int64_t n = 0; n < count; n += LANES) store(x + n, times(tanh_of(times(load(x + n), unit)), all(softcap)));
}

// what the queries of slots [from, to) see: keys [low, high), each its own
struct Bounds {
    int64_t low_least, low_most = 0, high_least, high_most = 0;

    Bounds(const Problem &p, int64_t b, int64_t from, int64_t to) : low_least(p.keys), high_least(p.keys) {
        for (int64_t i = b * p.queries + from - p.query_start; i < b * p.queries + to - p.query_start; ++i) {
            low_most = std::max<int64_t>(low_most, p.low[i]), low_least = std::min<int64_t>(low_least, p.low[i]);
            high_most = std::max<int64_t>(high_most, p.high[i]), high_least = std::min<int64_t>(high_least, p.high[i]);
        }
    }
};

// writes a query's lse and gives what its sum of weighted values is to be multiplied by, 0 where it has seen nothing: `mass`
// is the sum of its weights, exponents of two counted from `base`
float share_of(const Problem &p, int64_t b, int64_t h, int64_t slot, float base, float mass) {
    const bool seen = !(mass == 0);  // NaN is passed on
    const float lse = seen ? (base + std::log2(mass)) * LN_2 : NOTHING;
    p.lse[(b * p.query_heads + h) * p.queries + slot - p.query_start] = lse;
    return (seen ? 1 / mass : 0) / (p.sinks && seen ? 1 + std::exp(p.sinks[h] - lse) : 1);
}

uint8_t *output_of(const Problem &p, int64_t b, int64_t h, int64_t slot) {
    const int64_t at = b * p.o_batch + h * p.o_head + (slot - p.query_start) * p.o_token;
    return p.output + at * (p.kind == BFLOAT16 ? 2 : 4);
}

// pairs of the queries of slots [from, to) and the keys [first, last) that they see
int64_t pairs_of(const Problem &p, int64_t b, int64_t from, int64_t to, int64_t first, int64_t last) {
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

// does a tile matter, whose largest logits these are, one for each query of slots [from, to)? If so, raises their peaks.
// One that is NaN is not above anything, and matters.
bool raise(const Problem &p, int64_t b, int64_t from, int64_t to, float threshold, const float *tile, float *peak) {
    bool any = false;
    for (int64_t q = 0; q < to - from; ++q)
        any |= (!p.valid || p.valid[b * p.keys + from + q]) && tile[q] != NOTHING && !(tile[q] <= peak[q] + threshold);
    if (any)
        for (int64_t q = 0; q < to - from; ++q)
            if (!(tile[q] <= peak[q]) && peak[q] == peak[q]) peak[q] = tile[q];
    return any;
}

struct Item {
    const Problem &p;
    Scratch &s;
    int64_t b, h, row;
    int64_t from, to;  // slots of its queries
    int64_t columns, width;  // vectors of queries, and the queries of a strip
    bool pairs;
    float factor;   // what logits in memory are multiplied by to be exponents of two
    int64_t kv_head;
    int64_t step = PIECE;  // keys at a time; more where tiles may be skipped, which are whole blocks
    int64_t held = 0;  // keys whose places are known; the first `step` of them are at hand

    Item(const Problem &problem, Scratch &scratch, int64_t batch, int64_t head, int64_t r, int64_t first, int64_t last)
        : p(problem), s(scratch), b(batch), h(head), row(r), from(first), to(last) {
        columns = (to - from + LANES - 1) / LANES, width = std::min<int64_t>(columns, COLUMNS) * LANES;
        pairs = in_pairs(p.kind);
        kv_head = h / (p.query_heads / p.kv_heads);
        factor = p.softcap > 0 ? LOG2_E : p.scale * LOG2_E;
    }

    void run() {
        const Bounds seen(p, b, from, to);
        const int64_t base = seen.low_least;  // masks are in float, exact up to 2 ** 24 from here
        for (int64_t n = 0; n < columns * LANES; ++n) {
            s.most[n] = NOTHING, s.base[n] = 0, s.mass[n] = 0, s.peak[n] = NOTHING;
            s.low[n] = 1, s.high[n] = 0;  // beyond the item: nothing
            if (from + n >= to) continue;
            const int64_t i = b * p.queries + from + n - p.query_start;
            s.low[n] = static_cast<float>(std::min<int64_t>(p.low[i] - base, 1 << 24));
            s.high[n] = static_cast<float>(std::min<int64_t>(p.high[i] - base, 1 << 24));
        }
        if (p.output) std::fill_n(s.output.at, p.value_dim * strips() * width, 0.0f);
        const int64_t list = (b * p.query_heads + h) * p.rows + row;
        const float threshold = p.skip ? p.skip[list] : NOTHING;
        const bool skips = threshold > NOTHING;
        if (skips) step = s.piece;
        const int32_t *block = (skips ? p.visit : p.columns) + p.start[list];
        int64_t dropped = 0;
        bool ready = false;
        const auto prepare = [&] {
            next_keys(0, at_hand()).fetch(0, 1, 1);
            pack_query();
            ready = true;
        };
        for (int64_t t = 0; t < p.count[list]; ++t) {
            const int64_t begin = p.anchor[b] + block[t] * p.block_k, end = begin + p.block_k;
            const int64_t first = std::max(begin, seen.low_least), last = std::min(end, seen.high_most);
            const bool holes = p.valid && first < last &&
                               p.before[b * (p.keys + 1) + last] - p.before[b * (p.keys + 1) + first] < last - first;
            const bool edge = first < seen.low_most || last > seen.high_least;
            for (int64_t k = first; k < last; ++k) {
                if (holes && !p.valid[b * p.keys + k]) continue;
                if (held == 2 * step) {
                    if (!ready) prepare();
                    add(base);
                }
                s.place[held] = k, s.edge[held] = edge, ++held;
            }
            if (!skips) continue;
            if (!ready) prepare();
            if (matters(threshold, base))
                add(base, true);
            else
                dropped += pairs_of(p, b, from, to, first, last), held = 0;
        }
        if (held && !ready) prepare();
        while (held) add(base);
        if (p.skipped) p.skipped[list] += dropped;
        finish();
    }

  private:
    int64_t strips() const { return (columns + COLUMNS - 1) / COLUMNS; }
    int64_t at_hand() const { return std::min(held, step); }
    Pass pass() const { return {s, at_hand(), columns, width, p.head_dim, p.value_dim}; }
    const uint8_t *key_at(int64_t n) const { return row_of(p.key, p.k_batch, p.k_head, p.k_token, kv_head, s.place[n]); }

    Ahead next_keys(int64_t from, int64_t to) {
        for (int64_t n = from; n < to; ++n) s.next_key[n - from] = key_at(n);
        return {s.next_key.data(), to - from, p.head_dim * p.width()};
    }

    const uint8_t *row_of(const uint8_t *tensor, int64_t sb, int64_t sh, int64_t st, int64_t head, int64_t t) const {
        return tensor + (b * sb + head * sh + t * st) * p.width();
    }

    void pack_query() {
        const int64_t dim = p.head_dim;
        const auto row = [&](int64_t n) {
            return row_of(p.query, p.q_batch, p.q_head, p.q_token, h, from + n - p.query_start);
        };
        if (pairs || p.kind == FLOAT32) {
            pack_words(pairs ? dim / 2 : dim, row);
            return;
        }
        for (int64_t n = 0; n < to - from; ++n) widen(row(n), dim, p.kind, s.wide_key.at + n * dim);
        pack_words(dim, [&](int64_t n) { return reinterpret_cast<const uint8_t *>(s.wide_key.at + n * dim); });
    }

    // rows of 32-bit words, numbers or pairs, transposed; queries beyond the item are zeros
    template <class Row>
    void pack_words(int64_t words, const Row &row) {
        for (int64_t begin = 0; begin < columns * LANES; begin += LANES) {
            uint32_t *out = reinterpret_cast<uint32_t *>(s.query.at) + pass().place(begin / LANES, words);
            const int64_t some = std::clamp<int64_t>(to - from - begin, 0, LANES);
            int64_t d = 0;
#ifdef SPARSEPREFILL_SQUARES
            for (; d + LANES <= words; d += LANES) {
                Int square[LANES];
                for (int n = 0; n < LANES; ++n) square[n] = n < some ? load_int(row(begin + n) + 4 * d) : all_int(0);
                transpose(square);
                for (int r = 0; r < LANES; ++r) store_int(out + (d + r) * width, square[r]);
            }
#endif
            for (; d < words; ++d)
                for (int64_t n = 0; n < LANES; ++n) {
                    uint32_t &word = out[d * width + n];
                    if (n < some)
                        std::memcpy(&word, row(begin + n) + 4 * d, 4);
                    else
                        word = 0;
                }
        }
    }

    // logits of the keys at hand, soft-capped and masked, before the scale where there is no soft-cap
    void score(int64_t base) {
        const int64_t keys = at_hand();
        for (int64_t n = 0; n < keys; ++n) {
            const uint8_t *k = key_at(n);
            if (p.kind != FLOAT32 && !pairs) {
                float *wide = s.wide_key.at + n * p.head_dim;
                widen(k, p.head_dim, p.kind, wide);
                s.key[n] = wide;
            } else {
                s.key[n] = reinterpret_cast<const float *>(k);
            }
            if (p.output) s.value_at[n] = row_of(p.value, p.v_batch, p.v_head, p.v_token, kv_head, s.place[n]);
        }
        Pass at = pass();
        at.ahead = p.output ? Ahead{s.value_at.data(), keys, p.value_dim * p.width()} : next_keys(keys, std::min(held, 2 * keys));
#ifdef SPARSEPREFILL_PAIRS
        if (pairs)
            all_rows<ScorePairs>(keys, columns, at);
        else
#endif
            all_rows<Scores>(keys, columns, at);
        for (int64_t c = 0; p.softcap > 0 && c < columns; ++c)
            for (int64_t n = 0; n < keys; ++n)
                cap(s.logits.at + at.place(c, s.piece) + n * width, LANES, p.scale, p.softcap);
        for (int64_t n = 0; n < keys; ++n) {
            if (!s.edge[n]) continue;
            const Float key = all(static_cast<float>(s.place[n] - base));
            for (int64_t c = 0; c < columns; ++c) {
                float *x = s.logits.at + at.place(c, s.piece) + n * width;
                store(x, visible(load(x), load(s.low + c * LANES), load(s.high + c * LANES), key));
            }
        }
    }

    // does any query have a logit above its maximum so far and the threshold? Leaves the logits for `add`.
    bool matters(float threshold, int64_t base) {
        score(base);
        const int64_t keys = held;
        const float unit = p.softcap > 0 ? 1.0f : p.scale;
        for (int64_t q = 0; q < to - from; ++q) {
            const float *own = s.logits.at + pass().place(q / LANES, s.piece) + q % LANES;
            float top = NOTHING;
            for (int64_t n = 0; n < keys; ++n) {
                const float x = own[n * width];
                if (!(x <= top)) top = x;  // NaN stays
                if (top != top) break;
            }
            s.tile_peak[q] = top * unit;
        }
        return raise(p, b, from, to, threshold, s.tile_peak, s.peak);
    }

    // one step of the online softmax over the keys at hand
    void add(int64_t base, bool scored = false) {
        if (!scored) score(base);
        const int64_t keys = at_hand();
        for (int64_t c = 0; c < columns; ++c) weigh(c);
        if (p.output) {
            // every strip reads the values, some channels at a time
            const bool as_it_lies = pairs || (p.kind == FLOAT32 && strips() == 1);
            for (int64_t n = 0; n < keys; ++n) {
                float *wide = s.wide_value.at + n * s.value_row;
                if (!as_it_lies) widen(s.value_at[n], p.value_dim, p.kind, wide);
                s.value[n] = as_it_lies ? reinterpret_cast<const float *>(s.value_at[n]) : wide;
            }
            Pass at = pass();
            at.ahead = next_keys(keys, std::min(held, keys + step));
#ifdef SPARSEPREFILL_PAIRS
            if (pairs) {
                pair_values(reinterpret_cast<const uint16_t *const *>(s.value.data()), keys, p.value_dim,
                            reinterpret_cast<uint32_t *>(s.wide_value.at));
                all_rows<ValuePairs>(p.value_dim, columns, at);
            } else
#endif
                all_rows<Values>(p.value_dim, columns, at);
        }
        std::copy(s.place.begin() + keys, s.place.begin() + held, s.place.begin());
        std::copy(s.edge.begin() + keys, s.edge.begin() + held, s.edge.begin());
        held -= keys;
    }

    // raise the maximum of one vector of queries and turn their logits into weights
    void weigh(int64_t c) {
        const int64_t keys = at_hand();
        float *x = s.logits.at + pass().place(c, s.piece);
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
            int32_t *out = reinterpret_cast<int32_t *>(x);
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
        for (int64_t begin = 0; begin < to - from; begin += LANES) {
            const int64_t some = std::min<int64_t>(to - from - begin, LANES);
            float share[LANES];
            uint8_t *out[LANES];
            for (int64_t n = 0; n < some; ++n) {
                share[n] = share_of(p, b, h, from + begin + n, s.base[begin + n], s.mass[begin + n]);
                out[n] = p.output ? output_of(p, b, h, from + begin + n) : nullptr;
            }
            if (!p.output) continue;
            const float *sum = s.output.at + pass().place(begin / LANES, p.value_dim);
            int64_t d = 0;
#ifdef SPARSEPREFILL_SQUARES
            for (; d + LANES <= p.value_dim; d += LANES) {
                Int square[LANES];
                for (int r = 0; r < LANES; ++r) square[r] = load_int(sum + (d + r) * width);
                transpose(square);
                for (int64_t n = 0; n < some; ++n) {  // where nothing was seen no sum is
                    Float x;
                    std::memcpy(&x, &square[n], sizeof x);
                    x = share[n] == 0 ? all(0.0f) : times(x, all(share[n]));
                    write(out[n], d, x);
                }
            }
#endif
            for (; d < p.value_dim; ++d)
                for (int64_t n = 0; n < some; ++n) {
                    const float x = share[n] == 0 ? 0 : sum[d * width + n] * share[n];
                    if (p.kind == BFLOAT16)
                        reinterpret_cast<uint16_t *>(out[n])[d] = to_bfloat16(x);
                    else
                        reinterpret_cast<float *>(out[n])[d] = x;
                }
        }
    }

#ifdef SPARSEPREFILL_SQUARES
    void write(uint8_t *out, int64_t d, Float x) const {
#ifdef SPARSEPREFILL_PAIRS
        if (p.kind == BFLOAT16) {
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + 2 * d), (__m256i)_mm512_cvtneps_pbh(x));
            return;
        }
#endif
        if (p.kind == BFLOAT16) {
            float wide[LANES];
            store(wide, x);
            for (int n = 0; n < LANES; ++n) reinterpret_cast<uint16_t *>(out)[d + n] = to_bfloat16(wide[n]);
            return;
        }
        store(reinterpret_cast<float *>(out) + d, x);
    }
#endif
};

#ifdef SPARSEPREFILL_TILES

// ---- the same with tiles: queries in rows, keys (then channels of the output) in columns

constexpr int64_t GROUP = 32;  // keys that are packed together: what one product of tiles sums over
constexpr int64_t MOST_TILES = MOST_QUERIES / TILE_ROWS;
static_assert(GROUP == 2 * LANES && LANES == TILE_ROWS, "a vector of 32-bit numbers is a row of a tile");

// Keys and values in the order in which tiles are read, packed once a call, where one list names them at least: in groups of
// GROUP from the batch row's anchor on. Keys that no query sees are zeros, whatever they hold: 0 times NaN is NaN.
struct Packed {
    const Problem &p;
    int64_t groups;                  // of a batch row, at most
    int64_t key_steps, value_tiles;  // GROUP channels, and TILE_ROWS channels of the values, each; filled up with zeros
    int64_t key_bytes, value_bytes;  // of a group: tiles [keys / 16, key_steps], [value_tiles]
    Room<uint8_t> key, value;        // [batch, kv_heads, groups, bytes]
    std::vector<uint8_t> named;      // [batch, kv_heads, groups]
    std::vector<Bounds> seen;        // [batch]

    explicit Packed(const Problem &problem) : p(problem) {
        groups = (p.keys - *std::min_element(p.anchor, p.anchor + p.batch) + GROUP - 1) / GROUP;
        key_steps = (p.head_dim + GROUP - 1) / GROUP, value_tiles = (p.value_dim + TILE_ROWS - 1) / TILE_ROWS;
        key_bytes = GROUP / TILE_ROWS * key_steps * TILE_BYTES, value_bytes = p.output ? value_tiles * TILE_BYTES : 0;
        const int64_t all = p.batch * p.kv_heads * groups;
        key.hold(all * key_bytes), value.hold(all * value_bytes);
        in_large_pages(key.at, all * key_bytes), in_large_pages(value.at, all * value_bytes);
        named.resize(all);
        for (int64_t b = 0; b < p.batch; ++b) seen.emplace_back(p, b, p.query_start, p.query_start + p.queries);
    }

    int64_t place(int64_t b, int64_t kv_head, int64_t group) const { return (b * p.kv_heads + kv_head) * groups + group; }

    // marks what the lists of a KV head's query heads name
    void name(int64_t b, int64_t kv_head) {
        const int64_t together = p.query_heads / p.kv_heads, most = p.keys - p.anchor[b];
        uint8_t *mark = named.data() + place(b, kv_head, 0);
        for (int64_t head = b * p.query_heads + kv_head * together, n = 0; n < together * p.rows; ++n) {
            const int64_t own = head + n / p.rows, row = n % p.rows;
            if ((p.only && !p.only[own]) || p.begin[b * p.rows + row] >= p.end[b * p.rows + row]) continue;
            const int32_t *block = p.columns + p.start[own * p.rows + row];
            for (int64_t t = 0; t < p.count[own * p.rows + row]; ++t) {
                const int64_t first = block[t] * p.block_k, last = std::min(first + p.block_k, most);
                for (int64_t group = first / GROUP; group * GROUP < last; ++group) mark[group] = 1;
            }
        }
    }

    void pack(int64_t b, int64_t kv_head, int64_t group) {
        const int64_t at = place(b, kv_head, group);
        if (!named[at]) return;
        const uint16_t *k[GROUP], *v[GROUP];
        for (int64_t n = 0; n < GROUP; ++n) {
            const int64_t slot = p.anchor[b] + group * GROUP + n;
            const bool real = slot >= seen[b].low_least && slot < seen[b].high_most && (!p.valid || p.valid[b * p.keys + slot]);
            const auto row = [&](const uint8_t *tensor, int64_t sb, int64_t sh, int64_t st) {
                return real ? reinterpret_cast<const uint16_t *>(tensor) + b * sb + kv_head * sh + slot * st : nullptr;
            };
            k[n] = row(p.key, p.k_batch, p.k_head, p.k_token), v[n] = row(p.value, p.v_batch, p.v_head, p.v_token);
        }
        uint8_t *out = key.at + at * key_bytes;
        for (int64_t half = 0; half < GROUP; half += TILE_ROWS)
            for (int64_t c = 0; c < key_steps * GROUP; c += GROUP, out += TILE_BYTES) {
                Int row[TILE_ROWS];
                for (int n = 0; n < TILE_ROWS; ++n) row[n] = some_halves(k[half + n], c, p.head_dim);
                transpose(row);
                for (int r = 0; r < TILE_ROWS; ++r) store_int(out + r * TILE_ROW_BYTES, row[r]);
            }
        if (!p.output) return;
        out = value.at + at * value_bytes;
        for (int64_t c = 0; c < p.value_dim; c += GROUP, out += 2 * TILE_BYTES)
            for (int r = 0; r < TILE_ROWS; ++r) {
                const Int even = some_halves(v[2 * r], c, p.value_dim), odd = some_halves(v[2 * r + 1], c, p.value_dim);
                store_int(out + r * TILE_ROW_BYTES, interleaved(even, odd, 0));
                if (c + TILE_ROWS < p.value_dim) store_int(out + TILE_BYTES + r * TILE_ROW_BYTES, interleaved(even, odd, 16));
            }
    }

  private:
    // numbers [c, c + 32) of a row, zeros from its end on, and where there is no row
    static Int some_halves(const uint16_t *row, int64_t c, int64_t dim) {
        if (!row) return all_int(0);
        const int64_t left = dim - c;
        return _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, row + c);
    }

    // pairs [first, first + 16) of two rows
    static Int interleaved(Int even, Int odd, int first) {
        alignas(64) static constexpr uint16_t ORDER[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        return _mm512_permutex2var_epi16(even, _mm512_add_epi16(load_int(ORDER), _mm512_set1_epi16(first)), odd);
    }
};

// what one thread works with
struct TileScratch {
    const int64_t most_groups;            // at hand; where tiles may be skipped, of a block that begins and ends in a group
    const int64_t score_row, output_row;  // rows a little apart, so that they do not share a place in cache
    Room<uint8_t> query;   // tiles [MOST_TILES, key_steps]
    Room<float> logits;    // [MOST_QUERIES, score_row]
    Room<uint8_t> weight;  // tiles [most_groups, MOST_TILES]
    Room<float> output;    // [MOST_QUERIES, output_row]
    struct Group {
        int64_t number;
        int64_t first, last;  // keys of it that are listed, from its first
    };
    std::vector<Group> group;            // [most_groups]
    std::vector<const uint8_t *> value;  // [most_groups]
    alignas(64) float most[MOST_QUERIES], fade[MOST_QUERIES], minus_base[MOST_QUERIES];
    alignas(64) float mass[MOST_QUERIES][LANES];
    alignas(64) float peak[MOST_QUERIES], tile_peak[MOST_QUERIES];  // where tiles may be skipped
    TileThread tiles;

    explicit TileScratch(const Packed &packed)
        : most_groups(std::max(PIECE / GROUP, packed.p.skip ? packed.p.block_k / GROUP + 2 : 0)),
          score_row(most_groups * GROUP + LANES), output_row(packed.value_tiles * TILE_ROWS + LANES), group(most_groups),
          value(most_groups) {
        query.hold(MOST_TILES * packed.key_steps * TILE_BYTES);
        logits.hold(MOST_QUERIES * score_row);
        weight.hold(most_groups * MOST_TILES * TILE_BYTES);
        std::memset(weight.at, 0, most_groups * MOST_TILES * TILE_BYTES);  // of the rows that no query fills
        output.hold(MOST_QUERIES * output_row);
    }
};

struct TileItem {
    const Problem &p;
    const Packed &packed;
    TileScratch &s;
    int64_t b, h, from, to;  // slots of its queries
    int64_t queries, tiles, kv_head;
    float factor;  // what logits in memory are multiplied by to be exponents of two
    Bounds seen;
    int64_t held = 0, scored = 0;  // groups at hand, and how many of them have logits
    bool fresh = true;  // nothing is in the output yet

    TileItem(const Packed &packing, TileScratch &scratch, int64_t batch, int64_t head, int64_t first, int64_t last)
        : p(packing.p), packed(packing), s(scratch), b(batch), h(head), from(first), to(last), seen(p, b, from, to) {
        queries = to - from, tiles = (queries + TILE_ROWS - 1) / TILE_ROWS;
        kv_head = h / (p.query_heads / p.kv_heads);
        factor = p.softcap > 0 ? LOG2_E : p.scale * LOG2_E;
    }

    void run(int64_t row) {
        for (int64_t q = 0; q < MOST_QUERIES; ++q) {
            s.most[q] = NOTHING, s.minus_base[q] = 0, s.peak[q] = NOTHING;
            std::fill_n(s.mass[q], LANES, 0.0f);
        }
        copy_query();
        const int64_t list = (b * p.query_heads + h) * p.rows + row, anchor = p.anchor[b];
        const float threshold = p.skip ? p.skip[list] : NOTHING;
        const bool skips = threshold > NOTHING;
        const int32_t *block = (skips ? p.visit : p.columns) + p.start[list];
        int64_t dropped = 0;
        for (int64_t t = 0; t < p.count[list]; ++t) {
            const int64_t begin = block[t] * p.block_k;
            const int64_t first = std::max(begin, seen.low_least - anchor);
            const int64_t last = std::min(begin + p.block_k, seen.high_most - anchor);
            if (first >= last) continue;
            if (skips && held + (last - 1) / GROUP - first / GROUP + 1 > s.most_groups) add();
            const int64_t before = held;
            for (int64_t n = first / GROUP; n * GROUP < last; ++n) {
                const int64_t lower = std::max<int64_t>(first - n * GROUP, 0), upper = std::min(last - n * GROUP, GROUP);
                TileScratch::Group *left = held && !skips ? &s.group[held - 1] : nullptr;
                if (left && left->number == n && left->last == lower) {
                    left->last = upper;
                    continue;
                }
                if (held == s.most_groups) add();
                s.group[held++] = {n, lower, upper};
            }
            if (skips && !matters(before, threshold))
                dropped += pairs_of(p, b, from, to, anchor + first, anchor + last), held = scored = before;
        }
        if (held) add();
        if (p.skipped) p.skipped[list] += dropped;
        for (int64_t q = 0; q < queries; ++q) finish(q);
    }

  private:
    void finish(int64_t q) {
        const float share = share_of(p, b, h, from + q, -s.minus_base[q], _mm512_reduce_add_ps(load(s.mass[q])));
        if (!p.output) return;
        uint16_t *out = reinterpret_cast<uint16_t *>(output_of(p, b, h, from + q));
        const float *sum = s.output.at + q * s.output_row;
        for (int64_t c = 0; c < p.value_dim; c += LANES) {
            const Float x = share == 0 ? all(0.0f) : times(load(sum + c), all(share));  // where nothing was seen no sum is
            const __mmask16 kept = static_cast<__mmask16>((1u << std::min<int64_t>(p.value_dim - c, LANES)) - 1);
            _mm256_mask_storeu_epi16(out + c, kept, (__m256i)_mm512_cvtneps_pbh(x));
        }
    }

    void copy_query() {
        std::memset(s.query.at, 0, tiles * packed.key_steps * TILE_BYTES);
        for (int64_t q = 0; q < queries; ++q) {
            const uint8_t *own = p.query + (b * p.q_batch + h * p.q_head + (from + q - p.query_start) * p.q_token) * 2;
            uint8_t *out = s.query.at + q / TILE_ROWS * packed.key_steps * TILE_BYTES + q % TILE_ROWS * TILE_ROW_BYTES;
            for (int64_t c = 0; c < p.head_dim; c += GROUP, out += TILE_BYTES)
                std::memcpy(out, own + 2 * c, 2 * std::min(GROUP, p.head_dim - c));
        }
    }

    // does any query have a logit above its maximum so far and the threshold in the groups from `begin` on?
    bool matters(int64_t begin, float threshold) {
        score();
        for (int64_t q = 0; q < queries; ++q) {
            const float *x = s.logits.at + q * s.score_row;
            Float top = all(NOTHING);
            __mmask16 strange = 0;
            for (int64_t n = begin * GROUP; n < held * GROUP; n += LANES) {
                top = larger(load(x + n), top);
                strange |= _mm512_cmp_ps_mask(load(x + n), load(x + n), _CMP_UNORD_Q);
            }
            const float unit = p.softcap > 0 ? 1.0f : p.scale;
            s.tile_peak[q] = strange ? std::numeric_limits<float>::quiet_NaN() : largest(top) * unit;
        }
        return raise(p, b, from, to, threshold, s.tile_peak, s.peak);
    }

    // logits of the groups that have none yet, soft-capped and masked, before the scale where there is no soft-cap
    void score() {
        for (int64_t g = scored; g < held; ++g) {
            const uint8_t *key = packed.key.at + packed.place(b, kv_head, s.group[g].number) * packed.key_bytes;
            for (int64_t m = 0; m < tiles; m += 2) {
                const auto multiply = tiles - m > 1 ? &TileItem::products<2> : &TileItem::products<1>;
                (this->*multiply)(m, g, key);
            }
            if (p.softcap > 0)
                for (int64_t q = 0; q < queries; ++q)
                    cap(s.logits.at + q * s.score_row + g * GROUP, GROUP, p.scale, p.softcap);
            mask(g);
        }
        scored = held;
    }

    // one step of the online softmax over the groups at hand
    void add() {
        score();
        for (int64_t m = 0; m < tiles; ++m) weigh(m);
        if (p.output) {
            fade_output();
            for (int64_t g = 0; g < held; ++g)
                s.value[g] = packed.value.at + packed.place(b, kv_head, s.group[g].number) * packed.value_bytes;
            for (int64_t c = 0; c < packed.value_tiles; c += 2)
                for (int64_t m = 0; m < tiles; m += 2) {
                    const bool two = packed.value_tiles - c > 1;
                    const auto multiply = tiles - m > 1 ? (two ? &TileItem::gather<2, 2> : &TileItem::gather<2, 1>)
                                                        : (two ? &TileItem::gather<1, 2> : &TileItem::gather<1, 1>);
                    (this->*multiply)(m, c);
                }
            fresh = false;
        }
        held = scored = 0;
    }

    template <int M>
    void products(int64_t m, int64_t g, const uint8_t *key) {
        const int64_t steps = packed.key_steps;
        tile_products<M, 2>(
            steps, true, s.score_row * 4,
            [&](int i, int64_t k) { return s.query.at + ((m + i) * steps + k) * TILE_BYTES; },
            [&](int n, int64_t k) { return key + (n * steps + k) * TILE_BYTES; },
            [&](int i, int n) { return s.logits.at + (m + i) * TILE_ROWS * s.score_row + g * GROUP + n * TILE_ROWS; });
    }

    template <int M, int N>
    void gather(int64_t m, int64_t c) {
        tile_products<M, N>(
            held, fresh, s.output_row * 4,
            [&](int i, int64_t k) { return s.weight.at + (k * MOST_TILES + m + i) * TILE_BYTES; },
            [&](int n, int64_t k) { return s.value[k] + (c + n) * TILE_BYTES; },
            [&](int i, int n) { return s.output.at + (m + i) * TILE_ROWS * s.output_row + (c + n) * TILE_ROWS; });
    }

    // -inf where a query does not see a key of the group, or it is not listed
    void mask(int64_t g) {
        const int64_t slot = p.anchor[b] + s.group[g].number * GROUP;
        const int64_t first = slot + s.group[g].first, last = slot + s.group[g].last;
        const int32_t *before = p.before ? p.before + b * (p.keys + 1) : nullptr;
        const bool holes = before && before[last] - before[first] < last - first;
        if (last - first == GROUP && first >= seen.low_most && last <= seen.high_least && !holes) return;
        uint32_t valid = ~0u;
        for (int64_t n = 0; holes && n < GROUP; ++n)
            if (slot + n >= p.keys || !p.valid[b * p.keys + slot + n]) valid &= ~(1u << n);
        const auto below = [&](int64_t key) {  // keys before it, one bit each
            return static_cast<uint32_t>((uint64_t{1} << std::clamp<int64_t>(key - slot, 0, GROUP)) - 1);
        };
        for (int64_t q = 0; q < queries; ++q) {
            const int64_t i = b * p.queries + from + q - p.query_start;
            const uint32_t lower = below(std::max<int64_t>(first, p.low[i])), upper = below(std::min<int64_t>(last, p.high[i]));
            const uint32_t kept = upper & ~lower & valid;
            float *x = s.logits.at + q * s.score_row + g * GROUP;
            _mm512_mask_storeu_ps(x, static_cast<__mmask16>(~kept), all(NOTHING));
            _mm512_mask_storeu_ps(x + LANES, static_cast<__mmask16>(~kept >> 16), all(NOTHING));
        }
    }

    // raise the maxima of a tile of queries and turn their logits into weights
    void weigh(int64_t m) {
        const int64_t begin = m * TILE_ROWS, end = std::min<int64_t>(begin + TILE_ROWS, queries);
        const Float unit = all(factor);
        alignas(64) float rise[TILE_ROWS] = {};
        for (int64_t q = begin; q < end; ++q) {
            const float *x = s.logits.at + q * s.score_row;
            Float top = load(x), other = load(x + LANES);
            for (int64_t n = GROUP; n < held * GROUP; n += GROUP)
                top = larger(load(x + n), top), other = larger(load(x + n + LANES), other);
            const float now = largest(larger(other, top)), earlier = s.most[q], minus_base = s.minus_base[q];
            if (now > s.most[q]) s.most[q] = now;
            // exponents are counted from a base kept as it was rounded, so that a maximum that stays fades nothing
            s.minus_base[q] = s.most[q] == NOTHING ? 0.0f : -(s.most[q] * factor);
            rise[q - begin] = earlier == NOTHING ? NOTHING : s.minus_base[q] - minus_base;
        }
        store(s.fade + begin, two_to(load(rise)));
        for (int64_t q = begin; q < end; ++q) {
            const float *x = s.logits.at + q * s.score_row;
            uint8_t *out = s.weight.at + m * TILE_BYTES + (q - begin) * TILE_ROW_BYTES;
            const Float shift = all(s.minus_base[q]);
            Float sum = all(0.0f), more = all(0.0f);
            for (int64_t g = 0; g < held; ++g) {
                const Float first = two_to(times_plus(load(x + g * GROUP), unit, shift));
                const Float second = two_to(times_plus(load(x + g * GROUP + LANES), unit, shift));
                sum = plus(sum, first), more = plus(more, second);
                store_int(out + g * MOST_TILES * TILE_BYTES, (Int)_mm512_cvtne2ps_pbh(second, first));
            }
            store(s.mass[q], times_plus(load(s.mass[q]), all(s.fade[q]), plus(sum, more)));
        }
    }

    void fade_output() {
        if (fresh) return;
        for (int64_t q = 0; q < queries; ++q) {
            if (s.fade[q] == 1.0f) continue;  // maxima rise seldom, after the first steps
            float *o = s.output.at + q * s.output_row;
            for (int64_t c = 0; c < packed.value_tiles * TILE_ROWS; c += LANES)
                store(o + c, times(load(o + c), all(s.fade[q])));
        }
    }
};

#endif

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
    if (in_pairs(p.kind) && p.head_dim % 2) return 1;
    if (p.skip && p.block_q > MOST_QUERIES) return 1;
    const int64_t token = p.query_heads * p.value_dim;
    // without gaps it is new, but for `into`
    if (p.output && p.o_head == p.value_dim && p.o_token == token && p.o_batch == p.queries * token)
        in_large_pages(p.output, p.batch * p.o_batch * (p.kind == BFLOAT16 ? 2 : 4));
    const int64_t parts = (p.block_q + MOST_QUERIES - 1) / MOST_QUERIES, heads = p.batch * p.query_heads;
    // calls work(b, h, row, first, last) with the queries of an item
    const auto each_item = [&](const auto &start) {
        return in_threads(heads * p.rows * parts, threads, [&] {
            return [&p, parts, heads, work = start()](int64_t n) {
                const int64_t row = p.rows - 1 - n / (heads * parts), head = n % (heads * parts) / parts;
                const int64_t b = head / p.query_heads, h = head % p.query_heads;  // rows that see most first
                if (p.only && !p.only[head]) return;
                const int64_t first = p.begin[b * p.rows + row] + n % parts * MOST_QUERIES;
                const int64_t last = std::min(p.end[b * p.rows + row], first + MOST_QUERIES);
                if (first < last) work(b, h, row, first, last);
            };
        });
    };
#ifdef SPARSEPREFILL_TILES
    if (p.kind == BFLOAT16 && tiles_allowed()) {
        try {
            Packed packed(p);
            const int64_t both = p.batch * p.kv_heads, groups = packed.groups;
            const auto name = [&](int64_t n) { packed.name(n / p.kv_heads, n % p.kv_heads); };
            const auto pack = [&](int64_t n) {
                packed.pack(n / groups / p.kv_heads, n / groups % p.kv_heads, n % groups);
            };
            if (!in_threads(both, threads, [&] { return name; })) return 2;
            if (!in_threads(both * groups, threads, [&] { return pack; })) return 2;
            return each_item([&] {
                return [&packed, s = std::make_shared<TileScratch>(packed)](int64_t b, int64_t h, int64_t row, int64_t first,
                                                                            int64_t last) {
                    TileItem(packed, *s, b, h, first, last).run(row);
                };
            }) ? 0 : 2;
        } catch (const std::bad_alloc &) {  // the packed keys and values
            return 2;
        }
    }
#endif
    return each_item([&] {
        return [&p, s = std::make_shared<Scratch>(p)](int64_t b, int64_t h, int64_t row, int64_t first, int64_t last) {
            Item(p, *s, b, h, row, first, last).run();
        };
    }) ? 0 : 2;
}
