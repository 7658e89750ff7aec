/*
 * Speed of sh_matmul at each level, beside the fastest that the machine's multiply-add instructions
 * can go: GMAC/s of one thread, by processor time, best of several runs.
 *
 *     bench_matmul [in [out]]      default 256 512
 *
 * peak is a loop of nothing but dot product instructions (vpdpbusd, vpmaddubsw + vpmaddwd, FMA) on
 * registers. A kernel cannot reach it: every block's sum is also turned to float and scaled.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/kernel_internal.h"

#define ROWS_MAX    128
#define SIDE_MAX    65536
#define RUNS        5
#define MACS_A_RUN  2e8
#define PEAK_ROUNDS 2000000

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- peaks ---- */

#if SH_X86
#include <immintrin.h>

static volatile double sink; /* results are used, so that the loops stay */

enum { CHAINS = 12 }; /* independent sums: latency 4 or 5, two a cycle */

SH_TARGET_AVX512 static double peak_vnni(void)
{
    __m512i sums[CHAINS], a = _mm512_set1_epi8(1);
    for (int i = 0; i < CHAINS; i++)
        sums[i] = _mm512_set1_epi32(i);
    double begin = seconds();
    for (long k = 0; k < PEAK_ROUNDS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sums[i] = _mm512_dpbusd_epi32(sums[i], a, a);
        __asm__ volatile("" : "+v"(a)); /* or the compiler sums it up in advance */
    }
    double used = seconds() - begin;
    for (int i = 0; i < CHAINS; i++)
        sink += (double)_mm512_reduce_add_epi32(sums[i]);
    return (double)PEAK_ROUNDS * CHAINS * 64 / used;
}

SH_TARGET_AVX512 static double peak_fma512(void)
{
    __m512 sums[CHAINS], a = _mm512_set1_ps(1e-9f);
    for (int i = 0; i < CHAINS; i++)
        sums[i] = _mm512_set1_ps((float)i);
    double begin = seconds();
    for (long k = 0; k < PEAK_ROUNDS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sums[i] = _mm512_fmadd_ps(a, a, sums[i]);
        __asm__ volatile("" : "+v"(a)); /* or the compiler sums it up in advance */
    }
    double used = seconds() - begin;
    for (int i = 0; i < CHAINS; i++)
        sink += (double)_mm512_reduce_add_ps(sums[i]);
    return (double)PEAK_ROUNDS * CHAINS * 16 / used;
}

SH_TARGET_AVX2 static double peak_maddubs(void)
{
    __m256i sums[CHAINS], a = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
    for (int i = 0; i < CHAINS; i++)
        sums[i] = _mm256_set1_epi32(i);
    double begin = seconds();
    for (long k = 0; k < PEAK_ROUNDS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
            __asm__ volatile("" : "+x"(a)); /* or the product is taken out of the loop */
            __m256i pairs = _mm256_maddubs_epi16(a, a);
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
        }
    }
    double used = seconds() - begin;
    for (int i = 0; i < CHAINS; i++)
        sink += (double)_mm256_extract_epi32(sums[i], 0);
    return (double)PEAK_ROUNDS * CHAINS * 32 / used;
}

SH_TARGET_AVX2 static double peak_fma256(void)
{
    __m256 sums[CHAINS], a = _mm256_set1_ps(1e-9f);
    for (int i = 0; i < CHAINS; i++)
        sums[i] = _mm256_set1_ps((float)i);
    double begin = seconds();
    for (long k = 0; k < PEAK_ROUNDS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sums[i] = _mm256_fmadd_ps(a, a, sums[i]);
        __asm__ volatile("" : "+x"(a)); /* or the compiler sums it up in advance */
    }
    double used = seconds() - begin;
    for (int i = 0; i < CHAINS; i++)
        sink += (double)_mm256_cvtss_f32(sums[i]);
    return (double)PEAK_ROUNDS * CHAINS * 8 / used;
}

/* MAC/s of a level's dot product instruction, 0 when it has none of its own. */
static double peak(sh_level level, bool integer)
{
    double best = 0;
    for (int run = 0; run < RUNS && level != SH_LEVEL_PORTABLE; run++) {
        double now = level == SH_LEVEL_AVX512_VNNI ? (integer ? peak_vnni() : peak_fma512())
                                                   : (integer ? peak_maddubs() : peak_fma256());
        best = SH_MAX(best, now);
    }
    return best;
}
#else
static double peak(sh_level level, bool integer)
{
    (void)level;
    (void)integer;
    return 0;
}
#endif

/* ---- products ---- */

typedef struct {
    size_t in, out;
    const float *x;
    float *y;
    void *w, *scratch;
} buffers;

static double speed(const sh_kernels *kernels, sh_type type, const buffers *b, size_t n)
{
    double macs = (double)(b->in * b->out * n), best = 0;
    long rounds = (long)(MACS_A_RUN / macs / (kernels == &sh_kernels_portable ? 20 : 1)) + 1;
    sh_float_product p = {.in = b->in, .out = b->out, .x = b->x, .n = n, .y = b->y, .ldy = b->out};
    for (int run = 0; run < RUNS; run++) {
        double begin = seconds();
        for (long i = 0; i < rounds; i++)
            sh_matmul_with(kernels, type, &p, b->w, b->scratch);
        best = SH_MAX(best, macs * (double)rounds / (seconds() - begin));
    }
    return best;
}

static void run_type(sh_type type, const buffers *b, const float *weights)
{
    static const size_t ns[] = {1, 2, 4, 8, 16, 128};
    if (sh_type_row_bytes(type, b->in) == 0)
        return;
    if (sh_type_get((uint32_t)type)->can_write)
        sh_row_quantize(type, weights, b->w, b->in * b->out);
    bool integer = type == SH_TYPE_Q8_0 || type == SH_TYPE_Q4_0;
    for (unsigned level = SH_LEVELS; level-- > 0;) {
        if (!sh_level_available((sh_level)level))
            continue;
        double top = peak((sh_level)level, integer), at_8 = 0;
        printf("%-5s %-12s", sh_type_get((uint32_t)type)->name, sh_level_name((sh_level)level));
        for (size_t i = 0; i < SH_COUNT(ns); i++) {
            double now = speed(sh_kernels_of((sh_level)level), type, b, ns[i]);
            at_8 = ns[i] == 8 ? now : at_8;
            printf(" %7.1f", now * 1e-9);
        }
        if (top > 0)
            printf(" %8.1f %6.0f %%", top * 1e-9, 100 * at_8 / top);
        printf("\n");
    }
}

int main(int argc, char **argv)
{
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0, SH_TYPE_F32, SH_TYPE_F16,
                                    SH_TYPE_Q6_K};
    buffers b = {.in = argc > 1 ? strtoul(argv[1], NULL, 10) : 256,
                 .out = argc > 2 ? strtoul(argv[2], NULL, 10) : 512};
    if (b.in < 1 || b.in > SIDE_MAX || b.out < 1 || b.out > SIDE_MAX) {
        fprintf(stderr, "usage: bench_matmul [in [out]], 1 to %d each\n", SIDE_MAX);
        return 2;
    }
    sh_rng rng;
    float *weights = sh_alloc_aligned(b.in * b.out * sizeof *weights);
    float *x = sh_alloc_aligned(ROWS_MAX * b.in * sizeof *x);
    b.y = sh_alloc_aligned(ROWS_MAX * b.out * sizeof *b.y);
    b.w = sh_alloc_aligned(b.in * b.out * sizeof(float));
    b.scratch = sh_alloc_aligned(sh_matmul_scratch_bytes(ROWS_MAX, b.in));
    if (weights == NULL || x == NULL || b.y == NULL || b.w == NULL || b.scratch == NULL) {
        fprintf(stderr, "bench_matmul: out of memory\n");
        return 1;
    }
    sh_rng_init(&rng, 1, 0, 1);
    for (size_t i = 0; i < b.in * b.out; i++)
        weights[i] = sh_rng_normal(&rng);
    for (size_t i = 0; i < ROWS_MAX * b.in; i++)
        x[i] = sh_rng_normal(&rng);
    b.x = x;
    printf("GMAC/s, in %zu, out %zu, one thread\n%-5s %-12s %7s %7s %7s %7s %7s %7s %8s %8s\n",
           b.in, b.out, "type", "level", "n=1", "2", "4", "8", "16", "128", "peak", "n=8");
    for (size_t i = 0; i < SH_COUNT(types); i++)
        run_type(types[i], &b, weights);
    free(weights);
    free(x);
    free(b.y);
    free(b.w);
    free(b.scratch);
    return 0;
}
