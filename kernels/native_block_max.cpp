// The largest estimated score of each tile: products of low-bit codes, scales, biases and the maximum in one pass.
//
// What is computed stands in sparseprefill/kernels/low_bit.py (EstimatedLogits, block_max). A work item is one row of the
// grid for all query heads of one KV head, so that unpacked keys are shared by the group: TILE keys are unpacked into
// cache, multiplied with every query of the item, and reduced to one number for each block before the next TILE.
//
// Products are of an unsigned byte (a key's code plus an offset) and a signed one (a query's code), four channels at a
// time; the offset is taken back by the start value of the sum. Plain C interface, no dependencies.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "native_tiles.h"
#include "native_vectors.h"

namespace {

using namespace sparseprefill;

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

}  // namespace

extern "C" int sparseprefill_abi(void) { return 3; }

// what the functions here multiply with, as far as this process may
extern "C" const char *sparseprefill_instructions(void) {
#ifdef SPARSEPREFILL_PAIRS
    static const std::string all = std::string(INSTRUCTIONS) + ", avx512_bf16"
#ifdef SPARSEPREFILL_TILES
                                   + (tiles_allowed() ? std::string(", ") + TILE_INSTRUCTIONS : "")
#endif
        ;
    return all.c_str();
#else
    return INSTRUCTIONS;
#endif
}

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
