/*
 * Bodies of transform.h, included once by each level's file after its lanes: the type v16 of 16
 * floats with its operations (lanes_*), TARGET and OP (attributes of a function and of an inlined
 * operation), how many vectors a step takes (what fits the registers; no result depends on it), and
 * TABLE, the table's name.
 *
 * A fused multiply-add is asked for by name (these files are compiled with -ffp-contract=off), so
 * levels that have it round alike.
 */
#include <float.h>
#include <math.h>
#include <string.h>

/* e^x: x = k ln 2 + r, |r| <= ln 2 / 2; e^r by a polynomial of degree 6 (coefficients of Moshier's
 * Cephes expf). e^0 is 1 exactly. A NaN stays one. */
OP v16 lanes_exp(v16 x)
{
    const v16 magic = lanes_splat(12582912.0f); /* 1.5 * 2^23: rounds to integer */
    x = lanes_min(lanes_splat(86.0f), lanes_max(lanes_splat(-86.0f), x));
    const v16 shifted = lanes_fma(x, lanes_splat(1.44269504088896341f), magic);
    const v16 k = lanes_sub(shifted, magic);
    const v16 r =
        lanes_fma(k, lanes_splat(2.12194440e-4f), lanes_fnma(k, lanes_splat(0.693359375f), x));
    v16 p = lanes_fma(r, lanes_splat(1.9875691500e-4f), lanes_splat(1.3981999507e-3f));
    p = lanes_fma(p, r, lanes_splat(8.3334519073e-3f));
    p = lanes_fma(p, r, lanes_splat(4.1665795894e-2f));
    p = lanes_fma(p, r, lanes_splat(1.6666665459e-1f));
    p = lanes_fma(p, r, lanes_splat(5.0000001201e-1f));
    p = lanes_add(lanes_fma(p, lanes_mul(r, r), r), lanes_splat(1.0f));
    return lanes_power(p, shifted);
}

/* Four sums side by side hide the latency of the additions. */
TARGET static void rms_norm(const float *x, const float *weight, float eps, uint32_t n, float *out)
{
    v16 a = lanes_zero(), b = a, c = a, d = a;
    uint32_t i = 0;
    for (; i + 4 * SH_LANES <= n; i += 4 * SH_LANES) {
        const v16 s = lanes_load(x + i), t = lanes_load(x + i + SH_LANES);
        const v16 u = lanes_load(x + i + 2 * SH_LANES), v = lanes_load(x + i + 3 * SH_LANES);
        a = lanes_fma(s, s, a);
        b = lanes_fma(t, t, b);
        c = lanes_fma(u, u, c);
        d = lanes_fma(v, v, d);
    }
    for (; i < n; i += SH_LANES) {
        const v16 v = lanes_load_part(x + i, SH_MIN(SH_LANES, n - i));
        a = lanes_fma(v, v, a);
    }
    const float squares = lanes_sum(lanes_add(lanes_add(a, b), lanes_add(c, d)));
    const v16 scale = lanes_splat(1.0f / sqrtf(squares / (float)n + eps));
    for (i = 0; i + SH_LANES <= n; i += SH_LANES)
        lanes_store(out + i,
                    lanes_mul(lanes_mul(lanes_load(x + i), scale), lanes_load(weight + i)));
    if (i < n) {
        const v16 v = lanes_mul(lanes_load_part(x + i, n - i), scale);
        lanes_store_part(out + i, lanes_mul(v, lanes_load_part(weight + i, n - i)), n - i);
    }
}

TARGET static void rotate(float *x, const float *angles, uint32_t n)
{
    const size_t end = 2 * (size_t)n;
    size_t i = 0;
    for (; i + SH_LANES <= end; i += SH_LANES)
        lanes_store(x + i, lanes_rotate(lanes_load(x + i), lanes_load(angles + i)));
    if (i < end) {
        const v16 v = lanes_load_part(x + i, end - i);
        lanes_store_part(x + i, lanes_rotate(v, lanes_load_part(angles + i, end - i)), end - i);
    }
}

TARGET static void rotate_halves(float *x, const float *angles, uint32_t n)
{
    v16 c, s;
    uint32_t i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES) {
        const v16 a = lanes_load(x + i), b = lanes_load(x + n + i);
        lanes_load_pairs(angles + 2 * (size_t)i, &c, &s);
        lanes_store(x + i, lanes_fnma(b, s, lanes_mul(a, c)));
        lanes_store(x + n + i, lanes_fma(a, s, lanes_mul(b, c)));
    }
    if (i < n) {
        const uint32_t rest = n - i;
        const v16 a = lanes_load_part(x + i, rest), b = lanes_load_part(x + n + i, rest);
        float pairs[2 * SH_LANES] = {0};
        memcpy(pairs, angles + 2 * (size_t)i, 2 * (size_t)rest * sizeof *pairs);
        lanes_load_pairs(pairs, &c, &s);
        lanes_store_part(x + i, lanes_fnma(b, s, lanes_mul(a, c)), rest);
        lanes_store_part(x + n + i, lanes_fma(a, s, lanes_mul(b, c)), rest);
    }
}

OP v16 gated(v16 gate, v16 up)
{
    const v16 minus = lanes_sub(lanes_zero(), gate);
    return lanes_mul(lanes_div(gate, lanes_add(lanes_splat(1.0f), lanes_exp(minus))), up);
}

TARGET static void swiglu(float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES)
        lanes_store(gate + i, gated(lanes_load(gate + i), lanes_load(up + i)));
    if (i < n) {
        const v16 y = gated(lanes_load_part(gate + i, n - i), lanes_load_part(up + i, n - i));
        lanes_store_part(gate + i, y, n - i);
    }
}

TARGET static void add(float *y, const float *x, size_t n)
{
    size_t i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES)
        lanes_store(y + i, lanes_add(lanes_load(y + i), lanes_load(x + i)));
    for (; i < n; i++)
        y[i] += x[i];
}

/* ---- low-rank addition ---- */

#define UP_RANKS        64 /* of int8 that are summed up as integers */
#define UP_SCALE_BYTES  (SH_LANES * sizeof(uint16_t))
#define UP_AHEAD_GROUPS 8 /* at decode B comes from a far cache at best */
#define UP_AHEAD_LINES  4

/* 16 values at place i of an array. */
OP v16 load_at(const void *p, size_t i, const sh_factor form)
{
    return form == SH_FACTOR_F16 ? lanes_load_halves((const uint16_t *)p + i)
                                 : lanes_load((const float *)p + i);
}

/* At decode an adapter's factors come from memory, as everything does. */
#define LORA_AHEAD 768 /* values */
OP void fetch(const void *values, size_t place, const sh_factor form)
{
    __builtin_prefetch((const uint8_t *)values + place * sh_factor_bytes(form));
}

/* `columns` vectors of ranks from rank r on: for each four sums, of every fourth input. */
OP void down_step(const sh_lora_a *a, const float *x, uint32_t r, float *t, const int columns,
                  const sh_factor form)
{
    v16 sums[4][LORA_DOWN_COLUMNS];
    SH_UNROLL
    for (int j = 0; j < 4; j++)
        SH_UNROLL
    for (int c = 0; c < columns; c++)
        sums[j][c] = lanes_zero();
    uint32_t i = 0;
    for (; i + 4 <= a->in; i += 4) {
        SH_UNROLL
        for (uint32_t j = 0; j < 4; j++) {
            const v16 value = lanes_splat(x[i + j]);
            fetch(a->a, (size_t)(i + j) * a->rank + r + LORA_AHEAD, form);
            SH_UNROLL
            for (int c = 0; c < columns; c++) {
                const size_t place = (size_t)(i + j) * a->rank + r + (size_t)c * SH_LANES;
                sums[j][c] = lanes_fma(value, load_at(a->a, place, form), sums[j][c]);
            }
        }
    }
    SH_UNROLL
    for (int c = 0; c < columns; c++) {
        for (uint32_t j = i; j < a->in; j++) {
            const size_t place = (size_t)j * a->rank + r + (size_t)c * SH_LANES;
            sums[0][c] = lanes_fma(lanes_splat(x[j]), load_at(a->a, place, form), sums[0][c]);
        }
        lanes_store(t + r + c * SH_LANES, lanes_add(lanes_add(sums[0][c], sums[1][c]),
                                                    lanes_add(sums[2][c], sums[3][c])));
    }
}

OP void down(const sh_lora_a *a, const float *x, uint32_t begin, uint32_t end, float *t,
             const sh_factor form)
{
    uint32_t r = begin;
    for (; r + LORA_DOWN_COLUMNS * SH_LANES <= end; r += LORA_DOWN_COLUMNS * SH_LANES)
        down_step(a, x, r, t, LORA_DOWN_COLUMNS, form);
#if LORA_DOWN_COLUMNS > 1
    const uint32_t rest = (end - r) / SH_LANES;
    if (rest == 1)
        down_step(a, x, r, t, 1, form);
    if (rest == 2)
        down_step(a, x, r, t, 2, form);
    if (rest == 3)
        down_step(a, x, r, t, 3, form);
#endif
}

TARGET static void lora_down(const sh_lora_a *a, const float *x, uint32_t begin, uint32_t end,
                             float *t)
{
    if (a->form == SH_FACTOR_F16)
        down(a, x, begin, end, t, SH_FACTOR_F16);
    else
        down(a, x, begin, end, t, SH_FACTOR_F32);
}

/* `vectors` groups from output o on. A sum goes by the ranks in order, whatever is beside it. */
OP void up_step(const sh_lora_b *b, const float *t, uint32_t o, v16 *sums, const int vectors,
                const sh_factor form)
{
    const size_t group_bytes = sh_lora_b_group_bytes(form, b->rank);
    const uint8_t *group = (const uint8_t *)b->b + o / SH_LANES * group_bytes;
    SH_UNROLL
    for (int c = 0; c < vectors; c++)
        sums[c] = lanes_zero();
    for (uint32_t r = 0; r < b->rank; r++) {
        const v16 value = lanes_splat(t[r]);
        SH_UNROLL
        for (int c = 0; c < vectors; c++)
            sums[c] = lanes_fma(
                value, load_at(group + (size_t)c * group_bytes, (size_t)r * SH_LANES, form),
                sums[c]);
    }
}

OP void up(const sh_lora_b *b, const float *t, uint32_t begin, uint32_t end, float *y,
           const sh_factor form)
{
    v16 sums[LORA_UP_VECTORS];
    uint32_t o = begin;
    for (; o + LORA_UP_VECTORS * SH_LANES <= end; o += LORA_UP_VECTORS * SH_LANES) {
        up_step(b, t, o, sums, LORA_UP_VECTORS, form);
        SH_UNROLL
        for (uint32_t c = 0; c < LORA_UP_VECTORS; c++) {
            float *place = y + o + (size_t)c * SH_LANES;
            lanes_store(place, lanes_add(lanes_load(place), sums[c]));
        }
    }
    for (; o < end; o += SH_LANES) {
        const uint32_t n = SH_MIN(SH_LANES, end - o);
        up_step(b, t, o, sums, 1, form);
        lanes_store_part(y + o, lanes_add(lanes_load_part(y + o, n), sums[0]), n);
    }
}

/* t[n] ≈ d * codes, codes filled up to four; what is not finite makes d so. */
OP float quantize_t(const float *t, uint32_t n, int8_t codes[UP_RANKS])
{
    float largest = 0;
    bool finite = true;
    for (uint32_t r = 0; r < n; r++) {
        const float size = fabsf(t[r]);
        largest = size > largest ? size : largest;
        finite = finite && size <= FLT_MAX;
    }
    memset(codes, 0, UP_RANKS);
    const float inverse = 127 / largest; /* infinite for nothing but zeros */
    for (uint32_t r = 0; r < n && finite && inverse <= FLT_MAX; r++)
        codes[r] = (int8_t)lrintf(t[r] * inverse);
    return finite ? largest / 127 : NAN;
}

/* Both factors as int8: the dot product of UP_RANKS ranks is an exact integer. */
OP void up_codes(const sh_lora_b *b, const float *t, uint32_t begin, uint32_t end, float *y)
{
    const size_t group_bytes = sh_lora_b_group_bytes(SH_FACTOR_INT8, b->rank);
    for (uint32_t first = 0; first < b->rank; first += UP_RANKS) {
        const uint32_t ranks = SH_MIN(b->rank - first, UP_RANKS);
        int8_t codes[UP_RANKS];
        const v16 d = lanes_splat(quantize_t(t + first, ranks, codes));
        const uint8_t *group = (const uint8_t *)b->b + begin / SH_LANES * group_bytes;
        for (uint32_t o = begin; o < end; o += SH_LANES, group += group_bytes) {
            const int8_t *own = (const int8_t *)group + UP_SCALE_BYTES + (size_t)first * SH_LANES;
            SH_UNROLL
            for (size_t i = 0; i < UP_AHEAD_LINES; i++)
                __builtin_prefetch(own + UP_AHEAD_GROUPS * group_bytes + 64 * i);
            const v16 scales = lanes_mul(lanes_load_halves((const uint16_t *)group), d);
            const v16 sums = lanes_mul(lanes_dot(own, codes, (ranks + 3) / 4), scales);
            const uint32_t n = SH_MIN(SH_LANES, end - o);
            if (n == SH_LANES)
                lanes_store(y + o, lanes_add(lanes_load(y + o), sums));
            else
                lanes_store_part(y + o, lanes_add(lanes_load_part(y + o, n), sums), n);
        }
    }
}

TARGET static void lora_up(const sh_lora_b *b, const float *t, uint32_t begin, uint32_t end,
                           float *y)
{
    if (b->form == SH_FACTOR_INT8)
        up_codes(b, t, begin, end, y);
    else if (b->form == SH_FACTOR_F16)
        up(b, t, begin, end, y, SH_FACTOR_F16);
    else
        up(b, t, begin, end, y, SH_FACTOR_F32);
}

/* ---- loss ---- */

TARGET static float largest_of(const float *x, uint32_t n)
{
    v16 top = lanes_splat(x[0]);
    uint32_t i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES)
        top = lanes_max(lanes_load(x + i), top);
    float largest = lanes_largest(top);
    for (uint32_t j = i; j < n; j++)
        largest = x[j] > largest ? x[j] : largest;
    return largest;
}

TARGET static double sum_of(const v16d *sums)
{
    double all[SH_LANES], sum = 0;
    memcpy(all, sums, sizeof all);
    for (size_t j = 0; j < SH_LANES; j++)
        sum += all[j];
    return sum;
}

TARGET static double log_sum_exp(const float *x, uint32_t n)
{
    const float largest = largest_of(x, n);
    const v16 shift = lanes_splat(largest);
    v16d sums;
    uint32_t i;
    memset(&sums, 0, sizeof sums);
    for (i = 0; i + SH_LANES <= n; i += SH_LANES)
        lanes_add_double(&sums, lanes_exp(lanes_sub(lanes_load(x + i), shift)));
    if (i < n) {
        const v16 w = lanes_exp(lanes_sub(lanes_load_part(x + i, n - i), shift));
        lanes_add_double(&sums, lanes_first(w, n - i, lanes_zero()));
    }
    return (double)largest + log(sum_of(&sums));
}

TARGET static double log_sum_exp_mean(const float *x, uint32_t n, double *mean)
{
    const float largest = largest_of(x, n);
    const v16 shift = lanes_splat(largest);
    v16d sums, weighted; /* of x - largest: nothing is lost where x is far from 0 */
    uint32_t i;
    memset(&sums, 0, sizeof sums);
    memset(&weighted, 0, sizeof weighted);
    for (i = 0; i + SH_LANES <= n; i += SH_LANES) {
        const v16 below = lanes_sub(lanes_load(x + i), shift);
        const v16 w = lanes_exp(below);
        lanes_add_double(&sums, w);
        lanes_add_double(&weighted, lanes_mul(w, below));
    }
    if (i < n) {
        const v16 below = lanes_sub(lanes_load_part(x + i, n - i), shift);
        const v16 w = lanes_exp(below);
        lanes_add_double(&sums, lanes_first(w, n - i, lanes_zero()));
        lanes_add_double(&weighted, lanes_first(lanes_mul(w, below), n - i, lanes_zero()));
    }
    const double sum = sum_of(&sums);
    *mean = (double)largest + sum_of(&weighted) / sum;
    return (double)largest + log(sum);
}

#include "shared/model/transform_attend.h"

const sh_transform TABLE = {
    .rms_norm = rms_norm,
    .rotate = rotate,
    .rotate_halves = rotate_halves,
    .store = store,
    .attend = attend,
    .swiglu = swiglu,
    .add = add,
    .lora_down = lora_down,
    .lora_up = lora_up,
    .log_sum_exp = log_sum_exp,
    .log_sum_exp_mean = log_sum_exp_mean,
};
