/*
 * What the product kernels of all levels share: the layout of a packed group (pack.h), what a type
 * has in it, and the call that a level implements. Internal to math and its tests.
 *
 * A block of 32 columns of a group has 8 vectors of 64 bytes: vector v is columns 4v .. 4v + 3 of
 * the 16 rows, row after row. Stored are, a block:
 *   8 bits       8 x 64: the codes of Q8_0, signed
 *   4, 5, 6      4 x 64: low nibbles are vectors 0 .. 3, high nibbles vectors 4 .. 7
 *   5            + 64: bit v of a byte is the fifth bit of that byte of vector v
 *   6            + 2 x 64: bits 2i, 2i + 1 of a byte of part h are the top bits of vector 4h + i
 * Scales, a block of 32 columns, or a super-block of 256:
 *   Q8_0, Q4_0, Q5_0   16 halves d
 *   Q4_1, Q5_1         16 halves d, 16 halves m
 *   Q4_K, Q5_K         16 halves d, 16 halves dmin; 8 times 16 bytes of scales, 16 of minima
 *   Q6_K               16 halves d; 16 times (a half block each) 16 signed bytes of scales
 */
#ifndef SH_MATH_PRODUCT_INTERNAL_H
#define SH_MATH_PRODUCT_INTERNAL_H

#include <stddef.h>

#include "shared/math/pack.h"
#include "shared/math/quant_internal.h"

_Static_assert(sizeof(sh_x_block) == 64, "a cache line");

#define SH_X_ROWS 16 /* rows of x that pass over a group together */
/* Groups that rows of x pass over before the next rows do: a part of a second-level cache. */
#define SH_PANEL_BYTES ((size_t)512 << 10)

SH_INLINE int sh_code_bits(sh_type type)
{
    switch (type) {
    case SH_TYPE_Q4_0:
    case SH_TYPE_Q4_1:
    case SH_TYPE_Q4_K:
        return 4;
    case SH_TYPE_Q5_0:
    case SH_TYPE_Q5_1:
    case SH_TYPE_Q5_K:
        return 5;
    case SH_TYPE_Q6_K:
        return 6;
    default:
        return 8;
    }
}

SH_INLINE bool sh_is_k_quant(sh_type type)
{
    return type == SH_TYPE_Q4_K || type == SH_TYPE_Q5_K || type == SH_TYPE_Q6_K;
}

/* value = d * q - m; Q4_1 and Q5_1 have + m. */
SH_INLINE bool sh_has_minima(sh_type type)
{
    return type == SH_TYPE_Q4_1 || type == SH_TYPE_Q5_1 || type == SH_TYPE_Q4_K ||
           type == SH_TYPE_Q5_K;
}

/* Bytes of quants of 32 columns of a group. */
SH_INLINE size_t sh_group_block_bytes(sh_type type)
{
    int bits = sh_code_bits(type);
    return bits == 8 ? 512 : 256 + 64 * (size_t)(bits - 4);
}

#define SH_K_SCALE_BYTES    320 /* Q4_K, Q5_K: of 256 columns of a group */
#define SH_Q6_K_SCALE_BYTES 288

/* Where the quants of a group begin. */
SH_INLINE size_t sh_group_scales_bytes(sh_type type, size_t in)
{
    size_t bytes = in / 32 * (sh_has_minima(type) ? 64 : 32);
    if (type == SH_TYPE_Q6_K)
        bytes = in / SH_K_VALUES * SH_Q6_K_SCALE_BYTES;
    else if (sh_is_k_quant(type))
        bytes = in / SH_K_VALUES * SH_K_SCALE_BYTES;
    return (bytes + 63) / 64 * 64;
}

SH_INLINE size_t sh_group_bytes(sh_type type, size_t in)
{
    return sh_group_scales_bytes(type, in) + in / 32 * sh_group_block_bytes(type);
}

/* Where a block of x has the number that undoes the offset of the type's codes. */
SH_INLINE const int32_t *sh_x_start(const sh_x_block *x, sh_type type)
{
    if (type == SH_TYPE_Q8_0)
        return &x->start128;
    if (type == SH_TYPE_Q4_0)
        return &x->start8;
    return type == SH_TYPE_Q5_0 ? &x->start16 : &x->zero;
}

/* Rows of x times neighbouring groups. */
typedef struct {
    sh_type type;
    size_t n_blocks; /* of 32 columns */
    const uint8_t *groups;
    const sh_x_block *x; /* [n, n_blocks], row stride x_stride */
    size_t x_stride;
    size_t n;
    float *y; /* at the first group's column */
    size_t ldy;
    size_t outs; /* columns of y: the last group may have fewer than 16 */
    bool add;
} sh_panel;

/* As sh_pack_groups for one group, of 1 to 16 rows. */
typedef void sh_pack_group_fn(sh_type type, const uint8_t *rows, size_t n_rows, size_t in,
                              uint8_t *group);
typedef void sh_panel_fn(const sh_panel *p);
typedef void sh_x_quantize_fn(const float *x, size_t n_blocks, sh_x_block *blocks);

sh_pack_group_fn sh_pack_group_portable;
sh_panel_fn sh_panel_portable;
sh_x_quantize_fn sh_x_quantize_portable;
#if SH_X86
sh_pack_group_fn sh_pack_group_avx512;
sh_panel_fn sh_panel_avx512, sh_panel_avx2, sh_panel_avx_vnni;
sh_x_quantize_fn sh_x_quantize_avx512, sh_x_quantize_avx2;
#endif
#ifdef SH_TARGET_NEON
sh_panel_fn sh_panel_neon;
#endif

/* The scales part of a group. Every level starts here, and writes the quants its own way. */
void sh_pack_scales(sh_type type, const uint8_t *rows, size_t n_rows, size_t in, uint8_t *group);

/* static void panel_<TYPE>(const sh_panel *) for each of those types, from an inlined
 * BODY(panel, type): a function a type, so that the compiler has less to hold at once. */
#define SH_PANEL(TARGET, BODY, TYPE)                                                               \
    TARGET static __attribute__((noinline)) void panel_##TYPE(const sh_panel *p)                   \
    {                                                                                              \
        BODY(p, TYPE);                                                                             \
    }
#define SH_PANELS(TARGET, BODY)                                                                    \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q8_0)                                                           \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q4_0)                                                           \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q4_1)                                                           \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q5_0)                                                           \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q5_1)                                                           \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q4_K)                                                           \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q5_K)                                                           \
    SH_PANEL(TARGET, BODY, SH_TYPE_Q6_K)

/* CALL(type) for each type that products take blocks with, as a constant. */
#define SH_EACH_BLOCK_TYPE(type, CALL)                                                             \
    switch (type) {                                                                                \
    case SH_TYPE_Q8_0:                                                                             \
        CALL(SH_TYPE_Q8_0);                                                                        \
        break;                                                                                     \
    case SH_TYPE_Q4_0:                                                                             \
        CALL(SH_TYPE_Q4_0);                                                                        \
        break;                                                                                     \
    case SH_TYPE_Q4_1:                                                                             \
        CALL(SH_TYPE_Q4_1);                                                                        \
        break;                                                                                     \
    case SH_TYPE_Q5_0:                                                                             \
        CALL(SH_TYPE_Q5_0);                                                                        \
        break;                                                                                     \
    case SH_TYPE_Q5_1:                                                                             \
        CALL(SH_TYPE_Q5_1);                                                                        \
        break;                                                                                     \
    case SH_TYPE_Q4_K:                                                                             \
        CALL(SH_TYPE_Q4_K);                                                                        \
        break;                                                                                     \
    case SH_TYPE_Q5_K:                                                                             \
        CALL(SH_TYPE_Q5_K);                                                                        \
        break;                                                                                     \
    case SH_TYPE_Q6_K:                                                                             \
        CALL(SH_TYPE_Q6_K);                                                                        \
        break;                                                                                     \
    default:                                                                                       \
        SH_ASSERT(!"a quantized type");                                                            \
    }

#endif
