/*
 * Packing in plain C, and reading a packed row back. The layout: product_internal.h.
 */
#include "shared/math/pack.h"

#include "shared/math/kernel_internal.h"
#include "shared/math/product_internal.h"

size_t sh_pack_bytes(sh_type type, uint32_t out, uint32_t in)
{
    if (!sh_product_takes_blocks(type))
        return 0;
    SH_ASSERT(sh_type_row_bytes(type, in) > 0);
    size_t n_groups = ((size_t)out + SH_GROUP_ROWS - 1) / SH_GROUP_ROWS;
    return n_groups * sh_group_bytes(type, in);
}

/* ---- scales ---- */

/* d, and with has_m m, of every block of a row, to its place among the 16 rows. */
static void scales_of_row(const uint8_t *row, size_t block_bytes, size_t n_blocks, bool has_m,
                          uint8_t *to)
{
    size_t step = has_m ? 64 : 32;
    for (size_t b = 0; b < n_blocks; b++, row += block_bytes, to += step) {
        memcpy(to, row, 2);
        if (has_m)
            memcpy(to + 32, row + 2, 2);
    }
}

/* Q4_K and Q5_K begin alike: d, dmin, 12 bytes of scales. */
static void scales_of_k_row(const uint8_t *row, size_t block_bytes, size_t n_blocks, size_t lane,
                            uint8_t *to)
{
    for (size_t b = 0; b < n_blocks; b++, row += block_bytes, to += SH_K_SCALE_BYTES) {
        memcpy(to + 2 * lane, row, 2);
        memcpy(to + 32 + 2 * lane, row + 2, 2);
        for (size_t j = 0; j < 8; j++)
            sh_k_scale(row + 4, j, to + 64 + 32 * j + lane, to + 80 + 32 * j + lane);
    }
}

static void scales_of_q6_k_row(const sh_block_q6_k *row, size_t n_blocks, size_t lane, uint8_t *to)
{
    for (size_t b = 0; b < n_blocks; b++, row++, to += SH_Q6_K_SCALE_BYTES) {
        memcpy(to + 2 * lane, &row->d, 2);
        for (size_t j = 0; j < 16; j++)
            to[32 + 16 * j + lane] = (uint8_t)row->scales[j];
    }
}

void sh_pack_scales(sh_type type, const uint8_t *rows, size_t n_rows, size_t in, uint8_t *group)
{
    size_t row_bytes = sh_type_row_bytes(type, in);
    const sh_type_info *info = sh_type_get((uint32_t)type);
    size_t n_blocks = in / info->block_values;
    size_t scales_bytes = sh_group_scales_bytes(type, in),
           padded = SH_MIN(scales_bytes, (size_t)64);
    memset(group + scales_bytes - padded, 0, padded); /* rounded up to a line */
    if (n_rows < SH_GROUP_ROWS)
        memset(group, 0, scales_bytes);
    for (size_t r = 0; r < n_rows; r++, rows += row_bytes) {
        if (type == SH_TYPE_Q6_K)
            scales_of_q6_k_row((const void *)rows, n_blocks, r, group);
        else if (sh_is_k_quant(type))
            scales_of_k_row(rows, info->block_bytes, n_blocks, r, group);
        else
            scales_of_row(rows, info->block_bytes, n_blocks, sh_has_minima(type), group + 2 * r);
    }
}

/* ---- codes ---- */

static void codes_of_nibbles(const uint8_t qs[16], const uint8_t *high, uint8_t codes[32])
{
    uint32_t bits = 0;
    if (high != NULL)
        memcpy(&bits, high, sizeof bits);
    for (size_t j = 0; j < 16; j++) {
        codes[j] = (uint8_t)((qs[j] & 15u) | (bits >> j & 1) << 4);
        codes[j + 16] = (uint8_t)((uint32_t)(qs[j] >> 4) | (bits >> (j + 16) & 1) << 4);
    }
}

/* Sub-block j of Q4_K or Q5_K. */
static void codes_of_k(const uint8_t *qs, const uint8_t *high, size_t j, uint8_t codes[32])
{
    for (size_t l = 0; l < 32; l++) {
        uint8_t both = qs[j / 2 * 32 + l];
        codes[l] = j % 2 == 0 ? both & 15 : both >> 4;
        if (high != NULL)
            codes[l] |= (uint8_t)((high[l] >> j & 1) << 4);
    }
}

static void codes_of_q6_k(const sh_block_q6_k *b, size_t j, uint8_t codes[32])
{
    const uint8_t *ql = b->ql + j / 4 * 64 + j % 2 * 32, *qh = b->qh + j / 4 * 32;
    for (size_t l = 0; l < 32; l++) {
        int low = j % 4 < 2 ? ql[l] & 15 : ql[l] >> 4;
        codes[l] = (uint8_t)(low | (qh[l] >> j % 4 * 2 & 3) << 4);
    }
}

/* The codes of columns 32 b .. 32 b + 31 of a row, as the file has them. */
static void codes_of_row(sh_type type, const uint8_t *row, size_t b, uint8_t codes[32])
{
    switch (type) {
    case SH_TYPE_Q8_0:
        memcpy(codes, ((const sh_block_q8_0 *)(const void *)row)[b].qs, 32);
        return;
    case SH_TYPE_Q4_0:
        codes_of_nibbles(((const sh_block_q4_0 *)(const void *)row)[b].qs, NULL, codes);
        return;
    case SH_TYPE_Q4_1:
        codes_of_nibbles(((const sh_block_q4_1 *)(const void *)row)[b].qs, NULL, codes);
        return;
    case SH_TYPE_Q5_0: {
        const sh_block_q5_0 *block = (const sh_block_q5_0 *)(const void *)row + b;
        codes_of_nibbles(block->qs, block->qh, codes);
        return;
    }
    case SH_TYPE_Q5_1: {
        const sh_block_q5_1 *block = (const sh_block_q5_1 *)(const void *)row + b;
        codes_of_nibbles(block->qs, block->qh, codes);
        return;
    }
    case SH_TYPE_Q4_K:
        codes_of_k(((const sh_block_q4_k *)(const void *)row)[b / 8].qs, NULL, b % 8, codes);
        return;
    case SH_TYPE_Q5_K: {
        const sh_block_q5_k *block = (const sh_block_q5_k *)(const void *)row + b / 8;
        codes_of_k(block->qs, block->qh, b % 8, codes);
        return;
    }
    case SH_TYPE_Q6_K:
        codes_of_q6_k((const sh_block_q6_k *)(const void *)row + b / 8, b % 8, codes);
        return;
    default:
        SH_ASSERT(!"a quantized type");
    }
}

/* Puts 32 codes of one row into a block of a group that was zero there. */
static void codes_put(int bits, const uint8_t codes[32], size_t lane, uint8_t *block)
{
    for (size_t i = 0; i < 32; i++) {
        size_t v = i / 4, at = lane * 4 + i % 4;
        if (bits == 8) {
            block[v * 64 + at] = codes[i];
            continue;
        }
        block[v % 4 * 64 + at] |= (uint8_t)((codes[i] & 15) << v / 4 * 4);
        if (bits == 5)
            block[256 + at] |= (uint8_t)(codes[i] >> 4 << v);
        if (bits == 6)
            block[256 + v / 4 * 64 + at] |= (uint8_t)(codes[i] >> 4 << v % 4 * 2);
    }
}

void sh_pack_group_portable(sh_type type, const uint8_t *rows, size_t n_rows, size_t in,
                            uint8_t *group)
{
    size_t row_bytes = sh_type_row_bytes(type, in), block_bytes = sh_group_block_bytes(type);
    uint8_t *quants = group + sh_group_scales_bytes(type, in);
    sh_pack_scales(type, rows, n_rows, in, group);
    memset(quants, 0, in / 32 * block_bytes);
    for (size_t b = 0; b < in / 32; b++, quants += block_bytes) {
        for (size_t r = 0; r < n_rows; r++) {
            uint8_t codes[32];
            codes_of_row(type, rows + r * row_bytes, b, codes);
            codes_put(sh_code_bits(type), codes, r, quants);
        }
    }
}

void sh_pack_groups(sh_type type, const void *rows, uint32_t out, uint32_t in, size_t begin,
                    size_t end, void *packed)
{
    const sh_kernels *kernels = sh_kernels_of(sh_level_get());
    size_t row_bytes = sh_type_row_bytes(type, in), group_bytes = sh_group_bytes(type, in);
    SH_ASSERT(row_bytes > 0 && sh_product_takes_blocks(type));
    for (size_t g = begin; g < end; g++) {
        size_t first = g * SH_GROUP_ROWS;
        SH_ASSERT(first < out);
        kernels->pack_group(type, (const uint8_t *)rows + first * row_bytes,
                            SH_MIN((size_t)SH_GROUP_ROWS, out - first), in,
                            (uint8_t *)packed + g * group_bytes);
    }
}

/* ---- back to floats ---- */

static uint8_t code_get(int bits, const uint8_t *block, size_t lane, size_t i)
{
    size_t v = i / 4, at = lane * 4 + i % 4;
    if (bits == 8)
        return block[v * 64 + at];
    uint8_t code = block[v % 4 * 64 + at] >> v / 4 * 4 & 15;
    if (bits == 5)
        code |= (uint8_t)((block[256 + at] >> v & 1) << 4);
    if (bits == 6)
        code |= (uint8_t)((block[256 + v / 4 * 64 + at] >> v % 4 * 2 & 3) << 4);
    return code;
}

static float half_at(const uint8_t *at)
{
    uint16_t h;
    memcpy(&h, at, sizeof h);
    return sh_half_to_float(h);
}

/* Scale and minimum of half block h (0 or 1) of block b of one row: value = d * code + m. */
static void scale_get(sh_type type, const uint8_t *scales, size_t lane, size_t half_block,
                      float d_m[2])
{
    size_t b = half_block / 2;
    d_m[1] = 0;
    if (type == SH_TYPE_Q6_K) {
        const uint8_t *at = scales + b / 8 * SH_Q6_K_SCALE_BYTES;
        d_m[0] = half_at(at + 2 * lane) * (float)(int8_t)at[32 + half_block % 16 * 16 + lane];
    } else if (sh_is_k_quant(type)) {
        const uint8_t *at = scales + b / 8 * SH_K_SCALE_BYTES, *of_block = at + 64 + b % 8 * 32;
        d_m[0] = half_at(at + 2 * lane) * (float)of_block[lane];
        d_m[1] = -(half_at(at + 32 + 2 * lane) * (float)of_block[16 + lane]);
    } else if (sh_has_minima(type)) {
        d_m[0] = half_at(scales + b * 64 + 2 * lane);
        d_m[1] = half_at(scales + b * 64 + 32 + 2 * lane);
    } else {
        d_m[0] = half_at(scales + b * 32 + 2 * lane);
    }
}

void sh_packed_row(sh_type type, const void *packed, uint32_t in, uint32_t row, float *values)
{
    SH_ASSERT(sh_product_takes_blocks(type));
    static const int offsets[] = {[4] = 8, [5] = 16, [6] = 32, [8] = 0};
    int bits = sh_code_bits(type), offset = sh_has_minima(type) ? 0 : offsets[bits];
    size_t lane = row % SH_GROUP_ROWS;
    const uint8_t *group = (const uint8_t *)packed + row / SH_GROUP_ROWS * sh_group_bytes(type, in);
    const uint8_t *quants = group + sh_group_scales_bytes(type, in);
    float d_m[2] = {0};
    for (size_t i = 0; i < in; i++) {
        if (i % 16 == 0)
            scale_get(type, group, lane, i / 16, d_m);
        uint8_t code = code_get(bits, quants + i / 32 * sh_group_block_bytes(type), lane, i % 32);
        float product = (float)(bits == 8 ? (int)(int8_t)code : (int)code - offset) * d_m[0];
        values[i] = sh_has_minima(type) ? product + d_m[1] : product;
    }
}
