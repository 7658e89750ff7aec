/*
 * Speed of transform.h at each level: attention over 512 and 2048 positions (prefill: all rows in
 * calls of 128; decode: one row), beside the machine's peak of fused multiply-adds, and the
 * low-rank products. One thread, by processor time, median of several runs.
 *
 *     bench_transform [head_size [heads]]      default 64 3
 *
 * GFLOP/s counts 4 * keys * head_size a query, keys that it sees only; GB/s the bytes of the cache
 * or of the factors, read once.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/model/transform.h"

#define RUNS        9
#define RUN_SECONDS 0.02
#define KEYS_MAX    2048
#define ROWS        128

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double time_calls(void (*fn)(void *), void *arg, long n)
{
    const double begin = seconds();
    for (long i = 0; i < n; i++)
        fn(arg);
    return seconds() - begin;
}

/* Median seconds of a call of fn. Reading the clock is slower than some of them: many at once. */
static double time_of(void (*fn)(void *), void *arg)
{
    double runs[RUNS];
    long n = 1;
    while (time_calls(fn, arg, n) < RUN_SECONDS)
        n *= 2;
    for (int i = 0; i < RUNS; i++)
        runs[i] = time_calls(fn, arg, n) / (double)n;
    qsort(runs, RUNS, sizeof *runs, by_value);
    return runs[RUNS / 2];
}

/* ---- peaks ---- */

#if SH_X86
#include <immintrin.h>

static volatile float sink; /* results are used, so that the loops stay */

enum { CHAINS = 12, PEAK_ROUNDS = 20000 };

SH_TARGET_AVX512 static void peak_avx512(void *arg)
{
    (void)arg;
    __m512 sums[CHAINS], a = _mm512_set1_ps(1e-9f);
    for (int i = 0; i < CHAINS; i++)
        sums[i] = _mm512_set1_ps((float)i);
    for (long k = 0; k < PEAK_ROUNDS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sums[i] = _mm512_fmadd_ps(a, a, sums[i]);
        __asm__ volatile("" : "+v"(a)); /* or the compiler sums it up in advance */
    }
    for (int i = 0; i < CHAINS; i++)
        sink += _mm512_reduce_add_ps(sums[i]);
}

SH_TARGET_AVX2 static void peak_avx2(void *arg)
{
    (void)arg;
    __m256 sums[CHAINS], a = _mm256_set1_ps(1e-9f);
    for (int i = 0; i < CHAINS; i++)
        sums[i] = _mm256_set1_ps((float)i);
    for (long k = 0; k < PEAK_ROUNDS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sums[i] = _mm256_fmadd_ps(a, a, sums[i]);
        __asm__ volatile("" : "+x"(a)); /* or the compiler sums it up in advance */
    }
    for (int i = 0; i < CHAINS; i++)
        sink += _mm256_cvtss_f32(sums[i]);
}

/* GFLOP/s, 0 where it is not known. */
static double peak(sh_level level)
{
    const double flops = 2.0 * CHAINS * PEAK_ROUNDS;
    if (level == SH_LEVEL_AVX512_VNNI)
        return 1e-9 * flops * 16 / time_of(peak_avx512, NULL);
    if (level == SH_LEVEL_AVX2)
        return 1e-9 * flops * 8 / time_of(peak_avx2, NULL);
    return 0;
}
#else
static double peak(sh_level level)
{
    (void)level;
    return 0;
}
#endif

/* ---- attention ---- */

typedef struct {
    const sh_transform *ops;
    sh_attend attend;
    uint32_t n_keys;
    bool decode;
} attention;

static void run_attention(void *arg)
{
    const attention *t = arg;
    sh_attend a = t->attend;
    if (t->decode) {
        a.rows = 1;
        a.first = t->n_keys - 1;
        t->ops->attend(&a);
        return;
    }
    for (a.first = 0; a.first < t->n_keys; a.first += ROWS)
        t->ops->attend(&a);
}

static void bench_attention(sh_level level, attention *t, double top)
{
    const uint32_t size = t->attend.cache->head_size;
    for (t->n_keys = 512; t->n_keys <= KEYS_MAX; t->n_keys *= 4) {
        const double n = t->n_keys, queries_keys = n * (n + 1) / 2 * t->attend.heads;
        t->decode = false;
        const double prefill = 1e-9 * 4 * queries_keys * size / time_of(run_attention, t);
        t->decode = true;
        const double used = time_of(run_attention, t);
        const double bytes = n / SH_KV_TILE * (double)t->attend.cache->tile_bytes;
        printf("%-12s attend %-6s %4u keys: prefill %6.1f GFLOP/s", sh_level_name(level),
               t->attend.cache->halves ? "halves" : "floats", t->n_keys, prefill);
        if (top > 0)
            printf(" (%2.0f %% of %.0f)", 100 * prefill / top, top);
        printf(", decode %5.1f GFLOP/s, %5.1f GB/s\n", 1e-9 * 4 * n * size * t->attend.heads / used,
               1e-9 * bytes / used);
    }
}

/* ---- low rank ---- */

#define LORA_OUT 1536
typedef struct {
    const sh_transform *ops;
    sh_lora_a a;
    sh_lora_b b;
    const float *x;
    float *y;
} low_rank;

static void run_down(void *arg)
{
    const low_rank *l = arg;
    l->ops->lora_down(&l->a, l->x, 0, l->a.rank, l->y);
}

static void run_up(void *arg)
{
    const low_rank *l = arg;
    l->ops->lora_up(&l->b, l->x, 0, LORA_OUT, l->y);
}

static void bench_lora(sh_level level, const void *factors, const float *x, float *y)
{
    static const char *const names[] = {"floats", "halves", "int8"};
    for (sh_factor form = SH_FACTOR_F32; form <= SH_FACTOR_INT8; form++) {
        low_rank l = {
            .ops = sh_transform_at(level),
            .a = {.a = factors, .in = 576, .rank = 48, .form = form},
            .b = {.b = factors, .rank = 16, .form = form},
            .x = x,
            .y = y,
        };
        const double size = 1e-9 * (double)sh_factor_bytes(form);
        printf("%-12s lora   %-6s ", sh_level_name(level), names[form]);
        if (form != SH_FACTOR_INT8) { /* its A is a product */
            printf("down 576x48 %5.1f GB/s, ", 576 * 48 * size / time_of(run_down, &l));
            l.a.rank = 16;
            printf("576x16 %5.1f GB/s, ", 576 * 16 * size / time_of(run_down, &l));
        }
        printf("up 16x1536 %5.1f GB/s\n", 16 * LORA_OUT * size / time_of(run_up, &l));
    }
}

/* ---- rows ---- */

typedef struct {
    const sh_transform *ops;
    float *x, *y;
} rows;

static void run_norm(void *arg)
{
    const rows *r = arg;
    r->ops->rms_norm(r->x, r->x, 1e-5f, 576, r->y);
}

static void run_gate(void *arg)
{
    const rows *r = arg;
    memcpy(r->y, r->x, 1536 * sizeof *r->y); /* or it ends in denormals */
    r->ops->swiglu(r->y, r->x, 1536);
}

static void run_rotate(void *arg)
{
    const rows *r = arg;
    r->ops->rotate(r->y, r->x, 32);
}

static void run_rotate_halves(void *arg)
{
    const rows *r = arg;
    r->ops->rotate_halves(r->y, r->x, 32);
}

static void bench_rows(sh_level level, float *x, float *y)
{
    rows r = {.ops = sh_transform_at(level), .x = x, .y = y};
    for (int i = 0; i < 64; i++) /* no growth by rotation */
        x[i] = i % 2 == 0 ? 0.6f : 0.8f;
    const double norm = time_of(run_norm, &r), gate = time_of(run_gate, &r);
    const double adjacent = time_of(run_rotate, &r), halves = time_of(run_rotate_halves, &r);
    printf("%-12s rows   rms_norm 576 %.0f ns, swiglu 1536 %.0f ns, rotate 64 %.0f ns, "
           "rotate_halves 64 %.0f ns\n",
           sh_level_name(level), 1e9 * norm, 1e9 * gate, 1e9 * adjacent, 1e9 * halves);
}

int main(int argc, char **argv)
{
    const unsigned long head_size = argc > 1 ? strtoul(argv[1], NULL, 10) : 64;
    const unsigned long heads = argc > 2 ? strtoul(argv[2], NULL, 10) : 3;
    if (head_size < 2 || head_size > 256 || head_size % 2 != 0 || heads < 1 || heads > 64) {
        fprintf(stderr, "usage: bench_transform [head_size [heads]], 2 to 256 and 1 to 64\n");
        return 2;
    }
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 0);
    const uint32_t size = (uint32_t)head_size;
    const size_t width = heads * size, n = SH_MAX(ROWS * width, 4096);
    float *x = sh_alloc_aligned(n * sizeof *x), *y = sh_alloc_aligned(n * sizeof *y);
    float *scratch = sh_alloc_aligned(sh_attend_scratch_bytes(size));
    const size_t cache_bytes = KEYS_MAX / SH_KV_TILE * sh_kv_tile_bytes(size, false);
    void *tiles = sh_alloc_aligned(SH_MAX(cache_bytes, 1u << 18));
    if (x == NULL || y == NULL || scratch == NULL || tiles == NULL) {
        fprintf(stderr, "bench_transform: out of memory\n");
        return 1;
    }
    for (size_t i = 0; i < n; i++)
        x[i] = sh_rng_normal(&rng);
    memset(tiles, 0, SH_MAX(cache_bytes, 1u << 18));
    for (unsigned level = SH_LEVELS; level-- > 0;) {
        if (!sh_level_available((sh_level)level) || level == SH_LEVEL_AVX_VNNI)
            continue; /* AVX-VNNI has AVX2's table */
        const double top = peak((sh_level)level);
        for (int halves = 0; halves < 2; halves++) {
            sh_head_cache cache = {.tiles = tiles,
                                   .tile_bytes = sh_kv_tile_bytes(size, halves),
                                   .head_size = size,
                                   .head_padded = (uint32_t)SH_LANES_UP(size),
                                   .halves = halves};
            attention t = {.ops = sh_transform_at((sh_level)level),
                           .attend = {.cache = &cache,
                                      .q = x,
                                      .ldq = width,
                                      .rows = ROWS,
                                      .heads = (uint32_t)heads,
                                      .out = y,
                                      .ldout = width,
                                      .scratch = scratch}};
            for (uint32_t p = 0; p < KEYS_MAX; p++)
                t.ops->store(&cache, p, x + p % 64 * 7, x + p % 61 * 5);
            bench_attention((sh_level)level, &t, top);
        }
        bench_lora((sh_level)level, tiles, x, y);
        bench_rows((sh_level)level, x, y);
    }
    free(x);
    free(y);
    free(scratch);
    free(tiles);
    return 0;
}
