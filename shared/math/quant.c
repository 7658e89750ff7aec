/*
 * Rows of the block formats, to and from float. Layouts and rounding: ggml-quants.c of llama.cpp
 * (dequantize_row_*, quantize_row_*_ref). The bodies are compiled once more for AVX2, where the
 * compiler vectorizes them; contraction to FMA is off, so both give the same bits.
 */
#include "shared/math/quant.h"

#include <math.h>

#include "shared/math/quant_internal.h"

#if SH_X86
#include <immintrin.h>
#endif

_Static_assert(sizeof(sh_block_q8_0) == 34, "packed as in the file");
_Static_assert(sizeof(sh_block_q4_0) == 18, "packed as in the file");
_Static_assert(sizeof(sh_block_q4_1) == 20, "packed as in the file");
_Static_assert(sizeof(sh_block_q5_0) == 22, "packed as in the file");
_Static_assert(sizeof(sh_block_q5_1) == 24, "packed as in the file");
_Static_assert(sizeof(sh_block_q5_k) == 176, "packed as in the file");
_Static_assert(sizeof(sh_block_q4_k) == 144, "packed as in the file");
_Static_assert(sizeof(sh_block_q6_k) == 210, "packed as in the file");

static const struct {
    sh_type type;
    sh_type_info info;
} types[] = {
    {SH_TYPE_F32, {"F32", 1, 4, true}},
    {SH_TYPE_F16, {"F16", 1, 2, true}},
    {SH_TYPE_BF16, {"BF16", 1, 2, true}},
    {SH_TYPE_Q8_0, {"Q8_0", SH_Q8_0_VALUES, sizeof(sh_block_q8_0), true}},
    {SH_TYPE_Q4_0, {"Q4_0", SH_Q4_0_VALUES, sizeof(sh_block_q4_0), true}},
    {SH_TYPE_Q4_1, {"Q4_1", 32, sizeof(sh_block_q4_1), false}},
    {SH_TYPE_Q5_0, {"Q5_0", 32, sizeof(sh_block_q5_0), false}},
    {SH_TYPE_Q5_1, {"Q5_1", 32, sizeof(sh_block_q5_1), false}},
    {SH_TYPE_Q4_K, {"Q4_K", SH_K_VALUES, sizeof(sh_block_q4_k), false}},
    {SH_TYPE_Q5_K, {"Q5_K", SH_K_VALUES, sizeof(sh_block_q5_k), false}},
    {SH_TYPE_Q6_K, {"Q6_K", SH_K_VALUES, sizeof(sh_block_q6_k), false}},
};

const sh_type_info *sh_type_get(uint32_t type)
{
    for (size_t i = 0; i < SH_COUNT(types); i++)
        if ((uint32_t)types[i].type == type)
            return &types[i].info;
    return NULL;
}

static bool names_equal(const char *a, const char *b)
{
    for (; *a != '\0' && *b != '\0'; a++, b++) {
        char upper = *a >= 'a' && *a <= 'z' ? (char)(*a - 'a' + 'A') : *a;
        if (upper != *b)
            return false;
    }
    return *a == *b;
}

sh_status sh_type_parse(const char *name, sh_type *out, sh_error *err)
{
    for (size_t i = 0; i < SH_COUNT(types); i++) {
        if (names_equal(name, types[i].info.name)) {
            *out = types[i].type;
            return SH_OK;
        }
    }
    return sh_fail(err, SH_ERR_UNSUPPORTED,
                   "unknown tensor type '%.32s'; known are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, "
                   "Q5_1, Q4_K, Q5_K, Q6_K",
                   name);
}

size_t sh_type_row_bytes(sh_type type, size_t n)
{
    const sh_type_info *info = sh_type_get((uint32_t)type);
    SH_ASSERT(info != NULL);
    size_t blocks = n / info->block_values;
    if (n % info->block_values != 0 || blocks > SIZE_MAX / info->block_bytes)
        return 0;
    return blocks * info->block_bytes;
}

float sh_f16_to_f32(uint16_t h)
{
    return sh_half_to_float(h);
}

SH_INLINE uint16_t float_to_half(float x)
{
    uint32_t bits = sh_f32_to_bits(x);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) /* NaN: quiet, top of the payload kept, as the hardware does */
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520 and up round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: the sum with 0.5 rounds at 2^-24 */
        float sum = sh_bits_to_f32(magnitude) + 0.5f;
        return (uint16_t)(sign | (sh_f32_to_bits(sum) - 0x3f000000u));
    }
    uint32_t rebased = magnitude - (112u << 23);
    return (uint16_t)(sign | (rebased + 0xfffu + (rebased >> 13 & 1u)) >> 13);
}

uint16_t sh_f32_to_f16(float x)
{
    return float_to_half(x);
}

/* To nearest even; a NaN becomes quiet, so that it does not lose its mantissa and turn infinite. */
SH_INLINE uint16_t float_to_bf16(float x)
{
    uint32_t bits = sh_f32_to_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* ---- to float ---- */

SH_INLINE void dequantize_q8_0(const sh_block_q8_0 *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++, out += SH_Q8_0_VALUES) {
        float d = sh_half_to_float(b->d);
        for (size_t j = 0; j < SH_Q8_0_VALUES; j++)
            out[j] = (float)b->qs[j] * d;
    }
}

SH_INLINE void dequantize_q4_0(const sh_block_q4_0 *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++, out += SH_Q4_0_VALUES) {
        float d = sh_half_to_float(b->d);
        for (size_t j = 0; j < SH_Q4_0_VALUES / 2; j++) {
            out[j] = (float)((int)(b->qs[j] & 15) - 8) * d;
            out[j + SH_Q4_0_VALUES / 2] = (float)((int)(b->qs[j] >> 4) - 8) * d;
        }
    }
}

/* Q4_1 and Q5_1 (high != NULL). The sum rounds twice, as the reference does. */
SH_INLINE void dequantize_with_min(uint16_t d_bits, uint16_t m_bits, const uint8_t *qs,
                                   const uint8_t *high, float *out)
{
    float d = sh_half_to_float(d_bits), m = sh_half_to_float(m_bits);
    uint32_t bits = 0;
    if (high != NULL)
        memcpy(&bits, high, sizeof bits);
    for (size_t j = 0; j < 16; j++) {
        uint32_t low = (qs[j] & 15u) | (bits >> j & 1) << 4;
        uint32_t top = (uint32_t)(qs[j] >> 4) | (bits >> (j + 16) & 1) << 4;
        out[j] = (float)(int)low * d + m;
        out[j + 16] = (float)(int)top * d + m;
    }
}

SH_INLINE void dequantize_q4_1(const sh_block_q4_1 *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++, out += 32)
        dequantize_with_min(b->d, b->m, b->qs, NULL, out);
}

SH_INLINE void dequantize_q5_1(const sh_block_q5_1 *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++, out += 32)
        dequantize_with_min(b->d, b->m, b->qs, b->qh, out);
}

SH_INLINE void dequantize_q5_0(const sh_block_q5_0 *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++, out += 32) {
        float d = sh_half_to_float(b->d);
        uint32_t bits;
        memcpy(&bits, b->qh, sizeof bits);
        for (size_t j = 0; j < 16; j++) {
            uint32_t low = (b->qs[j] & 15u) | (bits >> j & 1) << 4;
            uint32_t top = (uint32_t)(b->qs[j] >> 4) | (bits >> (j + 16) & 1) << 4;
            out[j] = (float)((int)low - 16) * d;
            out[j + 16] = (float)((int)top - 16) * d;
        }
    }
}

/* Sub-blocks j and j + 1 of Q4_K, or of Q5_K (high != NULL). */
SH_INLINE void dequantize_k_pair(const float d[2], const uint8_t scales[12], size_t j,
                                 const uint8_t *q, const uint8_t *high, float *out)
{
    uint8_t scale[2], min[2];
    sh_k_scale(scales, j, &scale[0], &min[0]);
    sh_k_scale(scales, j + 1, &scale[1], &min[1]);
    float d_low = d[0] * (float)scale[0], m_low = d[1] * (float)min[0];
    float d_top = d[0] * (float)scale[1], m_top = d[1] * (float)min[1];
    for (size_t l = 0; l < 32; l++) {
        int low = q[l] & 15, top = q[l] >> 4;
        if (high != NULL) {
            low |= (high[l] >> j & 1) << 4;
            top |= (high[l] >> (j + 1) & 1) << 4;
        }
        out[l] = d_low * (float)low - m_low;
        out[l + 32] = d_top * (float)top - m_top;
    }
}

SH_INLINE void dequantize_q4_k(const sh_block_q4_k *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++) {
        const float d[2] = {sh_half_to_float(b->d), sh_half_to_float(b->dmin)};
        for (size_t j = 0; j < 8; j += 2, out += 64)
            dequantize_k_pair(d, b->scales, j, b->qs + j * 16, NULL, out);
    }
}

SH_INLINE void dequantize_q5_k(const sh_block_q5_k *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++) {
        const float d[2] = {sh_half_to_float(b->d), sh_half_to_float(b->dmin)};
        for (size_t j = 0; j < 8; j += 2, out += 64)
            dequantize_k_pair(d, b->scales, j, b->qs + j * 16, b->qh, out);
    }
}

SH_INLINE void dequantize_q6_k(const sh_block_q6_k *b, float *out, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++) {
        float d = sh_half_to_float(b->d);
        for (size_t half = 0; half < 2; half++, out += 128) {
            const uint8_t *ql = b->ql + half * 64, *qh = b->qh + half * 32;
            for (size_t part = 0; part < 2; part++) { /* 16 values share their four scales */
                const int8_t *scales = b->scales + half * 8 + part;
                float d0 = d * (float)scales[0], d1 = d * (float)scales[2];
                float d2 = d * (float)scales[4], d3 = d * (float)scales[6];
                for (size_t l = part * 16; l < part * 16 + 16; l++) {
                    out[l] = d0 * (float)(((ql[l] & 15) | (qh[l] & 3) << 4) - 32);
                    out[l + 32] = d1 * (float)(((ql[l + 32] & 15) | (qh[l] >> 2 & 3) << 4) - 32);
                    out[l + 64] = d2 * (float)((ql[l] >> 4 | (qh[l] >> 4 & 3) << 4) - 32);
                    out[l + 96] = d3 * (float)((ql[l + 32] >> 4 | (qh[l] >> 6) << 4) - 32);
                }
            }
        }
    }
}

SH_INLINE void row_dequantize(sh_type type, const void *row, float *out, size_t n)
{
    const uint16_t *halves = row;
    switch (type) {
    case SH_TYPE_F32:
        memcpy(out, row, n * sizeof *out);
        return;
    case SH_TYPE_F16:
        for (size_t i = 0; i < n; i++)
            out[i] = sh_half_to_float(halves[i]);
        return;
    case SH_TYPE_BF16:
        for (size_t i = 0; i < n; i++)
            out[i] = sh_bf16_to_float(halves[i]);
        return;
    case SH_TYPE_Q8_0:
        dequantize_q8_0(row, out, n / SH_Q8_0_VALUES);
        return;
    case SH_TYPE_Q4_0:
        dequantize_q4_0(row, out, n / SH_Q4_0_VALUES);
        return;
    case SH_TYPE_Q4_1:
        dequantize_q4_1(row, out, n / 32);
        return;
    case SH_TYPE_Q5_0:
        dequantize_q5_0(row, out, n / 32);
        return;
    case SH_TYPE_Q5_1:
        dequantize_q5_1(row, out, n / 32);
        return;
    case SH_TYPE_Q4_K:
        dequantize_q4_k(row, out, n / SH_K_VALUES);
        return;
    case SH_TYPE_Q5_K:
        dequantize_q5_k(row, out, n / SH_K_VALUES);
        return;
    case SH_TYPE_Q6_K:
        dequantize_q6_k(row, out, n / SH_K_VALUES);
        return;
    }
    SH_ASSERT(!"a readable type");
}

/* ---- from float ---- */

/* A block with a NaN or an infinity gets the scale NaN: what is read back is NaN, not a number that
 * looks good. */
SH_INLINE bool block_is_finite(const float *x, size_t n)
{
    bool finite = true;
    for (size_t j = 0; j < n; j++)
        finite &= (sh_f32_to_bits(x[j]) & 0x7f800000u) != 0x7f800000u;
    return finite;
}

/* 1 / d, or 0 when that would overflow: d is then far below the least half and is stored as 0. */
SH_INLINE float inverse_or_zero(float d)
{
    return fabsf(d) > 0x1p-127f ? 1.0f / d : 0;
}

SH_INLINE void quantize_q8_0(const float *x, sh_block_q8_0 *b, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++, x += SH_Q8_0_VALUES) {
        if (!block_is_finite(x, SH_Q8_0_VALUES)) {
            *b = (sh_block_q8_0){.d = 0x7e00};
            continue;
        }
        float largest = 0;
        for (size_t j = 0; j < SH_Q8_0_VALUES; j++)
            largest = fmaxf(largest, fabsf(x[j]));
        float d = largest / 127.0f;
        float inverse = inverse_or_zero(d);
        b->d = float_to_half(d);
        for (size_t j = 0; j < SH_Q8_0_VALUES; j++) { /* roundf, half away from zero */
            float v = x[j] * inverse;
            int whole = (int)v;
            float rest = v - (float)whole;
            b->qs[j] = (int8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
        }
    }
}

SH_INLINE void quantize_q4_0(const float *x, sh_block_q4_0 *b, size_t n_blocks)
{
    for (size_t i = 0; i < n_blocks; i++, b++, x += SH_Q4_0_VALUES) {
        if (!block_is_finite(x, SH_Q4_0_VALUES)) {
            *b = (sh_block_q4_0){.d = 0x7e00};
            continue;
        }
        float largest = 0;
        for (size_t j = 0; j < SH_Q4_0_VALUES; j++)
            if (fabsf(x[j]) > fabsf(largest))
                largest = x[j];
        float d = largest / -8.0f;
        float inverse = inverse_or_zero(d);
        b->d = float_to_half(d);
        for (size_t j = 0; j < SH_Q4_0_VALUES / 2; j++) {
            int low = (int)(x[j] * inverse + 8.5f);
            int high = (int)(x[j + SH_Q4_0_VALUES / 2] * inverse + 8.5f);
            b->qs[j] = (uint8_t)(SH_MIN(low, 15) | SH_MIN(high, 15) << 4);
        }
    }
}

SH_INLINE void row_quantize(sh_type type, const float *x, void *row, size_t n)
{
    uint16_t *halves = row;
    switch (type) {
    case SH_TYPE_F32:
        memcpy(row, x, n * sizeof *x);
        return;
    case SH_TYPE_F16:
        for (size_t i = 0; i < n; i++)
            halves[i] = float_to_half(x[i]);
        return;
    case SH_TYPE_Q8_0:
        quantize_q8_0(x, row, n / SH_Q8_0_VALUES);
        return;
    case SH_TYPE_Q4_0:
        quantize_q4_0(x, row, n / SH_Q4_0_VALUES);
        return;
    case SH_TYPE_BF16:
        for (size_t i = 0; i < n; i++)
            halves[i] = float_to_bf16(x[i]);
        return;
    case SH_TYPE_Q4_1:
    case SH_TYPE_Q5_0:
    case SH_TYPE_Q5_1:
    case SH_TYPE_Q4_K:
    case SH_TYPE_Q5_K:
    case SH_TYPE_Q6_K:
        break;
    }
    SH_ASSERT(!"a writable type");
}

/* ---- the same for each level ---- */

#if SH_X86
SH_TARGET_AVX2 static void halves_to_floats(const uint16_t *halves, float *out, size_t n)
{
    size_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(halves + i))));
    for (; i < n; i++)
        out[i] = sh_half_to_float(halves[i]);
}

SH_TARGET_AVX2 static void row_dequantize_avx2(sh_type type, const void *row, float *out, size_t n)
{
    if (type == SH_TYPE_F16)
        halves_to_floats(row, out, n);
    else
        row_dequantize(type, row, out, n);
}

SH_TARGET_AVX2 static void row_quantize_avx2(sh_type type, const float *x, void *row, size_t n)
{
    row_quantize(type, x, row, n);
}
#endif

static void check_row(sh_type type, size_t n)
{
    const sh_type_info *info = sh_type_get((uint32_t)type);
    SH_ASSERT(info != NULL && n % info->block_values == 0);
}

void sh_row_dequantize(sh_type type, const void *row, float *out, size_t n)
{
    check_row(type, n);
#if SH_X86
    if (sh_level_get() >= SH_LEVEL_AVX2) {
        row_dequantize_avx2(type, row, out, n);
        return;
    }
#endif
    row_dequantize(type, row, out, n);
}

void sh_row_quantize(sh_type type, const float *x, void *row, size_t n)
{
    check_row(type, n);
#if SH_X86
    if (sh_level_get() >= SH_LEVEL_AVX2) {
        row_quantize_avx2(type, x, row, n);
        return;
    }
#endif
    row_quantize(type, x, row, n);
}
