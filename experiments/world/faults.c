/*
 * `shoal-sim faults`: scripts of seeds, one run or many, and the short script of a failing one.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/world/run_internal.h"
#include "shared/base/canary.h"
#include "shared/base/clock.h"

#define SHRINK_RUNS_MAX 400u

/* ---- scripts ---- */

static bool is_listed(const char *list, const char *name)
{
    size_t n = strlen(name);
    for (const char *at = list; *at;) {
        size_t length = strcspn(at, ", ");
        if (length == n && strncmp(at, name, n) == 0)
            return true;
        at += length;
        at += strspn(at, ", ");
    }
    return false;
}

static sh_status check_faults(const char *list, sh_error *err)
{
    if (strcmp(list, "on") == 0 || strcmp(list, "off") == 0)
        return SH_OK;
    for (const char *at = list; *at;) {
        size_t length = strcspn(at, ", ");
        bool known = false;
        for (int k = 0; k < WORLD_FAULT_KINDS && !known; k++) {
            const char *name = world_fault_name((world_fault_kind)k);
            known = strlen(name) == length && strncmp(at, name, length) == 0;
        }
        if (!known)
            return sh_fail(err, SH_ERR_USAGE,
                           "--faults: \"%.*s\" is no kind of fault; \"on\", \"off\" or kinds like "
                           "drop,crash,torn",
                           (int)length, at);
        at += length;
        at += strspn(at, ", ");
    }
    return SH_OK;
}

sh_status world_script_of(const world_options *o, uint64_t seed, world_script *out, sh_error *err)
{
    if (o->script)
        return world_script_read(o->script, out, err);
    if (strcmp(o->faults, "off") == 0) {
        *out = (world_script){.seed = seed, .nodes = (uint32_t)o->nodes, .days = (uint32_t)o->days};
        return SH_OK;
    }
    SH_TRY(world_script_make(seed, (uint32_t)o->nodes, (uint32_t)o->days, out, err));
    if (strcmp(o->faults, "on") == 0)
        return SH_OK;
    size_t n = 0;
    for (size_t k = 0; k < out->n; k++)
        if (is_listed(o->faults, world_fault_name(out->faults[k].kind)))
            out->faults[n++] = out->faults[k];
    out->n = n;
    return SH_OK;
}

/* ---- many seeds ---- */

typedef struct {
    uint64_t hash, violations;
} seed_line;

typedef struct {
    const world_options *options;
    const world_fleet *fleet;
    atomic_uint next;
    uint32_t n;
    seed_line *lines; /* [n], each written once */
    pthread_mutex_t lock;
    world_summary *sum; /* under lock, as the rest */
    uint64_t first;     /* failing, offset from the first seed; n: none */
    sh_status status;
    sh_error err;
} campaign;

static void add_result(campaign *c, uint32_t at, const world_result *r)
{
    world_summary *s = c->sum;
    c->lines[at] = (seed_line){r->hash, r->violations};
    pthread_mutex_lock(&c->lock);
    s->seeds_run++;
    s->violations += r->violations;
    s->simulated_seconds += (double)r->simulated_ms / 1000;
    s->node_days += (double)r->nodes * (double)r->days;
    world_add_counts(&s->counts, &r->counts);
    if (s->rss_bytes_per_node == 0 && r->rss_peak > r->rss_before)
        s->rss_bytes_per_node = (double)(r->rss_peak - r->rss_before) / (double)r->nodes;
    if (r->violations > 0 && at < c->first) {
        c->first = at;
        s->first = *r;
    } else if (c->first == c->n) {
        s->first = *r;
    }
    world_progress_seeds(c->options, s->seeds_run, c->n, s->violations);
    pthread_mutex_unlock(&c->lock);
}

static void *run_seeds(void *arg)
{
    campaign *c = arg;
    uint32_t at;
    while ((at = atomic_fetch_add(&c->next, 1)) < c->n) {
        world_script script = {0};
        world_result result;
        sh_error err = {0};
        uint32_t threads = c->n == 1 ? (uint32_t)c->options->threads : 1;
        sh_status status =
            world_script_of(c->options, (uint64_t)c->options->seed + at, &script, &err);
        if (status == SH_OK)
            status = world_run(c->options, c->fleet, &script, threads, &result, &err);
        world_script_release(&script);
        if (status == SH_OK) {
            add_result(c, at, &result);
            continue;
        }
        pthread_mutex_lock(&c->lock);
        if (c->status == SH_OK) {
            c->status = status;
            c->err = err;
        }
        pthread_mutex_unlock(&c->lock);
        atomic_store(&c->next, c->n);
    }
    return NULL;
}

static sh_status run_campaign(campaign *c, sh_error *err)
{
    pthread_t threads[WORLD_THREADS_MAX];
    uint32_t n = 0, want = c->n == 1 ? 1 : (uint32_t)c->options->threads;
    while (n + 1 < want && pthread_create(&threads[n], NULL, run_seeds, c) == 0)
        n++;
    run_seeds(c);
    while (n > 0)
        pthread_join(threads[--n], NULL);
    if (c->status != SH_OK)
        *err = c->err;
    return c->status;
}

/* ---- the short script ---- */

typedef struct {
    const world_options *options;
    const world_fleet *fleet;
    world_rule rule; /* of the violation that is looked for */
} shrinking;

static sh_status try_script(void *arg, const world_script *script, bool *fails, sh_error *err)
{
    const shrinking *s = arg;
    world_script copy = {0};
    world_result result;
    SH_TRY(world_script_copy(script, &copy, err));
    SH_TRY(world_run(s->options, s->fleet, &copy, 1, &result, err));
    *fails = false;
    for (size_t k = 0; k < result.n_kept; k++)
        *fails = *fails || result.kept[k].rule == s->rule;
    return SH_OK;
}

static sh_status print_script(const campaign *c, sh_error *err)
{
    world_summary *sum = c->sum;
    world_script script = {0}, small = {0};
    sh_status status = SH_OK;
    shrinking s = {c->options, c->fleet, sum->first.n_kept > 0 ? sum->first.kept[0].rule : 0};
    SH_GOTO(world_script_of(c->options, sum->first.seed, &script, err));
    sh_buf_init(&sum->script, WORLD_SCRIPT_BYTES_MAX);
    if (c->options->shrink) {
        SH_GOTO(world_script_shrink(&script, try_script, &s, SHRINK_RUNS_MAX, &small, NULL, err));
        SH_GOTO(world_script_print(&small, &sum->script, err));
    } else {
        SH_GOTO(world_script_print(&script, &sum->script, err));
    }
cleanup:
    world_script_release(&script);
    world_script_release(&small);
    return status;
}

/* ---- all of it ---- */

static sh_status set_canary(const world_options *o, sh_error *err)
{
    if (!o->canary)
        return SH_OK;
#ifdef SHOAL_CANARIES
    sh_canary canary = sh_canary_find(o->canary);
    if (canary == SH_CANARIES)
        return sh_fail(err, SH_ERR_USAGE,
                       "--canary: \"%s\" is no known bug; --canary list "
                       "names them",
                       o->canary);
    sh_canary_on = canary;
    return SH_OK;
#else
    return sh_fail(err, SH_ERR_USAGE, "--canary: this build has no known bugs");
#endif
}

static sh_status check(const world_options *o, sh_error *err)
{
    world_script script = {0};
    SH_TRY(check_faults(o->faults, err));
    if (!o->script)
        return SH_OK;
    if (o->seeds > 1)
        return sh_fail(err, SH_ERR_USAGE, "--seeds: a script is of one seed");
    SH_TRY(world_script_read(o->script, &script, err));
    world_script_release(&script);
    return SH_OK;
}

sh_status world_faults(const world_options *o, bool *failed, sh_error *err)
{
    world_fleet fleet;
    world_summary sum = {0};
    campaign c = {.options = o, .fleet = &fleet, .n = (uint32_t)o->seeds, .sum = &sum};
    sh_sha256_state hash;
    sh_status status = SH_OK;
    uint64_t began = sh_clock_mono_ms();
    SH_TRY(check(o, err));
    SH_TRY(set_canary(o, err));
    SH_TRY(world_fleet_read(&o->devices, &fleet, err));
    c.first = c.n;
    c.lines = sh_calloc(c.n, sizeof *c.lines);
    if (!c.lines)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u seeds", c.n);
    pthread_mutex_init(&c.lock, NULL);
    SH_GOTO(run_campaign(&c, err));
    sh_sha256_init(&hash);
    for (uint32_t k = 0; k < c.n; k++)
        sh_sha256_update(&hash, &c.lines[k].hash, sizeof c.lines[k].hash);
    sum.hash = sh_sha256_final(&hash);
    sum.failing = c.first < c.n;
    sum.first_failing_seed = sum.first.seed;
    if (sum.failing)
        SH_GOTO(print_script(&c, err));
    sum.wall_seconds = (double)(sh_clock_mono_ms() - began) / 1000;
    world_report(o, &sum);
    *failed = sum.violations > 0;
cleanup:
    world_progress_end();
    pthread_mutex_destroy(&c.lock);
    free(c.lines);
    sh_buf_release(&sum.script);
    return status;
}
