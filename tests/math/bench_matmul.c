/*
 * Speed of products at each level, as a share of what the machine can do at most, measured beside
 * it: one thread, processor time, best of several runs.
 *
 *     bench_matmul [TYPE [LEVEL]]      default: every type, every level
 *
 * gemv       n = 1, packed and in place: GB/s of weights and, in %, of a plain sum over as many
 *            bytes (of the matrix's size, so that both are in the same cache or memory)
 * gemm       n = 4, 16 and 512: GMAC/s, and in % of a loop of nothing but dot product instructions
 *            of the level (vpdpbusd, vpmaddubsw + vpmaddwd), which no kernel can reach: a block's
 *            sum is also turned to float and scaled.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/kernel_internal.h"

#define ROWS_MAX    512
#define RUNS        7
#define BYTES_A_RUN 4e7
#define MACS_A_RUN  1e9
#define PEAK_ROUNDS 1000000

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- ceilings ---- */

#if SH_X86
#include <immintrin.h>

static volatile double sink; /* results are used, so that the loops stay */

enum { CHAINS = 12 }; /* independent sums: latency 4 or 5, two a cycle */

SH_TARGET_AVX512 static double peak_vnni512(void)
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

SH_TARGET_AVX_VNNI static double peak_vnni256(void)
{
    __m256i sums[CHAINS], a = _mm256_set1_epi8(1);
    for (int i = 0; i < CHAINS; i++)
        sums[i] = _mm256_set1_epi32(i);
    double begin = seconds();
    for (long k = 0; k < PEAK_ROUNDS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sums[i] = _mm256_dpbusd_avx_epi32(sums[i], a, a);
        __asm__ volatile("" : "+x"(a));
    }
    double used = seconds() - begin;
    for (int i = 0; i < CHAINS; i++)
        sink += (double)_mm256_extract_epi32(sums[i], 0);
    return (double)PEAK_ROUNDS * CHAINS * 32 / used;
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

/* MAC/s of a level's dot product instruction, 0 when it has none of its own. */
static double peak(sh_level level)
{
    double best = 0;
    for (int run = 0; run < RUNS && level >= SH_LEVEL_AVX2; run++) {
        double now = level == SH_LEVEL_AVX512_VNNI ? peak_vnni512()
                     : level == SH_LEVEL_AVX_VNNI  ? peak_vnni256()
                                                   : peak_maddubs();
        best = SH_MAX(best, now);
    }
    return best;
}

SH_TARGET_AVX2 static double sum_bytes(const uint8_t *at, size_t bytes)
{
    __m256i sums[8];
    for (int i = 0; i < 8; i++)
        sums[i] = _mm256_setzero_si256();
    for (size_t b = 0; b + 256 <= bytes; b += 256) {
        _mm_prefetch((const void *)(at + b + 4096), _MM_HINT_T0);
        _mm_prefetch((const void *)(at + b + 4160), _MM_HINT_T0);
        _mm_prefetch((const void *)(at + b + 4224), _MM_HINT_T0);
        _mm_prefetch((const void *)(at + b + 4288), _MM_HINT_T0);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            sums[i] = _mm256_add_epi64(sums[i], _mm256_load_si256((const void *)(at + b + 32 * i)));
    }
    for (int i = 1; i < 8; i++)
        sums[0] = _mm256_add_epi64(sums[0], sums[i]);
    return (double)_mm256_extract_epi64(sums[0], 0);
}
#else
static double peak(sh_level level)
{
    (void)level;
    return 0;
}

static volatile double sink;

static double sum_bytes(const uint8_t *at, size_t bytes)
{
    uint64_t sum = 0, word;
    for (size_t b = 0; b + 8 <= bytes; b += 8) {
        memcpy(&word, at + b, 8);
        sum += word;
    }
    return (double)sum;
}
#endif

/* ---- products ---- */

typedef struct {
    sh_weights w;
    uint8_t *packed;
    sh_x_block *blocks;
    float *y;
    void *scratch;
} buffers;

static double bytes_a_second(const sh_kernels *kernels, const buffers *b, bool packed)
{
    double bytes = (double)sh_type_row_bytes(b->w.type, b->w.in) * b->w.out, best = 0;
    long rounds = (long)(BYTES_A_RUN / bytes / (kernels == &sh_kernels_portable ? 20 : 1)) + 1;
    size_t read = sh_pack_bytes(b->w.type, b->w.out, b->w.in);
    sh_weights w = b->w;
    w.packed = packed ? b->packed : NULL;
    sh_product p = {.w = &w, .blocks = b->blocks, .n = 1, .y = b->y, .ldy = b->w.out};
    for (int run = 0; run < RUNS; run++) {
        double begin = seconds();
        for (long i = 0; i < rounds; i++) {
            if (kernels != NULL)
                sh_product_run_with(kernels, &p, 0, w.out, b->scratch);
            else
                sink += sum_bytes(b->packed, read);
        }
        double total = (kernels != NULL ? bytes : (double)read) * (double)rounds;
        best = SH_MAX(best, total / (seconds() - begin));
    }
    return best;
}

static double macs_a_second(const sh_kernels *kernels, const buffers *b, size_t n, bool packed)
{
    double macs = (double)b->w.in * b->w.out * (double)n, best = 0;
    long rounds = (long)(MACS_A_RUN / macs / (kernels == &sh_kernels_portable ? 50 : 1)) + 1;
    sh_weights w = b->w;
    w.packed = packed ? b->packed : NULL;
    sh_product p = {.w = &w, .blocks = b->blocks, .n = n, .y = b->y, .ldy = b->w.out};
    for (int run = 0; run < RUNS - 2; run++) {
        double begin = seconds();
        for (long i = 0; i < rounds; i++)
            sh_product_run_with(kernels, &p, 0, w.out, b->scratch);
        best = SH_MAX(best, macs * (double)rounds / (seconds() - begin));
    }
    return best;
}

static void run_level(sh_level level, const buffers *b)
{
    const sh_kernels *kernels = sh_kernels_of(level);
    double read = bytes_a_second(NULL, b, true), top = peak(level);
    double packed = bytes_a_second(kernels, b, true), in_place = bytes_a_second(kernels, b, false);
    printf("%-4s %5ux%-5u %-11s gemv %5.1f (%3.0f %%), in place %5.1f (%3.0f %%) of %5.1f GB/s",
           sh_type_get((uint32_t)b->w.type)->name, b->w.out, b->w.in, sh_level_name(level),
           packed * 1e-9, 100 * packed / read, in_place * 1e-9, 100 * in_place / read, read * 1e-9);
    printf("; gemm");
    static const size_t ns[] = {4, 16, ROWS_MAX};
    for (size_t i = 0; i < SH_COUNT(ns) && (level != SH_LEVEL_PORTABLE || i == 0); i++) {
        double now = macs_a_second(kernels, b, ns[i], true);
        printf(" %zu: %5.0f", ns[i], now * 1e-9);
        if (top > 0)
            printf(" (%2.0f %%)", 100 * now / top);
    }
    if (top > 0)
        printf(", in place %5.0f, of %5.0f GMAC/s",
               macs_a_second(kernels, b, ROWS_MAX, false) * 1e-9, top * 1e-9);
    printf("\n");
}

static int run_shape(sh_type type, uint32_t out, uint32_t in, const char *level)
{
    buffers b = {.w = {.type = type, .out = out, .in = in}};
    size_t bytes = out * sh_type_row_bytes(type, in);
    if (bytes == 0)
        return 0; /* no multiple of the block */
    uint8_t *rows = sh_alloc_aligned(bytes);
    float *x = sh_alloc_aligned((size_t)ROWS_MAX * in * sizeof *x);
    b.packed = sh_alloc_aligned(sh_pack_bytes(type, out, in));
    b.blocks = sh_alloc_aligned((size_t)ROWS_MAX * sh_x_stride(in) * sizeof *b.blocks);
    b.y = sh_alloc_aligned((size_t)ROWS_MAX * out * sizeof *b.y);
    b.scratch = sh_alloc_aligned(sh_product_scratch_bytes(in));
    bool ok = rows != NULL && x != NULL && b.packed != NULL && b.blocks != NULL && b.y != NULL &&
              b.scratch != NULL;
    if (ok) {
        sh_rng rng;
        sh_rng_init(&rng, 1, 0, 1);
        for (size_t i = 0; i < bytes; i++)
            rows[i] = (uint8_t)(sh_rng_u32(&rng) & 0x3f); /* no NaN scales */
        for (size_t i = 0; i < (size_t)ROWS_MAX * in; i++)
            x[i] = sh_rng_normal(&rng);
        b.w.rows = rows;
        sh_x_quantize(x, in, ROWS_MAX, in, b.blocks);
        sh_pack_groups(type, rows, out, in, 0, (out + 15) / 16, b.packed);
        for (unsigned l = SH_LEVELS; l-- > 0;)
            if (sh_level_available((sh_level)l) &&
                (level == NULL || strcmp(level, sh_level_name((sh_level)l)) == 0))
                run_level((sh_level)l, &b);
    }
    free(rows);
    free(x);
    free(b.packed);
    free(b.blocks);
    free(b.y);
    free(b.scratch);
    return ok ? 0 : 1;
}

int main(int argc, char **argv)
{
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0, SH_TYPE_Q4_K, SH_TYPE_Q6_K,
                                    SH_TYPE_Q4_1, SH_TYPE_Q5_0, SH_TYPE_Q5_1, SH_TYPE_Q5_K};
    static const uint32_t shapes[][2] = {
        {576, 576},   {1536, 576},  {576, 1536}, {49152, 576},
        {2048, 2048}, {5632, 2048}, {2048, 5632}}; /* of a 135M and a 1.1B model */
    sh_type only = SH_TYPE_F32;
    if (argc > 1 && sh_type_parse(argv[1], &only, NULL) != SH_OK) {
        fprintf(stderr, "usage: bench_matmul [TYPE [LEVEL]], as in: bench_matmul Q8_0 avx2\n");
        return 2;
    }
    for (size_t t = 0; t < SH_COUNT(types); t++)
        for (size_t s = 0; s < SH_COUNT(shapes) && (argc < 2 || types[t] == only); s++)
            if (run_shape(types[t], shapes[s][0], shapes[s][1], argc > 2 ? argv[2] : NULL) != 0) {
                fprintf(stderr, "bench_matmul: out of memory\n");
                return 1;
            }
    return 0;
}
