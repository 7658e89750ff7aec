/*
 * Dispatch, the portable kernels, and the generic product for types without kernels of their own
 * (rows of W are dequantized, a few at a time, and multiplied as floats).
 *
 * Tolerance between levels: the integer parts are equal. The sums of avx2 and avx512-vnni are equal
 * bit for bit (both use FMA, in the same order); the portable level does not round like FMA where
 * the CPU has none, and differs by at most in/16 + 8 roundings of 2^-24 of Σ|terms|.
 */
#include "shared/math/kernel.h"

#include "shared/math/kernel_internal.h"
#include "shared/math/quant_internal.h"

#define GENERIC_ROWS 16 /* rows of W that are dequantized together */

/* ---- portable ---- */

#ifdef __FP_FAST_FMAF
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

/* 16 (or, of an odd last block, 8) lanes of one pair of blocks: lanes += (w·x) * d_w * d_x.
 * w: weights as signed numbers. */
static void pair_add(float lanes[SH_LANES], const int8_t w[SH_PAIR_VALUES], const float d_w[2],
                     const sh_x_pair *x)
{
    for (size_t l = 0; l < SH_LANES; l++) {
        int32_t sum = 0;
        for (size_t k = 4 * l; k < 4 * l + 4; k++)
            sum += (int32_t)w[k] * x->q[k];
        lanes[l] = MULTIPLY_ADD((float)sum, d_w[l / 8] * x->d[l], lanes[l]);
    }
}

static void portable_q8_0(const sh_quant_product *p)
{
    for (size_t o = 0; o < p->out; o++) {
        const sh_block_q8_0 *row = (const void *)(p->w + o * p->row_bytes);
        for (size_t r = 0; r < p->n; r++) {
            const sh_x_pair *x = p->x + r * p->n_pairs;
            float lanes[SH_LANES] = {0};
            for (size_t i = 0; i < p->n_pairs; i++) {
                int8_t w[SH_PAIR_VALUES] = {0};
                float d[2] = {0};
                for (size_t h = 0; h < 2 && 2 * i + h < p->n_blocks; h++) {
                    memcpy(w + h * 32, row[2 * i + h].qs, 32);
                    d[h] = sh_half_to_float(row[2 * i + h].d);
                }
                pair_add(lanes, w, d, &x[i]);
            }
            p->y[r * p->ldy + o] = sh_lanes_fold(lanes);
        }
    }
}

static void portable_q4_0(const sh_quant_product *p)
{
    for (size_t o = 0; o < p->out; o++) {
        const sh_block_q4_0 *row = (const void *)(p->w + o * p->row_bytes);
        for (size_t r = 0; r < p->n; r++) {
            const sh_x_pair *x = p->x + r * p->n_pairs;
            float lanes[SH_LANES] = {0};
            for (size_t i = 0; i < p->n_pairs; i++) {
                int8_t w[SH_PAIR_VALUES] = {0};
                float d[2] = {0};
                for (size_t h = 0; h < 2 && 2 * i + h < p->n_blocks; h++) {
                    for (size_t j = 0; j < 16; j++) {
                        uint8_t both = row[2 * i + h].qs[j];
                        w[h * 32 + j] = (int8_t)((both & 15) - SH_Q4_0_OFFSET);
                        w[h * 32 + 16 + j] = (int8_t)((both >> 4) - SH_Q4_0_OFFSET);
                    }
                    d[h] = sh_half_to_float(row[2 * i + h].d);
                }
                pair_add(lanes, w, d, &x[i]);
            }
            p->y[r * p->ldy + o] = sh_lanes_fold(lanes);
        }
    }
}

static void portable_f32(const sh_float_product *p)
{
    for (size_t o = 0; o < p->out; o++) {
        const float *w = p->w + o * p->in;
        for (size_t r = 0; r < p->n; r++) {
            const float *x = p->x + r * p->in;
            float lanes[SH_LANES] = {0};
            size_t i = 0;
            for (; i + SH_LANES <= p->in; i += SH_LANES)
                for (size_t l = 0; l < SH_LANES; l++)
                    lanes[l] = MULTIPLY_ADD(w[i + l], x[i + l], lanes[l]);
            for (size_t l = 0; i + l < p->in; l++)
                lanes[l] = MULTIPLY_ADD(w[i + l], x[i + l], lanes[l]);
            p->y[r * p->ldy + o] = sh_lanes_fold(lanes);
        }
    }
}

static void portable_quantize_row(const float *x, size_t n_blocks, int32_t offset, sh_x_pair *pairs)
{
    sh_quantize_row_body(x, n_blocks, offset, pairs);
}

static void portable_axpy(float *y, float s, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = MULTIPLY_ADD(s, x[i], y[i]);
}

const sh_kernels sh_kernels_portable = {portable_quantize_row, portable_q8_0, portable_q4_0,
                                        portable_f32, portable_axpy};

/* ---- dispatch ---- */

const sh_kernels *sh_kernels_of(sh_level level)
{
#if SH_X86
    if (level == SH_LEVEL_AVX512_VNNI)
        return &sh_kernels_avx512;
    if (level == SH_LEVEL_AVX2)
        return &sh_kernels_avx2;
#endif
    SH_ASSERT(level == SH_LEVEL_PORTABLE);
    return &sh_kernels_portable;
}

const char *sh_kernel_level(void)
{
    return sh_level_name(sh_level_get());
}

static size_t pairs_of(size_t in)
{
    return (in + SH_PAIR_VALUES - 1) / SH_PAIR_VALUES;
}

size_t sh_matmul_scratch_bytes(size_t n, size_t in)
{
    size_t quantized = n * pairs_of(in) * sizeof(sh_x_pair);
    size_t dequantized = GENERIC_ROWS * in * sizeof(float);
    return SH_MAX(quantized, dequantized);
}

static void matmul_quantized(const sh_kernels *kernels, sh_type type, const sh_float_product *p,
                             const void *w, sh_x_pair *pairs)
{
    size_t n_blocks = p->in / 32, n_pairs = pairs_of(p->in);
    int32_t offset = type == SH_TYPE_Q8_0 ? SH_Q8_0_OFFSET : SH_Q4_0_OFFSET;
    for (size_t r = 0; r < p->n; r++)
        kernels->quantize_row(p->x + r * p->in, n_blocks, offset, pairs + r * n_pairs);
    sh_quant_product q = {.w = w,
                          .row_bytes = sh_type_row_bytes(type, p->in),
                          .n_blocks = n_blocks,
                          .out = p->out,
                          .x = pairs,
                          .n_pairs = n_pairs,
                          .n = p->n,
                          .y = p->y,
                          .ldy = p->ldy};
    if (type == SH_TYPE_Q8_0)
        kernels->q8_0(&q);
    else
        kernels->q4_0(&q);
}

static void matmul_generic(const sh_kernels *kernels, sh_type type, const sh_float_product *p,
                           const uint8_t *w, float *rows)
{
    size_t row_bytes = sh_type_row_bytes(type, p->in);
    for (size_t o = 0; o < p->out; o += GENERIC_ROWS) {
        size_t n_rows = SH_MIN(p->out - o, (size_t)GENERIC_ROWS);
        /* rows follow each other without gaps, so they dequantize as one */
        sh_row_dequantize(type, w + o * row_bytes, rows, n_rows * p->in);
        sh_float_product part = *p;
        part.w = rows;
        part.out = n_rows;
        part.y = p->y + o;
        kernels->f32(&part);
    }
}

void sh_matmul_with(const sh_kernels *kernels, sh_type type, const sh_float_product *p,
                    const void *w, void *scratch)
{
    SH_ASSERT(sh_type_row_bytes(type, p->in) > 0 && (uintptr_t)scratch % 64 == 0);
    if (type == SH_TYPE_Q8_0 || type == SH_TYPE_Q4_0) {
        matmul_quantized(kernels, type, p, w, scratch);
    } else if (type == SH_TYPE_F32) {
        sh_float_product whole = *p;
        whole.w = w;
        kernels->f32(&whole);
    } else {
        matmul_generic(kernels, type, p, w, scratch);
    }
}

void sh_matmul(sh_type type, const void *w, size_t out, size_t in, const float *x, size_t n,
               float *y, void *scratch)
{
    sh_float_product p = {.in = in, .out = out, .x = x, .n = n, .y = y, .ldy = out};
    sh_matmul_with(sh_kernels_of(sh_level_get()), type, &p, w, scratch);
}

float sh_dot(const float *a, const float *b, size_t n)
{
    float y;
    sh_float_product p = {.w = a, .in = n, .out = 1, .x = b, .n = 1, .y = &y, .ldy = 1};
    sh_kernels_of(sh_level_get())->f32(&p);
    return y;
}

void sh_axpy(float *y, float s, const float *x, size_t n)
{
    sh_kernels_of(sh_level_get())->axpy(y, s, x, n);
}
