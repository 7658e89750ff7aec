/*
 * Runners: the scratch of forward passes, and the passes that a call is cut into.
 *
 * A pass takes the next rows of the items in their order, until it is full. Its rows are laid out
 * by what is wanted of them (sh_pass), so that the last layer and the output matrix work on rows
 * that lie side by side. A row's result depends on itself and on what its context holds alone, so
 * neither the cuts nor the layout matter to the bits.
 */
#include <stdlib.h>

#include "shared/base/buf.h"
#include "shared/model/context_internal.h"

/* Rows of a segment that are attended as one piece of work. */
#define UNIT_ROWS 32

/* ---- memory ---- */

static void carve_member(const sh_runner *r, sh_carver *c, sh_member_scratch *member)
{
    const sh_model_config *m = &r->model->config;
    const size_t norm = (size_t)SH_FEW_ROWS * r->in_max;
    const sh_member_scratch s = {
        .norm = sh_carve(c, norm * sizeof(float)),
        .blocks = sh_carve(c, SH_FEW_ROWS * sh_x_stride(r->in_max) * sizeof(sh_x_block)),
        .columns = sh_carve(c, (size_t)r->rows_max * SH_COLUMNS * sizeof(float)),
        .attend = sh_carve(c, sh_attend_scratch_bytes(m->head_size)),
        .head = sh_carve(c, m->head_size * sizeof(float)),
        .product = sh_carve(c, sh_product_scratch_bytes(r->in_max))};
    if (c->block != NULL)
        *member = s;
}

static void carve_runner(sh_runner *r, sh_carver *c)
{
    const sh_model_config *m = &r->model->config;
    const size_t rows = r->rows_max, q = (size_t)m->n_heads * m->head_size;
    const size_t kv = (size_t)m->n_kv_heads * m->head_size;
    const unsigned members = sh_team_threads(r->team);
    r->x = sh_carve(c, rows * m->width * sizeof(float));
    /* What attention reads is dead when its result goes to the output matrix, and what it leaves
     * when the feed-forward part begins. */
    const size_t heads = SH_LANES_UP(rows * q) + SH_LANES_UP(rows * kv);
    r->norm = r->att = sh_carve(c, rows * SH_MAX((size_t)m->width, q) * sizeof(float));
    r->q = r->gate =
        sh_carve(c, SH_MAX(heads + SH_LANES_UP(rows * kv), rows * (size_t)m->ffn) * sizeof(float));
    r->k = r->q != NULL ? r->q + SH_LANES_UP(rows * q) : NULL;
    r->v = r->q != NULL ? r->q + heads : NULL;
    r->blocks = sh_carve(c, rows * sh_x_stride(r->in_max) * sizeof(sh_x_block));
    r->segments = sh_carve(c, rows * sizeof *r->segments);
    r->units = sh_carve(c, rows * sizeof *r->units);
    r->row_segment = sh_carve(c, rows * sizeof *r->row_segment);
    r->members = sh_carve(c, members * sizeof *r->members);
    for (unsigned i = 0; i < members; i++)
        carve_member(r, c, c->block != NULL ? &r->members[i] : NULL);
}

static void shape_runner(sh_runner *r, const sh_model *model, const sh_runner_options *options)
{
    const sh_model_config *m = &model->config;
    const uint32_t widest = SH_MAX(SH_MAX(m->width, m->n_heads * m->head_size), m->ffn);
    *r = (sh_runner){.model = model,
                     .ops = sh_transform_get(),
                     .team = options->team,
                     .rows_max = options->rows_max != 0 ? options->rows_max : SH_PASS_ROWS_DEFAULT,
                     .in_max = (widest + SH_X_VALUES - 1) / SH_X_VALUES * SH_X_VALUES};
}

size_t sh_runner_bytes(const sh_model *model, const sh_runner_options *options)
{
    sh_runner r;
    sh_carver c = {0};
    shape_runner(&r, model, options);
    carve_runner(&r, &c);
    return sizeof r + c.used;
}

sh_status sh_runner_create(const sh_model *model, const sh_runner_options *options, sh_runner **out,
                           sh_error *err)
{
    if (options->rows_max > SH_PASS_ROWS_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a pass of %u rows is over the limit of %u",
                       options->rows_max, SH_PASS_ROWS_MAX);
    const size_t bytes = sh_runner_bytes(model, options);
    sh_runner *r = sh_calloc(1, sizeof *r);
    void *block = sh_alloc_aligned(bytes);
    if (r == NULL || block == NULL) {
        free(r);
        free(block);
        return sh_fail(err, SH_ERR_NO_MEMORY, "forward pass: no memory for %zu bytes", bytes);
    }
    shape_runner(r, model, options);
    sh_carver c = {.block = block};
    r->block = block;
    carve_runner(r, &c);
    *out = r;
    return SH_OK;
}

void sh_runner_destroy(sh_runner **runner)
{
    if (*runner == NULL)
        return;
    free((*runner)->block);
    free((*runner)->t_block);
    free(*runner);
    *runner = NULL;
}

sh_status sh_runner_reserve_t(sh_runner *r, uint32_t rank, sh_error *err)
{
    if (rank <= r->t_rank)
        return SH_OK;
    const unsigned members = sh_team_threads(r->team);
    const size_t all = (size_t)r->rows_max * rank, own = (size_t)SH_FEW_ROWS * rank;
    const size_t bytes = (all + members * own) * sizeof(float);
    float *t = sh_alloc_aligned(bytes);
    if (t == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "adapters: no memory for %zu bytes", bytes);
    free(r->t_block);
    r->t_block = r->t = t;
    r->t_rank = rank;
    for (unsigned i = 0; i < members; i++)
        r->members[i].t = t + all + i * own;
    return SH_OK;
}

/* ---- passes ---- */

static bool item_logits_at(const sh_run_item *item, uint32_t token)
{
    switch (item->logits_wanted) {
    case SH_LOGITS_ALL:
        return true;
    case SH_LOGITS_LAST:
        return token + 1 == item->n;
    case SH_LOGITS_SOME:
        return item->wants[token];
    default:
        return false;
    }
}

/* How many of the first n tokens have logits. */
static size_t logits_before(const sh_run_item *item, uint32_t n)
{
    size_t count = 0;
    for (uint32_t i = 0; i < n; i++)
        count += item_logits_at(item, i);
    return count;
}

/* What is wanted of a row, in the order of the rows of a pass. */
typedef enum { WANT_LOGITS, WANT_HIDDEN, WANT_NOTHING, WANTS } want;

static want wanted(const sh_run_item *item, uint32_t token)
{
    if (item_logits_at(item, token))
        return WANT_LOGITS;
    return item->hidden != NULL ? WANT_HIDDEN : WANT_NOTHING;
}

/* Where a call has got to. */
typedef struct {
    const sh_run_item *items;
    size_t n, item;
    uint32_t done; /* tokens of the item */
} cursor;

static void add_segment(sh_pass *pass, const sh_run_item *item, uint32_t from, uint32_t n,
                        uint32_t position)
{
    sh_runner *r = pass->runner;
    const sh_model_config *c = &r->model->config;
    sh_segment *s = &r->segments[pass->n_segments];
    *s = (sh_segment){.context = item->context,
                      .tokens = item->tokens + from,
                      .row = pass->n_rows,
                      .n = n,
                      .position = position};
    if (item_logits_at(item, from))
        s->logits = item->logits + logits_before(item, from) * c->vocab;
    if (item->hidden != NULL)
        s->hidden = item->hidden + (size_t)from * c->width;
    for (uint32_t i = 0; i < n; i++)
        r->row_segment[pass->n_rows + i] = pass->n_segments;
    for (uint32_t first = 0; first < n; first += UNIT_ROWS)
        r->units[pass->n_units++] = (sh_unit){
            .segment = pass->n_segments, .first = first, .n = SH_MIN(UNIT_ROWS, n - first)};
    pass->n_rows += n;
    pass->n_segments++;
}

/* The rows of an item, from `begin` to before `end`, of which `kind` is wanted: a segment a run. */
static void add_runs(sh_pass *pass, const sh_run_item *item, uint32_t begin, uint32_t end,
                     want kind)
{
    for (uint32_t first = begin; first < end; first++) {
        uint32_t last = first;
        while (last < end && wanted(item, last) == kind)
            last++;
        /* The context's length grows when the pass is over: an item's later rows stand after it. */
        if (last > first) {
            add_segment(pass, item, first, last - first, item->context->length + (first - begin));
            first = last; /* which is of another kind */
        }
    }
}

/* The rows of the pass that begins at `at` of which `kind` is wanted; at most rows_max rows of all
 * kinds. Returns where the next pass begins. */
static cursor add_rows(sh_pass *pass, cursor at, want kind)
{
    uint32_t room = pass->runner->rows_max;
    while (room > 0 && at.item < at.n) {
        const sh_run_item *item = &at.items[at.item];
        const uint32_t end = at.done + SH_MIN(room, item->n - at.done);
        add_runs(pass, item, at.done, end, kind);
        room -= end - at.done;
        at.done = end;
        if (at.done == item->n) {
            at.item++;
            at.done = 0;
        }
    }
    return at;
}

static cursor make_pass(sh_runner *runner, cursor at, sh_pass *pass)
{
    *pass = (sh_pass){.runner = runner};
    cursor next = add_rows(pass, at, WANT_LOGITS);
    pass->n_logits = pass->n_rows;
    pass->n_segments_logits = pass->n_segments;
    next = add_rows(pass, at, WANT_HIDDEN);
    pass->n_out = pass->n_rows;
    pass->n_units_out = pass->n_units;
    next = add_rows(pass, at, WANT_NOTHING);
    for (uint32_t i = 0; i < pass->n_segments; i++) {
        const sh_segment *s = &runner->segments[i];
        sh_context_fill_angles(s->context, s->position + s->n);
    }
    if (pass->n_segments == 1 && pass->n_logits == pass->n_rows &&
        runner->segments[0].context->trace != NULL)
        pass->traced = runner->segments[0].context;
    return next;
}

static void run_member(void *arg, const sh_member *me)
{
    sh_pass_run(arg, me);
}

/* ---- calls ---- */

static sh_status check_item(const sh_runner *runner, const sh_run_item *item, sh_error *err)
{
    const sh_context *context = item->context;
    const uint32_t vocab = runner->model->config.vocab;
    SH_ASSERT(context->model == runner->model);
    SH_ASSERT(item->logits_wanted == SH_LOGITS_NONE || item->logits != NULL);
    SH_ASSERT(item->logits_wanted != SH_LOGITS_SOME || item->wants != NULL);
    if (item->n == 0)
        return sh_fail(err, SH_ERR_INVALID, "no tokens to decode");
    if (item->n > context->n_max - context->length)
        return sh_fail(err, SH_ERR_LIMIT, "%u tokens do not fit: %u of %u places are taken",
                       item->n, context->length, context->n_max);
    for (uint32_t i = 0; i < item->n; i++)
        if (item->tokens[i] < 0 || (uint32_t)item->tokens[i] >= vocab)
            return sh_fail(err, SH_ERR_INVALID, "token %d is not in the vocabulary of %u",
                           item->tokens[i], vocab);
    return SH_OK;
}

sh_status sh_runner_run(sh_runner *runner, const sh_run_item *items, size_t n, sh_error *err)
{
    for (size_t i = 0; i < n; i++) {
        SH_TRY(check_item(runner, &items[i], err));
        if (items[i].context->lora != NULL)
            SH_TRY(sh_runner_reserve_t(runner, items[i].context->lora->rank_max, err));
    }
    for (size_t i = 0; i < n; i++) {
        SH_ASSERT(!items[i].context->in_run); /* each context once */
        items[i].context->in_run = true;
    }
    for (cursor at = {.items = items, .n = n}; at.item < n;) {
        sh_pass pass;
        at = make_pass(runner, at, &pass);
        sh_team_run(runner->team, run_member, &pass);
        for (uint32_t i = 0; i < pass.n_segments; i++)
            runner->segments[i].context->length += runner->segments[i].n;
    }
    for (size_t i = 0; i < n; i++)
        items[i].context->in_run = false;
    return SH_OK;
}
