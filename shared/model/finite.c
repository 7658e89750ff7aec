#include "shared/model/finite.h"

#include <string.h>

#define HALF_EXPONENT   0x7c00u
#define BFLOAT_EXPONENT 0x7f80u
#define FLOAT_EXPONENT  0x7f800000u

/* Where the halves of a block are. */
typedef struct {
    sh_type type;
    uint32_t n, at[2];
} block_halves;

static const block_halves layouts[] = {
    {SH_TYPE_Q8_0, 1, {0}},    {SH_TYPE_Q4_0, 1, {0}},    {SH_TYPE_Q4_1, 2, {0, 2}},
    {SH_TYPE_Q5_0, 1, {0}},    {SH_TYPE_Q5_1, 2, {0, 2}}, {SH_TYPE_Q4_K, 2, {0, 2}},
    {SH_TYPE_Q5_K, 2, {0, 2}}, {SH_TYPE_Q6_K, 1, {208}},
};

static bool halves_are_finite(const uint8_t *bytes, size_t stride, size_t n, unsigned exponent)
{
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, bytes + i * stride, sizeof h);
        finite &= (h & exponent) != exponent;
    }
    return finite;
}

static bool floats_are_finite(const uint8_t *bytes, size_t n)
{
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
        finite &= (bits & FLOAT_EXPONENT) != FLOAT_EXPONENT;
    }
    return finite;
}

bool sh_row_is_finite(sh_type type, const void *row, size_t n)
{
    const sh_type_info *info = sh_type_get((uint32_t)type);
    if (type == SH_TYPE_F32)
        return floats_are_finite(row, n);
    if (type == SH_TYPE_F16 || type == SH_TYPE_BF16)
        return halves_are_finite(row, sizeof(uint16_t), n,
                                 type == SH_TYPE_F16 ? HALF_EXPONENT : BFLOAT_EXPONENT);
    for (size_t i = 0; i < SH_COUNT(layouts); i++) {
        if (layouts[i].type != type)
            continue;
        bool finite = true;
        for (uint32_t k = 0; k < layouts[i].n; k++)
            finite &= halves_are_finite((const uint8_t *)row + layouts[i].at[k], info->block_bytes,
                                        n / info->block_values, HALF_EXPONENT);
        return finite;
    }
    SH_ASSERT(!"a readable type");
    return false;
}
