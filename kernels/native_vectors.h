// What the native sources share: vectors of LANES numbers for this processor, threads, and half-precision numbers.

#ifndef SPARSEPREFILL_NATIVE_VECTORS_H
#define SPARSEPREFILL_NATIVE_VECTORS_H

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
#elif defined(__SSE2__) && !defined(SPARSEPREFILL_GENERIC)
#include <emmintrin.h>
#endif

namespace sparseprefill {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// ---- vectors: LANES keys at a time

#if defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)

constexpr const char *INSTRUCTIONS = "avx512_vnni";
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4;  // ROWS x COLUMNS sums of whole numbers stay in registers
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
inline Float plus(Float a, Float b) { return _mm512_add_ps(a, b); }
inline Float over(Float a, Float b) { return _mm512_div_ps(a, b); }
// yes where a < b, else no
inline Float where_less(Float a, Float b, Float yes, Float no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// x where low <= key < high, else -inf
inline Float visible(Float x, Float low, Float high, Float key) {
    const __mmask16 seen = _mm512_cmp_ps_mask(low, key, _CMP_LE_OQ) & _mm512_cmp_ps_mask(key, high, _CMP_LT_OQ);
    return _mm512_mask_blend_ps(seen, all(NOTHING), x);
}
#define SPARSEPREFILL_BRAINS
inline Float load_brains(const void *p) {
    const __m256i x = _mm256_loadu_si256(static_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
#define SPARSEPREFILL_HALVES
inline Float load_halves(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(p))); }
inline Float whole(Float x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2 ** n, n whole and at most 0
inline Float scaled(Float x, Float n) { return _mm512_scalef_ps(x, n); }
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
inline Float plus(Float a, Float b) { return _mm256_add_ps(a, b); }
inline Float over(Float a, Float b) { return _mm256_div_ps(a, b); }
inline Float where_less(Float a, Float b, Float yes, Float no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Float visible(Float x, Float low, Float high, Float key) {
    const Float seen = _mm256_and_ps(_mm256_cmp_ps(low, key, _CMP_LE_OQ), _mm256_cmp_ps(key, high, _CMP_LT_OQ));
    return _mm256_blendv_ps(all(NOTHING), x, seen);
}
#define SPARSEPREFILL_BRAINS
inline Float load_brains(const void *p) {
    const __m128i x = _mm_loadu_si128(static_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
#if defined(__F16C__)
#define SPARSEPREFILL_HALVES
inline Float load_halves(const void *p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p))); }
#endif
inline Float whole(Float x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Float scaled(Float x, Float n) {  // 0 below the normal numbers
    const Int bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(larger(all(-127.0f), n)), all_int(127)), 23);
    return times(x, _mm256_castsi256_ps(bits));
}
inline Float inside(Float x, int low, int high) {
    const Int lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const Int kept = _mm256_and_si256(_mm256_cmpgt_epi32(lane, all_int(low - 1)), _mm256_cmpgt_epi32(all_int(high), lane));
    return _mm256_blendv_ps(all(NOTHING), x, _mm256_castsi256_ps(kept));
}

#else

// vectors of the compiler (gcc and clang), of 16 bytes: NEON, SSE2, or whatever there is
#if defined(__ARM_NEON)
constexpr const char *INSTRUCTIONS = "neon";
#else
constexpr const char *INSTRUCTIONS = "portable";
#endif
#if defined(__SSE2__) && !defined(SPARSEPREFILL_GENERIC)
constexpr int COLUMNS = 2;  // of 16 registers
#else
constexpr int COLUMNS = 4;  // of 32
#endif
constexpr int LANES = 4, ROWS = 6;
typedef int32_t Int __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef float Float __attribute__((vector_size(16)));
inline Int load_int(const void *p) {
    Int x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store_int(void *p, Int x) { std::memcpy(p, &x, sizeof x); }
inline Int all_int(int x) { return Int{x, x, x, x}; }
inline Int add_products(Int sum, Int key, Int query) {
#if defined(__SSE2__) && !defined(SPARSEPREFILL_GENERIC)
    // bytes to 16 bits, even and odd ones apart
    const __m128i k = (__m128i)key, q = (__m128i)query;
    const __m128i even = _mm_madd_epi16(_mm_and_si128(k, _mm_set1_epi16(0x00ff)), _mm_srai_epi16(_mm_slli_epi16(q, 8), 8));
    const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(k, 8), _mm_srai_epi16(q, 8));
    return sum + (Int)even + (Int)odd;
#else
    const Bits k = (Bits)key, q = (Bits)query;
    sum += (Int)(k & 0xffu) * ((Int)(q << 24) >> 24);
    sum += (Int)(k >> 8 & 0xffu) * ((Int)(q << 16) >> 24);
    sum += (Int)(k >> 16 & 0xffu) * ((Int)(q << 8) >> 24);
    return sum + (Int)(k >> 24) * (query >> 24);
#endif
}
inline Int low_nibbles(Int x) { return x & 0x0f0f0f0f; }
inline Int high_nibbles(Int x) { return low_nibbles((Int)((Bits)x >> 4)); }
inline Int flipped(Int x, int bits) { return x ^ bits; }
inline Float to_float(Int x) { return __builtin_convertvector(x, Float); }
inline Float load(const float *p) {
    Float x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float *p, Float x) { std::memcpy(p, &x, sizeof x); }
inline Float all(float x) { return Float{x, x, x, x}; }
inline Float times(Float a, Float b) { return a * b; }
inline Float times_plus(Float a, Float b, Float c) { return a * b + c; }  // fused where that is one instruction
inline Float minus(Float a, Float b) { return a - b; }
inline Float chosen(Int where, Float yes, Float no) { return (Float)(((Int)yes & where) | ((Int)no & ~where)); }
inline Float larger(Float a, Float b) { return chosen(a > b, a, b); }
inline float largest(Float x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
inline Float plus(Float a, Float b) { return a + b; }
inline Float over(Float a, Float b) { return a / b; }
inline Float where_less(Float a, Float b, Float yes, Float no) { return chosen(a < b, yes, no); }
inline Float visible(Float x, Float low, Float high, Float key) {
    return chosen((low <= key) & (key < high), x, all(NOTHING));
}
// below 2 ** 22: the fraction does not fit beside this
inline Float whole(Float x) { return (x + all(12582912.0f)) - all(12582912.0f); }
inline Float scaled(Float x, Float n) {  // 0 below the normal numbers
    const Bits exponent = (Bits)__builtin_convertvector(larger(all(-127.0f), n), Int) + 127u;
    return x * (Float)(exponent << 23);
}
inline Float inside(Float x, int low, int high) {
    const Int lane = {0, 1, 2, 3};
    return chosen((lane >= low) & (lane < high), x, all(NOTHING));
}

#endif

// 2 ** x for x up to 0, 0 where that is below every number, NaN where x is; within a place and a half of the last.
// The minimax polynomial of degree 6 on [-0.5, 0.5] is off by 2e-9.
inline Float two_to(Float x) {
    x = larger(all(-200.0f), x);  // gives x where it is NaN
    const Float n = whole(x), f = minus(x, n);
    Float y = times_plus(all(1.5345810710970757e-4f), f, all(1.3399930903688073e-3f));
    y = times_plus(y, f, all(9.618489071726799e-3f));
    y = times_plus(y, f, all(5.550328642129898e-2f));
    y = times_plus(y, f, all(0.24022646248340607f));
    y = times_plus(y, f, all(0.6931471824645996f));
    return scaled(times_plus(y, f, all(1.0f)), n);
}

// the hyperbolic tangent; near 0 a series, as the difference of exponentials cancels there
inline Float tanh_of(Float x) {
    const Float size = larger(x, minus(all(0.0f), x)), one = all(1.0f), square = times(x, x);
    const Float e = two_to(times(size, all(-2.8853900817779268f)));
    const Float far = over(minus(one, e), plus(one, e));
    Float y = times_plus(all(2.1869488536155203e-2f), square, all(-5.396825396825397e-2f));
    y = times_plus(y, square, all(0.13333333333333333f));
    y = times_plus(y, square, all(-0.3333333333333333f));
    y = times_plus(times(y, square), x, x);
    return where_less(size, all(0.25f), y, where_less(x, all(0.0f), minus(all(0.0f), far), far));
}

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

}  // namespace sparseprefill

#endif
