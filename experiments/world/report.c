/* What `shoal-sim faults` says: one JSON object, or a short text; progress on a terminal. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "experiments/world/run_internal.h"
#include "shared/base/clock.h"

#define PROGRESS_MS 200u

/* ---- progress ---- */

static bool drawn; /* a line stands on stderr; one thread draws at a time */
static uint64_t drawn_ms;

static bool due(void)
{
    uint64_t now = sh_clock_mono_ms();
    if (!isatty(STDERR_FILENO) || now < drawn_ms + PROGRESS_MS)
        return false;
    drawn_ms = now;
    drawn = true;
    return true;
}

void world_progress_run(const world *w, uint64_t now_ms)
{
    if (w->options->seeds > 1 || !due())
        return;
    fprintf(stderr, "\rday %.2f of %u, %" PRIu64 " violations ",
            (double)now_ms / (double)WORLD_DAY_MS, w->script.days,
            world_oracle_violations(w->oracle));
}

void world_progress_seeds(const world_options *options, uint64_t done, uint64_t n,
                          uint64_t violations)
{
    if (options->seeds == 1 || !due())
        return;
    fprintf(stderr, "\rseed %" PRIu64 " of %" PRIu64 ", %" PRIu64 " violations ", done, n,
            violations);
}

void world_progress_end(void)
{
    if (drawn)
        fputc('\n', stderr);
    drawn = false;
}

/* ---- the result ---- */

typedef struct {
    const char *name;
    uint64_t n;
} field;

static size_t fields_of(const world_counts *c, field out[32])
{
    const field f[] = {
        {"events", c->events},
        {"node_steps", c->node_steps},
        {"coordinator_steps", c->coord_steps},
        {"commits", c->commits},
        {"boots", c->boots},
        {"inferences", c->inferences},
        {"inferences_dropped_full", c->inferences_full},
        {"feedback", c->feedback},
        {"checkins", c->checkins},
        {"windows", c->windows},
        {"alarms", c->alarms},
        {"updates", c->updates},
        {"updates_acked", c->updates_acked},
        {"merges", c->merges},
        {"releases", c->releases},
        {"candidates_refused", c->candidates_refused},
        {"activations", c->activations},
        {"confirmations", c->confirmations},
        {"rejected", c->rejected},
        {"messages_up", c->messages_up},
        {"bytes_up", c->bytes_up},
        {"messages_down", c->messages_down},
        {"bytes_down", c->bytes_down},
        {"acks", c->acks},
        {"told_later", c->told_later},
    };
    memcpy(out, f, sizeof f);
    return SH_COUNT(f);
}

static json_t *violations_of(const world_result *r)
{
    json_t *list = json_array();
    for (size_t k = 0; k < r->n_kept; k++) {
        const world_violation *v = &r->kept[k];
        json_t *one = json_object();
        sh_json_set(one, "rule", json_string(world_rule_name(v->rule)));
        sh_json_set(one, "at_ms", sh_json_uint(v->at_ms));
        if (v->target == WORLD_AGGREGATOR)
            sh_json_set(one, "target", json_string("aggregator"));
        else
            sh_json_set(one, "target", sh_json_uint(v->target));
        sh_json_set(one, "text", json_string(v->text));
        json_array_append_new(list, one);
    }
    return list;
}

static double per_node_day(const world_summary *s, uint64_t n)
{
    return s->node_days > 0 ? (double)n / s->node_days : 0;
}

static void print_json(const world_options *o, const world_summary *s)
{
    json_t *j = json_object(), *faults = json_object(), *rates = json_object();
    const world_counts *c = &s->counts;
    field f[32];
    size_t n = fields_of(c, f);
    sh_json_set(j, "seeds_run", sh_json_uint(s->seeds_run));
    sh_json_set(j, "violations", sh_json_uint(s->violations));
    sh_json_set(j, "first_failing_seed",
                s->failing ? sh_json_uint(s->first_failing_seed) : json_null());
    sh_json_set(j, "result_hash", sh_json_hash(&s->hash));
    sh_json_set(j, "simulated_seconds", sh_json_number(s->simulated_seconds));
    sh_json_set(j, "wall_seconds", sh_json_number(s->wall_seconds));
    sh_json_set(j, "rss_bytes_per_node", sh_json_number(s->rss_bytes_per_node));
    sh_json_set(j, "resting_bytes_per_node",
                o->seeds == 1 ? sh_json_number((double)s->first.resting_bytes /
                                               (double)SH_MAX(s->first.nodes, (uint64_t)1))
                              : json_null());
    for (int k = 0; k < WORLD_FAULT_KINDS; k++)
        sh_json_set(faults, world_fault_name((world_fault_kind)k), sh_json_uint(c->faults[k]));
    sh_json_set(j, "faults", faults);
    sh_json_set(j, "first_seed", sh_json_uint((uint64_t)o->seed));
    sh_json_set(j, "nodes", sh_json_uint(s->first.nodes));
    sh_json_set(j, "threads", sh_json_uint((uint64_t)o->threads));
    sh_json_set(rates, "checkins", sh_json_number(per_node_day(s, c->checkins)));
    sh_json_set(rates, "windows", sh_json_number(per_node_day(s, c->windows)));
    sh_json_set(rates, "updates", sh_json_number(per_node_day(s, c->updates)));
    sh_json_set(j, "per_node_day", rates);
    for (size_t k = 0; k < n; k++)
        sh_json_set(j, f[k].name, sh_json_uint(f[k].n));
    sh_json_set(j, "store_bytes_node_max", sh_json_uint(s->first.store_bytes_node_max));
    sh_json_set(j, "rested_seconds", sh_json_number((double)s->first.rested_ms / 1000));
    sh_json_set(j, "first_violations", violations_of(&s->first));
    if (s->script.len > 0)
        sh_json_set(j, "script", json_stringn((const char *)s->script.data, s->script.len));
    json_dumpf(j, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(j);
}

void world_report(const world_options *o, const world_summary *s)
{
    field f[32];
    char hash[SH_HASH_HEX_BYTES];
    if (o->json) {
        print_json(o, s);
        return;
    }
    sh_hex(s->hash.b, sizeof s->hash.b, hash);
    printf("%" PRIu64 " seed%s, %" PRIu64 " violations, %.0f virtual s in %.1f s, hash %.16s\n",
           s->seeds_run, s->seeds_run == 1 ? "" : "s", s->violations, s->simulated_seconds,
           s->wall_seconds, hash);
    size_t n = fields_of(&s->counts, f);
    for (size_t k = 0; k < n; k++)
        printf("  %-24s %12" PRIu64 "\n", f[k].name, f[k].n);
    for (int k = 0; k < WORLD_FAULT_KINDS; k++)
        if (s->counts.faults[k] > 0)
            printf("  fault %-18s %12" PRIu64 "\n", world_fault_name((world_fault_kind)k),
                   s->counts.faults[k]);
    if (s->failing)
        printf("first failing seed %" PRIu64 "\n", s->first_failing_seed);
    for (size_t k = 0; k < s->first.n_kept; k++)
        printf("  %s at %" PRIu64 " ms, %s %" PRIu32 ": %s\n",
               world_rule_name(s->first.kept[k].rule), s->first.kept[k].at_ms,
               s->first.kept[k].target == WORLD_AGGREGATOR ? "aggregator" : "node",
               s->first.kept[k].target, s->first.kept[k].text);
    if (s->script.len > 0)
        printf("%.*s", (int)s->script.len, (const char *)s->script.data);
}
