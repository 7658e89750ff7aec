/*
 * Fault schedules: made from a seed, as text.
 */
#include "experiments/world/script.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/base/rng.h"

#define HOUR_MS          UINT64_C(3600000)
#define DAY_MS           (24 * HOUR_MS)
#define PURPOSE_SCRIPT   0x73637231u
#define FAULTS_NODE_DAY  0.02  /* of each kind, beside the first one */
#define LIARS_SHARE      4u    /* at most one node in so many lies */
#define LIARS_PER        50u   /* one in so many does in a large fleet */
#define CENTER_DAY       2.0   /* of each kind that every node feels, at the aggregator */
#define ALL_SHARE        16u   /* at most one link fault in so many is everybody's */
#define ALL_DAY          0.125 /* of each kind in a large fleet: it is not cut off more often */
#define TORN_SHARE       3u    /* at most one torn commit in so many is the aggregator's */
#define DOWN_SHARE       2u    /* no node is away for more than one part in so many */
#define QUIET_PARTS      8u    /* the last one of them has no faults */
#define NUMBER_WRITE_MAX 40u   /* writes before a crash */

enum { LINK = 1, LIE = 2, DOWN = 4 /* the node is away meanwhile */, CENTER = 8 };

/* What a schedule draws for each kind: for_ms and number uniformly in [min, max], a rate too. */
static const struct kind {
    const char *name;
    unsigned flags;
    uint64_t for_min, for_max;
    double rate_min, rate_max;
    uint64_t number_min, number_max;
} kinds[WORLD_FAULT_KINDS] = {
    [WORLD_DROP] = {"drop", LINK, HOUR_MS / 2, 4 * HOUR_MS, 0.05, 0.5, 0, 0},
    [WORLD_DUPLICATE] = {"duplicate", LINK, HOUR_MS / 2, 6 * HOUR_MS, 0.1, 0.9, 1, 3 * HOUR_MS},
    [WORLD_REORDER] = {"reorder", LINK, HOUR_MS / 2, 4 * HOUR_MS, 0.1, 0.9, 100, 60000},
    [WORLD_DELAY] = {"delay", LINK, HOUR_MS / 2, 4 * HOUR_MS, 0, 0, 100, 120000},
    [WORLD_ONE_WAY_UP] = {"one-way-up", LINK | DOWN, HOUR_MS / 4, 3 * HOUR_MS, 0, 0, 0, 0},
    [WORLD_ONE_WAY_DOWN] = {"one-way-down", LINK | DOWN, HOUR_MS / 4, 3 * HOUR_MS, 0, 0, 0, 0},
    [WORLD_PARTITION] = {"partition", LINK | DOWN, HOUR_MS / 4, 6 * HOUR_MS, 0, 0, 0, 0},
    [WORLD_SLOW] = {"slow", LINK, HOUR_MS / 2, 4 * HOUR_MS, 0, 0, 500, 20000},
    [WORLD_CORRUPT_MESSAGE] = {"corrupt-message", LINK, HOUR_MS / 2, 4 * HOUR_MS, 0.02, 0.3, 0,
                               UINT32_MAX},
    [WORLD_CRASH] = {"crash", DOWN, 1000, HOUR_MS, 0, 0, 0, 0},
    [WORLD_CRASH_AGGREGATOR] = {"crash-aggregator", CENTER, 1000, HOUR_MS / 4, 0, 0, 1,
                                NUMBER_WRITE_MAX},
    [WORLD_TORN] = {"torn", DOWN, 1000, HOUR_MS / 2, 0, 1, 1, NUMBER_WRITE_MAX},
    [WORLD_DISK_FULL] = {"disk-full", 0, HOUR_MS / 4, 3 * HOUR_MS, 0, 0, 0, 4096},
    [WORLD_CLOCK_SKEW] = {"clock-skew", 0, HOUR_MS, 12 * HOUR_MS, -0.05, 0.05, 0, 0},
    [WORLD_CLOCK_JUMP] = {"clock-jump", 0, 0, 0, 0, 0, 1, 0},
    [WORLD_CORRUPT_CHUNK] = {"corrupt-chunk", 0, HOUR_MS, 6 * HOUR_MS, 0.5, 1, 0, 65535},
    [WORLD_LIE_HASH] = {"lie-hash", LIE, 6 * HOUR_MS, DAY_MS, 0.2, 1, 0, 0},
    [WORLD_LIE_REPLAY] = {"lie-replay", LIE, 6 * HOUR_MS, DAY_MS, 0.2, 1, 0, 0},
    [WORLD_LIE_VERSION] = {"lie-version", LIE, 6 * HOUR_MS, DAY_MS, 0.2, 1, 0, UINT32_MAX},
    [WORLD_LIE_POISON] = {"lie-poison", LIE, 6 * HOUR_MS, DAY_MS, 0.2, 1, 0, 0},
    [WORLD_CLONE] = {"clone", 0, HOUR_MS, DAY_MS, 0, 0, 0, 0},
    [WORLD_RESTORE] = {"restore", DOWN, 1000, HOUR_MS / 2, 0, 0, HOUR_MS / 4, 12 * HOUR_MS},
    [WORLD_CORRUPT_STORE] = {"corrupt-store", 0, 0, 0, 0, 0, 0, 0},
};

const char *world_fault_name(world_fault_kind kind)
{
    return kind < WORLD_FAULT_KINDS ? kinds[kind].name : "?";
}

bool world_fault_is_lie(world_fault_kind kind)
{
    return kind < WORLD_FAULT_KINDS && kinds[kind].flags & LIE;
}

bool world_fault_is_link(world_fault_kind kind)
{
    return kind < WORLD_FAULT_KINDS && kinds[kind].flags & LINK;
}

void world_script_release(world_script *script)
{
    free(script->faults);
    *script = (world_script){0};
}

sh_status world_script_add(world_script *script, const world_fault *fault, sh_error *err)
{
    void *faults = script->faults;
    sh_status status =
        sh_array_reserve(&faults, &script->cap, script->n + 1, sizeof *fault, WORLD_FAULTS_MAX);
    script->faults = faults;
    if (status != SH_OK)
        return sh_fail(err, status, "fault script: %zu faults, at most %u", script->n + 1,
                       WORLD_FAULTS_MAX);
    script->faults[script->n++] = *fault;
    return SH_OK;
}

sh_status world_script_copy(const world_script *script, world_script *out, sh_error *err)
{
    world_script copy = {.seed = script->seed, .nodes = script->nodes, .days = script->days};
    for (size_t i = 0; i < script->n; i++) {
        sh_status status = world_script_add(&copy, &script->faults[i], err);
        if (status != SH_OK) {
            world_script_release(&copy);
            return status;
        }
    }
    *out = copy;
    return SH_OK;
}

/* ---- from a seed ---- */

typedef struct {
    world_script *script;
    sh_rng rng;
    uint32_t *order;   /* the nodes, shuffled: liars first */
    uint64_t *down_ms; /* of each node, so far */
    uint32_t liars, honest;
    uint64_t quiet_ms;
} maker;

uint64_t world_script_quiet_ms(uint32_t days)
{
    return days * DAY_MS / QUIET_PARTS * (QUIET_PARTS - 1);
}

static uint64_t between(sh_rng *rng, uint64_t min, uint64_t max)
{
    return max <= min ? min : min + sh_rng_below(rng, max - min + 1);
}

static double between_real(sh_rng *rng, double min, double max)
{
    return min + (max - min) * sh_rng_unit(rng);
}

/* One of the n faults of a kind is such a one: at most one in `share`, and about `day` a day. */
static bool draw_common(maker *m, uint64_t n, uint32_t share, double day)
{
    double of_all = day * m->script->days / (double)n;
    return sh_rng_unit(&m->rng) < SH_MIN(1.0 / share, of_all);
}

static uint32_t draw_target(maker *m, world_fault_kind kind, uint64_t n)
{
    unsigned flags = kinds[kind].flags;
    uint32_t nodes = m->script->nodes;
    if (flags & CENTER)
        return WORLD_AGGREGATOR;
    if (flags & LIE)
        return m->order[sh_rng_below(&m->rng, m->liars)];
    if (flags & LINK && draw_common(m, n, ALL_SHARE, ALL_DAY))
        return WORLD_ALL;
    if (kind == WORLD_TORN && draw_common(m, n, TORN_SHARE, CENTER_DAY / 2))
        return WORLD_AGGREGATOR;
    if (kind == WORLD_CLONE || kind == WORLD_RESTORE)
        return m->order[m->liars + sh_rng_below(&m->rng, m->honest)];
    return m->order[sh_rng_below(&m->rng, nodes)];
}

/* A jump: seconds to years, either way. */
static uint64_t draw_jump(sh_rng *rng)
{
    static const uint64_t sizes[] = {10000, HOUR_MS, DAY_MS, 400 * DAY_MS, 20 * 365 * DAY_MS};
    uint64_t size = sizes[sh_rng_below(rng, SH_COUNT(sizes))];
    int64_t jump = (int64_t)between(rng, size / 10, size);
    return (uint64_t)(sh_rng_below(rng, 2) ? jump : -jump);
}

/* One of the n of its kind. */
static sh_status make_one(maker *m, world_fault_kind kind, uint64_t n, sh_error *err)
{
    const struct kind *k = &kinds[kind];
    uint64_t room = m->quiet_ms;
    world_fault f = {
        .kind = kind,
        .target = draw_target(m, kind, n),
        .for_ms = SH_MIN(between(&m->rng, k->for_min, k->for_max), room / 4),
        .rate = between_real(&m->rng, k->rate_min, k->rate_max),
        .number = kind == WORLD_CLOCK_JUMP ? draw_jump(&m->rng)
                                           : between(&m->rng, k->number_min, k->number_max),
    };
    if (f.target == WORLD_ALL)
        f.for_ms /= 4; /* the fleet has to get on */
    f.at_ms = sh_rng_below(&m->rng, room - f.for_ms);
    if (kind == WORLD_RESTORE) {
        f.number = SH_MIN(f.number, room / 8);
        f.at_ms = SH_MAX(f.at_ms, f.number); /* there was something by then */
        f.at_ms = SH_MIN(f.at_ms, room - f.for_ms);
    }
    if (k->flags & DOWN && f.target < m->script->nodes) {
        if (m->down_ms[f.target] + f.for_ms > room / DOWN_SHARE)
            f.for_ms = 0; /* it has had its share */
        m->down_ms[f.target] += f.for_ms;
    }
    return world_script_add(m->script, &f, err);
}

static int fault_order(const void *a, const void *b)
{
    const world_fault *x = a, *y = b;
    if (x->at_ms != y->at_ms)
        return x->at_ms < y->at_ms ? -1 : 1;
    if (x->kind != y->kind)
        return x->kind < y->kind ? -1 : 1;
    return (x->target > y->target) - (x->target < y->target);
}

static sh_status make_all(maker *m, sh_error *err)
{
    double days = m->script->days, of_nodes = FAULTS_NODE_DAY * m->script->nodes * days;
    for (int kind = 0; kind < WORLD_FAULT_KINDS; kind++) {
        if (kinds[kind].flags & LIE && m->liars == 0)
            continue;
        bool center = kinds[kind].flags & CENTER;
        double more = center ? SH_MIN(of_nodes, days) : of_nodes; /* there is one aggregator */
        uint64_t n = 1 + (uint64_t)(2 * more * sh_rng_unit(&m->rng));
        if (center || kind == WORLD_TORN)
            n += (uint64_t)(CENTER_DAY * days); /* what every node depends on */
        for (uint64_t i = 0; i < n; i++)
            SH_TRY(make_one(m, (world_fault_kind)kind, n, err));
    }
    if (m->script->n > 0)
        qsort(m->script->faults, m->script->n, sizeof(world_fault), fault_order);
    return SH_OK;
}

sh_status world_script_make(uint64_t seed, uint32_t nodes, uint32_t days, world_script *out,
                            sh_error *err)
{
    if (nodes == 0 || nodes > WORLD_NODES_MAX || days == 0 || days > WORLD_DAYS_MAX)
        return sh_fail(err, SH_ERR_USAGE, "faults: %u nodes for %u days: 1 to %u, 1 to %u", nodes,
                       days, WORLD_NODES_MAX, WORLD_DAYS_MAX);
    world_script script = {.seed = seed, .nodes = nodes, .days = days};
    maker m = {.script = &script, .quiet_ms = world_script_quiet_ms(days)};
    m.liars = SH_MIN(nodes / LIARS_SHARE, SH_MAX(4u, nodes / LIARS_PER));
    m.honest = nodes - m.liars;
    m.order = sh_calloc(nodes, sizeof *m.order);
    m.down_ms = sh_calloc(nodes, sizeof *m.down_ms);
    sh_status status = SH_OK;
    if (!m.order || !m.down_ms)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "faults: no memory for %u nodes", nodes));
    sh_rng_init(&m.rng, seed, 0, PURPOSE_SCRIPT);
    for (uint32_t i = 0; i < nodes; i++)
        m.order[i] = i;
    sh_rng_shuffle(&m.rng, m.order, nodes);
    SH_GOTO(make_all(&m, err));
    *out = script;
    script = (world_script){0};
cleanup:
    free(m.order);
    free(m.down_ms);
    world_script_release(&script);
    return status;
}

/* ---- text ---- */

static sh_status print_fault(const world_fault *f, sh_buf *out)
{
    SH_TRY(sh_buf_printf(out, "at %" PRIu64 " for %" PRIu64 " %s ", f->at_ms, f->for_ms,
                         world_fault_name(f->kind)));
    if (f->target == WORLD_AGGREGATOR)
        SH_TRY(sh_buf_printf(out, "aggregator"));
    else if (f->target == WORLD_ALL)
        SH_TRY(sh_buf_printf(out, "all"));
    else
        SH_TRY(sh_buf_printf(out, "node %u", f->target));
    return sh_buf_printf(out, " rate %.17g number %" PRIu64 "\n", f->rate, f->number);
}

sh_status world_script_print(const world_script *script, sh_buf *out, sh_error *err)
{
    sh_status status = sh_buf_printf(out, "shoal-faults 1\nseed %" PRIu64 " nodes %u days %u\n",
                                     script->seed, script->nodes, script->days);
    for (size_t i = 0; i < script->n && status == SH_OK; i++)
        status = print_fault(&script->faults[i], out);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "fault script: its text is too long");
}

typedef struct {
    const char *p, *end;
    unsigned line;
    char word[64]; /* the last one taken; empty at the end of the line */
} scanner;

static const char *take(scanner *s)
{
    size_t n = 0;
    while (s->p < s->end && (*s->p == ' ' || *s->p == '\t' || *s->p == '\r'))
        s->p++;
    while (s->p<s->end && * s->p> ' ' && *s->p != '#' && n + 1 < sizeof s->word)
        s->word[n++] = *s->p++;
    s->word[n] = '\0';
    return s->word;
}

static sh_status bad(const scanner *s, const char *want, sh_error *err)
{
    return sh_fail(err, SH_ERR_INVALID, "fault script: line %u: %s expected, not '%s'", s->line,
                   want, s->word);
}

static sh_status take_word(scanner *s, const char *want, sh_error *err)
{
    return strcmp(take(s), want) == 0 ? SH_OK : bad(s, want, err);
}

static sh_status take_number(scanner *s, uint64_t max, uint64_t *out, sh_error *err)
{
    uint64_t x = 0;
    const char *w = take(s);
    bool good = *w != '\0';
    for (; *w && good; w++) {
        good = *w >= '0' && *w <= '9' && x <= (UINT64_MAX - (uint64_t)(*w - '0')) / 10;
        x = 10 * x + (uint64_t)(*w - '0');
    }
    if (!good || x > max)
        return bad(s, "a number in its range", err);
    *out = x;
    return SH_OK;
}

static sh_status take_named(scanner *s, const char *name, uint64_t max, uint64_t *out,
                            sh_error *err)
{
    SH_TRY(take_word(s, name, err));
    return take_number(s, max, out, err);
}

static sh_status take_target(scanner *s, uint32_t nodes, uint32_t *out, sh_error *err)
{
    uint64_t node = 0;
    take(s);
    if (strcmp(s->word, "aggregator") == 0) {
        node = WORLD_AGGREGATOR;
    } else if (strcmp(s->word, "all") == 0) {
        node = WORLD_ALL;
    } else {
        if (strcmp(s->word, "node") != 0)
            return bad(s, "'node', 'all' or 'aggregator'", err);
        SH_TRY(take_number(s, nodes - 1, &node, err));
    }
    *out = (uint32_t)node;
    return SH_OK;
}

static sh_status take_fault(scanner *s, const world_script *script, world_fault *f, sh_error *err)
{
    uint64_t most = (uint64_t)WORLD_DAYS_MAX * DAY_MS;
    if (strcmp(s->word, "at") != 0)
        return bad(s, "'at'", err);
    SH_TRY(take_number(s, most, &f->at_ms, err));
    SH_TRY(take_named(s, "for", most, &f->for_ms, err));
    int kind = 0;
    for (take(s); kind < WORLD_FAULT_KINDS && strcmp(s->word, kinds[kind].name) != 0; kind++)
        ;
    if (kind == WORLD_FAULT_KINDS)
        return bad(s, "a kind of fault", err);
    f->kind = (world_fault_kind)kind;
    SH_TRY(take_target(s, script->nodes, &f->target, err));
    if (f->kind == WORLD_CLONE && f->target >= script->nodes)
        return bad(s, "one node to clone", err);
    SH_TRY(take_word(s, "rate", err));
    char *end = NULL;
    f->rate = strtod(take(s), &end);
    if (end == s->word || *end != '\0' || !(f->rate >= -1 && f->rate <= 1))
        return bad(s, "a rate from -1 to 1", err);
    return take_named(s, "number", UINT64_MAX, &f->number, err);
}

static sh_status take_line(scanner *s, world_script *script, unsigned *part, sh_error *err)
{
    uint64_t x = 0;
    world_fault fault = {0};
    if (*take(s) == '\0')
        return SH_OK; /* empty, or a comment */
    switch ((*part)++) {
    case 0:
        if (strcmp(s->word, "shoal-faults") != 0)
            return bad(s, "'shoal-faults 1'", err);
        return take_word(s, "1", err);
    case 1:
        if (strcmp(s->word, "seed") != 0)
            return bad(s, "'seed'", err);
        SH_TRY(take_number(s, UINT64_MAX, &script->seed, err));
        SH_TRY(take_named(s, "nodes", WORLD_NODES_MAX, &x, err));
        script->nodes = (uint32_t)x;
        SH_TRY(take_named(s, "days", WORLD_DAYS_MAX, &x, err));
        script->days = (uint32_t)x;
        return script->nodes && script->days ? SH_OK : bad(s, "at least one node and day", err);
    default:
        SH_TRY(take_fault(s, script, &fault, err));
        return world_script_add(script, &fault, err);
    }
}

sh_status world_script_parse(const char *text, size_t n, world_script *out, sh_error *err)
{
    world_script script = {0};
    scanner s = {.p = text, .line = 1};
    const char *end = text + n;
    unsigned part = 0;
    sh_status status = SH_OK;
    for (; s.p < end; s.line++) {
        const char *newline = memchr(s.p, '\n', (size_t)(end - s.p));
        s.end = newline ? newline : end;
        SH_GOTO(take_line(&s, &script, &part, err));
        if (*take(&s) != '\0' || (s.p < s.end && *s.p != '#'))
            SH_GOTO(bad(&s, "the end of the line", err));
        s.p = newline ? newline + 1 : end;
    }
    if (part < 2)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID,
                        "fault script: it must begin with 'shoal-faults 1' and 'seed'"));
    if (script.n > 0)
        qsort(script.faults, script.n, sizeof(world_fault), fault_order);
    *out = script;
    script = (world_script){0};
cleanup:
    world_script_release(&script);
    return status;
}

sh_status world_script_read(const char *path, world_script *out, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, WORLD_SCRIPT_BYTES_MAX, &text, &n, err));
    sh_status status = world_script_parse((const char *)text, n, out, err);
    free(text);
    return status;
}
