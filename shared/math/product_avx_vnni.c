/* Quantized products with AVX-VNNI. */
#include "shared/math/kernel_internal.h"

#if SH_X86
#include <immintrin.h>

#define YMM_TARGET   SH_TARGET_AVX_VNNI
#define YMM_SIGNED_8 false

YMM_TARGET SH_INLINE __m256i dot_ymm(sh_type type, const __m256i *w, int count, const int8_t *q,
                                     int32_t start)
{
    (void)type;
    __m256i sum = _mm256_set1_epi32(start);
#pragma GCC unroll 8
    for (int v = 0; v < count; v++) {
        int32_t four;
        memcpy(&four, q + 4 * v, sizeof four);
        sum = _mm256_dpbusd_avx_epi32(sum, w[v], _mm256_set1_epi32(four));
    }
    return sum;
}

#include "shared/math/product_ymm_internal.h"

void sh_panel_avx_vnni(const sh_panel *p)
{
#define PANEL(TYPE) panel_##TYPE(p)
    SH_EACH_BLOCK_TYPE(p->type, PANEL)
#undef PANEL
}

#endif
