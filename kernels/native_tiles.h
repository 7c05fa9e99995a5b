// Tiles of the processor (AMX): eight registers of 16 rows x 64 bytes, and the product of pairs of bfloat16 on them.
//
// With SPARSEPREFILL_EMULATE_TILES they are plain C++ of the documented meaning, so that what uses them can be tested on
// any processor. With SPARSEPREFILL_NO_TILES there are none. As with the intrinsics, numbers of tiles are constants.

#ifndef SPARSEPREFILL_NATIVE_TILES_H
#define SPARSEPREFILL_NATIVE_TILES_H

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512F__) && defined(__AVX512BW__)
#define SPARSEPREFILL_PAIRS
#endif

#if defined(SPARSEPREFILL_PAIRS) && !defined(SPARSEPREFILL_NO_TILES)
#if defined(SPARSEPREFILL_EMULATE_TILES)
#define SPARSEPREFILL_TILES
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && defined(__x86_64__)
#define SPARSEPREFILL_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#ifdef SPARSEPREFILL_TILES

namespace sparseprefill {

constexpr int TILE_ROWS = 16, TILE_ROW_BYTES = 64, TILE_BYTES = TILE_ROWS * TILE_ROW_BYTES, TILES = 8;

// what tile_loadconfig reads
struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the processor reads it");

#ifdef SPARSEPREFILL_EMULATE_TILES

constexpr const char *TILE_INSTRUCTIONS = "emulated amx_bf16";

struct TileState {
    TileConfig config;
    alignas(64) uint8_t tile[TILES][TILE_BYTES];
};
inline thread_local TileState tile_state{};

inline bool tiles_allowed() { return true; }
inline void tile_loadconfig(const TileConfig *config) {
    if (config->palette != 1 || config->start_row) __builtin_trap();
    std::memset(&tile_state, 0, sizeof tile_state);
    tile_state.config = *config;
}
inline void tile_release() { std::memset(&tile_state, 0, sizeof tile_state); }
template <int T>
uint8_t *tile_rows() {
    const TileConfig &c = tile_state.config;
    if (c.palette != 1 || c.rows[T] != TILE_ROWS || c.row_bytes[T] != TILE_ROW_BYTES) __builtin_trap();
    return tile_state.tile[T];
}
template <int T>
void tile_zero() {
    std::memset(tile_rows<T>(), 0, TILE_BYTES);
}
template <int T>
void tile_load(const void *from, int64_t stride) {
    uint8_t *to = tile_rows<T>();
    for (int r = 0; r < TILE_ROWS; ++r)
        std::memcpy(to + r * TILE_ROW_BYTES, static_cast<const uint8_t *>(from) + r * stride, TILE_ROW_BYTES);
}
template <int T>
void tile_store(void *to, int64_t stride) {
    const uint8_t *from = tile_rows<T>();
    for (int r = 0; r < TILE_ROWS; ++r)
        std::memcpy(static_cast<uint8_t *>(to) + r * stride, from + r * TILE_ROW_BYTES, TILE_ROW_BYTES);
}
inline float without_denormals(float x) { return std::fabs(x) < FLT_MIN ? 0.0f * x : x; }
inline float wide_half(uint32_t pair, bool upper) {
    const uint32_t bits = upper ? pair & 0xffff0000u : pair << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return without_denormals(x);
}
// SUM[row, n] += A[row, 2 k] B[k, 2 n] + A[row, 2 k + 1] B[k, 2 n + 1], even and odd ones summed apart
template <int SUM, int A, int B>
void tile_dpbf16ps() {
    uint8_t *sum = tile_rows<SUM>();
    const uint8_t *a = tile_rows<A>(), *b = tile_rows<B>();
    for (int row = 0; row < TILE_ROWS; ++row) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < 16; ++k) {
            uint32_t left, right[16];
            std::memcpy(&left, a + row * TILE_ROW_BYTES + 4 * k, 4);
            std::memcpy(right, b + k * TILE_ROW_BYTES, sizeof right);
            const float left_even = wide_half(left, false), left_odd = wide_half(left, true);
            for (int n = 0; n < 16; ++n) {
                even[n] = without_denormals(std::fma(left_even, wide_half(right[n], false), even[n]));
                odd[n] = without_denormals(std::fma(left_odd, wide_half(right[n], true), odd[n]));
            }
        }
        float total[16];
        std::memcpy(total, sum + row * TILE_ROW_BYTES, sizeof total);
        for (int n = 0; n < 16; ++n)
            total[n] = without_denormals(without_denormals(total[n]) + without_denormals(even[n] + odd[n]));
        std::memcpy(sum + row * TILE_ROW_BYTES, total, sizeof total);
    }
}

#else

constexpr const char *TILE_INSTRUCTIONS = "amx_bf16";

// does the processor have them, does the system keep them, and does it let this process use them? Asked once.
inline bool tiles_allowed() {
    static const bool allowed = [] {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
        uint32_t low, high;
        asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        if ((low >> 17 & 3) != 3) return false;  // configuration and data of tiles are kept across threads
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return allowed;
}
// assembler, as the intrinsics of gcc are macros that want a literal, and do not say that they read memory
inline void tile_loadconfig(const TileConfig *config) { asm volatile("ldtilecfg %0" ::"m"(*config)); }
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
void tile_load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
void tile_store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int SUM, int A, int B>
void tile_dpbf16ps() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

#endif

// tiles are this thread's while it lives
struct TileThread {
    TileThread() {
        TileConfig config{};
        config.palette = 1;
        for (int t = 0; t < TILES; ++t) config.row_bytes[t] = TILE_ROW_BYTES, config.rows[t] = TILE_ROWS;
        tile_loadconfig(&config);
    }
    ~TileThread() { tile_release(); }
    TileThread(const TileThread &) = delete;
    TileThread &operator=(const TileThread &) = delete;
};

// SUM[m, n] = (fresh ? 0 : SUM[m, n]) + the sum over k of A[m, k] B[n, k]. `a` and `b` say where tiles of the operands lie, in
// one piece each, and `sum` where those of the result do, whose rows are `stride` bytes apart. Sums are held in tiles 0 to
// 3, operands in 4, 5 and 6, 7, so that each is read once for two products.
template <int M, int N, class A, class B, class Sum>
inline void tile_products(int64_t steps, bool fresh, int64_t stride, const A &a, const B &b, const Sum &sum) {
    static_assert(M >= 1 && M <= 2 && N >= 1 && N <= 2, "four sums");
    if (fresh) {
        tile_zero<0>();
        if constexpr (N > 1) tile_zero<1>();
        if constexpr (M > 1) tile_zero<2>();
        if constexpr (M > 1 && N > 1) tile_zero<3>();
    } else {
        tile_load<0>(sum(0, 0), stride);
        if constexpr (N > 1) tile_load<1>(sum(0, 1), stride);
        if constexpr (M > 1) tile_load<2>(sum(1, 0), stride);
        if constexpr (M > 1 && N > 1) tile_load<3>(sum(1, 1), stride);
    }
    for (int64_t k = 0; k < steps; ++k) {
        tile_load<4>(a(0, k), TILE_ROW_BYTES);
        tile_load<6>(b(0, k), TILE_ROW_BYTES);
        tile_dpbf16ps<0, 4, 6>();
        if constexpr (N > 1) {
            tile_load<7>(b(1, k), TILE_ROW_BYTES);
            tile_dpbf16ps<1, 4, 7>();
        }
        if constexpr (M > 1) {
            tile_load<5>(a(1, k), TILE_ROW_BYTES);
            tile_dpbf16ps<2, 5, 6>();
        }
        if constexpr (M > 1 && N > 1) tile_dpbf16ps<3, 5, 7>();
    }
    tile_store<0>(sum(0, 0), stride);
    if constexpr (N > 1) tile_store<1>(sum(0, 1), stride);
    if constexpr (M > 1) tile_store<2>(sum(1, 0), stride);
    if constexpr (M > 1 && N > 1) tile_store<3>(sum(1, 1), stride);
}

}  // namespace sparseprefill

#endif

#endif
