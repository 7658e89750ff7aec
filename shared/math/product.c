/*
 * Products: what is the same for every level, and the portable kernels.
 *
 * Rows of x are the outer loop over a panel of groups that stays in the second-level cache; in
 * place a panel is the one group that was interleaved into scratch. How a value of y is made
 * depends on none of that (product.h).
 */
#include "shared/math/product.h"

#include "shared/math/kernel_internal.h"
#include "shared/math/product_internal.h"

bool sh_product_takes_blocks(sh_type type)
{
    return type != SH_TYPE_F32 && type != SH_TYPE_F16 && type != SH_TYPE_BF16;
}

/* ---- portable ---- */

void sh_x_quantize_portable(const float *x, size_t n_blocks, sh_x_block *blocks)
{
    for (size_t b = 0; b < n_blocks; b++)
        sh_x_quantize_body(x + b * SH_X_VALUES, &blocks[b]);
}

/* The 8 vectors of a block as bytes 0 .. 255: codes, those of Q8_0 with 128 added. */
SH_INLINE void unpack_block(sh_type type, const uint8_t *quants, uint8_t w[512])
{
    int bits = sh_code_bits(type);
    if (bits == 8) {
        for (size_t i = 0; i < 512; i++)
            w[i] = quants[i] ^ 0x80;
        return;
    }
    for (size_t i = 0; i < 256; i++) {
        w[i] = quants[i] & 15;
        w[i + 256] = quants[i] >> 4;
    }
    for (size_t v = 0; v < 8 && bits == 5; v++)
        for (size_t i = 0; i < 64; i++)
            w[v * 64 + i] |= (uint8_t)((quants[256 + i] >> v & 1) << 4);
    for (size_t v = 0; v < 8 && bits == 6; v++)
        for (size_t i = 0; i < 64; i++)
            w[v * 64 + i] |= (uint8_t)((quants[256 + v / 4 * 64 + i] >> v % 4 * 2 & 3) << 4);
}

/* Of block b: d of its halves (equal but for Q6_K), and m of value = d * code - m. */
typedef struct {
    float d[2][SH_GROUP_ROWS], m[SH_GROUP_ROWS];
} block_scales;

SH_INLINE void halves_read(const uint8_t *at, float out[SH_GROUP_ROWS])
{
    uint16_t halves[SH_GROUP_ROWS];
    memcpy(halves, at, sizeof halves);
    for (size_t l = 0; l < SH_GROUP_ROWS; l++)
        out[l] = sh_half_to_float(halves[l]);
}

SH_INLINE void scales_read(sh_type type, const uint8_t *scales, size_t b, block_scales *s)
{
    if (type == SH_TYPE_Q6_K) {
        const uint8_t *at = scales + b / 8 * SH_Q6_K_SCALE_BYTES;
        const int8_t *of_block = (const int8_t *)at + 32 + b % 8 * 32;
        float d[SH_GROUP_ROWS];
        halves_read(at, d);
        for (size_t l = 0; l < SH_GROUP_ROWS; l++) {
            s->d[0][l] = d[l] * (float)of_block[l];
            s->d[1][l] = d[l] * (float)of_block[16 + l];
        }
    } else if (sh_is_k_quant(type)) {
        const uint8_t *at = scales + b / 8 * SH_K_SCALE_BYTES, *of_block = at + 64 + b % 8 * 32;
        halves_read(at, s->d[0]);
        halves_read(at + 32, s->m);
        for (size_t l = 0; l < SH_GROUP_ROWS; l++) {
            s->d[0][l] *= (float)of_block[l];
            s->m[l] *= (float)of_block[16 + l];
        }
    } else if (sh_has_minima(type)) {
        halves_read(scales + b * 64, s->d[0]);
        halves_read(scales + b * 64 + 32, s->m);
        for (size_t l = 0; l < SH_GROUP_ROWS; l++)
            s->m[l] = -s->m[l];
    } else {
        halves_read(scales + b * 32, s->d[0]);
    }
}

/* sums += vectors `first` .. `first` + `count` - 1 of a block times x. */
SH_INLINE void dot_add(const uint8_t w[512], const int8_t q[SH_X_VALUES], size_t first,
                       size_t count, int32_t sums[SH_GROUP_ROWS])
{
    for (size_t v = first; v < first + count; v++)
        for (size_t l = 0; l < SH_GROUP_ROWS; l++)
            for (size_t k = 0; k < 4; k++)
                sums[l] += (int32_t)w[v * 64 + l * 4 + k] * q[v * 4 + k];
}

SH_INLINE void block_add(sh_type type, const uint8_t w[512], const block_scales *s,
                         const sh_x_block *x, float sums[SH_GROUP_ROWS])
{
    bool halves = type == SH_TYPE_Q6_K;
    for (size_t h = 0; h < (halves ? 2 : 1); h++) {
        int32_t dot[SH_GROUP_ROWS], start = halves ? x->start32[h] : *sh_x_start(x, type);
        for (size_t l = 0; l < SH_GROUP_ROWS; l++)
            dot[l] = start;
        dot_add(w, x->q, 4 * h, halves ? 4 : 8, dot);
        for (size_t l = 0; l < SH_GROUP_ROWS; l++)
            sums[l] = SH_MULTIPLY_ADD((float)dot[l], s->d[h][l] * x->d, sums[l]);
    }
    for (size_t l = 0; l < SH_GROUP_ROWS && sh_has_minima(type); l++)
        sums[l] = SH_MULTIPLY_ADD(-s->m[l], x->d_sum, sums[l]);
}

/* Up to 16 rows of x times one group. */
SH_INLINE void group_portable(const sh_panel *p, const uint8_t *group, size_t column, size_t row,
                              sh_type type)
{
    size_t rows = SH_MIN(p->n - row, (size_t)SH_X_ROWS);
    float sums[SH_X_ROWS][SH_GROUP_ROWS] = {{0}};
    const uint8_t *quants = group + sh_group_scales_bytes(type, p->n_blocks * 32);
    for (size_t b = 0; b < p->n_blocks; b++, quants += sh_group_block_bytes(type)) {
        uint8_t w[512];
        block_scales scales;
        unpack_block(type, quants, w);
        scales_read(type, group, b, &scales);
        for (size_t r = 0; r < rows; r++)
            block_add(type, w, &scales, p->x + (row + r) * p->x_stride + b, sums[r]);
    }
    size_t outs = SH_MIN(p->outs - column, (size_t)SH_GROUP_ROWS);
    for (size_t r = 0; r < rows; r++) {
        float *y = p->y + (row + r) * p->ldy + column;
        for (size_t l = 0; l < outs; l++)
            y[l] = p->add ? y[l] + sums[r][l] : sums[r][l];
    }
}

SH_INLINE void panel_portable(const sh_panel *p, sh_type type)
{
    size_t group_bytes = sh_group_bytes(type, p->n_blocks * 32);
    for (size_t r = 0; r < p->n; r += SH_X_ROWS)
        for (size_t o = 0; o < p->outs; o += SH_GROUP_ROWS)
            group_portable(p, p->groups + o / SH_GROUP_ROWS * group_bytes, o, r, type);
}

void sh_panel_portable(const sh_panel *p)
{
#define PANEL(TYPE) panel_portable(p, TYPE)
    SH_EACH_BLOCK_TYPE(p->type, PANEL)
#undef PANEL
}

/* ---- every level ---- */

void sh_x_quantize_with(const sh_kernels *kernels, const float *x, size_t ldx, size_t n, size_t in,
                        sh_x_block *blocks)
{
    SH_ASSERT(in % SH_X_VALUES == 0);
    for (size_t r = 0; r < n; r++)
        kernels->x_quantize(x + r * ldx, in / SH_X_VALUES, blocks + r * sh_x_stride(in));
}

void sh_x_quantize(const float *x, size_t ldx, size_t n, size_t in, sh_x_block *blocks)
{
    sh_x_quantize_with(sh_kernels_of(sh_level_get()), x, ldx, n, in, blocks);
}

/* A group of the type that takes most. */
size_t sh_product_scratch_bytes(uint32_t in)
{
    return sh_group_bytes(SH_TYPE_Q8_0, in / 32 * 32) + 64;
}

static void run_packed(const sh_kernels *kernels, const sh_product *p, size_t begin, size_t end)
{
    const sh_weights *w = p->w;
    size_t group_bytes = sh_group_bytes(w->type, w->in);
    size_t groups = p->n <= SH_X_ROWS ? SIZE_MAX / SH_GROUP_ROWS : SH_PANEL_BYTES / group_bytes;
    size_t step = SH_MAX(groups, (size_t)1) * SH_GROUP_ROWS;
    for (size_t o = begin; o < end; o += SH_MIN(step, end - o)) {
        kernels->panel(&(sh_panel){
            .type = w->type,
            .n_blocks = w->in / 32,
            .x_stride = sh_x_stride(w->in),
            .groups = (const uint8_t *)w->packed + o / SH_GROUP_ROWS * group_bytes,
            .x = p->blocks,
            .n = p->n,
            .y = p->y + o,
            .ldy = p->ldy,
            .outs = SH_MIN(step, end - o),
            .add = p->add,
        });
    }
}

static void run_in_place(const sh_kernels *kernels, const sh_product *p, size_t begin, size_t end,
                         uint8_t *scratch)
{
    const sh_weights *w = p->w;
    size_t row_bytes = sh_type_row_bytes(w->type, w->in);
    for (size_t o = begin; o < end; o += SH_MIN((size_t)SH_GROUP_ROWS, end - o)) {
        size_t outs = SH_MIN((size_t)SH_GROUP_ROWS, end - o);
        kernels->pack_group(w->type, (const uint8_t *)w->rows + o * row_bytes, outs, w->in,
                            scratch);
        kernels->panel(&(sh_panel){
            .type = w->type,
            .n_blocks = w->in / 32,
            .x_stride = sh_x_stride(w->in),
            .groups = scratch,
            .x = p->blocks,
            .n = p->n,
            .y = p->y + o,
            .ldy = p->ldy,
            .outs = outs,
            .add = p->add,
        });
    }
}

void sh_product_run_with(const sh_kernels *kernels, const sh_product *p, size_t begin, size_t end,
                         void *scratch)
{
    const sh_weights *w = p->w;
    SH_ASSERT(begin % SH_GROUP_ROWS == 0 && begin <= end && end <= w->out);
    SH_ASSERT(w->in > 0 && sh_type_row_bytes(w->type, w->in) > 0);
    if (!sh_product_takes_blocks(w->type)) {
        kernels->floats(&(sh_float_product){
            .type = w->type,
            .w = (const uint8_t *)w->rows + begin * sh_type_row_bytes(w->type, w->in),
            .in = w->in,
            .out = end - begin,
            .x = p->x,
            .ldx = p->ldx,
            .n = p->n,
            .y = p->y + begin,
            .ldy = p->ldy,
            .add = p->add,
        });
    } else if (w->packed != NULL) {
        run_packed(kernels, p, begin, end);
    } else {
        SH_ASSERT((uintptr_t)scratch % 64 == 0);
        run_in_place(kernels, p, begin, end, scratch);
    }
}

void sh_product_run(const sh_product *p, size_t begin, size_t end, void *scratch)
{
    sh_product_run_with(sh_kernels_of(sh_level_get()), p, begin, end, scratch);
}
