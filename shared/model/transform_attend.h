/*
 * Attention of transform.h: the last part of transform_body.h, see there for the macros.
 *
 * For each block of positions and each group of queries: scores = q·K (lanes are positions),
 * weights = e^(score - largest so far), acc = acc * factor + weights·V (lanes are values). Keys and
 * values are read once for a group; the block stays in the first-level cache for the groups of a
 * chunk. A chunk with many queries turns a block of halves to floats first.
 *
 * What keeps a query's bits apart from its neighbours': its sums are added position by position
 * whatever the group, positions that it does not see are never multiplied, and a step that another
 * query needs is a multiplication by 1 or an addition of 0 for this one.
 */

/* Some tiles of one head's cache, at most SH_ATTEND_TILES. */
typedef struct {
    const uint8_t *tiles;
    size_t tile_bytes;
    uint32_t head_size, head_padded, n_tiles;
    const uint8_t *ahead; /* FETCH_BYTES for each value of a head, to be fetched; NULL: nothing */
} kv_block;

#define FETCH_BYTES ((size_t)256) /* about what arrives while a step of the scores is computed */

/* Queries that are computed together. acc, sums, top are the first one's, the others' follow. */
typedef struct {
    const float *q[SH_ATTEND_GROUP];
    float *acc;                  /* [queries, head_padded] */
    float *sums;                 /* [queries, SH_LANES] of weights */
    float *top;                  /* [queries] largest q·K so far */
    float *weights;              /* [queries, SH_ATTEND_POSITIONS], scores before */
    uint32_t n[SH_ATTEND_GROUP]; /* positions of the block that the query sees */
    uint32_t n_min, n_max;       /* of n */
    float factor[SH_LANES];      /* for sums and acc, as the maximum grew */
} query_group;

typedef struct {
    float *tiles;   /* a block as floats */
    float *weights; /* [SH_ATTEND_GROUP, SH_ATTEND_POSITIONS] */
    float *acc;     /* [SH_ATTEND_CHUNK, head_padded] */
    float *sums;    /* [SH_ATTEND_CHUNK, SH_LANES] */
    float *top;     /* [SH_ATTEND_CHUNK] */
} attend_scratch;

static attend_scratch scratch_of(const sh_attend *a)
{
    const size_t padded = a->cache->head_padded;
    attend_scratch s = {.tiles = a->scratch};
    s.weights =
        s.tiles + SH_ATTEND_TILES * sh_kv_tile_bytes(a->cache->head_size, false) / sizeof(float);
    s.acc = s.weights + (size_t)SH_ATTEND_GROUP * SH_ATTEND_POSITIONS;
    s.sums = s.acc + SH_ATTEND_CHUNK * padded;
    s.top = s.sums + (size_t)SH_ATTEND_CHUNK * SH_LANES;
    return s;
}

/* ---- scores ---- */

/* Scores of `queries` queries with `tiles` tiles from tile t on. */
OP void score_step(const kv_block *b, const query_group *g, uint32_t t, const int queries,
                   const int tiles, const bool halves)
{
    v16 sums[SH_ATTEND_GROUP][SH_ATTEND_TILES];
    const uint8_t *keys = b->tiles + t * b->tile_bytes;
    SH_UNROLL
    for (int i = 0; i < queries; i++)
        SH_UNROLL
    for (int k = 0; k < tiles; k++)
        sums[i][k] = lanes_zero();
    for (uint32_t d = 0; d < b->head_size; d++) {
        v16 key[SH_ATTEND_TILES];
        SH_UNROLL
        for (int k = 0; k < tiles; k++)
            key[k] = load_at(keys + (size_t)k * b->tile_bytes, (size_t)d * SH_LANES, halves);
        if (b->ahead != NULL) {
            const uint8_t *at = b->ahead + d * FETCH_BYTES;
            SH_UNROLL
            for (size_t i = 0; i < FETCH_BYTES; i += 64)
                __builtin_prefetch(at + i, 0, 2);
        }
        SH_UNROLL
        for (int i = 0; i < queries; i++) {
            const v16 value = lanes_splat(g->q[i][d]);
            SH_UNROLL
            for (int k = 0; k < tiles; k++)
                sums[i][k] = lanes_fma(value, key[k], sums[i][k]);
        }
    }
    SH_UNROLL
    for (int i = 0; i < queries; i++)
        SH_UNROLL
    for (int k = 0; k < tiles; k++)
        lanes_store(g->weights + (size_t)i * SH_ATTEND_POSITIONS + (t + (size_t)k) * SH_LANES,
                    sums[i][k]);
}

OP void score(const kv_block *b, const query_group *g, const int queries, const bool halves)
{
    const int step = SCORE_STEP(queries);
    uint32_t t = 0;
    for (; t + (uint32_t)step <= b->n_tiles; t += (uint32_t)step)
        score_step(b, g, t, queries, step, halves);
    if (step > 3 && b->n_tiles - t == 3)
        score_step(b, g, t, queries, 3, halves);
    else if (step > 2 && b->n_tiles - t == 2)
        score_step(b, g, t, queries, 2, halves);
    else if (step > 1 && b->n_tiles - t == 1)
        score_step(b, g, t, queries, 1, halves);
}

/* ---- weights ---- */

/* The largest of top and the n scores that the query sees; the others are overwritten. */
OP float move_top(float *scores, uint32_t n_tiles, uint32_t n, float before)
{
    v16 top = lanes_splat(before);
    if (n == SH_ATTEND_POSITIONS) {
        const v16 a = lanes_max(lanes_load(scores), top);
        const v16 b = lanes_max(lanes_load(scores + SH_LANES), top);
        const v16 c = lanes_max(lanes_load(scores + 2 * SH_LANES), a);
        return lanes_largest(lanes_max(lanes_max(lanes_load(scores + 3 * SH_LANES), b), c));
    }
    for (uint32_t at = 0; at < n_tiles * SH_LANES; at += SH_LANES) {
        const uint32_t seen = n > at ? SH_MIN(n - at, SH_LANES) : 0;
        const v16 s = lanes_first(lanes_load(scores + at), seen, lanes_splat(-FLT_MAX));
        lanes_store(scores + at, s);
        top = lanes_max(s, top);
    }
    return lanes_largest(top);
}

/* Scores become weights; their sums, tile by tile (0 of a tile that the query does not see). */
OP v16 weigh_query(float *w, uint32_t n_tiles, uint32_t n, float top, v16 scale)
{
    const v16 shift = lanes_splat(top);
    v16 e[SH_ATTEND_TILES];
    if (n == SH_ATTEND_POSITIONS) {
        SH_UNROLL
        for (uint32_t t = 0; t < SH_ATTEND_TILES; t++)
            e[t] = lanes_exp(lanes_mul(lanes_sub(lanes_load(w + t * SH_LANES), shift), scale));
        SH_UNROLL
        for (uint32_t t = 0; t < SH_ATTEND_TILES; t++)
            lanes_store(w + t * SH_LANES, e[t]);
        return lanes_add(lanes_add(e[0], e[1]), lanes_add(e[2], e[3]));
    }
    SH_UNROLL
    for (uint32_t t = 0; t < SH_ATTEND_TILES; t++) {
        const uint32_t at = t * SH_LANES, seen = n > at ? SH_MIN(n - at, SH_LANES) : 0;
        e[t] = lanes_zero();
        if (t >= n_tiles)
            continue;
        const v16 x = lanes_exp(lanes_mul(lanes_sub(lanes_load(w + at), shift), scale));
        e[t] = lanes_first(x, seen, e[t]);
        lanes_store(w + at, e[t]);
    }
    return lanes_add(lanes_add(e[0], e[1]), lanes_add(e[2], e[3]));
}

/* Weights of all queries; the running maxima and sums move on, factor tells how far. */
OP void weigh(const kv_block *b, query_group *g, const int queries)
{
    const v16 scale = lanes_splat(1.0f / sqrtf((float)b->head_size));
    v16 delta = lanes_zero();
    SH_UNROLL
    for (int i = 0; i < queries; i++) {
        const float before = g->top[i];
        g->top[i] =
            move_top(g->weights + (size_t)i * SH_ATTEND_POSITIONS, b->n_tiles, g->n[i], before);
        delta = lanes_first(delta, (size_t)i, lanes_splat(before - g->top[i])); /* 0 or less */
    }
    lanes_store(g->factor, lanes_exp(lanes_mul(delta, scale)));
    for (int i = 0; i < queries; i++) {
        float *sums = g->sums + (size_t)i * SH_LANES;
        const v16 more = weigh_query(g->weights + (size_t)i * SH_ATTEND_POSITIONS, b->n_tiles,
                                     g->n[i], g->top[i], scale);
        lanes_store(sums, lanes_add(lanes_mul(lanes_load(sums), lanes_splat(g->factor[i])), more));
    }
}

/* ---- weights·V ---- */

/* `vectors` vectors of values from value d on. */
OP void mix_step(const kv_block *b, const query_group *g, uint32_t d, const int queries,
                 const int vectors, const bool halves)
{
    v16 acc[SH_ATTEND_GROUP][4];
    float *first = g->acc + d;
    SH_UNROLL
    for (int i = 0; i < queries; i++)
        SH_UNROLL
    for (int k = 0; k < vectors; k++)
        acc[i][k] = lanes_mul(lanes_load(first + (size_t)i * b->head_padded + (size_t)k * SH_LANES),
                              lanes_splat(g->factor[i]));
    const size_t first_value = (size_t)b->head_size * SH_KV_TILE + d;
    const uint8_t *tile = b->tiles;
    for (uint32_t at = 0; at < g->n_max; at += SH_KV_TILE, tile += b->tile_bytes) {
        const uint32_t n = SH_MIN(g->n_max - at, SH_KV_TILE);
        const uint32_t n_all = g->n_min > at ? SH_MIN(g->n_min - at, SH_KV_TILE) : 0;
        const float *w = g->weights + at;
        size_t place = first_value;
        uint32_t p = 0;
        for (; p < n_all; p++, place += b->head_padded) {
            v16 value[4];
            SH_UNROLL
            for (int k = 0; k < vectors; k++)
                value[k] = load_at(tile, place + (size_t)k * SH_LANES, halves);
            SH_UNROLL
            for (int i = 0; i < queries; i++) {
                const v16 weight = lanes_splat(w[(size_t)i * SH_ATTEND_POSITIONS + p]);
                SH_UNROLL
                for (int k = 0; k < vectors; k++)
                    acc[i][k] = lanes_fma(weight, value[k], acc[i][k]);
            }
        }
        for (; p < n; p++, place += b->head_padded) { /* some queries end before this position */
            SH_UNROLL
            for (int i = 0; i < queries; i++) {
                if (at + p >= g->n[i])
                    continue;
                const v16 weight = lanes_splat(w[(size_t)i * SH_ATTEND_POSITIONS + p]);
                SH_UNROLL
                for (int k = 0; k < vectors; k++)
                    acc[i][k] = lanes_fma(
                        weight, load_at(tile, place + (size_t)k * SH_LANES, halves), acc[i][k]);
            }
        }
    }
    SH_UNROLL
    for (int i = 0; i < queries; i++)
        SH_UNROLL
    for (int k = 0; k < vectors; k++)
        lanes_store(first + (size_t)i * b->head_padded + (size_t)k * SH_LANES, acc[i][k]);
}

OP void mix(const kv_block *b, const query_group *g, const int queries, const bool halves)
{
    const int step = MIX_STEP(queries);
    uint32_t d = 0;
    for (; d + (uint32_t)step * SH_LANES <= b->head_padded; d += (uint32_t)step * SH_LANES)
        mix_step(b, g, d, queries, step, halves);
    const uint32_t rest = (b->head_padded - d) / SH_LANES;
    if (step > 3 && rest == 3)
        mix_step(b, g, d, queries, 3, halves);
    else if (step > 2 && rest == 2)
        mix_step(b, g, d, queries, 2, halves);
    else if (step > 1 && rest == 1)
        mix_step(b, g, d, queries, 1, halves);
}

/* ---- groups, chunks ---- */

#define ATTEND_GROUP(queries, halves, name)                                                        \
    TARGET static void name(const kv_block *b, query_group *g)                                     \
    {                                                                                              \
        score(b, g, queries, halves);                                                              \
        weigh(b, g, queries);                                                                      \
        mix(b, g, queries, halves);                                                                \
    }
ATTEND_GROUP(1, false, attend_1)
ATTEND_GROUP(2, false, attend_2)
ATTEND_GROUP(3, false, attend_3)
ATTEND_GROUP(4, false, attend_4)
ATTEND_GROUP(6, false, attend_6)
ATTEND_GROUP(1, true, attend_1_halves)
ATTEND_GROUP(2, true, attend_2_halves)
ATTEND_GROUP(3, true, attend_3_halves)
ATTEND_GROUP(4, true, attend_4_halves)
#undef ATTEND_GROUP

/* From here on halves are turned to floats first: they are then read more than twice. */
#define ATTEND_CONVERT_MIN 9

static uint32_t group_size(uint32_t n_left, bool halves)
{
    if (n_left >= SH_ATTEND_GROUP && !halves)
        return SH_ATTEND_GROUP;
    return n_left == 5 ? 3 : SH_MIN(n_left, 4);
}

static void attend_group(const kv_block *b, query_group *g, uint32_t n, bool halves)
{
    static void (*const by_size[2][SH_ATTEND_GROUP + 1])(const kv_block *, query_group *) = {
        {NULL, attend_1, attend_2, attend_3, attend_4, NULL, attend_6},
        {NULL, attend_1_halves, attend_2_halves, attend_3_halves, attend_4_halves, NULL, NULL},
    };
    by_size[halves][n](b, g);
}

TARGET static void convert_tiles(const kv_block *halves, float *out)
{
    const size_t n = halves->tile_bytes / sizeof(uint16_t);
    for (uint32_t t = 0; t < halves->n_tiles; t++) {
        const uint16_t *tile = (const uint16_t *)(halves->tiles + t * halves->tile_bytes);
        for (size_t i = 0; i < n; i += SH_LANES)
            lanes_store(out + t * n + i, lanes_load_halves(tile + i));
    }
}

/* Some queries of a call, side by side: of row `row`, head `head` and so on. */
typedef struct {
    uint32_t row, head, n;
} query_range;

/* One block of positions from `start` on for all queries of a chunk. */
static void attend_block(const sh_attend *a, const attend_scratch *s, kv_block *b, uint32_t start,
                         query_range chunk, bool halves)
{
    const uint32_t head_size = b->head_size;
    query_group g = {.weights = s->weights};
    for (uint32_t i = 0, n; i < chunk.n; i += n) {
        n = group_size(chunk.n - i, halves);
        g.acc = s->acc + (size_t)i * b->head_padded;
        g.sums = s->sums + (size_t)i * SH_LANES;
        g.top = s->top + i;
        for (uint32_t k = 0; k < n; k++) {
            const uint32_t keys = a->first + chunk.row + 1;
            g.q[k] = a->q + chunk.row * a->ldq + (size_t)chunk.head * head_size;
            g.n[k] = keys > start ? SH_MIN(keys - start, SH_ATTEND_POSITIONS) : 0;
            if (++chunk.head == a->heads) {
                chunk.head = 0;
                chunk.row++;
            }
        }
        g.n_min = g.n[0]; /* rows ascend */
        g.n_max = g.n[n - 1];
        b->n_tiles = (g.n_max + SH_KV_TILE - 1) / SH_KV_TILE;
        if (g.n_max > 0)
            attend_group(b, &g, n, halves);
    }
}

/* out = acc / sum of all queries of a chunk. */
TARGET static void attend_finish(const sh_attend *a, const attend_scratch *s, query_range chunk)
{
    const uint32_t head_size = a->cache->head_size;
    for (uint32_t i = 0; i < chunk.n; i++) {
        const float *acc = s->acc + (size_t)i * a->cache->head_padded;
        float *out = a->out + chunk.row * a->ldout + (size_t)chunk.head * head_size;
        const float sum = lanes_sum(lanes_load(s->sums + (size_t)i * SH_LANES));
        const v16 share = lanes_splat(1.0f / sum);
        uint32_t d = 0;
        for (; d + SH_LANES <= head_size; d += SH_LANES)
            lanes_store(out + d, lanes_mul(lanes_load(acc + d), share));
        if (d < head_size)
            lanes_store_part(out + d, lanes_mul(lanes_load(acc + d), share), head_size - d);
        if (++chunk.head == a->heads) {
            chunk.head = 0;
            chunk.row++;
        }
    }
}

static void attend(const sh_attend *a)
{
    const sh_head_cache *c = a->cache;
    const attend_scratch s = scratch_of(a);
    const uint32_t n = a->rows * a->heads;
    size_t fetched = 0;
    for (uint32_t begin = 0; begin < n; begin += SH_ATTEND_CHUNK) {
        const query_range chunk = {.row = begin / a->heads,
                                   .head = begin % a->heads,
                                   .n = SH_MIN(n - begin, SH_ATTEND_CHUNK)};
        const uint32_t n_keys = a->first + (begin + chunk.n - 1) / a->heads + 1;
        const bool convert = c->halves && chunk.n >= ATTEND_CONVERT_MIN;
        memset(s.acc, 0, (size_t)chunk.n * c->head_padded * sizeof *s.acc);
        memset(s.sums, 0, (size_t)chunk.n * SH_LANES * sizeof *s.sums);
        for (uint32_t i = 0; i < chunk.n; i++)
            s.top[i] = -FLT_MAX;
        for (uint32_t start = 0; start < n_keys; start += SH_ATTEND_POSITIONS) {
            const size_t tile = start / SH_KV_TILE;
            const uint32_t left = (n_keys - start + SH_KV_TILE - 1) / SH_KV_TILE;
            kv_block block = {.tiles = (const uint8_t *)c->tiles + tile * c->tile_bytes,
                              .tile_bytes = c->tile_bytes,
                              .head_size = c->head_size,
                              .head_padded = c->head_padded,
                              .n_tiles = SH_MIN(left, SH_ATTEND_TILES)};
            if (a->next_bytes - fetched >= c->head_size * FETCH_BYTES) {
                block.ahead = a->next + fetched;
                fetched += c->head_size * FETCH_BYTES;
            }
            if (convert) {
                convert_tiles(&block, s.tiles);
                block.tiles = (const uint8_t *)s.tiles;
                block.tile_bytes = sh_kv_tile_bytes(c->head_size, false);
            }
            attend_block(a, &s, &block, start, chunk, c->halves && !convert);
        }
        attend_finish(a, &s, chunk);
    }
}

/* ---- store ---- */

TARGET static void store(const sh_head_cache *cache, uint32_t position, const float *k,
                         const float *v)
{
    const uint32_t size = cache->head_size, padded = cache->head_padded;
    const size_t lane = position % SH_KV_TILE;
    uint8_t *tile = (uint8_t *)cache->tiles + (size_t)(position / SH_KV_TILE) * cache->tile_bytes;
    const size_t value = (size_t)size * SH_KV_TILE + lane * padded;
    for (uint32_t d = 0; d < padded; d += SH_LANES) {
        const uint32_t n = SH_MIN(SH_LANES, size - d);
        const v16 part = lanes_load_part(v + d, n);
        if (!cache->halves) {
            float *keys = (float *)tile;
            lanes_store(keys + value + d, part);
            for (uint32_t i = d; i < d + n; i++)
                keys[i * SH_KV_TILE + lane] = k[i];
            continue;
        }
        uint16_t *keys = (uint16_t *)tile, halves[SH_LANES];
        lanes_store_halves(keys + value + d, part);
        lanes_store_halves(halves, lanes_load_part(k + d, n));
        for (uint32_t i = 0; i < n; i++)
            keys[(d + i) * SH_KV_TILE + lane] = halves[i];
    }
}
