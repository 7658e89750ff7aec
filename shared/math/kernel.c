/*
 * Dispatch, and the portable kernels on floats.
 */
#include "shared/math/kernel.h"

#include "shared/math/kernel_internal.h"
#include "shared/math/quant_internal.h"

/* ---- portable ---- */

SH_INLINE void floats_portable(const sh_float_product *p, sh_type type)
{
    size_t row_bytes = sh_type_row_bytes(type, p->in);
    for (size_t o = 0; o < p->out; o++) {
        const void *w = (const uint8_t *)p->w + o * row_bytes;
        for (size_t r = 0; r < p->n; r++) {
            const float *x = p->x + r * p->ldx;
            float lanes[SH_LANES] = {0}, *y = p->y + r * p->ldy + o;
            size_t i = 0;
            for (; i + SH_LANES <= p->in; i += SH_LANES)
                for (size_t l = 0; l < SH_LANES; l++)
                    lanes[l] = SH_MULTIPLY_ADD(sh_weight_at(type, w, i + l), x[i + l], lanes[l]);
            for (size_t l = 0; i + l < p->in; l++)
                lanes[l] = SH_MULTIPLY_ADD(sh_weight_at(type, w, i + l), x[i + l], lanes[l]);
            *y = p->add ? *y + sh_lanes_fold(lanes) : sh_lanes_fold(lanes);
        }
    }
}

static void portable_floats(const sh_float_product *p)
{
    SH_EACH_FLOAT_TYPE(p, floats_portable)
}

static void portable_axpy(float *y, float s, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = SH_MULTIPLY_ADD(s, x[i], y[i]);
}

const sh_kernels sh_kernels_portable = {
    .x_quantize = sh_x_quantize_portable,
    .panel = sh_panel_portable,
    .pack_group = sh_pack_group_portable,
    .floats = portable_floats,
    .axpy = portable_axpy,
};

/* ---- dispatch ---- */

const sh_kernels *sh_kernels_of(sh_level level)
{
#if SH_X86
    if (level == SH_LEVEL_AVX512_VNNI)
        return &sh_kernels_avx512;
    if (level == SH_LEVEL_AVX_VNNI)
        return &sh_kernels_avx_vnni;
    if (level == SH_LEVEL_AVX2)
        return &sh_kernels_avx2;
#endif
#ifdef SH_TARGET_NEON
    if (level == SH_LEVEL_NEON_DOTPROD)
        return &sh_kernels_neon;
#endif
    SH_ASSERT(level == SH_LEVEL_PORTABLE);
    return &sh_kernels_portable;
}

const char *sh_kernel_level(void)
{
    return sh_level_name(sh_level_get());
}

/* The names of the levels that are available, "portable, avx2". */
static void list_levels(char *text, size_t size)
{
    size_t used = 0;
    text[0] = '\0';
    for (unsigned i = 0; i < SH_LEVELS; i++) {
        const char *name = sh_level_name((sh_level)i);
        size_t length = strlen(name);
        if (!sh_level_available((sh_level)i) || used + length + 3 > size)
            continue;
        if (used > 0) {
            memcpy(text + used, ", ", 3);
            used += 2;
        }
        memcpy(text + used, name, length + 1);
        used += length;
    }
}

sh_status sh_kernel_force(const char *name, sh_error *err)
{
    if (name == NULL)
        return SH_OK;
    for (unsigned i = 0; i < SH_LEVELS; i++) {
        sh_level level = (sh_level)i;
        if (strcmp(name, sh_level_name(level)) != 0 || !sh_level_available(level))
            continue;
        if (sh_level_force(level))
            return SH_OK;
        return sh_fail(err, SH_ERR_INVALID, "kernel level %s: %s is in use already", name,
                       sh_kernel_level());
    }
    char levels[128];
    list_levels(levels, sizeof levels);
    return sh_fail(err, SH_ERR_USAGE, "kernel level '%.32s' is not known here; this machine has %s",
                   name, levels);
}

float sh_dot(const float *a, const float *b, size_t n)
{
    float y;
    sh_float_product p = {.type = SH_TYPE_F32,
                          .w = a,
                          .in = n,
                          .out = 1,
                          .x = b,
                          .ldx = n,
                          .n = 1,
                          .y = &y,
                          .ldy = 1};
    sh_kernels_of(sh_level_get())->floats(&p);
    return y;
}

void sh_axpy(float *y, float s, const float *x, size_t n)
{
    sh_kernels_of(sh_level_get())->axpy(y, s, x, n);
}
