/*
 * Products of operands that are rounded to bf16 (the upper half of a float, to nearest even) with
 * sums in f32: C [m, n] (+)= A [m, k]·B [k, n]. About 3 decimal digits an operand; the trainer
 * offers it as an option, behind an accuracy test.
 *
 * Both operands are packed first, A by rows, B in blocks of 32 rows (k) times 16 columns (n) whose
 * neighbouring rows are interleaved in pairs, as AMX's TDPBF16PS and AVX512-BF16's VDPBF16PS read
 * them (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). Sizes are rounded
 * up with zeros.
 *
 * Levels: "amx-bf16", "avx512-bf16", "portable". They add in different orders, and the first two
 * take denormals for zero. Within a level a value depends on its row of A, its column of B and k
 * alone.
 * Threads: pure functions.
 */
#ifndef SH_MATH_BF16_H
#define SH_MATH_BF16_H

#include "shared/base/status.h"

#define SH_BF16_K 32 /* values of k in a block */
#define SH_BF16_N 16 /* columns of B in a block */

typedef uint16_t sh_bf16;

/* The level in use: the best that this machine has and its kernel lets us use. */
const char *sh_bf16_level(void);
/* For tests: uses another from now on. false: not here. */
bool sh_bf16_force(const char *level);

size_t sh_bf16_a_values(size_t m, size_t k);
size_t sh_bf16_b_values(size_t n, size_t k);
/* x [m, k], row stride ldx. */
void sh_bf16_pack_a(const float *x, size_t ldx, size_t m, size_t k, sh_bf16 *out);
/* Columns first .. first + n - 1 of a B of k rows, first a multiple of SH_BF16_N: from the rows
 * w [n, k] of its transpose. */
void sh_bf16_pack_columns(const float *w, size_t ldw, size_t first, size_t n, size_t k,
                          sh_bf16 *out);
/* Rows first .. first + rows - 1 of a B [k, n], first a multiple of SH_BF16_K: from w [rows, n]. */
void sh_bf16_pack_rows(const float *w, size_t ldw, size_t first, size_t rows, size_t n, size_t k,
                       sh_bf16 *out);

typedef struct {
    const sh_bf16 *a, *b; /* packed */
    size_t m, n, k;
    float *c; /* row stride ldc */
    size_t ldc;
    bool add;
} sh_bf16_product;
void sh_bf16_run(const sh_bf16_product *p);

#endif
