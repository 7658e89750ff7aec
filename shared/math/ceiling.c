#include "shared/math/ceiling.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shared/base/buf.h"
#include "shared/math/dispatch.h"

#if SH_X86
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PASSES  7
#define READS   15
#define ROUNDS  200000u /* of the register loops, about 2 ms each */
#define CHAINS  12      /* independent sums: latency times throughput, and some */
#define SLICE   (1u << 20)
#define LINE    64u
#define STREAMS 8
#define AHEAD   24 /* lines */

typedef float v16 __attribute__((vector_size(64)));
typedef uint64_t u8x64 __attribute__((vector_size(64)));

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* What a loop computed must be used, or it is not computed. */
static void keep(const void *p)
{
    __asm__ volatile("" : : "r"(p) : "memory");
}

/* ---- reading ---- */

/* STREAMS places at once, because a core's prefetchers follow several streams better than one. */
#define READ_BODY(p, n)                                                                            \
    u8x64 sum = {0};                                                                               \
    for (size_t i = 0; i < n; i += 4)                                                              \
        for (size_t s = 0; s < STREAMS; s++) {                                                     \
            const u8x64 *at = p + s * n + i;                                                       \
            for (size_t k = 0; k < 4; k++)                                                         \
                __builtin_prefetch(at + AHEAD + k);                                                \
            sum ^= (at[0] ^ at[1]) ^ (at[2] ^ at[3]);                                              \
        }                                                                                          \
    keep(&sum)

static void read_portable(const u8x64 *p, size_t n)
{
    READ_BODY(p, n);
}

#if SH_X86
SH_TARGET_AVX2 static void read_avx2(const u8x64 *p, size_t n)
{
    READ_BODY(p, n);
}

SH_TARGET_AVX512 static void read_avx512(const u8x64 *p, size_t n)
{
    READ_BODY(p, n);
}
#endif

typedef struct {
    const uint8_t *bytes;
    size_t n;
    void (*fn)(const u8x64 *p, size_t n);
} reading;

static void read_share(void *arg, const sh_member *me)
{
    const reading *r = arg;
    size_t begin, end;
    while (sh_team_take(me, r->n / SLICE, 1, &begin, &end))
        r->fn((const void *)(r->bytes + begin * SLICE), SLICE / STREAMS / LINE);
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

sh_status sh_ceiling_read(sh_team *team, size_t bytes, double *bytes_per_s, sh_error *err)
{
    reading r = {.n = SH_MAX(bytes / SLICE, (size_t)1) * SLICE, .fn = read_portable};
    uint8_t *buffer = sh_alloc_aligned(r.n);
    if (buffer == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory to read %zu bytes from", r.n);
    for (size_t i = 0; i < r.n; i += LINE) /* pages of zeros would all be the same one */
        buffer[i] = (uint8_t)(i / LINE);
    r.bytes = buffer;
#if SH_X86
    if (sh_level_get() == SH_LEVEL_AVX512_VNNI)
        r.fn = read_avx512;
    else if (sh_level_get() >= SH_LEVEL_AVX2)
        r.fn = read_avx2;
#endif
    double rates[READS];
    for (int pass = 0; pass < READS; pass++) {
        const double begun = now_s();
        sh_team_run(team, read_share, &r);
        rates[pass] = (double)r.n / (now_s() - begun);
    }
    free(buffer);
    qsort(rates, READS, sizeof *rates, compare);
    *bytes_per_s = rates[READS / 2];
    return SH_OK;
}

/* ---- computing ---- */

/* One call: ROUNDS times CHAINS vectors; returns the operations done. */
typedef double (*compute_fn)(void);

static double f32_portable(void)
{
    v16 sums[CHAINS], x;
    memset(sums, 0, sizeof sums);
    memset(&x, 0, sizeof x);
    for (uint32_t i = 0; i < ROUNDS / 8; i++) {
        for (int c = 0; c < CHAINS; c++)
            sums[c] = sums[c] + x * x;
        keep(&x);
    }
    keep(sums);
    return 2.0 * 16 * CHAINS * (ROUNDS / 8);
}

static double int8_portable(void)
{
    int32_t sums[64] = {0};
    int8_t a[64], b[64];
    memset(a, 1, sizeof a);
    memset(b, 2, sizeof b);
    for (uint32_t i = 0; i < ROUNDS / 8; i++) {
        for (int c = 0; c < 64; c++)
            sums[c] += (int32_t)a[c] * b[c];
        keep(a);
    }
    keep(sums);
    return 2.0 * 64 * (ROUNDS / 8);
}

#if SH_X86
/* asm keeps the compiler from folding what is the same in every round. */
#define OPAQUE(x) __asm__ volatile("" : "+x"(x))

SH_TARGET_AVX512 static double int8_avx512(void)
{
    __m512i sums[CHAINS], a = _mm512_set1_epi8(1);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm512_set1_epi32(c);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        __asm__ volatile("" : "+v"(a));
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++)
            sums[c] = _mm512_dpbusd_epi32(sums[c], a, a);
    }
    keep(sums);
    return 2.0 * 64 * CHAINS * ROUNDS;
}

SH_TARGET_AVX512 static double f32_avx512(void)
{
    __m512 sums[CHAINS], a = _mm512_set1_ps(0.5f);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm512_set1_ps((float)c);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        __asm__ volatile("" : "+v"(a));
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++)
            sums[c] = _mm512_fmadd_ps(a, a, sums[c]);
    }
    keep(sums);
    return 2.0 * 16 * CHAINS * ROUNDS;
}

SH_TARGET_AVX2 static double f32_avx2(void)
{
    __m256 sums[CHAINS], a = _mm256_set1_ps(0.5f);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm256_set1_ps((float)c);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        OPAQUE(a);
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++)
            sums[c] = _mm256_fmadd_ps(a, a, sums[c]);
    }
    keep(sums);
    return 2.0 * 8 * CHAINS * ROUNDS;
}

SH_TARGET_AVX2 static double int8_avx2(void)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[CHAINS], a = _mm256_set1_epi8(1);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm256_set1_epi32(c);
    for (uint32_t i = 0; i < ROUNDS; i++) {
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++) {
            OPAQUE(a);
            __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), ones);
            sums[c] = _mm256_add_epi32(sums[c], pairs);
        }
    }
    keep(sums);
    return 2.0 * 32 * CHAINS * ROUNDS;
}

#ifdef SH_TARGET_AVX_VNNI
SH_TARGET_AVX_VNNI static double int8_avx_vnni(void)
{
    __m256i sums[CHAINS], a = _mm256_set1_epi8(1);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = _mm256_set1_epi32(c);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        OPAQUE(a);
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++)
            sums[c] = _mm256_dpbusd_avx_epi32(sums[c], a, a);
    }
    keep(sums);
    return 2.0 * 32 * CHAINS * ROUNDS;
}
#endif
#endif

#ifdef SH_TARGET_NEON
SH_TARGET_NEON static double int8_neon(void)
{
    int32x4_t sums[CHAINS];
    int8x16_t a = vdupq_n_s8(1);
    for (int c = 0; c < CHAINS; c++)
        sums[c] = vdupq_n_s32(c);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        __asm__ volatile("" : "+w"(a));
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; c++)
            sums[c] = vdotq_s32(sums[c], a, a);
    }
    keep(sums);
    return 2.0 * 16 * CHAINS * ROUNDS;
}
#endif

typedef struct {
    compute_fn fn;
    double ops; /* of one member */
} computing;

static void compute_share(void *arg, const sh_member *me)
{
    computing *c = arg;
    const double ops = c->fn();
    if (me->index == 0)
        c->ops = ops;
}

static double best_rate(sh_team *team, compute_fn fn)
{
    computing c = {.fn = fn};
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        const double begun = now_s();
        sh_team_run(team, compute_share, &c);
        best = SH_MAX(best, c.ops * sh_team_threads(team) / (now_s() - begun));
    }
    return best;
}

double sh_ceiling_int8(sh_team *team)
{
    compute_fn fn = int8_portable;
    switch (sh_level_get()) {
#if SH_X86
    case SH_LEVEL_AVX512_VNNI:
        fn = int8_avx512;
        break;
#ifdef SH_TARGET_AVX_VNNI
    case SH_LEVEL_AVX_VNNI:
        fn = int8_avx_vnni;
        break;
#endif
    case SH_LEVEL_AVX2:
        fn = int8_avx2;
        break;
#endif
#ifdef SH_TARGET_NEON
    case SH_LEVEL_NEON_DOTPROD:
        fn = int8_neon;
        break;
#endif
    default:
        break;
    }
    return best_rate(team, fn);
}

double sh_ceiling_f32(sh_team *team)
{
    compute_fn fn = f32_portable;
#if SH_X86
    if (sh_level_get() == SH_LEVEL_AVX512_VNNI)
        fn = f32_avx512;
    else if (sh_level_get() >= SH_LEVEL_AVX2)
        fn = f32_avx2;
#endif
    return best_rate(team, fn);
}
