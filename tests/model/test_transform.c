/* Every level of transform.h that the CPU has against sums in double, and against each other. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/base/rng.h"
#include "shared/math/quant.h"
#include "shared/model/transform.h"

#define SEED 20261122

/* A byte pattern that is NaN as a float and as a half. */
#define GARBAGE 0xff

#define FOR_LEVELS(level)                                                                          \
    for (sh_level level = 0; level < SH_LEVELS; level++)                                           \
        if (sh_level_available(level))

static float *floats(size_t n)
{
    float *p = sh_alloc_aligned(SH_MAX(n, 1) * sizeof *p);
    assert_non_null(p);
    return p;
}

static float *normals(sh_rng *rng, size_t n)
{
    float *p = floats(n);
    for (size_t i = 0; i < n; i++)
        p[i] = sh_rng_normal(rng);
    return p;
}

static void expect_near(const char *what, double got, double want, double tolerance)
{
    if (!(fabs(got - want) <= tolerance)) /* a NaN is never near */
        fail_msg("%s: %.9g, want %.9g within %.2g", what, got, want, tolerance);
}

static void expect_same(const char *what, const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            fail_msg("%s: value %zu of %zu is %.9g and %.9g", what, i, n, (double)a[i],
                     (double)b[i]);
}

/* Whether a level rounds as AVX2 does. */
static bool fused(sh_level level)
{
    return sh_transform_at(level) != sh_transform_at(SH_LEVEL_PORTABLE);
}

/* ---- caches ---- */

typedef struct {
    sh_head_cache head;
    uint32_t n_keys;
    float *k, *v; /* [n_keys, head_size]: as the cache holds them */
} cache;

static float as_stored(float x, bool halves)
{
    return halves ? sh_f16_to_f32(sh_f32_to_f16(x)) : x;
}

/* Room for just the tiles needed, all garbage but what was stored. */
static cache cache_make(sh_rng *rng, const sh_transform *ops, uint32_t head_size, uint32_t n_keys,
                        bool halves)
{
    cache c = {.n_keys = n_keys,
               .head = {.head_size = head_size,
                        .head_padded = (uint32_t)SH_LANES_UP(head_size),
                        .halves = halves,
                        .tile_bytes = sh_kv_tile_bytes(head_size, halves)}};
    const size_t bytes = (n_keys + SH_KV_TILE - 1) / SH_KV_TILE * c.head.tile_bytes;
    c.head.tiles = sh_alloc_aligned(bytes);
    assert_non_null(c.head.tiles);
    memset(c.head.tiles, GARBAGE, bytes);
    c.k = normals(rng, (size_t)n_keys * head_size);
    c.v = normals(rng, (size_t)n_keys * head_size);
    for (uint32_t p = 0; p < n_keys; p++)
        ops->store(&c.head, p, c.k + (size_t)p * head_size, c.v + (size_t)p * head_size);
    for (size_t i = 0; i < (size_t)n_keys * head_size; i++) {
        c.k[i] = as_stored(c.k[i], halves);
        c.v[i] = as_stored(c.v[i], halves);
    }
    return c;
}

static void cache_release(cache *c)
{
    free(c->head.tiles);
    free(c->k);
    free(c->v);
}

static void attend_rows(const sh_transform *ops, const cache *c, const sh_attend *shape)
{
    sh_attend a = *shape;
    a.cache = &c->head;
    const size_t bytes = sh_attend_scratch_bytes(c->head.head_size);
    a.scratch = sh_alloc_aligned(bytes);
    assert_non_null(a.scratch);
    memset(a.scratch, GARBAGE, bytes);
    ops->attend(&a);
    free(a.scratch);
}

/* softmax(q·K / sqrt(head_size))·V of one query over n keys. */
static void attend_reference(const cache *c, const float *q, uint32_t n, double *out)
{
    const uint32_t size = c->head.head_size;
    double *w = malloc(n * sizeof *w), top = -INFINITY, sum = 0;
    assert_non_null(w);
    for (uint32_t p = 0; p < n; p++) {
        w[p] = 0;
        for (uint32_t d = 0; d < size; d++)
            w[p] += (double)q[d] * (double)c->k[(size_t)p * size + d];
        w[p] /= sqrt(size);
        top = SH_MAX(top, w[p]);
    }
    for (uint32_t p = 0; p < n; p++)
        sum += w[p] = exp(w[p] - top);
    for (uint32_t d = 0; d < size; d++) {
        out[d] = 0;
        for (uint32_t p = 0; p < n; p++)
            out[d] += w[p] / sum * (double)c->v[(size_t)p * size + d];
    }
    free(w);
}

/* The last rh[0] positions of n_keys attend, with rh[1] queries each; the rows of q and of out have
 * 3 values between them that are not theirs. */
static void check_attend(sh_level level, uint32_t head_size, uint32_t n_keys, const uint32_t rh[2],
                         bool halves)
{
    const uint32_t rows = rh[0], heads = rh[1];
    const sh_transform *ops = sh_transform_at(level);
    sh_rng rng;
    sh_rng_init(&rng, SEED, head_size, n_keys);
    cache c = cache_make(&rng, ops, head_size, n_keys, halves);
    const size_t width = (size_t)heads * head_size, ld = width + 3;
    float *q = normals(&rng, rows * ld), *out = floats(rows * ld);
    double *want = malloc(head_size * sizeof *want);
    assert_non_null(want);
    memset(out, GARBAGE, rows * ld * sizeof *out);
    attend_rows(ops, &c,
                &(sh_attend){.q = q,
                             .ldq = ld,
                             .rows = rows,
                             .heads = heads,
                             .first = n_keys - rows,
                             .out = out,
                             .ldout = ld});
    char what[128];
    for (uint32_t r = 0; r < rows; r++) {
        for (uint32_t h = 0; h < heads; h++) {
            attend_reference(&c, q + r * ld + (size_t)h * head_size, n_keys - rows + r + 1, want);
            snprintf(what, sizeof what, "%s head_size=%u keys=%u row=%u/%u head=%u/%u halves=%d",
                     sh_level_name(level), head_size, n_keys, r, rows, h, heads, halves);
            for (uint32_t d = 0; d < head_size; d++) /* sums of 256 and of 300 terms around 1 */
                expect_near(what, (double)out[r * ld + (size_t)h * head_size + d], want[d], 1e-5);
        }
        for (size_t i = width; i < ld; i++)
            assert_true(isnan(out[r * ld + i])); /* not written */
    }
    cache_release(&c);
    free(want);
    free(q);
    free(out);
}

/* ---- attention ---- */

static void test_attend_decode(void **state)
{
    (void)state;
    static const uint32_t sizes[] = {2, 8, 48, 64, 80, 96, 112, 128, 256};
    FOR_LEVELS(level)
    for (size_t s = 0; s < SH_COUNT(sizes); s++)
        for (uint32_t n = 1; n <= 70; n++)
            for (int halves = 0; halves < 2; halves++)
                check_attend(level, sizes[s], n, (uint32_t[]){1, 1 + (n + (uint32_t)s) % 9},
                             halves);
}

static void test_attend_prefill(void **state)
{
    (void)state;
    static const uint32_t sizes[] = {2, 48, 64, 80, 128};
    static const uint32_t cases[][3] = {/* keys, rows, heads */
                                        {1, 1, 1},    {2, 2, 1},    {17, 17, 3}, {70, 70, 1},
                                        {70, 33, 2},  {64, 64, 3},  {65, 2, 3},  {128, 128, 1},
                                        {129, 40, 4}, {130, 66, 8}, {200, 7, 7}, {300, 5, 5}};
    FOR_LEVELS(level)
    for (size_t s = 0; s < SH_COUNT(sizes); s++)
        for (size_t i = 0; i < SH_COUNT(cases); i++)
            for (int halves = 0; halves < 2; halves++)
                check_attend(level, sizes[s], cases[i][0], &cases[i][1], halves);
}

/* All rows in one call, row by row, head by head, in pieces: the same bits; also with all later
 * positions spoiled, and at every level that has multiply-add. */
static void check_split(uint32_t head_size, uint32_t heads, bool halves)
{
    enum { KEYS = 150, FIRST = 11, ROWS = KEYS - FIRST };
    const size_t ld = (size_t)heads * head_size;
    float *first_level = NULL;
    FOR_LEVELS(level)
    {
        const sh_transform *ops = sh_transform_at(level);
        sh_rng rng;
        sh_rng_init(&rng, SEED, head_size, heads);
        cache c = cache_make(&rng, ops, head_size, KEYS, halves);
        float *q = normals(&rng, ROWS * ld), *all = floats(ROWS * ld), *part = floats(ROWS * ld);
        for (size_t i = 0; i < 40 * ld; i++)
            q[i] *= 20; /* one key takes nearly everything */
        sh_attend whole = {.q = q,
                           .ldq = ld,
                           .rows = ROWS,
                           .heads = heads,
                           .first = FIRST,
                           .out = all,
                           .ldout = ld};
        attend_rows(ops, &c, &whole);
        for (uint32_t r = 0, n; r < ROWS; r += n) {
            n = SH_MIN(1 + sh_rng_u32(&rng) % 50, ROWS - r);
            sh_attend a = whole;
            a.rows = n, a.first = FIRST + r, a.q = q + r * ld, a.out = part + r * ld;
            a.next = (const uint8_t *)q, a.next_bytes = ROWS * ld * sizeof *q; /* only fetched */
            attend_rows(ops, &c, &a);
        }
        expect_same("pieces of rows", part, all, ROWS * ld);
        for (uint32_t r = ROWS; r-- > 0;) { /* and nothing after this row exists */
            sh_attend a = whole;
            a.rows = 1, a.first = FIRST + r, a.q = q + r * ld, a.out = part + r * ld;
            attend_rows(ops, &c, &a);
            const float bad = r % 2 == 0 ? INFINITY : NAN;
            float *spoiled = floats(head_size);
            for (uint32_t d = 0; d < head_size; d++)
                spoiled[d] = bad;
            ops->store(&c.head, FIRST + r, spoiled, spoiled);
            free(spoiled);
        }
        expect_same("row by row", part, all, ROWS * ld);
        if (fused(level)) {
            if (first_level != NULL)
                expect_same(sh_level_name(level), first_level, all, ROWS * ld);
            free(first_level);
            first_level = floats(ROWS * ld);
            memcpy(first_level, all, ROWS * ld * sizeof *all);
        }
        cache_release(&c);
        free(q);
        free(all);
        free(part);
    }
    free(first_level);
}

static void test_attend_split(void **state)
{
    (void)state;
    for (uint32_t heads = 1; heads <= 8; heads++)
        for (int halves = 0; halves < 2; halves++)
            check_split(heads % 2 == 0 ? 64 : 40, heads, halves);
}

/* Later positions that hold infinities, computed beside a row that sees them. */
static void test_attend_later_infinite(void **state)
{
    (void)state;
    enum { KEYS = 80, SIZE = 64, BAD = 71 };
    FOR_LEVELS(level)
    {
        const sh_transform *ops = sh_transform_at(level);
        sh_rng rng;
        sh_rng_init(&rng, SEED, 7, 0);
        cache c = cache_make(&rng, ops, SIZE, KEYS, false);
        float *q = normals(&rng, KEYS * SIZE), *good = floats(KEYS * SIZE),
              *bad = floats(KEYS * SIZE), spoiled[SIZE];
        sh_attend a = {.q = q, .ldq = SIZE, .rows = KEYS, .heads = 1, .out = good, .ldout = SIZE};
        attend_rows(ops, &c, &a);
        for (int i = 0; i < SIZE; i++)
            spoiled[i] = INFINITY;
        ops->store(&c.head, BAD, spoiled, spoiled);
        a.out = bad;
        attend_rows(ops, &c, &a);
        expect_same("rows before", bad, good, BAD * SIZE);
        for (int i = 0; i < SIZE; i++) /* they are seen from there on */
            assert_false(isfinite(bad[BAD * SIZE + i]));
        cache_release(&c);
        free(q);
        free(good);
        free(bad);
    }
}

/* Scores of ±1e30 and -infinity: the largest takes all, nothing is NaN. */
static void test_attend_huge(void **state)
{
    (void)state;
    enum { KEYS = 140, SIZE = 8 };
    static const float scores[] = {1e30f, -1e30f, 3e38f, -3e38f, 0};
    FOR_LEVELS(level)
    {
        const sh_transform *ops = sh_transform_at(level);
        for (uint32_t best = 0; best < KEYS; best += 23) {
            sh_rng rng;
            sh_rng_init(&rng, SEED, 8, best);
            cache c = cache_make(&rng, ops, SIZE, KEYS, false);
            const float q[SIZE] = {1, 1};
            float out[SIZE];
            for (uint32_t p = 0; p < KEYS; p++) {
                float k[SIZE] = {scores[sh_rng_u32(&rng) % 5] * (p == best ? 0 : 0.5f)};
                if (p == best)
                    k[0] = 3e38f;
                else if (p % 5 == 2)
                    k[0] = k[1] = -FLT_MAX; /* their sum is -infinity */
                else if (k[0] > 0)
                    k[0] = -k[0];
                ops->store(&c.head, p, k, c.v + (size_t)p * SIZE);
            }
            attend_rows(ops, &c,
                        &(sh_attend){.q = q,
                                     .ldq = SIZE,
                                     .rows = 1,
                                     .heads = 1,
                                     .first = KEYS - 1,
                                     .out = out,
                                     .ldout = SIZE});
            for (int d = 0; d < SIZE; d++)
                expect_near("huge", (double)out[d], (double)c.v[best * SIZE + (size_t)d], 1e-6);
            cache_release(&c);
        }
    }
}

static void test_store(void **state)
{
    (void)state;
    static const uint32_t sizes[] = {2, 8, 16, 40, 64, 80};
    enum { PLACE = 37 }; /* tile 2, lane 5 */
    static const float odd[] = {0,        -0.0f,       65504,  65519,     65520,   1e9f,
                                INFINITY, 1e-8f,       6e-8f,  -3e-8f,    6.1e-5f, NAN,
                                1,        1.00048828f, -1e-5f, -INFINITY, 2047.5f, 1.0014648f};
    FOR_LEVELS(level)
    for (size_t s = 0; s < 2 * SH_COUNT(sizes); s++) {
        const uint32_t size = sizes[s / 2], padded = (uint32_t)SH_LANES_UP(size);
        const bool halves = s % 2 != 0;
        const sh_transform *ops = sh_transform_at(level);
        sh_rng rng;
        sh_rng_init(&rng, SEED, size, 1);
        cache c = cache_make(&rng, ops, size, 48, halves);
        const size_t width = halves ? 2 : 4;
        memset(c.head.tiles, GARBAGE, 3 * c.head.tile_bytes);
        float k[80], v[80];
        for (uint32_t d = 0; d < size; d++) {
            k[d] = odd[d % SH_COUNT(odd)];
            v[d] = odd[(d + 7) % SH_COUNT(odd)];
        }
        ops->store(&c.head, PLACE, k, v);
        const uint8_t *tile = (const uint8_t *)c.head.tiles + 2 * c.head.tile_bytes;
        size_t n_written = 0;
        for (uint32_t d = 0; d < padded; d++) {
            const float want[2] = {d < size ? k[d] : 0, d < size ? v[d] : 0};
            const size_t at[2] = {(size_t)d * 16 + 5, (size_t)size * 16 + 5 * padded + d};
            for (int i = d < size ? 0 : 1; i < 2; i++, n_written += width) {
                const uint16_t half = sh_f32_to_f16(want[i]);
                const void *bits = halves ? (const void *)&half : (const void *)&want[i];
                if (memcmp(tile + at[i] * width, bits, width) != 0 && !isnan(want[i]))
                    fail_msg("%s: %s %u of %u", sh_level_name(level), i ? "v" : "k", d, size);
                if (isnan(want[i]) && halves)
                    assert_true(isnan(sh_f16_to_f32(((const uint16_t *)tile)[at[i]])));
            }
        }
        size_t n_garbage = 0;
        for (size_t i = 0; i < 3 * c.head.tile_bytes; i++)
            n_garbage += ((const uint8_t *)c.head.tiles)[i] == GARBAGE;
        assert_true(n_garbage >= 3 * c.head.tile_bytes - n_written);
        cache_release(&c);
    }
}

/* ---- single operations ---- */

/* silu(g) * 1 is g e^g for a very negative g: how exact exp is. */
static void test_swiglu(void **state)
{
    (void)state;
    enum { N = 4099 };
    FOR_LEVELS(level)
    {
        const sh_transform *ops = sh_transform_at(level);
        float *gate = floats(N + 1), *up = floats(N);
        for (int i = 0; i < N; i++) {
            gate[i] = -85.5f + 171.0f * (float)i / N;
            up[i] = i % 3 == 0 ? 1.0f : -2.5f;
        }
        gate[N] = 42;
        float *x = floats(N);
        memcpy(x, gate, N * sizeof *x);
        ops->swiglu(gate, up, N);
        assert_true(gate[N] == 42);
        for (int i = 0; i < N; i++) {
            const double want = (double)x[i] / (1 + exp(-(double)x[i])) * (double)up[i];
            expect_near(sh_level_name(level), (double)gate[i], want, 4e-7 * fabs(want));
        }
        const float extreme[] = {-1e30f, 1e30f, -INFINITY, 0, -0.0f, 200, -200, NAN};
        memcpy(gate, extreme, sizeof extreme);
        for (size_t i = 0; i < SH_COUNT(extreme); i++)
            up[i] = 1;
        ops->swiglu(gate, up, SH_COUNT(extreme));
        expect_near("-1e30", (double)gate[0], 0, 1e-6);
        assert_true(gate[1] == 1e30f && gate[3] == 0 && gate[4] == 0 && gate[5] == 200);
        expect_near("-200", (double)gate[6], 0, 1e-30);
        assert_true(isnan(gate[7]));
        free(gate);
        free(up);
        free(x);
    }
}

/* Every length up to four vectors and more, in place too; the value after the end stays. */
static void test_rms_norm_and_add(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 2, 0);
    for (uint32_t n = 1; n < 150; n++) {
        float *x = normals(&rng, n), *w = normals(&rng, n), *out = floats(n + 1);
        double squares = 0;
        for (uint32_t i = 0; i < n; i++)
            squares += (double)x[i] * (double)x[i];
        const double rms = sqrt(squares / n + 1e-5);
        float before[150];
        bool have_before = false;
        FOR_LEVELS(level)
        {
            const sh_transform *ops = sh_transform_at(level);
            out[n] = 42;
            ops->rms_norm(x, w, 1e-5f, n, out);
            for (uint32_t i = 0; i < n; i++)
                expect_near("rms_norm", (double)out[i], (double)x[i] / rms * (double)w[i], 2e-6);
            if (fused(level) && have_before)
                expect_same("rms_norm", out, before, n);
            if (fused(level)) {
                memcpy(before, out, n * sizeof *out);
                have_before = true;
            }
            float *place = floats(n);
            memcpy(place, x, n * sizeof *x);
            ops->rms_norm(place, w, 1e-5f, n, place);
            expect_same("in place", place, out, n);
            ops->add(out, x, n);
            for (uint32_t i = 0; i < n; i++)
                assert_true(out[i] == place[i] + x[i]);
            assert_true(out[n] == 42);
            free(place);
        }
        free(x);
        free(w);
        free(out);
    }
}

static void check_rotation(sh_level level, const float *x, const float *angles, uint32_t n)
{
    const sh_transform *ops = sh_transform_at(level);
    for (int apart = 0; apart < 2; apart++) {
        float *y = floats(2 * (size_t)n + 1);
        memcpy(y, x, 2 * (size_t)n * sizeof *y);
        y[2 * n] = 42;
        if (apart != 0)
            ops->rotate_halves(y, angles, n);
        else
            ops->rotate(y, angles, n);
        for (uint32_t j = 0; j < n; j++) {
            const uint32_t i0 = apart ? j : 2 * j, i1 = apart ? j + n : 2 * j + 1;
            const double a = (double)x[i0], b = (double)x[i1];
            const double c = (double)angles[2 * j], s = (double)angles[2 * j + 1];
            expect_near("first of a pair", (double)y[i0], a * c - b * s, 1e-6);
            expect_near("second of a pair", (double)y[i1], a * s + b * c, 1e-6);
            const float want = fmaf(x[i0], angles[2 * j], -(x[i1] * angles[2 * j + 1]));
            if (fused(level) && apart == 0)
                expect_same("rounding", &y[i0], &want, 1);
        }
        assert_true(y[2 * n] == 42);
        free(y);
    }
}

static void test_rotate(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 3, 0);
    for (uint32_t n = 1; n <= 130; n += n < 70 ? 1 : 29) {
        float *x = normals(&rng, 2 * (size_t)n), *angles = floats(2 * (size_t)n);
        for (uint32_t j = 0; j < n; j++) {
            const double angle = 100 * (double)sh_rng_unit(&rng);
            angles[2 * j] = (float)cos(angle);
            angles[2 * j + 1] = (float)sin(angle);
        }
        FOR_LEVELS(level)
        check_rotation(level, x, angles, n);
        free(x);
        free(angles);
    }
}

static void test_log_sum_exp(void **state)
{
    (void)state;
    sh_rng rng;
    sh_rng_init(&rng, SEED, 4, 0);
    static const uint32_t sizes[] = {1, 2, 15, 16, 17, 31, 100, 1000, 49152};
    for (size_t s = 0; s < SH_COUNT(sizes); s++) {
        const uint32_t n = sizes[s];
        float *x = normals(&rng, n);
        for (uint32_t i = 0; i < n; i++)
            x[i] = x[i] * 10 + 300;
        double top = -INFINITY, sum = 0, weighted = 0;
        for (uint32_t i = 0; i < n; i++)
            top = SH_MAX(top, (double)x[i]);
        for (uint32_t i = 0; i < n; i++) {
            sum += exp((double)x[i] - top);
            weighted += exp((double)x[i] - top) * (double)x[i];
        }
        FOR_LEVELS(level)
        {
            const sh_transform *ops = sh_transform_at(level);
            double mean;
            expect_near("log_sum_exp", ops->log_sum_exp(x, n), top + log(sum), 1e-6);
            expect_near("log_sum_exp_mean", ops->log_sum_exp_mean(x, n, &mean), top + log(sum),
                        1e-6);
            expect_near("its mean", mean, weighted / sum, 1e-6);
        }
        free(x);
    }
}

/* ---- low rank ---- */

/* A factor in floats or halves, from values that halves hold exactly. */
static void *factor(sh_rng *rng, size_t n, sh_factor form, float **values)
{
    *values = normals(rng, n);
    uint16_t *packed = malloc(n * sizeof *packed);
    assert_non_null(packed);
    for (size_t i = 0; i < n; i++) {
        packed[i] = sh_f32_to_f16((*values)[i]);
        (*values)[i] = sh_f16_to_f32(packed[i]);
    }
    if (form == SH_FACTOR_F16)
        return packed;
    free(packed);
    float *copy = floats(n);
    memcpy(copy, *values, n * sizeof *copy);
    return copy;
}

static void check_down(uint32_t in, uint32_t rank, sh_factor form)
{
    sh_rng rng;
    sh_rng_init(&rng, SEED, in, rank);
    const uint32_t padded = (uint32_t)SH_LANES_UP(rank);
    float *values = NULL, *x = normals(&rng, in), *t = floats(padded), *before = NULL;
    void *packed = factor(&rng, (size_t)in * padded, form, &values);
    const sh_lora_a a = {.a = packed, .in = in, .rank = padded, .form = form};
    FOR_LEVELS(level)
    {
        const sh_transform *ops = sh_transform_at(level);
        memset(t, GARBAGE, padded * sizeof *t);
        ops->lora_down(&a, x, 0, padded, t);
        for (uint32_t r = 0; r < padded; r++) {
            double want = 0, size = 0;
            for (uint32_t i = 0; i < in; i++) {
                want += (double)x[i] * (double)values[(size_t)i * padded + r];
                size += fabs((double)x[i] * (double)values[(size_t)i * padded + r]);
            }
            expect_near("lora_down", (double)t[r], want, 1e-6 * size);
        }
        float *part = floats(padded);
        memset(part, GARBAGE, padded * sizeof *part);
        for (uint32_t r = padded; r > 0; r -= SH_LANES) {
            ops->lora_down(&a, x, r - SH_LANES, r, part);
            assert_true(r < 32 || isnan(part[r - SH_LANES - 1])); /* no more than asked for */
        }
        expect_same("lora_down in pieces", part, t, padded);
        if (fused(level) && before != NULL)
            expect_same("lora_down of two levels", before, t, padded);
        if (!fused(level)) {
            free(part);
            continue;
        }
        free(before);
        before = part;
    }
    free(before);
    free(values);
    free(packed);
    free(x);
    free(t);
}

/* B of `out` outputs, as codes and scales; values as factor()'s. Codes reach -127 and 127. */
static void *codes_of(sh_rng *rng, uint32_t rank, uint32_t groups, float *values)
{
    const size_t group_bytes = sh_lora_b_group_bytes(SH_FACTOR_INT8, rank);
    uint8_t *packed = calloc(groups, group_bytes);
    assert_non_null(packed);
    for (uint32_t g = 0; g < groups; g++) {
        uint16_t *scales = (uint16_t *)(void *)(packed + g * group_bytes);
        int8_t *codes = (int8_t *)(scales + SH_LANES);
        for (uint32_t i = 0; i < SH_LANES; i++)
            scales[i] = sh_f32_to_f16((float)sh_rng_below(rng, 1000) * 1e-4f); /* 0 as well */
        for (uint32_t i = 0; i < rank * SH_LANES; i++) {
            const uint32_t r = i / SH_LANES, lane = i % SH_LANES;
            const int code = (int)sh_rng_below(rng, 255) - 127;
            codes[(r / 4 * SH_LANES + lane) * 4 + r % 4] = (int8_t)code;
            values[g * rank * SH_LANES + i] = sh_f16_to_f32(scales[lane]) * (float)code;
        }
    }
    return packed;
}

static void check_up(uint32_t rank, uint32_t out, sh_factor form)
{
    sh_rng rng;
    sh_rng_init(&rng, SEED, rank, out);
    const uint32_t padded = (uint32_t)SH_LANES_UP(out);
    float *values = NULL, *t = normals(&rng, rank), *y0 = normals(&rng, out), *before = NULL;
    void *packed = factor(&rng, (size_t)rank * padded, form, &values);
    if (form == SH_FACTOR_INT8) {
        free(packed);
        packed = codes_of(&rng, rank, padded / SH_LANES, values);
        for (uint32_t r = 0; r < rank; r++) /* what int8 holds exactly, 64 ranks at a time */
            t[r] = 0.25f * (r % 64 == 0 ? 127 : (float)sh_rng_below(&rng, 255) - 127);
    }
    const sh_lora_b b = {.b = packed, .rank = rank, .form = form};
    FOR_LEVELS(level)
    {
        const sh_transform *ops = sh_transform_at(level);
        float *y = floats(out + 1), *part = floats(out + 1);
        memcpy(y, y0, out * sizeof *y);
        y[out] = 42;
        memcpy(part, y, (out + 1) * sizeof *y);
        ops->lora_up(&b, t, 0, out, y);
        for (uint32_t o = 0; o < out; o++) {
            double want = (double)y0[o], size = fabs(want);
            for (uint32_t r = 0; r < rank; r++) {
                const size_t at = ((size_t)(o / SH_LANES) * rank + r) * SH_LANES + o % SH_LANES;
                want += (double)t[r] * (double)values[at];
                size += fabs((double)t[r] * (double)values[at]);
            }
            expect_near("lora_up", (double)y[o], want, 1e-6 * size);
        }
        const float kept = t[0]; /* what is no number stays none, whatever comes after it */
        float *bad = floats(out);
        memcpy(bad, y0, out * sizeof *bad);
        t[0] = level % 2 != 0 ? NAN : INFINITY;
        ops->lora_up(&b, t, 0, out, bad);
        for (uint32_t o = 0; o < out; o++)
            assert_false(isfinite(bad[o]));
        free(bad);
        t[0] = kept;
        for (uint32_t o = 0; o < out; o += 32)
            ops->lora_up(&b, t, o, SH_MIN(o + 32, out), part);
        expect_same("lora_up in pieces", part, y, out + 1);
        if (fused(level) && before != NULL)
            expect_same("lora_up of two levels", before, y, out);
        free(y);
        if (!fused(level)) {
            free(part);
            continue;
        }
        free(before);
        before = part;
    }
    free(before);
    free(values);
    free(packed);
    free(t);
    free(y0);
}

static void test_lora(void **state)
{
    (void)state;
    for (uint32_t rank = 1; rank <= 40; rank++)
        for (sh_factor form = SH_FACTOR_F32; form <= SH_FACTOR_INT8; form++) {
            if (form != SH_FACTOR_INT8) /* its A is a product, tested as such */
                check_down(5 + 37 * rank % 101, rank, form);
            check_up(rank, 1 + 53 * rank % 307, form);
        }
    for (uint32_t n = 1; n <= 9; n++) { /* every remainder of inputs, many columns of ranks */
        check_down(n, 16 * n, n % 2 != 0 ? SH_FACTOR_F16 : SH_FACTOR_F32);
        check_up(n, 16 * n, (sh_factor)(n % 3));
    }
    check_down(576, 48, SH_FACTOR_F16);
    check_up(16, 1536, SH_FACTOR_F16);
    check_up(16, 1536, SH_FACTOR_INT8);
}

/* ---- levels ---- */

static void test_levels(void **state)
{
    (void)state;
    const sh_transform *in_use = sh_transform_get();
    assert_ptr_equal(in_use, sh_transform_at(sh_level_get()));
    unsigned n = 0;
    FOR_LEVELS(level)
    {
        n++;
        print_message("level: %s\n", sh_level_name(level));
    }
    assert_true(n >= 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_levels),
        cmocka_unit_test(test_attend_decode),
        cmocka_unit_test(test_attend_prefill),
        cmocka_unit_test(test_attend_split),
        cmocka_unit_test(test_attend_later_infinite),
        cmocka_unit_test(test_attend_huge),
        cmocka_unit_test(test_store),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_rms_norm_and_add),
        cmocka_unit_test(test_rotate),
        cmocka_unit_test(test_log_sum_exp),
        cmocka_unit_test(test_lora),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
