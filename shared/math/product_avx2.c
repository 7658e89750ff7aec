/*
 * Quantized products with AVX2: vpmaddubsw adds two products in 16 bits, and saturates. Codes of 4
 * bits times 127 leave room for eight such sums, of 5 bits for four, of 6 for two. Those of Q8_0
 * (-128 .. 127) are taken as |w| * (x with w's sign): 2 * 128 * 127 < 2^15.
 */
#include "shared/math/kernel_internal.h"

#if SH_X86
#include <immintrin.h>

#define YMM_TARGET   SH_TARGET_AVX2
#define YMM_SIGNED_8 true

YMM_TARGET SH_INLINE __m256i dot_ymm(sh_type type, const __m256i *w, int count, const int8_t *q,
                                     int32_t start)
{
    const int bits = sh_code_bits(type);
    const int chain = bits == 4 ? 8 : (bits == 5 ? 4 : (bits == 6 ? 2 : 1));
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_set1_epi32(start), pairs = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int v = 0; v < count; v++) {
        int32_t four;
        memcpy(&four, q + 4 * v, sizeof four);
        __m256i x = _mm256_set1_epi32(four);
        __m256i two = bits == 8
                          ? _mm256_maddubs_epi16(_mm256_abs_epi8(w[v]), _mm256_sign_epi8(x, w[v]))
                          : _mm256_maddubs_epi16(w[v], x);
        pairs = v % chain == 0 ? two : _mm256_add_epi16(pairs, two);
        if ((v + 1) % chain == 0 || v + 1 == count)
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return sum;
}

#include "shared/math/product_ymm_internal.h"

void sh_panel_avx2(const sh_panel *p){
#define PANEL(TYPE) panel_##TYPE(p)
    SH_EACH_BLOCK_TYPE(p->type, PANEL)
#undef PANEL
}

SH_TARGET_AVX2 void sh_x_quantize_avx2(const float *x, size_t n_blocks, sh_x_block *blocks)
{
    for (size_t b = 0; b < n_blocks; b++)
        sh_x_quantize_body(x + b * SH_X_VALUES, &blocks[b]);
}

#endif
