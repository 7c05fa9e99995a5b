// The largest estimated score of each tile: products of low-bit codes, scales, biases and the maximum in one pass.
//
// What is computed stands in sparseprefill/kernels/low_bit.py (EstimatedLogits, block_max). A work item is one row of the
// grid for all query heads of one KV head, so that unpacked keys are shared by the group: TILE keys are unpacked into
// cache, multiplied with every query of the item, and reduced to one number for each block before the next TILE.
//
// Products are of an unsigned byte (a key's code plus an offset) and a signed one (a query's code), four channels at a
// time; the offset is taken back by the start value of the sum. Plain C interface, no dependencies.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// ---- vectors: LANES keys at a time

#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)

constexpr const char *INSTRUCTIONS = "avx512_vnni";
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4;  // ROWS x COLUMNS sums are held in registers
using Int = __m512i;
using Float = __m512;
inline Int load_int(const void *p) { return _mm512_loadu_si512(p); }
inline void store_int(void *p, Int x) { _mm512_storeu_si512(p, x); }
inline Int all_int(int x) { return _mm512_set1_epi32(x); }
inline Int add_products(Int sum, Int key, Int query) {
    // as the intrinsic, but gcc 12 moves sums through memory around that
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(key), "v"(query));
    return sum;
}
inline Int low_nibbles(Int x) { return _mm512_and_si512(x, all_int(0x0f0f0f0f)); }
inline Int high_nibbles(Int x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }
inline Int flipped(Int x, int bits) { return _mm512_xor_si512(x, all_int(bits)); }
inline Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
inline Float load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, Float x) { _mm512_storeu_ps(p, x); }
inline Float all(float x) { return _mm512_set1_ps(x); }
inline Float times(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float times_plus(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Float minus(Float a, Float b) { return _mm512_sub_ps(a, b); }
inline Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
inline float largest(Float x) { return _mm512_reduce_max_ps(x); }
// x where low <= lane number < high
inline Float inside(Float x, int low, int high) {
    const unsigned below = high >= LANES ? 0xffffu : high <= 0 ? 0u : (1u << high) - 1;
    const unsigned under = low >= LANES ? 0xffffu : low <= 0 ? 0u : (1u << low) - 1;
    return _mm512_mask_blend_ps(static_cast<__mmask16>(below & ~under), all(NOTHING), x);
}

#elif defined(__AVX2__) && defined(__FMA__)

#if defined(__AVXVNNI__)
constexpr const char *INSTRUCTIONS = "avx_vnni";
#else
constexpr const char *INSTRUCTIONS = "avx2";
#endif
constexpr int LANES = 8, ROWS = 4, COLUMNS = 2;
using Int = __m256i;
using Float = __m256;
inline Int load_int(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline void store_int(void *p, Int x) { _mm256_storeu_si256(static_cast<__m256i *>(p), x); }
inline Int all_int(int x) { return _mm256_set1_epi32(x); }
inline Int add_products(Int sum, Int key, Int query) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, key, query);
#else
    // bytes to 16 bits, even and odd ones apart: a sum of two products of 8-bit codes may not fit into 16 bits
    const Int low = _mm256_set1_epi16(0x00ff);
    const Int even = _mm256_madd_epi16(_mm256_and_si256(key, low), _mm256_srai_epi16(_mm256_slli_epi16(query, 8), 8));
    const Int odd = _mm256_madd_epi16(_mm256_srli_epi16(key, 8), _mm256_srai_epi16(query, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}
inline Int low_nibbles(Int x) { return _mm256_and_si256(x, all_int(0x0f0f0f0f)); }
inline Int high_nibbles(Int x) { return low_nibbles(_mm256_srli_epi32(x, 4)); }
inline Int flipped(Int x, int bits) { return _mm256_xor_si256(x, all_int(bits)); }
inline Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
inline Float load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Float x) { _mm256_storeu_ps(p, x); }
inline Float all(float x) { return _mm256_set1_ps(x); }
inline Float times(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float times_plus(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float minus(Float a, Float b) { return _mm256_sub_ps(a, b); }
inline Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
inline float largest(Float x) {
    alignas(32) float each[LANES];
    _mm256_store_ps(each, x);
    return *std::max_element(each, each + LANES);
}
inline Float inside(Float x, int low, int high) {
    const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const Int kept = _mm256_and_si256(_mm256_cmpgt_epi32(lane, all_int(low - 1)), _mm256_cmpgt_epi32(all_int(high), lane));
    return _mm256_blendv_ps(all(NOTHING), x, _mm256_castsi256_ps(kept));
}

#else

constexpr const char *INSTRUCTIONS = "portable";
constexpr int LANES = 16, ROWS = 2, COLUMNS = 1;
struct Int {
    int32_t each[LANES];
};
struct Float {
    float each[LANES];
};
template <class To, class Made>
inline To lanes(Made made) {
    To x;
    for (int n = 0; n < LANES; ++n) x.each[n] = made(n);
    return x;
}
inline Int load_int(const void *p) {
    Int x;
    std::memcpy(x.each, p, sizeof x.each);
    return x;
}
inline void store_int(void *p, Int x) { std::memcpy(p, x.each, sizeof x.each); }
inline Int all_int(int x) {
    return lanes<Int>([=](int) { return x; });
}
inline Int add_products(Int sum, Int key, Int query) {
    uint8_t k[4 * LANES];
    int8_t q[4 * LANES];
    std::memcpy(k, key.each, sizeof k);
    std::memcpy(q, query.each, sizeof q);
    for (int n = 0; n < LANES; ++n)
        for (int c = 0; c < 4; ++c) sum.each[n] += static_cast<int>(k[4 * n + c]) * static_cast<int>(q[4 * n + c]);
    return sum;
}
inline Int low_nibbles(Int x) {
    return lanes<Int>([=](int n) { return x.each[n] & 0x0f0f0f0f; });
}
inline Int high_nibbles(Int x) {
    return lanes<Int>([=](int n) { return (x.each[n] >> 4) & 0x0f0f0f0f; });
}
inline Int flipped(Int x, int bits) {
    return lanes<Int>([=](int n) { return x.each[n] ^ bits; });
}
inline Float to_float(Int x) {
    return lanes<Float>([=](int n) { return static_cast<float>(x.each[n]); });
}
inline Float load(const float *p) {
    return lanes<Float>([=](int n) { return p[n]; });
}
inline void store(float *p, Float x) { std::memcpy(p, x.each, sizeof x.each); }
inline Float all(float x) {
    return lanes<Float>([=](int) { return x; });
}
inline Float times(Float a, Float b) {
    return lanes<Float>([=](int n) { return a.each[n] * b.each[n]; });
}
inline Float times_plus(Float a, Float b, Float c) {
    return lanes<Float>([=](int n) { return a.each[n] * b.each[n] + c.each[n]; });
}
inline Float minus(Float a, Float b) {
    return lanes<Float>([=](int n) { return a.each[n] - b.each[n]; });
}
inline Float larger(Float a, Float b) {
    return lanes<Float>([=](int n) { return a.each[n] > b.each[n] ? a.each[n] : b.each[n]; });
}
inline float largest(Float x) { return *std::max_element(x.each, x.each + LANES); }
inline Float inside(Float x, int low, int high) {
    return lanes<Float>([=](int n) { return n >= low && n < high ? x.each[n] : NOTHING; });
}

#endif

constexpr int TILE = LANES * COLUMNS;  // keys that are unpacked together
constexpr int STEP = 16;               // a block of keys is a multiple of this
static_assert(STEP % LANES == 0 || LANES % STEP == 0, "a vector may not cross the edge of a block");

struct Problem {
    int64_t batch, kv_heads, group, rows, block_q, keys, block_k, key_blocks, bytes, bits;
    const int8_t *query;                           // [batch, kv_heads, group, rows * block_q, bytes]
    const int8_t *key;                             // [batch, kv_heads, keys, bytes]
    const float *query_scale, *shift, *reference;  // [batch, kv_heads, group, rows * block_q]
    const float *key_scale;                        // [batch, kv_heads, keys]
    const float *bias;                             // [batch, kv_heads, group, keys]
    const int32_t *low, *high;                     // [batch, rows * block_q]
    const int64_t *anchor;                         // [batch]
    float scale, softcap;                          // softcap 0: none
    float *best;                                   // [batch, kv_heads, group, rows, key_blocks]
};

// what one thread works with
struct Scratch {
    std::vector<int8_t> query;      // [group * block_q, channels]
    std::vector<int32_t> start;     // [group * block_q]: takes the offset of the keys' codes back
    std::vector<float> bar;         // [group * block_q]: reference / scale - shift
    std::vector<int32_t> key;       // [COLUMNS, channels / 4, LANES]
    std::vector<float> key_scale;   // [TILE]
    std::vector<float> bias;        // [group, TILE]

    Scratch(const Problem &p, int64_t channels)
        : query(p.group * p.block_q * channels), start(p.group * p.block_q), bar(p.group * p.block_q),
          key(COLUMNS * channels / 4 * LANES), key_scale(TILE), bias(p.group * TILE) {}
};

// codes of some rows one by one; returns nothing, `out` is [count, channels]
void unpack_rows(const int8_t *codes, int64_t count, int64_t bytes, bool nibbles, int8_t *out) {
    if (!nibbles) {
        std::memcpy(out, codes, count * bytes);
        return;
    }
    for (int64_t n = 0; n < count; ++n)
        for (int64_t c = 0; c < bytes; ++c) {
            const int8_t both = codes[n * bytes + c];
            out[2 * n * bytes + c] = static_cast<int8_t>(both >> 4);
            out[(2 * n + 1) * bytes + c] = static_cast<int8_t>(static_cast<int8_t>(static_cast<uint8_t>(both) << 4) >> 4);
        }
}

// codes of TILE keys, offset to be unsigned, four channels of LANES keys beside each other; keys past the end are zeros
void unpack_keys(const Problem &p, const int8_t *codes, int64_t first, bool nibbles, int32_t *out) {
    const int64_t words = p.bytes / 4, all_words = nibbles ? 2 * words : words;
    for (int column = 0; column < COLUMNS; ++column) {
        int32_t *own = out + column * all_words * LANES;
        const int64_t start = first + column * LANES;
        for (int lane = 0; lane < LANES; ++lane) {
            const bool real = start + lane < p.keys;
            const int8_t *from = codes + (real ? start + lane : 0) * p.bytes;
            for (int64_t w = 0; w < words; ++w) {
                int32_t word = 0;
                if (real) std::memcpy(&word, from + 4 * w, 4);
                own[w * LANES + lane] = word;
            }
        }
        for (int64_t w = 0; w < words; ++w) {
            const Int word = load_int(own + w * LANES);
            if (nibbles) {  // a code of 4 bits in two's complement, its sign bit flipped, is the code plus 8
                store_int(own + w * LANES, flipped(high_nibbles(word), 0x08080808));
                store_int(own + (words + w) * LANES, flipped(low_nibbles(word), 0x08080808));
            } else {
                store_int(own + w * LANES, flipped(word, static_cast<int>(0x80808080u)));
            }
        }
    }
}

struct Rows {  // some queries of one head against the keys of a tile
    const int8_t *query;   // [COUNT, channels]
    const int32_t *start;  // [COUNT]
    const float *scale, *bar, *shift, *reference;
    const int32_t *low, *high;
};

// scores of COUNT queries and the tile's keys, the largest of each lane put into peak [TILE], or (softcap) of each block
template <int COUNT, bool MASKED, bool CAPPED>
void multiply(const Problem &p, const Rows &r, int64_t words, const int32_t *key, const float *key_scale,
              const float *bias, int64_t first, float *peak) {
    Int sum[COUNT][COLUMNS];
    for (int n = 0; n < COUNT; ++n)
        for (int c = 0; c < COLUMNS; ++c) sum[n][c] = all_int(r.start[n]);
    const int8_t *query = r.query;
    for (int64_t w = 0; w < words; ++w) {
        Int k[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) k[c] = load_int(key + (c * words + w) * LANES);
        for (int n = 0; n < COUNT; ++n) {
            int32_t four;
            std::memcpy(&four, query + 4 * (n * words + w), 4);
            const Int q = all_int(four);
            for (int c = 0; c < COLUMNS; ++c) sum[n][c] = add_products(sum[n][c], k[c], q);
        }
    }
    for (int c = 0; c < COLUMNS; ++c) {
        const Float by_key = load(key_scale + c * LANES), plus = load(bias + c * LANES);
        Float most = load(peak + c * LANES);
        for (int n = 0; n < COUNT; ++n) {
            Float x = times_plus(times(to_float(sum[n][c]), by_key), all(r.scale[n]), plus);
            if (MASKED) {
                const int64_t from = first + c * LANES;
                const auto clipped = [&](int64_t slot) {
                    return static_cast<int>(std::clamp<int64_t>(slot - from, 0, LANES));
                };
                x = inside(x, clipped(r.low[n]), clipped(r.high[n]));
            }
            if (CAPPED) {  // rising in x, so the largest of a vector is capped, and no other
                const float z = largest(x);
                if (z > NOTHING) {
                    const float capped = p.softcap * std::tanh(p.scale * (z + r.shift[n]) / p.softcap);
                    most = larger(most, all(capped - r.reference[n]));
                }
            } else {
                most = larger(most, minus(x, all(r.bar[n])));
            }
        }
        store(peak + c * LANES, most);
    }
}

template <bool MASKED, bool CAPPED>
void multiply_some(int count, const Problem &p, const Rows &r, int64_t words, const int32_t *key,
                   const float *key_scale, const float *bias, int64_t first, float *peak) {
    static_assert(ROWS <= 6, "one case for each number of rows");
    switch (count) {
#define SOME(COUNT)                                                                             \
    case COUNT:                                                                                 \
        if constexpr (COUNT <= ROWS) multiply<COUNT, MASKED, CAPPED>(p, r, words, key, key_scale, bias, first, peak); \
        break;
        SOME(1) SOME(2) SOME(3) SOME(4) SOME(5) SOME(6)
#undef SOME
    }
}

// one row of the grid, all query heads of one KV head
void item(const Problem &p, int64_t b, int64_t g, int64_t row, Scratch &s) {
    const bool nibbles = p.bits < 8;
    const int64_t channels = nibbles ? 2 * p.bytes : p.bytes, words = channels / 4;
    const int64_t queries = p.rows * p.block_q, offset = nibbles ? 8 : 128;
    const int32_t *low = p.low + b * queries + row * p.block_q, *high = p.high + b * queries + row * p.block_q;
    // keys that some query of the row looks at, and those that each does that looks at any
    int64_t first = p.keys, last = 0, clear_first = 0, clear_last = p.keys;
    int64_t begin = p.block_q, end = 0;  // queries that look at any
    for (int64_t i = 0; i < p.block_q; ++i) {
        if (low[i] >= high[i]) continue;
        begin = std::min(begin, i), end = i + 1;
        first = std::min<int64_t>(first, low[i]), last = std::max<int64_t>(last, high[i]);
        clear_first = std::max<int64_t>(clear_first, low[i]), clear_last = std::min<int64_t>(clear_last, high[i]);
    }
    for (int64_t i = begin; i < end; ++i)
        if (low[i] >= high[i]) clear_last = 0;  // one in between that looks at nothing: always masked
    if (begin >= end) return;
    const int64_t anchor = p.anchor[b];
    first = std::max(first, anchor);
    for (int64_t h = 0; h < p.group; ++h) {
        const int64_t head = (b * p.kv_heads + g) * p.group + h, at = head * queries + row * p.block_q;
        unpack_rows(p.query + at * p.bytes, p.block_q, p.bytes, nibbles, s.query.data() + h * p.block_q * channels);
        for (int64_t i = 0; i < p.block_q; ++i) {
            const int8_t *own = s.query.data() + (h * p.block_q + i) * channels;
            int32_t total = 0;
            for (int64_t c = 0; c < channels; ++c) total += own[c];
            s.start[h * p.block_q + i] = static_cast<int32_t>(-offset * total);
            s.bar[h * p.block_q + i] = p.reference[at + i] / p.scale - p.shift[at + i];
        }
    }
    const int8_t *codes = p.key + (b * p.kv_heads + g) * p.keys * p.bytes;
    const float *scales = p.key_scale + (b * p.kv_heads + g) * p.keys;
    for (int64_t tile = anchor + (first - anchor) / TILE * TILE; tile < last; tile += TILE) {
        unpack_keys(p, codes, tile, nibbles, s.key.data());
        const int64_t real = std::clamp<int64_t>(p.keys - tile, 0, TILE);
        std::fill(s.key_scale.begin(), s.key_scale.end(), 0.0f);
        std::copy_n(scales + tile, real, s.key_scale.begin());
        const bool masked = tile < clear_first || tile + TILE > clear_last;
        for (int64_t h = 0; h < p.group; ++h) {
            const int64_t head = (b * p.kv_heads + g) * p.group + h, at = head * queries + row * p.block_q;
            float *bias = s.bias.data() + h * TILE;
            std::fill_n(bias, TILE, NOTHING);
            std::copy_n(p.bias + head * p.keys + tile, real, bias);
            alignas(64) float peak[TILE];
            std::fill_n(peak, TILE, NOTHING);
            for (int64_t i = begin; i < end; i += ROWS) {
                const int count = static_cast<int>(std::min<int64_t>(ROWS, end - i));
                const int64_t own = h * p.block_q + i;
                const Rows r{s.query.data() + own * channels, s.start.data() + own, p.query_scale + at + i,
                             s.bar.data() + own,              p.shift + at + i,     p.reference + at + i,
                             low + i,                         high + i};
                if (p.softcap > 0)
                    multiply_some<true, true>(count, p, r, words, s.key.data(), s.key_scale.data(), bias, tile, peak);
                else if (masked)
                    multiply_some<true, false>(count, p, r, words, s.key.data(), s.key_scale.data(), bias, tile, peak);
                else
                    multiply_some<false, false>(count, p, r, words, s.key.data(), s.key_scale.data(), bias, tile, peak);
            }
            float *best = p.best + (head * p.rows + row) * p.key_blocks;
            for (int c = 0; c < COLUMNS; ++c) {
                const int64_t block = (tile - anchor + c * LANES) / p.block_k;
                const float most = largest(load(peak + c * LANES));
                if (block < p.key_blocks && most > NOTHING)
                    best[block] = std::max(best[block], p.softcap > 0 ? most : p.scale * most);
            }
        }
    }
}

// ---- codes

inline float widened(uint16_t half, bool brain) {
    uint32_t bits;
    if (brain) {
        bits = static_cast<uint32_t>(half) << 16;
    } else {
        const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
        if (rest >= 0x7c00u) {  // infinite, or not a number
            bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
        } else if (rest >= 0x400u) {
            bits = sign | ((rest << 13) + 0x38000000u);
        } else {  // below the normal numbers: the fraction times 2 ** -24
            const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
            std::memcpy(&bits, &small, 4);
            bits |= sign;
        }
    }
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct Vectors {
    int64_t heads, tokens, dim, channels, bytes, bits, kind, together;  // kind: 0 float32, 1 bfloat16, 2 float16
    int64_t stride_batch, stride_head, stride_token;                    // of vectors, in numbers
    const void *vectors;
    const float *mean;      // [batch, heads, dim]
    const int64_t *anchor;  // [batch]
    const uint8_t *real;    // [batch, tokens], or null
    int8_t *codes;          // [batch, heads, tokens, bytes]
    float *scale;           // [batch, heads, tokens]
};

// one vector minus the mean, filled up with zeros; returns its largest magnitude, 0 where it is not real
float centred(const Vectors &v, int64_t b, int64_t h, int64_t token, float *out) {
    if (v.real && !v.real[b * v.tokens + token]) {
        std::fill_n(out, v.channels, 0.0f);
        return 0;
    }
    const int64_t at = b * v.stride_batch + h * v.stride_head + token * v.stride_token;
    const float *mean = v.mean + (b * v.heads + h) * v.dim;
    if (v.kind == 0) {
        const float *x = static_cast<const float *>(v.vectors) + at;
        for (int64_t c = 0; c < v.dim; ++c) out[c] = x[c] - mean[c];
    } else {
        const uint16_t *x = static_cast<const uint16_t *>(v.vectors) + at;
        const bool brain = v.kind == 1;
        for (int64_t c = 0; c < v.dim; ++c) out[c] = widened(x[c], brain) - mean[c];
    }
    float most = 0, sum = 0;
    for (int64_t c = 0; c < v.dim; ++c) {
        most = std::max(most, std::fabs(out[c]));
        sum += out[c] * 0.0f;
    }
    return sum == 0 ? most : std::numeric_limits<float>::quiet_NaN();  // 0 times what is not finite is not 0
}

// x is finite, and x * factor no larger than the largest code, up to rounding
void encode(const Vectors &v, const float *x, float factor, int8_t *codes) {
    const auto code = [=](int64_t c) { return static_cast<int>(std::nearbyint(x[c] * factor)); };
    if (v.bits == 8) {
        for (int64_t c = 0; c < v.bytes; ++c) codes[c] = static_cast<int8_t>(code(c));
    } else {
        for (int64_t c = 0; c < v.bytes; ++c)
            codes[c] = static_cast<int8_t>(static_cast<uint8_t>(code(c)) << 4 | (code(c + v.bytes) & 15));
    }
}

// tokens [first, last) of one head, which share a scale
void group_of(const Vectors &v, int64_t b, int64_t h, int64_t first, int64_t last, std::vector<float> &x) {
    float largest = 0;
    for (int64_t t = first; t < last; ++t) {
        const float own = centred(v, b, h, t, x.data() + (t - first) * v.channels);
        largest = own > largest || own != own ? own : largest;
        if (largest != largest) break;
    }
    const float most = static_cast<float>((1 << (v.bits - 1)) - 1);
    const int64_t row = (b * v.heads + h) * v.tokens;
    const bool usable = largest > 0 && largest < std::numeric_limits<float>::infinity();
    const float factor = most * (1.0f / largest);  // as torch divides
    const bool whole = usable && factor < std::numeric_limits<float>::infinity();  // else so small that codes are 0
    for (int64_t t = first; t < last; ++t) {
        v.scale[row + t] = usable ? largest / most : 1.0f;
        int8_t *codes = v.codes + (row + t) * v.bytes;
        if (whole)
            encode(v, x.data() + (t - first) * v.channels, factor, codes);
        else
            std::fill_n(codes, v.bytes, static_cast<int8_t>(0));
    }
}

// runs work(0), ..., work(items - 1) on some threads; false where memory or threads ran out
template <class Work>
bool in_threads(int64_t items, int64_t threads, const Work &work) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> well{true};
    const auto loop = [&] {  // nothing may be thrown into the caller, who speaks C
        try {
            auto own = work();
            for (int64_t n; (n = next.fetch_add(1)) < items;) own(n);
        } catch (...) {
            well = false;
        }
    };
    std::vector<std::thread> others;
    try {
        for (int64_t t = 1; t < std::min(threads, items); ++t) others.emplace_back(loop);
    } catch (...) {  // fewer threads do the same work
    }
    loop();
    for (auto &other : others) other.join();
    return well;
}

}  // namespace

extern "C" int sparseprefill_abi(void) { return 2; }

extern "C" const char *sparseprefill_instructions(void) { return INSTRUCTIONS; }

// `best` arrives filled with -inf. Returns 0, 1 for a shape that it cannot serve, 2 where memory or threads run out.
extern "C" int sparseprefill_block_max(const int64_t *shape, const void *const *pointers, const float *numbers,
                                       int64_t threads) {
    Problem p;
    p.batch = shape[0], p.kv_heads = shape[1], p.group = shape[2], p.rows = shape[3], p.block_q = shape[4];
    p.keys = shape[5], p.block_k = shape[6], p.key_blocks = shape[7], p.bytes = shape[8], p.bits = shape[9];
    p.query = static_cast<const int8_t *>(pointers[0]), p.key = static_cast<const int8_t *>(pointers[1]);
    p.query_scale = static_cast<const float *>(pointers[2]), p.shift = static_cast<const float *>(pointers[3]);
    p.reference = static_cast<const float *>(pointers[4]), p.key_scale = static_cast<const float *>(pointers[5]);
    p.bias = static_cast<const float *>(pointers[6]), p.low = static_cast<const int32_t *>(pointers[7]);
    p.high = static_cast<const int32_t *>(pointers[8]), p.anchor = static_cast<const int64_t *>(pointers[9]);
    p.best = static_cast<float *>(const_cast<void *>(pointers[10]));
    p.scale = numbers[0], p.softcap = numbers[1];
    if (p.block_k % STEP || p.bytes % 4 || threads < 1) return 1;
    const int64_t pairs = p.batch * p.kv_heads, items = p.rows * pairs;
    const bool well = in_threads(items, threads, [&] {
        return [&p, pairs, s = Scratch(p, p.bits < 8 ? 2 * p.bytes : p.bytes)](int64_t n) mutable {
            item(p, n % pairs / p.kv_heads, n % p.kv_heads, p.rows - 1 - n / pairs, s);  // rows that see most first
        };
    });
    return well ? 0 : 2;
}

// Vectors minus their mean as codes, see `quantize` in sparseprefill/kernels/low_bit.py. `together` tokens from `anchor`
// on share a scale. Returns as above.
extern "C" int sparseprefill_quantize(const int64_t *shape, const void *const *pointers, int64_t threads) {
    Vectors v;
    const int64_t batch = shape[0];
    v.heads = shape[1], v.tokens = shape[2], v.dim = shape[3], v.bytes = shape[4], v.bits = shape[5];
    v.kind = shape[6], v.together = shape[7];
    v.stride_batch = shape[8], v.stride_head = shape[9], v.stride_token = shape[10];
    v.channels = v.bits == 8 ? v.bytes : 2 * v.bytes;
    v.vectors = pointers[0], v.mean = static_cast<const float *>(pointers[1]);
    v.anchor = static_cast<const int64_t *>(pointers[2]), v.real = static_cast<const uint8_t *>(pointers[3]);
    v.codes = static_cast<int8_t *>(const_cast<void *>(pointers[4]));
    v.scale = static_cast<float *>(const_cast<void *>(pointers[5]));
    if (v.kind < 0 || v.kind > 2 || v.together < 1 || v.channels < v.dim || threads < 1) return 1;
    const int64_t most_groups = v.tokens / v.together + 2;  // one may begin before the first token, one end after the last
    const bool well = in_threads(batch * v.heads * most_groups, threads, [&] {
        return [&v, most_groups, x = std::vector<float>(v.together * v.channels, 0.0f)](int64_t n) mutable {
            const int64_t head = n / most_groups, b = head / v.heads;
            // the first token's group begins at or before it
            const int64_t past = ((0 - v.anchor[b]) % v.together + v.together) % v.together;
            const int64_t begin = n % most_groups * v.together - past;
            const int64_t first = std::max<int64_t>(begin, 0), last = std::min(begin + v.together, v.tokens);
            if (first < last) group_of(v, b, head % v.heads, first, last, x);
        };
    });
    return well ? 0 : 2;
}
