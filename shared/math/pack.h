/*
 * The packed form of a quantized matrix: groups of 16 rows, interleaved so that a vector holds four
 * neighbouring values of each of the 16 rows (Q8_0: 64 bytes; lanes of a dot product are rows). One
 * layout serves every level. Groups are one after another; the last is filled up with zero rows.
 *
 * Layout of a group of `in` columns, each part starting at a multiple of 64 bytes:
 *   1. scales, for all blocks of 32 (K-quants: 256) columns, a value a row
 *   2. quants: for each block of 32 columns, for each 4 columns c .. c + 3, 16 rows x 4 values.
 *      8 bits: int8, 8 x 64 bytes a block. 4 bits: 4 x 64 bytes a block, the low nibbles of vector
 *      v are columns 4v .. 4v + 3, the high ones 16 + 4v .. 16 + 4v + 3 (as in the file's Q4_0).
 *      5 and 6 bits: the same, then the block's high bits (product_internal.h has every type)
 * Packing loses nothing: sh_packed_row gives the same floats as sh_row_dequantize of the file's
 * row, bit for bit.
 */
#ifndef SH_MATH_PACK_H
#define SH_MATH_PACK_H

#include "shared/math/product.h"

/* To be raised with every change of the layout: packed forms are kept in files, and one of another
 * version is made anew. */
#define SH_PACK_VERSION 1

/* Bytes of the packed form, a multiple of 64; 0: this type is not packed (floats). */
size_t sh_pack_bytes(sh_type type, uint32_t out, uint32_t in);
/* Packs groups begin .. end - 1 of `rows` (the whole matrix) into `packed` (the whole of it).
 * Groups may be packed by several threads. */
void sh_pack_groups(sh_type type, const void *rows, uint32_t out, uint32_t in, size_t begin,
                    size_t end, void *packed);
/* values[in] of one row. */
void sh_packed_row(sh_type type, const void *packed, uint32_t in, uint32_t row, float *values);

#endif
