/*
 * Federated evaluation: canary nodes score a candidate that passed the operator's suites beside its
 * parent, on what their own users did, and send sums and counts.
 *
 * Who: nodes that run the parent, chosen by a hash of key, candidate and the store's seed, so that
 * no few nodes decide always and none can choose to. When half of the time is gone, all are asked.
 * An answer counts once a node, whichever of its stores it comes from; one that comes late, again
 * or for another candidate is acknowledged and changes nothing.
 *
 * How it is decided, as soon as canary_nodes_min nodes with data and canary_tokens_min tokens are
 * there:
 * - A node counts with its tokens, at most COORD_WEIGHT_FACTOR_MAX times the median's, and with a
 *   loss of at most COORD_LOSS_MAX a token: neither is anything but its own word.
 * - The mean increase of the loss over all tokens must keep gate_overall_max, that of a slice with
 *   at least a tenth of canary_tokens_min tokens gate_slice_max.
 * - From three nodes on no single one decides. To refuse, the mean must be over its limit also
 *   without the node that speaks most against the candidate; to publish, the median over the nodes
 *   of their own increases must keep gate_overall_max, too, which one that praises a bad candidate
 *   cannot move past its neighbours. With one or two nodes there is no majority to ask, and the
 *   mean decides alone.
 * Not enough by canary_ms_max is inconclusive: never a pass.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define MAJORITY_NODES_MIN  3u
#define SLICE_TOKENS_FACTOR 10u

typedef struct { /* of one node: its weight, and losses a token */
    double tokens[SH_SLICES], parent[SH_SLICES], candidate[SH_SLICES];
    double all_tokens, all_parent, all_candidate;
} answer;

typedef struct {
    answer *items;
    size_t n, cap; /* nodes with data */
    sh_error *err;
} answers;

/* ---- reading ---- */

static bool is_sane(const sh_evaluation *e)
{
    bool seen[SH_SLICES] = {false};
    uint64_t tokens = 0;
    if (e->n > SH_EVALUATION_SLICES_MAX)
        return false;
    for (uint32_t i = 0; i < e->n; i++) {
        const sh_slice_score *s = &e->slices[i];
        if (s->slice >= SH_SLICES || seen[s->slice] || s->tokens > COORD_EVALUATION_TOKENS_MAX ||
            !isfinite(s->nll_parent) || !isfinite(s->nll_candidate) || s->nll_parent < 0 ||
            s->nll_candidate < 0)
            return false;
        seen[s->slice] = true;
        tokens += s->tokens;
    }
    return tokens <= COORD_EVALUATION_TOKENS_MAX;
}

static answer answer_of(const sh_evaluation *e)
{
    answer a = {0};
    for (uint32_t i = 0; i < e->n; i++) {
        const sh_slice_score *s = &e->slices[i];
        double tokens = (double)s->tokens;
        if (s->tokens == 0)
            continue;
        a.tokens[s->slice] = tokens;
        a.parent[s->slice] = fmin(s->nll_parent / tokens, COORD_LOSS_MAX);
        a.candidate[s->slice] = fmin(s->nll_candidate / tokens, COORD_LOSS_MAX);
        a.all_tokens += tokens;
        a.all_parent += tokens * a.parent[s->slice];
        a.all_candidate += tokens * a.candidate[s->slice];
    }
    if (a.all_tokens > 0) {
        a.all_parent /= a.all_tokens;
        a.all_candidate /= a.all_tokens;
    }
    return a;
}

static sh_status add_answer(void *arg, const sh_update_id *id, sh_bytes payload)
{
    answers *all = arg;
    sh_evaluation e;
    (void)id;
    if (sh_evaluation_decode(payload.data, payload.n, &e, NULL) != SH_OK || !is_sane(&e))
        return sh_fail(all->err, SH_ERR_CORRUPT, "coordinator: an evaluation cannot be read");
    answer a = answer_of(&e);
    if (a.all_tokens == 0) /* nothing to say */
        return SH_OK;
    if (sh_array_reserve((void **)&all->items, &all->cap, all->n + 1, sizeof *all->items,
                         COORD_EVALUATIONS_MAX) != SH_OK)
        return sh_fail(all->err, SH_ERR_NO_MEMORY, "coordinator: no memory for evaluations");
    all->items[all->n++] = a;
    return SH_OK;
}

static int compare_f64(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, size_t n)
{
    qsort(values, n, sizeof *values, compare_f64);
    return n % 2 == 1 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

/* ---- judging ---- */

typedef struct {
    double tokens, parent, candidate; /* weighted means of all */
    double median;                    /* of the nodes' increases */
    double overall;                   /* mean increase, without the worst node from three on */
    double slice;                     /* the worst slice's, in the same way */
    unsigned worst;                   /* which */
} tally;

/* Each node's tokens, cut to a multiple of the (lower) median's. */
static void cap_tokens(answers *all, double *scratch)
{
    for (size_t i = 0; i < all->n; i++)
        scratch[i] = all->items[i].all_tokens;
    qsort(scratch, all->n, sizeof *scratch, compare_f64);
    double cap = COORD_WEIGHT_FACTOR_MAX * scratch[(all->n - 1) / 2];
    for (size_t i = 0; i < all->n; i++) {
        answer *a = &all->items[i];
        double share = fmin(1, cap / a->all_tokens);
        a->all_tokens *= share;
        for (unsigned k = 0; k < SH_SLICES; k++)
            a->tokens[k] *= share;
    }
}

/* The weighted mean of the increases; from three nodes on the smallest that it has without one of
 * them. weights and increases: [n]. -inf when there is no weight. */
static double mean_without_worst(const double *weights, const double *increases, size_t n)
{
    double weight = 0, sum = 0;
    size_t nodes = 0;
    for (size_t i = 0; i < n; i++) {
        weight += weights[i];
        sum += weights[i] * increases[i];
        nodes += weights[i] > 0;
    }
    if (weight <= 0)
        return -INFINITY;
    double least = sum / weight;
    for (size_t i = 0; i < n && nodes >= MAJORITY_NODES_MIN; i++)
        if (weights[i] > 0)
            least = fmin(least, (sum - weights[i] * increases[i]) / (weight - weights[i]));
    return least;
}

static sh_status tally_answers(const coord_step *s, answers *all, tally *out)
{
    size_t n = all->n;
    double *scratch = sh_calloc(2 * n + 1, sizeof *scratch), *weights = scratch,
           *increases = scratch + n;
    if (scratch == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for evaluations");
    tally t = {.overall = -INFINITY, .slice = -INFINITY};
    if (n > 0)
        cap_tokens(all, scratch);
    for (size_t i = 0; i < n; i++) {
        const answer *a = &all->items[i];
        weights[i] = a->all_tokens;
        increases[i] = a->all_candidate - a->all_parent;
        t.tokens += a->all_tokens;
        t.parent += a->all_tokens * a->all_parent;
        t.candidate += a->all_tokens * a->all_candidate;
    }
    if (n > 0) {
        t.parent /= t.tokens;
        t.candidate /= t.tokens;
        t.overall = mean_without_worst(weights, increases, n);
        t.median = median(increases, n);
    }
    for (unsigned k = 0; k < SH_SLICES; k++) {
        double tokens = 0;
        for (size_t i = 0; i < n; i++) {
            const answer *a = &all->items[i];
            weights[i] = a->tokens[k];
            increases[i] = a->candidate[k] - a->parent[k];
            tokens += a->tokens[k];
        }
        if (tokens * SLICE_TOKENS_FACTOR < (double)s->c->options.canary_tokens_min)
            continue;
        double increase = mean_without_worst(weights, increases, n);
        if (increase > t.slice) {
            t.slice = increase;
            t.worst = k;
        }
    }
    free(scratch);
    *out = t;
    return SH_OK;
}

/* Fills what nodes said and the verdict; true: the candidate passes. */
static bool passes(const sh_coord_options *options, const answers *all, const tally *t,
                   sh_release_row *row)
{
    char *out = row->verdict;
    row->canary_nodes = (uint32_t)all->n;
    row->canary_tokens = (uint64_t)t->tokens;
    row->canary_parent = t->parent;
    row->canary_candidate = t->candidate;
    if (t->overall > options->gate_overall_max)
        (void)snprintf(out, sizeof row->verdict, "refused: canary loss up by %.4f, over %g",
                       t->overall, options->gate_overall_max);
    else if (all->n >= MAJORITY_NODES_MIN && t->median > options->gate_overall_max)
        (void)snprintf(out, sizeof row->verdict, "refused: canary median up by %.4f, over %g",
                       t->median, options->gate_overall_max);
    else if (t->slice > options->gate_slice_max)
        (void)snprintf(out, sizeof row->verdict, "refused: canary slice %u up by %.4f, over %g",
                       t->worst, t->slice, options->gate_slice_max);
    else
        return true;
    return false;
}

static sh_status decide(coord_step *s, const answers *all, const tally *t, bool enough)
{
    const sh_coord_options *options = &s->c->options;
    sh_release_row row = {0};
    SH_TRY(coord_candidate_row(s, &row));
    sh_status status;
    bool good = passes(options, all, t, &row);
    if (!enough) {
        (void)snprintf(row.verdict, sizeof row.verdict,
                       "inconclusive: %zu of %u nodes, %.0f of %llu tokens", all->n,
                       options->canary_nodes_min, t->tokens,
                       (unsigned long long)options->canary_tokens_min);
        status = coord_leave_open(s, &row);
    } else if (good) {
        status = coord_audit(s, "canary candidate=%llu nodes=%u tokens=%llu loss %.4f, was %.4f",
                             (unsigned long long)row.candidate, row.canary_nodes,
                             (unsigned long long)row.canary_tokens, row.canary_candidate,
                             row.canary_parent);
        if (status == SH_OK)
            status = coord_accept(s, &row);
    } else {
        status = coord_reject(s, &row);
    }
    free(row.merged);
    return status;
}

sh_status coord_canary_consider(coord_step *s)
{
    sh_coord *c = s->c;
    answers all = {.err = s->err};
    tally t;
    sh_status status = coord_each_evaluation(s->txn, c->candidate.number, add_answer, &all, s->err);
    if (status == SH_OK)
        status = tally_answers(s, &all, &t);
    if (status == SH_OK) {
        bool enough = all.n >= c->options.canary_nodes_min &&
                      t.tokens >= (double)c->options.canary_tokens_min;
        if (enough || c->options.canary_nodes_min == 0) /* it was switched off meanwhile */
            status = decide(s, &all, &t, true);
        else if (s->now_ms >= c->candidate.until_ms)
            status = decide(s, &all, &t, false);
        else
            status = coord_set_timer(s, c->candidate.until_ms);
    }
    free(all.items);
    return status;
}

sh_status coord_canary_begin(coord_step *s)
{
    sh_coord *c = s->c;
    c->candidate.until_ms = s->now_ms + c->options.canary_ms_max;
    c->state.phase = PHASE_EVALUATING;
    c->dirty = true;
    SH_TRY(coord_candidate_save(s));
    SH_TRY(coord_audit(s, "canary candidate=%llu loss %.4f, was %.4f on the suites",
                       (unsigned long long)c->candidate.number, c->candidate.loss_candidate,
                       c->candidate.loss_parent));
    coord_note(s, SH_CNOTE_CANARY_STARTED, NULL, c->candidate.number);
    return coord_set_timer(s, c->candidate.until_ms);
}

/* ---- asking and answering ---- */

static bool is_canary(const coord_step *s, const sh_hash *node)
{
    const sh_coord *c = s->c;
    uint64_t half_ms = c->options.canary_ms_max / 2;
    if (s->now_ms + half_ms >= c->candidate.until_ms)
        return true;
    uint8_t bytes[8 + 8 + sizeof node->b];
    sh_key_put_u64(bytes, c->state.seed);
    sh_key_put_u64(bytes + 8, c->candidate.number);
    memcpy(bytes + 16, node->b, sizeof node->b);
    sh_hash hash = sh_blake2b(bytes, sizeof bytes);
    double unit = (double)(sh_key_get_u64(hash.b) >> 11) * 0x1p-53;
    return unit < c->options.canary_share;
}

sh_status coord_canary_plan(coord_step *s, const sh_hash *node, const sh_msg_checkin *checkin,
                            sh_evaluate_plan *plan)
{
    const sh_coord *c = s->c;
    const coord_candidate *candidate = &c->candidate;
    if (c->state.phase != PHASE_EVALUATING || s->version < 2 || /* version 1 knows no evaluation */
        checkin->active_version != candidate->parent_version ||
        c->n_evaluations >= COORD_EVALUATIONS_MAX || !is_canary(s, node))
        return SH_OK;
    bool answered = false;
    SH_TRY(coord_evaluation_has(s->txn, candidate->number, node, &answered, s->err));
    if (answered)
        return SH_OK;
    *plan = (sh_evaluate_plan){.candidate = candidate->number,
                               .parent_version = candidate->parent_version,
                               .model = {.sha256 = candidate->sha256,
                                         .bytes = candidate->bytes,
                                         .n_chunks = candidate->n_chunks,
                                         .chunk_hashes = candidate->chunks}};
    return SH_OK;
}

sh_status coord_on_evaluation(coord_step *s, const sh_update_id *id, sh_bytes payload, bool *good)
{
    sh_coord *c = s->c;
    const coord_candidate *candidate = &c->candidate;
    sh_evaluation e;
    *good = sh_evaluation_decode(payload.data, payload.n, &e, NULL) == SH_OK && is_sane(&e);
    if (!*good || c->state.phase != PHASE_EVALUATING || e.candidate != candidate->number ||
        e.parent_version != candidate->parent_version ||
        !sh_hash_equal(&e.candidate_sha256, &candidate->sha256) ||
        c->n_evaluations >= COORD_EVALUATIONS_MAX)
        return SH_OK;
    bool answered = false;
    SH_TRY(coord_evaluation_has(s->txn, candidate->number, &id->node, &answered, s->err));
    if (answered)
        return SH_OK;
    SH_TRY(coord_evaluation_put(s->txn, candidate->number, id, payload, s->err));
    c->n_evaluations++;
    coord_note(s, SH_CNOTE_EVALUATION_IN, &id->node, candidate->number);
    return coord_canary_consider(s);
}

/* ---- forgetting ---- */

typedef struct {
    const sh_hash *node; /* NULL: any */
    sh_buf ids;
    sh_error *err;
} forgetting;

static sh_status pick(void *arg, const sh_update_id *id, sh_bytes payload)
{
    forgetting *f = arg;
    (void)payload;
    if (f->node != NULL && !sh_hash_equal(&id->node, f->node))
        return SH_OK;
    if (sh_buf_append(&f->ids, id, sizeof *id) != SH_OK)
        return sh_fail(f->err, SH_ERR_NO_MEMORY, "coordinator: no memory for evaluations");
    return SH_OK;
}

sh_status coord_canary_forget(coord_step *s, const sh_hash *node)
{
    sh_coord *c = s->c;
    if (c->n_evaluations == 0)
        return SH_OK;
    forgetting f = {.node = node, .err = s->err};
    sh_buf_init(&f.ids, COORD_EVALUATIONS_MAX * sizeof(sh_update_id));
    sh_status status = coord_each_evaluation(s->txn, c->candidate.number, pick, &f, s->err);
    for (size_t at = 0; status == SH_OK && at < f.ids.len; at += sizeof(sh_update_id)) {
        sh_update_id id;
        memcpy(&id, f.ids.data + at, sizeof id);
        status = coord_evaluation_delete(s->txn, c->candidate.number, &id, s->err);
        c->n_evaluations--;
    }
    sh_buf_release(&f.ids);
    return status;
}
