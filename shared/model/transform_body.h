/*
 * Bodies of transform.h, included once a level by transform.c with two macros set:
 * LEVEL(name) names a function of the level, TARGET is its attribute. Vectors of 16 floats are
 * GCC's and Clang's generic ones; the compiler cuts them to what the level has.
 */

TARGET static inline v16 LEVEL(load)(const float *p)
{
    v16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

TARGET static inline void LEVEL(store)(float *p, v16 v)
{
    memcpy(p, &v, sizeof v);
}

/* The first n lanes from p, the rest `fill`. */
TARGET static inline v16 LEVEL(load_part)(const float *p, size_t n, float fill)
{
    v16 v;
    for (size_t i = 0; i < SH_LANES; i++)
        v[i] = i < n ? p[i] : fill;
    return v;
}

TARGET static inline v16 LEVEL(select)(v16i mask, v16 yes, v16 no)
{
    return (v16)((mask & (v16i)yes) | (~mask & (v16i)no));
}

TARGET static inline v16 LEVEL(splat)(float x)
{
    return x - (v16){0};
}

TARGET static inline float LEVEL(sum)(v16 v)
{
    float s[SH_LANES];
    memcpy(s, &v, sizeof s);
    for (size_t half = SH_LANES / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++)
            s[i] += s[i + half];
    return s[0];
}

TARGET static inline float LEVEL(largest)(v16 v)
{
    float m = v[0];
    for (size_t i = 1; i < SH_LANES; i++)
        m = v[i] > m ? v[i] : m;
    return m;
}

/* e^x: x = k ln 2 + r, |r| <= ln 2 / 2; e^r by a polynomial of degree 6 (coefficients of Moshier's
 * Cephes expf). A NaN stays one. */
TARGET static inline v16 LEVEL(exp)(v16 x)
{
    x = LEVEL(select)(x < -86.0f, LEVEL(splat)(-86.0f), x);
    x = LEVEL(select)(x > 86.0f, LEVEL(splat)(86.0f), x);
    const v16 shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to integer */
    const v16 k = shifted - 12582912.0f;
    const v16 r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    v16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const v16u power = ((v16u)shifted << 23) + (127u << 23);
    return p * (v16)power;
}

TARGET static void LEVEL(rms_norm)(const float *x, const float *weight, float eps, uint32_t n,
                                   float *out)
{
    v16 squares = {0};
    uint32_t i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES) {
        const v16 v = LEVEL(load)(x + i);
        squares += v * v;
    }
    if (i < n) {
        const v16 v = LEVEL(load_part)(x + i, n - i, 0);
        squares += v * v;
    }
    const float scale = 1.0f / sqrtf(LEVEL(sum)(squares) / (float)n + eps);
    for (i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

TARGET static void LEVEL(rotate)(float *x, const float *angles, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        const float c = angles[2 * i], s = angles[2 * i + 1];
        x[2 * i] = a * c - b * s;
        x[2 * i + 1] = a * s + b * c;
    }
}

/* scores[n_keys] = q·K * scale, in whole blocks of lanes. */
TARGET static void LEVEL(score)(const sh_head_cache *cache, const float *q, uint32_t n_keys,
                                float *scores)
{
    const uint32_t head_size = cache->head_size;
    const size_t end = SH_LANES_UP(n_keys), stride = cache->stride;
    const float scale = 1.0f / sqrtf((float)head_size);
    size_t s = 0;
    for (; s + 4 * SH_LANES <= end; s += 4 * SH_LANES) {
        v16 a = {0}, b = {0}, c = {0}, d = {0};
        const float *k = cache->k + s;
        for (uint32_t i = 0; i < head_size; i++, k += stride) {
            a += q[i] * LEVEL(load)(k);
            b += q[i] * LEVEL(load)(k + SH_LANES);
            c += q[i] * LEVEL(load)(k + 2 * SH_LANES);
            d += q[i] * LEVEL(load)(k + 3 * SH_LANES);
        }
        LEVEL(store)(scores + s, a * scale);
        LEVEL(store)(scores + s + SH_LANES, b * scale);
        LEVEL(store)(scores + s + 2 * SH_LANES, c * scale);
        LEVEL(store)(scores + s + 3 * SH_LANES, d * scale);
    }
    for (; s < end; s += SH_LANES) {
        v16 a = {0};
        const float *k = cache->k + s;
        for (uint32_t i = 0; i < head_size; i++, k += stride)
            a += q[i] * LEVEL(load)(k);
        LEVEL(store)(scores + s, a * scale);
    }
}

/* Scores become weights e^(score - largest); returns their sum. */
TARGET static float LEVEL(weigh)(uint32_t n_keys, float *scores)
{
    const size_t end = SH_LANES_UP(n_keys);
    for (size_t s = n_keys; s < end; s++)
        scores[s] = -INFINITY;
    v16 top = LEVEL(load)(scores);
    for (size_t s = SH_LANES; s < end; s += SH_LANES) {
        const v16 v = LEVEL(load)(scores + s);
        top = LEVEL(select)(v > top, v, top);
    }
    const float largest = LEVEL(largest)(top);
    v16 sums = {0};
    for (size_t s = 0; s < end; s += SH_LANES) {
        v16 w = LEVEL(exp)(LEVEL(load)(scores + s) - largest);
        if (s + SH_LANES > n_keys)
            for (size_t i = n_keys - s; i < SH_LANES; i++)
                w[i] = 0;
        sums += w;
        LEVEL(store)(scores + s, w);
    }
    return LEVEL(sum)(sums);
}

TARGET static void LEVEL(attend)(const sh_head_cache *cache, const float *q, uint32_t n_keys,
                                 float *scores, float *out)
{
    LEVEL(score)(cache, q, n_keys, scores);
    const float share = 1.0f / LEVEL(weigh)(n_keys, scores);
    const uint32_t padded = cache->head_padded;
    uint32_t d = 0;
    for (; d + 4 * SH_LANES <= padded; d += 4 * SH_LANES) {
        v16 a = {0}, b = {0}, c = {0}, e = {0};
        const float *v = cache->v + d;
        for (uint32_t s = 0; s < n_keys; s++, v += padded) {
            a += scores[s] * LEVEL(load)(v);
            b += scores[s] * LEVEL(load)(v + SH_LANES);
            c += scores[s] * LEVEL(load)(v + 2 * SH_LANES);
            e += scores[s] * LEVEL(load)(v + 3 * SH_LANES);
        }
        const v16 block[4] = {a * share, b * share, c * share, e * share};
        memcpy(out + d, block, SH_MIN(sizeof block, (cache->head_size - d) * sizeof *out));
    }
    for (; d < padded; d += SH_LANES) {
        v16 a = {0};
        const float *v = cache->v + d;
        for (uint32_t s = 0; s < n_keys; s++, v += padded)
            a += scores[s] * LEVEL(load)(v);
        a *= share;
        memcpy(out + d, &a, SH_MIN(sizeof a, (cache->head_size - d) * sizeof *out));
    }
}

TARGET static void LEVEL(swiglu)(float *gate, const float *up, size_t n)
{
    size_t i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES) {
        const v16 g = LEVEL(load)(gate + i);
        LEVEL(store)(gate + i, g / (1.0f + LEVEL(exp)(-g)) * LEVEL(load)(up + i));
    }
    if (i < n) {
        const v16 g = LEVEL(load_part)(gate + i, n - i, 0);
        const v16 y = g / (1.0f + LEVEL(exp)(-g)) * LEVEL(load_part)(up + i, n - i, 0);
        memcpy(gate + i, &y, (n - i) * sizeof *gate);
    }
}

TARGET static void LEVEL(add_rows)(float *y, const float *t, const float *rows, uint32_t rank,
                                   uint32_t out)
{
    uint32_t o = 0;
    for (; o + 4 * SH_LANES <= out; o += 4 * SH_LANES) {
        v16 a = {0}, b = {0}, c = {0}, d = {0};
        const float *row = rows + o;
        for (uint32_t r = 0; r < rank; r++, row += out) {
            a += t[r] * LEVEL(load)(row);
            b += t[r] * LEVEL(load)(row + SH_LANES);
            c += t[r] * LEVEL(load)(row + 2 * SH_LANES);
            d += t[r] * LEVEL(load)(row + 3 * SH_LANES);
        }
        LEVEL(store)(y + o, LEVEL(load)(y + o) + a);
        LEVEL(store)(y + o + SH_LANES, LEVEL(load)(y + o + SH_LANES) + b);
        LEVEL(store)(y + o + 2 * SH_LANES, LEVEL(load)(y + o + 2 * SH_LANES) + c);
        LEVEL(store)(y + o + 3 * SH_LANES, LEVEL(load)(y + o + 3 * SH_LANES) + d);
    }
    for (; o < out; o++) {
        float sum = 0;
        for (uint32_t r = 0; r < rank; r++)
            sum += t[r] * rows[(size_t)r * out + o];
        y[o] += sum;
    }
}

TARGET static double LEVEL(log_sum_exp)(const float *x, uint32_t n)
{
    v16 top = LEVEL(splat)(x[0]);
    uint32_t i = 0;
    for (; i + SH_LANES <= n; i += SH_LANES) {
        const v16 v = LEVEL(load)(x + i);
        top = LEVEL(select)(v > top, v, top);
    }
    float largest = LEVEL(largest)(top);
    for (uint32_t j = i; j < n; j++)
        largest = x[j] > largest ? x[j] : largest;
    v16d sums = {0};
    for (i = 0; i + SH_LANES <= n; i += SH_LANES)
        sums += __builtin_convertvector(LEVEL(exp)(LEVEL(load)(x + i) - largest), v16d);
    if (i < n) {
        v16 w = LEVEL(exp)(LEVEL(load_part)(x + i, n - i, largest) - largest);
        for (size_t j = n - i; j < SH_LANES; j++)
            w[j] = 0;
        sums += __builtin_convertvector(w, v16d);
    }
    double sum = 0;
    for (size_t j = 0; j < SH_LANES; j++)
        sum += sums[j];
    return (double)largest + log(sum);
}

static const sh_transform LEVEL(table) = {
    .rms_norm = LEVEL(rms_norm),
    .rotate = LEVEL(rotate),
    .attend = LEVEL(attend),
    .swiglu = LEVEL(swiglu),
    .add_rows = LEVEL(add_rows),
    .log_sum_exp = LEVEL(log_sum_exp),
};
