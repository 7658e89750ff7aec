/*
 * One pass over the model: what every member of the team does. Rows are B, C width, H heads of size
 * S, G key-value heads, F ffn. All activations are float.
 *
 *   x (B,C)    residual stream           q, att (B,H*S), k and v (B,G*S)
 *   norm (B,C) input of the products     gate (B,F)
 *
 * A layer is eight phases with a barrier after each: norm; q, k and v; rotation and cache;
 * attention; output; norm, then gate and up; down. What prepares the input of products (norm,
 * rounding to int8, the adapters' A) every member does for itself when the rows are few, which
 * takes less than to wait for another one.
 *
 * Products are taken by groups of rows of W. A value is made by one member alone in the order that
 * product.h and transform.h promise, so it does not matter who takes what.
 */
#include <string.h>

#include "shared/math/pack.h"
#include "shared/model/context_internal.h"

/* Pieces of a loop for each member: so that one that lost its processor holds up little. */
#define GROUPS_TOGETHER 8
#define PIECES          2
#define CHUNK_MAX       64          /* groups */
#define GATE_CHUNK_MAX  128         /* of gate, and as many of up: both outputs stay in a cache */
#define FETCH_MAX       (96u << 10) /* bytes: a part of a small second-level cache */

typedef struct {
    const sh_pass *pass;
    sh_runner *r;
    const sh_model_config *c;
    const sh_transform *ops;
    const sh_member *me;
    sh_member_scratch *own;
    bool few;
} worker;

/* What products read: rows of x, their blocks, and the adapters' t. */
typedef struct {
    const float *x;
    size_t ldx, ldblocks;
    sh_x_block *blocks;
    float *t;
    size_t ldt;
} input;

/* Where an input comes from. */
typedef struct {
    const float *x; /* [n, in] */
    uint32_t in;
    const float *norm; /* weights of the norm that goes before; NULL: none */
    uint32_t layer;    /* of the adapters' A; n_layers: the output matrix's */
    uint32_t which;    /* SH_INPUT_... */
    bool blocks;       /* a matrix takes them */
} source;

/* ---- inputs of products ---- */

static const sh_lora *row_lora(const worker *w, uint32_t row)
{
    return w->r->segments[w->r->row_segment[row]].context->lora;
}

/* The adapters' A that a row of an input goes through; NULL: none. */
static const sh_lora_input *row_a(const worker *w, const source *s, uint32_t row)
{
    const sh_lora *lora = row_lora(w, row);
    if (lora == NULL)
        return NULL;
    const sh_lora_input *l = &lora->inputs[(size_t)s->layer * SH_LAYER_INPUTS + s->which];
    return l->a.rank != 0 ? l : NULL;
}

/* t of rows begin .. end - 1. Every member reads all of A for itself when the rows are few: it is
 * a fiftieth of what is multiplied with, and a cache that is shared has it. */
static void make_t(const worker *w, const source *s, uint32_t begin, uint32_t end, const input *to)
{
    for (uint32_t row = begin, next; row < end; row = next) {
        const sh_lora_input *l = row_a(w, s, row);
        next = row + 1;
        if (l == NULL)
            continue;
        float *t = to->t + row * to->ldt;
        if (l->a.form == SH_FACTOR_INT8) {
            while (next < end && row_a(w, s, next) == l)
                next++;
            const sh_weights a = {
                .type = SH_TYPE_Q8_0, .out = l->a.rank, .in = l->a.in, .packed = l->a.a};
            const sh_product product = {.w = &a,
                                        .blocks = to->blocks + row * to->ldblocks,
                                        .n = next - row,
                                        .y = t,
                                        .ldy = to->ldt};
            sh_product_run(&product, 0, a.out, w->own->product);
        } else {
            w->ops->lora_down(&l->a, to->x + row * to->ldx, 0, l->a.rank, t);
        }
        for (uint32_t k = row; l->scales != NULL && k < next; k++)
            for (uint32_t i = 0; i < l->a.rank; i++)
                to->t[k * to->ldt + i] *= l->scales[i];
    }
}

/* Rows begin .. end - 1; to[0] is where row 0 goes. */
static void make_rows(const worker *w, const source *s, uint32_t begin, uint32_t end, float *norm,
                      const input *to)
{
    const size_t in = s->in;
    for (uint32_t row = begin; s->norm != NULL && row < end; row++)
        w->ops->rms_norm(s->x + row * in, s->norm, w->c->norm_eps, s->in, norm + row * in);
    if (s->blocks && begin < end)
        sh_x_quantize(to->x + begin * in, in, end - begin, in, to->blocks + begin * to->ldblocks);
    make_t(w, s, begin, end, to);
}

/* The input of n rows: its own for each member, without a barrier, or shared. */
static input make_input(const worker *w, const source *s, uint32_t n)
{
    sh_runner *r = w->r;
    float *norm = w->few ? w->own->norm : r->norm;
    const input to = {.x = s->norm != NULL ? norm : s->x,
                      .ldx = s->in,
                      .ldblocks = sh_x_stride(s->in),
                      .blocks = w->few ? w->own->blocks : r->blocks,
                      .t = w->few ? w->own->t : r->t,
                      .ldt = r->t_rank};
    if (w->few) {
        make_rows(w, s, 0, n, norm, &to);
        return to;
    }
    size_t begin, end;
    while (sh_team_take(w->me, n, SH_FEW_ROWS, &begin, &end))
        make_rows(w, s, (uint32_t)begin, (uint32_t)end, norm, &to);
    sh_team_barrier(w->me);
    return to;
}

/* ---- products ---- */

/* Rows begin .. end - 1 of a matrix, begin a multiple of SH_GROUP_ROWS. */
static sh_weights slice(const sh_matrix *m, uint32_t begin, uint32_t end)
{
    sh_weights w = sh_matrix_weights(m);
    w.out = end - begin;
    if (w.rows != NULL)
        w.rows = (const uint8_t *)w.rows + begin * sh_type_row_bytes(m->type, m->in);
    if (w.packed != NULL)
        w.packed = (const uint8_t *)w.packed +
                   begin / SH_GROUP_ROWS * sh_pack_bytes(m->type, SH_GROUP_ROWS, m->in);
    return w;
}

/* y[n, end - begin] (+)= columns of x·Wᵀ, for n rows from row `first` of the pass on. */
typedef struct {
    const sh_matrix *m;
    const input *in;
    uint32_t first, n, begin, end;
    float *y;
    size_t ldy;
    bool add;
} columns;

static void multiply(const worker *w, const columns *p)
{
    const sh_weights weights = slice(p->m, p->begin, p->end);
    const sh_product product = {.w = &weights,
                                .x = p->in->x + p->first * p->in->ldx,
                                .ldx = p->in->ldx,
                                .blocks = p->in->blocks + p->first * p->in->ldblocks,
                                .n = p->n,
                                .y = p->y,
                                .ldy = p->ldy,
                                .add = p->add};
    sh_product_run(&product, 0, weights.out, w->own->product);
}

/* Adds what the adapters of each row give the matrix of a pair. */
static void add_adapters(const worker *w, size_t pair, const columns *p)
{
    for (uint32_t i = 0; i < p->n; i++) {
        const sh_lora *lora = row_lora(w, p->first + i);
        if (lora == NULL || lora->outputs[pair].b.rank == 0)
            continue;
        const sh_lora_output *l = &lora->outputs[pair];
        sh_lora_b b = l->b;
        b.b = (const uint8_t *)b.b + p->begin / SH_LANES * sh_lora_b_group_bytes(b.form, b.rank);
        w->ops->lora_up(&b, p->in->t + (p->first + i) * p->in->ldt + l->from, 0, p->end - p->begin,
                        p->y + i * p->ldy);
    }
}

/* The product of a layer's matrix, with its bias and the adapters of each row. */
static void multiply_layer(const worker *w, uint32_t layer, uint32_t m, const columns *p)
{
    const float *bias = w->r->model->layers[layer].bias[m];
    multiply(w, p);
    for (uint32_t i = 0; bias != NULL && i < p->n; i++)
        w->ops->add(p->y + i * p->ldy, bias + p->begin, p->end - p->begin);
    add_adapters(w, (size_t)layer * SH_LAYER_MATRICES + m, p);
}

static size_t groups_of(const sh_matrix *m)
{
    return (m->out + SH_GROUP_ROWS - 1) / SH_GROUP_ROWS;
}

/* Groups that a member takes at once: whole GROUPS_TOGETHER, which kernels read best, where there
 * are enough of them. */
static size_t chunk_of(const worker *w, size_t n, size_t most)
{
    const size_t pieces = w->me->n > 1 ? (size_t)w->me->n * PIECES : 1;
    const size_t even = SH_MIN(SH_MAX(n / pieces, 1), most);
    if (n < GROUPS_TOGETHER * w->me->n || even % GROUPS_TOGETHER == 0)
        return even;
    return SH_MIN(even + GROUPS_TOGETHER - even % GROUPS_TOGETHER, most);
}

/* A matrix of a list that one loop goes through, and where its rows go. */
typedef struct {
    uint32_t m, n; /* SH_ATTN_Q ..., rows of x */
    float *y;
    bool add;
} target;

static void multiply_list(const worker *w, uint32_t layer, const target *targets, size_t n_targets,
                          const input *in)
{
    const sh_matrix *matrices = w->r->model->layers[layer].m;
    size_t groups = 0, begin, end;
    for (size_t i = 0; i < n_targets; i++)
        groups += groups_of(&matrices[targets[i].m]);
    const size_t chunk = chunk_of(w, groups, CHUNK_MAX);
    while (sh_team_take(w->me, groups, chunk, &begin, &end)) {
        size_t before = 0; /* groups of the matrices before */
        for (size_t i = 0; i < n_targets && before < end; i++) {
            const sh_matrix *m = &matrices[targets[i].m];
            const size_t own = groups_of(m);
            const size_t from = SH_MAX(begin, before) - before, to = SH_MIN(end - before, own);
            before += own;
            if (from >= to || targets[i].n == 0)
                continue;
            const uint32_t first = (uint32_t)(from * SH_GROUP_ROWS);
            const columns p = {.m = m,
                               .in = in,
                               .n = targets[i].n,
                               .begin = first,
                               .end = (uint32_t)SH_MIN(to * SH_GROUP_ROWS, m->out),
                               .y = targets[i].y + first,
                               .ldy = m->out,
                               .add = targets[i].add};
            multiply_layer(w, layer, targets[i].m, &p);
        }
    }
}

/* ---- attention ---- */

/* Norm (qwen3) and rotation of one head's vector. */
static void turn(const worker *w, const float *norm, const float *angles, float *x)
{
    const uint32_t size = w->c->head_size;
    if (norm != NULL) {
        w->ops->rms_norm(x, norm, w->c->norm_eps, size, w->own->head);
        memcpy(x, w->own->head, size * sizeof *x);
    }
    if (w->c->rope_halves)
        w->ops->rotate_halves(x, angles, size / 2);
    else
        w->ops->rotate(x, angles, size / 2);
}

/* Of a unit's rows and a key-value head: keys and values into the cache, queries turned. */
static void prepare_unit(const worker *w, uint32_t layer, uint32_t unit, uint32_t head,
                         bool queries)
{
    const sh_runner *r = w->r;
    const sh_model_config *c = w->c;
    const sh_layer *l = &r->model->layers[layer];
    const sh_unit *u = &r->units[unit];
    const sh_segment *s = &r->segments[u->segment];
    const uint32_t size = c->head_size, group = c->n_heads / c->n_kv_heads;
    const sh_head_cache cache = sh_context_head(s->context, layer, head);
    for (uint32_t i = u->first; i < u->first + u->n; i++) {
        const size_t row = (size_t)s->row + i, at = (row * c->n_kv_heads + head) * size;
        const float *angles = s->context->angles + (size_t)(s->position + i) * size;
        turn(w, l->k_norm, angles, r->k + at);
        w->ops->store(&cache, s->position + i, r->k + at, r->v + at);
        for (uint32_t h = head * group; queries && h < (head + 1) * group; h++)
            turn(w, l->q_norm, angles, r->q + (row * c->n_heads + h) * size);
    }
}

/* Few rows leave the memory idle during the attention: what this member will probably read first of
 * the matrix behind it, a part for each of its heads. */
static void fetch_output(const worker *w, uint32_t layer, uint32_t head, sh_attend *a)
{
    const sh_matrix *m = &w->r->model->layers[layer].m[SH_ATTN_OUTPUT];
    const size_t groups = groups_of(m), chunk = chunk_of(w, groups, CHUNK_MAX);
    const size_t group_bytes = sh_pack_bytes(m->type, SH_GROUP_ROWS, m->in);
    const size_t begin = w->me->index * chunk, heads = (w->c->n_kv_heads - 1) / w->me->n + 1;
    if (!w->few || m->packed == NULL || begin >= groups)
        return;
    const size_t bytes = SH_MIN((size_t)FETCH_MAX, SH_MIN(chunk, groups - begin) * group_bytes);
    a->next_bytes = bytes / heads / 64 * 64;
    a->next = (const uint8_t *)m->packed + begin * group_bytes + head / w->me->n * a->next_bytes;
}

/* heads query heads of a key-value head, from its first + `from` on. */
static void attend_unit(const worker *w, uint32_t layer, uint32_t unit, uint32_t head,
                        uint32_t from, uint32_t heads)
{
    const sh_runner *r = w->r;
    const sh_model_config *c = w->c;
    const sh_unit *u = &r->units[unit];
    const sh_segment *s = &r->segments[u->segment];
    const sh_head_cache cache = sh_context_head(s->context, layer, head);
    const size_t row = (size_t)s->row + u->first, ld = (size_t)c->n_heads * c->head_size;
    const size_t at =
        row * ld + (size_t)(head * (c->n_heads / c->n_kv_heads) + from) * c->head_size;
    sh_attend a = {.cache = &cache,
                   .q = r->q + at,
                   .ldq = ld,
                   .rows = u->n,
                   .heads = heads,
                   .first = s->position + u->first,
                   .out = r->att + at,
                   .ldout = ld,
                   .scratch = w->own->attend};
    fetch_output(w, layer, head, &a);
    w->ops->attend(&a);
}

/* att of the rows from which something leaves the layer, with a barrier at the end. */
static void attend(const worker *w, uint32_t layer, uint32_t n_units_out)
{
    const sh_pass *pass = w->pass;
    const uint32_t kv = w->c->n_kv_heads, group = w->c->n_heads / kv;
    size_t begin, end;
    if (w->few && kv >= w->me->n) { /* nobody would wait much longer than for the barrier */
        while (sh_team_take(w->me, kv, 1, &begin, &end)) {
            for (uint32_t u = 0; u < pass->n_units; u++)
                prepare_unit(w, layer, u, (uint32_t)begin, u < n_units_out);
            for (uint32_t u = 0; u < n_units_out; u++)
                attend_unit(w, layer, u, (uint32_t)begin, 0, group);
        }
        sh_team_barrier(w->me);
        return;
    }
    while (sh_team_take(w->me, (size_t)pass->n_units * kv, 1, &begin, &end))
        prepare_unit(w, layer, (uint32_t)(begin / kv), (uint32_t)(begin % kv),
                     begin / kv < n_units_out);
    sh_team_barrier(w->me);
    if (n_units_out == 0)
        return;
    /* Heads of a group share their keys and values, unless that leaves members without work: one
     * head alone takes most of the time of all three. */
    const uint32_t parts = (size_t)n_units_out * kv >= w->me->n ? 1 : group;
    while (sh_team_take(w->me, (size_t)n_units_out * kv * parts, 1, &begin, &end)) {
        const uint32_t part = (uint32_t)(begin % parts);
        const uint32_t head = (uint32_t)(begin / parts % kv);
        attend_unit(w, layer, (uint32_t)(begin / parts / kv), head, part * (group / parts),
                    group / parts);
    }
    sh_team_barrier(w->me);
}

/* ---- layers ---- */

/* Between two barriers: x is whole, and nobody writes it. */
static void trace(const worker *w, sh_stage stage, uint32_t layer, const float *x, uint32_t n)
{
    sh_context *context = w->pass->traced;
    if (context == NULL)
        return;
    sh_team_barrier(w->me);
    if (w->me->index == 0)
        context->trace(context->trace_arg, stage, layer, x, n);
    sh_team_barrier(w->me);
}

static bool takes_blocks(const sh_layer *l, uint32_t first, uint32_t last)
{
    for (uint32_t m = first; m <= last; m++)
        if (sh_product_takes_blocks(l->m[m].type))
            return true;
    return false;
}

/* gate = silu(gate) * up, columns of both at once. */
static void gate_and_up(const worker *w, uint32_t layer, uint32_t n, const input *in)
{
    const sh_matrix *matrices = w->r->model->layers[layer].m;
    const uint32_t ffn = w->c->ffn;
    const size_t groups = groups_of(&matrices[SH_FFN_GATE]);
    const size_t room = (size_t)w->r->rows_max * SH_COLUMNS / SH_GROUP_ROWS / n;
    const size_t chunk = chunk_of(w, groups, SH_MIN(room, (size_t)GATE_CHUNK_MAX));
    size_t begin, end;
    while (sh_team_take(w->me, groups, chunk, &begin, &end)) {
        columns p = {.m = &matrices[SH_FFN_GATE],
                     .in = in,
                     .n = n,
                     .begin = (uint32_t)begin * SH_GROUP_ROWS,
                     .end = (uint32_t)SH_MIN(end * SH_GROUP_ROWS, ffn),
                     .ldy = ffn};
        float *gate = p.y = w->r->gate + p.begin;
        multiply_layer(w, layer, SH_FFN_GATE, &p);
        p.m = &matrices[SH_FFN_UP];
        p.y = w->own->columns;
        p.ldy = p.end - p.begin;
        multiply_layer(w, layer, SH_FFN_UP, &p);
        for (uint32_t i = 0; i < n; i++)
            w->ops->swiglu(gate + (size_t)i * ffn, p.y + (size_t)i * p.ldy, p.end - p.begin);
    }
}

/* One layer over all rows of x; the last one lets only the first n_out rows out. */
static void run_layer(const worker *w, uint32_t layer)
{
    const sh_pass *pass = w->pass;
    sh_runner *r = w->r;
    const sh_model_config *c = w->c;
    const sh_layer *l = &r->model->layers[layer];
    const bool last = layer + 1 == c->n_layers;
    const uint32_t rows = pass->n_rows, n = last ? pass->n_out : rows;
    const source attn = {.x = r->x,
                         .in = c->width,
                         .norm = l->attn_norm,
                         .layer = layer,
                         .which = SH_INPUT_ATTN,
                         .blocks = takes_blocks(l, SH_ATTN_Q, SH_ATTN_V)};
    input in = make_input(w, &attn, rows);
    const target qkv[] = {{.m = SH_ATTN_Q, .n = n, .y = r->q},
                          {.m = SH_ATTN_K, .n = rows, .y = r->k},
                          {.m = SH_ATTN_V, .n = rows, .y = r->v}};
    multiply_list(w, layer, qkv, SH_COUNT(qkv), &in);
    sh_team_barrier(w->me);
    attend(w, layer, last ? pass->n_units_out : pass->n_units);
    if (n == 0)
        return;
    const source att = {.x = r->att,
                        .in = c->n_heads * c->head_size,
                        .layer = layer,
                        .which = SH_INPUT_ATT,
                        .blocks = takes_blocks(l, SH_ATTN_OUTPUT, SH_ATTN_OUTPUT)};
    in = make_input(w, &att, n);
    multiply_list(w, layer, &(target){.m = SH_ATTN_OUTPUT, .n = n, .y = r->x, .add = true}, 1, &in);
    sh_team_barrier(w->me);
    trace(w, SH_STAGE_AFTER_ATTENTION, layer, r->x, n);
    const source ffn = {.x = r->x,
                        .in = c->width,
                        .norm = l->ffn_norm,
                        .layer = layer,
                        .which = SH_INPUT_FFN,
                        .blocks = takes_blocks(l, SH_FFN_GATE, SH_FFN_UP)};
    in = make_input(w, &ffn, n);
    gate_and_up(w, layer, n, &in);
    sh_team_barrier(w->me);
    const source gate = {.x = r->gate,
                         .in = c->ffn,
                         .layer = layer,
                         .which = SH_INPUT_GATE,
                         .blocks = takes_blocks(l, SH_FFN_DOWN, SH_FFN_DOWN)};
    in = make_input(w, &gate, n);
    multiply_list(w, layer, &(target){.m = SH_FFN_DOWN, .n = n, .y = r->x, .add = true}, 1, &in);
    sh_team_barrier(w->me);
    trace(w, SH_STAGE_LAYER_OUTPUT, layer, r->x, n);
}

/* ---- begin and end of a pass ---- */

static void embed(const worker *w)
{
    const sh_runner *r = w->r;
    size_t begin, end;
    while (sh_team_take(w->me, w->pass->n_rows, 1, &begin, &end)) {
        const sh_segment *s = &r->segments[r->row_segment[begin]];
        sh_matrix_row(&r->model->token_embd, (uint32_t)s->tokens[begin - s->row],
                      r->x + begin * w->c->width);
    }
    sh_team_barrier(w->me);
}

/* Columns begin .. end - 1 of all logits. Rows of one segment lie side by side; those of several
 * are made together, so that the weights are read once, and then taken apart. */
static void logits_columns(const worker *w, const input *in, uint32_t begin, uint32_t end)
{
    const sh_runner *r = w->r;
    const uint32_t n = w->pass->n_logits, vocab = w->c->vocab;
    const bool apart = w->pass->n_segments_logits > 1;
    const columns p = {.m = &r->model->output,
                       .in = in,
                       .n = n,
                       .begin = begin,
                       .end = end,
                       .y = apart ? w->own->columns : r->segments[0].logits + begin,
                       .ldy = apart ? SH_COLUMNS : vocab};
    multiply(w, &p);
    add_adapters(w, sh_lora_output_pair(w->c->n_layers), &p);
    for (uint32_t i = 0; apart && i < n; i++) {
        const sh_segment *s = &r->segments[r->row_segment[i]];
        memcpy(s->logits + (size_t)(i - s->row) * vocab + begin, p.y + (size_t)i * SH_COLUMNS,
               (end - begin) * sizeof *p.y);
    }
}

static void finish(const worker *w)
{
    const sh_pass *pass = w->pass;
    const sh_runner *r = w->r;
    const uint32_t width = w->c->width, n = pass->n_out;
    const sh_matrix *output = &r->model->output;
    const source last = {.x = r->x,
                         .in = width,
                         .norm = r->model->output_norm,
                         .layer = w->c->n_layers,
                         .blocks = sh_product_takes_blocks(output->type)};
    const input in = make_input(w, &last, n);
    for (uint32_t i = 0; w->me->index == 0 && i < n; i++) {
        const sh_segment *s = &r->segments[r->row_segment[i]];
        if (s->hidden != NULL)
            memcpy(s->hidden + (size_t)(i - s->row) * width, in.x + (size_t)i * width,
                   width * sizeof *in.x);
    }
    trace(w, SH_STAGE_FINAL_NORM, w->c->n_layers, in.x, n);
    if (pass->n_logits == 0)
        return;
    const size_t groups = groups_of(output);
    const size_t chunk =
        chunk_of(w, groups, pass->n_segments_logits > 1 ? SH_COLUMNS / SH_GROUP_ROWS : CHUNK_MAX);
    size_t begin, end;
    while (sh_team_take(w->me, groups, chunk, &begin, &end))
        logits_columns(w, &in, (uint32_t)begin * SH_GROUP_ROWS,
                       (uint32_t)SH_MIN(end * SH_GROUP_ROWS, output->out));
}

void sh_pass_run(const sh_pass *pass, const sh_member *me)
{
    sh_runner *r = pass->runner;
    const worker w = {.pass = pass,
                      .r = r,
                      .c = &r->model->config,
                      .ops = r->ops,
                      .me = me,
                      .own = &r->members[me->index],
                      .few = pass->n_rows <= SH_FEW_ROWS};
    embed(&w);
    trace(&w, SH_STAGE_EMBEDDING, 0, r->x, pass->n_rows);
    for (uint32_t layer = 0; layer < w.c->n_layers; layer++)
        run_layer(&w, layer);
    if (pass->n_out > 0)
        finish(&w);
}
