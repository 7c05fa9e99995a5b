// The largest score of each tile, from codes of queries and keys: see kernels/low_bit.py for what a score is.
// Plain C at the seam: no headers of torch or Python, so that one file serves every release of both.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

extern "C" int sparseprefill_abi(void) { return 1; }

extern "C" const char *sparseprefill_instructions(void) {
#if defined(__AVX512VNNI__)
    return "avx512_vnni";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "arm_dotprod";
#else
    return "portable";
#endif
}

// Codes are one a byte, all arrays contiguous. Shapes as in EstimatedLogits; sizes: batch, kv_heads, group, rows,
// block_q, keys, channels, key_blocks, block_k. `best` is [batch, kv_heads * group, rows, key_blocks]. Gives 0.
extern "C" int sparseprefill_block_max(const int8_t *query, const float *query_scale, const int8_t *key,
                                       const float *key_scale, const float *bias, const float *shift,
                                       const float *reference, const int32_t *low, const int32_t *high,
                                       const int64_t *anchor, const int64_t *sizes, float scale, float softcap,
                                       float *best) {
    const int64_t batch = sizes[0], kv_heads = sizes[1], group = sizes[2], rows = sizes[3], block_q = sizes[4];
    const int64_t keys = sizes[5], channels = sizes[6], key_blocks = sizes[7], block_k = sizes[8];
    const int64_t heads = kv_heads * group, queries = rows * block_q;
    const float nothing = -std::numeric_limits<float>::infinity();
    std::fill(best, best + batch * heads * rows * key_blocks, nothing);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < queries; ++i) {
                const int64_t q = (b * heads + h) * queries + i, kv = (b * kv_heads + h / group) * keys;
                float *row = best + ((b * heads + h) * rows + i / block_q) * key_blocks;
                const int64_t first = std::max<int64_t>(low[b * queries + i], anchor[b]);
                const int64_t stop = std::min<int64_t>({high[b * queries + i], keys, anchor[b] + key_blocks * block_k});
                for (int64_t j = first; j < stop; ++j) {
                    const float own = bias[(b * heads + h) * keys + j];
                    if (own == nothing) continue;
                    int32_t product = 0;
                    for (int64_t c = 0; c < channels; ++c)
                        product += int32_t(query[q * channels + c]) * key[(kv + j) * channels + c];
                    float score = scale * (query_scale[q] * key_scale[kv + j] * float(product) + own + shift[q]);
                    if (softcap > 0) score = softcap * std::tanh(score / softcap);
                    float &tile = row[(j - anchor[b]) / block_k];
                    tile = std::max(tile, score - reference[q]);
                }
            }
    return 0;
}
