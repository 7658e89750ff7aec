#include "shared/math/bf16.h"

#include <stdatomic.h>
#include <string.h>

#include "shared/math/dispatch.h"

#if SH_X86
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))
#define TARGET_AMX  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl")))
#endif

#define BLOCK (SH_BF16_K * SH_BF16_N) /* values of a block of B: a tile of 1 KiB */
#define ROWS  16                      /* of a tile */

/* ---- levels ---- */

typedef enum { LEVEL_UNKNOWN, LEVEL_PORTABLE, LEVEL_AVX512, LEVEL_AMX } bf16_level;

static const char *const names[] = {"", "portable", "avx512-bf16", "amx-bf16"};
static _Atomic(int) level_in_use;

#if SH_X86
#define ARCH_REQ_XCOMP_PERM 0x1023 /* Linux, arch/x86/include/uapi/asm/prctl.h */
#define XFEATURE_XTILEDATA  18

static bool has_avx512_bf16(void)
{
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
}

/* Tiles are state that Linux gives a process only on request. */
static bool has_amx(void)
{
    unsigned a, b, c, d;
    return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) != 0 &&
           (d >> 24 & 1) != 0 &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

static bool available(bf16_level level)
{
#if SH_X86
    if (level == LEVEL_AMX)
        return has_amx();
    if (level == LEVEL_AVX512)
        return has_avx512_bf16();
#endif
    return level == LEVEL_PORTABLE;
}

static bf16_level level_get(void)
{
    bf16_level level = (bf16_level)atomic_load_explicit(&level_in_use, memory_order_relaxed);
    if (level != LEVEL_UNKNOWN)
        return level;
    for (level = LEVEL_AMX; !available(level);)
        level--;
    atomic_store(&level_in_use, (int)level);
    return level;
}

const char *sh_bf16_level(void)
{
    return names[level_get()];
}

bool sh_bf16_force(const char *name)
{
    for (bf16_level level = LEVEL_PORTABLE; level <= LEVEL_AMX; level++)
        if (strcmp(names[level], name) == 0 && available(level)) {
            atomic_store(&level_in_use, (int)level);
            return true;
        }
    return false;
}

/* ---- packing ---- */

static size_t up(size_t n, size_t step)
{
    return (n + step - 1) / step * step;
}

/* An odd number of blocks: rows a power of two apart would share the sets of a cache. */
static size_t a_stride(size_t k)
{
    return ((k + SH_BF16_K - 1) / SH_BF16_K | 1) * SH_BF16_K;
}

size_t sh_bf16_a_values(size_t m, size_t k)
{
    return up(m, ROWS) * a_stride(k);
}

size_t sh_bf16_b_values(size_t n, size_t k)
{
    return up(n, SH_BF16_N) * up(k, SH_BF16_K);
}

/* A NaN stays one. */
SH_INLINE sh_bf16 round_one(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (sh_bf16)(bits >> 16 | 0x40);
    return (sh_bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if SH_X86
TARGET_BF16 static size_t round_row_avx512(const float *x, size_t n, sh_bf16 *out)
{
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m512bh both =
            _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
        _mm512_storeu_si512((void *)(out + i), (__m512i)both);
    }
    return i;
}

/* Two rows of B, 16 columns: pairs beside each other. */
TARGET_BF16 static size_t pair_rows_avx512(const float *even, const float *odd, size_t n,
                                           sh_bf16 *out, size_t block_step)
{
    size_t i = 0;
    for (; i + 16 <= n; i += 16, out += block_step) {
        const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(even + i));
        const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(odd + i));
        const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                              _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_storeu_si512((void *)out, pairs);
    }
    return i;
}
#endif

static void round_row(const float *x, size_t n, sh_bf16 *out)
{
    size_t i = 0;
#if SH_X86
    if (level_get() >= LEVEL_AVX512)
        i = round_row_avx512(x, n, out);
#endif
    for (; i < n; i++)
        out[i] = round_one(x[i]);
}

void sh_bf16_pack_a(const float *x, size_t ldx, size_t m, size_t k, sh_bf16 *out)
{
    const size_t stride = a_stride(k), blocks = up(k, SH_BF16_K);
    for (size_t i = 0; i < up(m, ROWS); i++, out += stride) {
        if (i >= m) {
            memset(out, 0, blocks * sizeof *out);
            continue;
        }
        round_row(x + i * ldx, k, out);
        memset(out + k, 0, (blocks - k) * sizeof *out);
    }
}

#if SH_X86
/* A block of B from 16 rows of its transpose of 32 values: pairs of values are 32 bits, which a
 * transpose of 16 x 16 turns. */
TARGET_BF16 static void turn_block_avx512(const float *w, size_t ldw, sh_bf16 *out)
{
    __m512i r[16], t[16];
    for (size_t i = 0; i < 16; i++)
        r[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(w + i * ldw + 16),
                                            _mm512_loadu_ps(w + i * ldw));
    for (size_t i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (size_t i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (size_t i = 0; i < 4; i++) { /* r[4 g + i]: values 4 l + i of rows 4 g .. 4 g + 3 */
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        _mm512_storeu_si512((void *)(out + 32 * i), _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512((void *)(out + 32 * (8 + i)), _mm512_shuffle_i32x4(a, c, 0xdd));
        _mm512_storeu_si512((void *)(out + 32 * (4 + i)), _mm512_shuffle_i32x4(b, d, 0x88));
        _mm512_storeu_si512((void *)(out + 32 * (12 + i)), _mm512_shuffle_i32x4(b, d, 0xdd));
    }
}
#endif

void sh_bf16_pack_columns(const float *w, size_t ldw, size_t first, size_t n, size_t k,
                          sh_bf16 *out)
{
    const size_t k_blocks = up(k, SH_BF16_K) / SH_BF16_K;
    SH_ASSERT(first % SH_BF16_N == 0);
    out += first / SH_BF16_N * k_blocks * BLOCK;
    for (size_t j = 0; j < n; j += SH_BF16_N)
        for (size_t b = 0; b < k_blocks; b++, out += BLOCK) {
            const size_t columns = SH_MIN((size_t)SH_BF16_N, n - j);
            const size_t rows = SH_MIN((size_t)SH_BF16_K, k - b * SH_BF16_K);
            const float *from = w + j * ldw + b * SH_BF16_K;
#if SH_X86
            if (columns == SH_BF16_N && rows == SH_BF16_K && level_get() >= LEVEL_AVX512) {
                turn_block_avx512(from, ldw, out);
                continue;
            }
#endif
            memset(out, 0, BLOCK * sizeof *out);
            for (size_t c = 0; c < columns; c++)
                for (size_t r = 0; r < rows; r++)
                    out[r / 2 * 2 * SH_BF16_N + 2 * c + r % 2] = round_one(from[c * ldw + r]);
        }
}

void sh_bf16_pack_rows(const float *w, size_t ldw, size_t first, size_t rows, size_t n, size_t k,
                       sh_bf16 *out)
{
    const size_t step = up(k, SH_BF16_K) * SH_BF16_N; /* from a block to the next columns' */
    SH_ASSERT(first % SH_BF16_K == 0 && first + rows <= k);
    for (size_t r = 0; r < up(rows, SH_BF16_K); r += 2) {
        sh_bf16 *pair = out + (first + r) / SH_BF16_K * BLOCK + r % SH_BF16_K * SH_BF16_N;
        size_t c = 0;
#if SH_X86
        if (r + 2 <= rows && level_get() >= LEVEL_AVX512)
            c = pair_rows_avx512(w + r * ldw, w + (r + 1) * ldw, n, pair, step);
#endif
        for (; c < up(n, SH_BF16_N); c++)
            for (size_t i = 0; i < 2; i++)
                pair[c / SH_BF16_N * step + c % SH_BF16_N * 2 + i] =
                    c < n && r + i < rows ? round_one(w[(r + i) * ldw + c]) : 0;
    }
}

/* ---- products ---- */

SH_INLINE float widen(sh_bf16 x)
{
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static void run_portable(const sh_bf16_product *p)
{
    const size_t stride = a_stride(p->k), step = up(p->k, SH_BF16_K) * SH_BF16_N;
    for (size_t i = 0; i < p->m; i++)
        for (size_t j = 0; j < p->n; j++) {
            const sh_bf16 *a = p->a + i * stride;
            const sh_bf16 *b = p->b + j / SH_BF16_N * step + j % SH_BF16_N * 2;
            float sum = 0;
            for (size_t k = 0; k < p->k; k++)
                sum += widen(a[k]) * widen(b[k / 2 * 2 * SH_BF16_N + k % 2]);
            float *c = p->c + i * p->ldc + j;
            *c = p->add ? *c + sum : sum;
        }
}

#if SH_X86
/* `rows` rows of A times two blocks of columns. */
TARGET_BF16 SH_INLINE void strip_avx512(const sh_bf16_product *p, size_t i, size_t j, int rows)
{
    const size_t stride = a_stride(p->k), step = up(p->k, SH_BF16_K) * SH_BF16_N;
    const sh_bf16 *a = p->a + i * stride, *b = p->b + j / SH_BF16_N * step;
    const bool two = j + SH_BF16_N < p->n;
    const sh_bf16 *b2 = two ? b + step : b;
    __m512 sums[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (size_t k = 0; k < p->k; k += 2, b += 2 * SH_BF16_N, b2 += 2 * SH_BF16_N) {
        const __m512bh x = (__m512bh)_mm512_loadu_si512((const void *)b);
        const __m512bh y = (__m512bh)_mm512_loadu_si512((const void *)b2);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, a + (size_t)r * stride + k, sizeof pair);
            const __m512bh q = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], q, x);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], q, y);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        for (size_t half = 0; half < (two ? 2 : 1); half++) {
            const size_t at = j + half * SH_BF16_N, n = SH_MIN(p->n - at, (size_t)SH_BF16_N);
            const __mmask16 mask = (__mmask16)((1u << n) - 1);
            float *c = p->c + (i + (size_t)r) * p->ldc + at;
            __m512 sum = sums[r][half];
            if (p->add)
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, c));
            _mm512_mask_storeu_ps(c, mask, sum);
        }
}

TARGET_BF16 static void run_avx512(const sh_bf16_product *p)
{
    for (size_t j = 0; j < p->n; j += 2 * SH_BF16_N) {
        size_t i = 0;
        for (; i + 8 <= p->m; i += 8)
            strip_avx512(p, i, j, 8);
        for (; i < p->m; i++)
            strip_avx512(p, i, j, 1);
    }
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

TARGET_AMX static void configure(void)
{
    tile_config config __attribute__((aligned(64))) = {.palette = 1};
    for (size_t t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = ROWS;
    }
    _tile_loadconfig(&config);
}

/* The part of a tile that lies in C. */
static void tile_edge(const sh_bf16_product *p, size_t i, size_t j, const float *tile)
{
    for (size_t r = 0; r < ROWS && i + r < p->m; r++)
        for (size_t c = 0; c < SH_BF16_N && j + c < p->n; c++) {
            float *to = p->c + (i + r) * p->ldc + j + c;
            *to = p->add ? *to + tile[r * SH_BF16_N + c] : tile[r * SH_BF16_N + c];
        }
}

TARGET_BF16 static void tile_add(const sh_bf16_product *p, size_t i, size_t j, const float *tile)
{
    if (i + ROWS > p->m || j + SH_BF16_N > p->n) {
        tile_edge(p, i, j, tile);
        return;
    }
    for (size_t r = 0; r < ROWS; r++) {
        float *to = p->c + (i + r) * p->ldc + j;
        __m512 sum = _mm512_loadu_ps(tile + r * SH_BF16_N);
        if (p->add)
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(to));
        _mm512_storeu_ps(to, sum);
    }
}

/* Tile numbers are part of the instructions. */
#define STORE(T, I, J)                                                                             \
    do {                                                                                           \
        _tile_stored(T, tile, sizeof *tile *SH_BF16_N);                                            \
        tile_add(p, I, J, tile);                                                                   \
    } while (0)

/* 32 x 32 values of C, or what there is of them: tiles past an edge are those at it once more. */
TARGET_AMX static void square_amx(const sh_bf16_product *p, size_t i, size_t j)
{
    const size_t stride = a_stride(p->k), k_blocks = up(p->k, SH_BF16_K) / SH_BF16_K;
    const bool low = i + ROWS < p->m, right = j + SH_BF16_N < p->n;
    const sh_bf16 *a = p->a + i * stride, *a2 = low ? a + ROWS * stride : a;
    const sh_bf16 *b = p->b + j / SH_BF16_N * k_blocks * BLOCK;
    const sh_bf16 *b2 = right ? b + k_blocks * BLOCK : b;
    float tile[ROWS * SH_BF16_N] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t k = 0; k < k_blocks; k++) {
        _tile_loadd(4, a + k * SH_BF16_K, stride * sizeof *a);
        _tile_loadd(5, a2 + k * SH_BF16_K, stride * sizeof *a);
        _tile_loadd(6, b + k * BLOCK, 64);
        _tile_loadd(7, b2 + k * BLOCK, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    STORE(0, i, j);
    if (right)
        STORE(1, i, j + SH_BF16_N);
    if (low)
        STORE(2, i + ROWS, j);
    if (low && right)
        STORE(3, i + ROWS, j + SH_BF16_N);
}

TARGET_AMX static void run_amx(const sh_bf16_product *p)
{
    configure();
    for (size_t j = 0; j < p->n; j += 2 * SH_BF16_N)
        for (size_t i = 0; i < p->m; i += 2 * ROWS)
            square_amx(p, i, j);
    _tile_release();
}
#endif

void sh_bf16_run(const sh_bf16_product *p)
{
    if (p->m == 0 || p->n == 0)
        return;
    switch (level_get()) {
#if SH_X86
    case LEVEL_AMX:
        run_amx(p);
        break;
    case LEVEL_AVX512:
        run_avx512(p);
        break;
#endif
    default:
        run_portable(p);
        break;
    }
}
