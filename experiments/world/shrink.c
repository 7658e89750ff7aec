/*
 * Shrinking a failing script: ddmin (Zeller and Hildebrandt, 2002, figure 4) over its faults, with
 * complements only, since one fault of a set rarely fails by itself; then each duration is halved
 * while it fails still.
 */
#include <stdlib.h>

#include "experiments/world/script.h"

#define DURATION_MIN_MS 1000u

typedef struct {
    world_run_fn run;
    void *arg;
    uint32_t runs, runs_max;
    world_script best; /* the smallest that failed; owned */
    sh_error *err;
} shrinker;

/* Runs the candidate; when it fails it is the best one, and taken over. */
static sh_status try_it(shrinker *s, world_script *candidate, bool *fails)
{
    *fails = false;
    if (s->runs >= s->runs_max)
        return SH_OK;
    s->runs++;
    SH_TRY(s->run(s->arg, candidate, fails, s->err));
    if (*fails) {
        world_script_release(&s->best);
        s->best = *candidate;
        *candidate = (world_script){0};
    }
    return SH_OK;
}

/* The best one without its faults [from, to). */
static sh_status try_without(shrinker *s, size_t from, size_t to, bool *fails)
{
    world_script candidate = {.seed = s->best.seed, .nodes = s->best.nodes, .days = s->best.days};
    sh_status status = SH_OK;
    for (size_t i = 0; i < s->best.n && status == SH_OK; i++)
        if (i < from || i >= to)
            status = world_script_add(&candidate, &s->best.faults[i], s->err);
    if (status == SH_OK)
        status = try_it(s, &candidate, fails);
    world_script_release(&candidate);
    return status;
}

static sh_status fewer_faults(shrinker *s)
{
    size_t parts = 2;
    bool fails = false;
    if (s->best.n > 0) /* often the faults were not needed at all */
        SH_TRY(try_without(s, 0, s->best.n, &fails));
    while (s->best.n > 0 && s->runs < s->runs_max) {
        parts = SH_MIN(parts, s->best.n);
        size_t n = s->best.n;
        fails = false;
        for (size_t i = 0; i < parts && !fails && s->runs < s->runs_max; i++)
            SH_TRY(try_without(s, n * i / parts, n * (i + 1) / parts, &fails));
        if (fails)
            parts = parts > 2 ? parts - 1 : 2;
        else if (parts == n)
            break; /* every one of them is needed */
        else
            parts *= 2;
    }
    return SH_OK;
}

static sh_status shorter(shrinker *s)
{
    for (size_t i = 0; i < s->best.n; i++) {
        bool fails = true;
        while (fails && s->best.faults[i].for_ms / 2 >= DURATION_MIN_MS && s->runs < s->runs_max) {
            world_script candidate = {0};
            SH_TRY(world_script_copy(&s->best, &candidate, s->err));
            candidate.faults[i].for_ms /= 2;
            sh_status status = try_it(s, &candidate, &fails);
            world_script_release(&candidate);
            SH_TRY(status);
        }
    }
    return SH_OK;
}

sh_status world_script_shrink(const world_script *script, world_run_fn run, void *arg,
                              uint32_t runs_max, world_script *out, uint32_t *runs, sh_error *err)
{
    shrinker s = {.run = run, .arg = arg, .runs_max = runs_max, .err = err};
    SH_TRY(world_script_copy(script, &s.best, err));
    sh_status status = fewer_faults(&s);
    if (status == SH_OK)
        status = shorter(&s);
    if (status != SH_OK) {
        world_script_release(&s.best);
        return status;
    }
    *out = s.best;
    if (runs)
        *runs = s.runs;
    return SH_OK;
}
