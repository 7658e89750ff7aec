/*
 * Admission: how much of what nodes send is taken in at a time, so that a whole fleet that comes
 * back at once is served in turn. A kind of message (enrolments and check-ins, items, chunks of
 * releases) has a rate and a second's burst. What is over it is answered with ERROR limit, and each
 * answer names the next free slot of that kind, so that those who were told come back one after
 * another and not together. Slots are given at SLOT_SHARE of the rate: the rest is for who was not
 * told. A node that keeps to its slot is let in, with all that it sends in PASS_MS; what it sends
 * before is thrown away, and answered once in TELL_MS.
 *
 * All of it is in memory only: after a crash of the aggregator everybody is new.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define BURST_MS       1000.0
#define SLOT_SHARE     0.75
#define UPLOADS_PER_S  200.0 /* slots of updates that found no place */
#define PASS_MS        10000u
#define PASS_MESSAGES  64u
#define TELL_MS        1000u
#define LOAD_SHARE     0.5
#define SEEN_MS        600000u    /* least period that nodes are counted in */
#define SEEN_BEFORE_MS 604800000u /* who checked in within it before a start is counted */

struct coord_later {
    sh_hash node;
    uint64_t from_ms, told_ms; /* from_ms 0: a free place */
    uint32_t used;             /* messages taken since from_ms */
};

void coord_admit_release(coord_admission *admission)
{
    free(admission->later);
    admission->later = NULL;
}

/* ---- rates ---- */

static double per_second(const sh_coord *c, unsigned rate)
{
    switch (rate) {
    case COORD_RATE_CHECKIN:
        return c->options.checkins_per_s;
    case COORD_RATE_ITEM:
        return c->options.items_per_s;
    case COORD_RATE_SERVED:
        return (double)c->options.served_bytes_per_s / SH_CHUNK_BYTES;
    default:
        return UPLOADS_PER_S / SLOT_SHARE;
    }
}

/* Takes `cost` of a rate; force: also what is not there, which later ones then lack. */
static bool take(sh_coord *c, unsigned which, double cost, uint64_t now_ms, bool force)
{
    coord_rate *rate = &c->admission.rates[which];
    double speed = per_second(c, which), most = SH_MAX(speed * BURST_MS / 1000, 1.0);
    if (speed <= 0)
        return true;
    if (rate->at_ms == 0)
        rate->tokens = most;
    else if (now_ms > rate->at_ms) /* a clock that was set back gives nothing */
        rate->tokens = fmin(most, rate->tokens + speed * (double)(now_ms - rate->at_ms) / 1000);
    rate->at_ms = SH_MAX(now_ms, UINT64_C(1));
    if (!force && rate->tokens < fmin(cost, most))
        return false;
    rate->tokens = fmax(rate->tokens - cost, -most);
    return true;
}

/* ---- "later" ---- */

static struct coord_later *place_of(const coord_admission *a, const sh_hash *node)
{
    uint32_t at;
    memcpy(&at, node->b, sizeof at);
    return &a->later[at % COORD_LATER_PLACES];
}

static sh_status tell(coord_step *s, const sh_hash *node, uint64_t wait_ms, const char *text)
{
    sh_msg msg = {.type = SH_MSG_ERROR,
                  .error = {.code = sh_status_name(SH_ERR_LIMIT),
                            .text = text,
                            .retry_after_ms = SH_MAX(wait_ms, UINT64_C(1))}};
    s->c->admission.told++;
    return coord_send(s, node, &msg);
}

sh_status coord_later(coord_step *s, const sh_hash *node, unsigned which, uint64_t after_ms,
                      const char *text)
{
    coord_admission *a = &s->c->admission;
    coord_rate *rate = &a->rates[which];
    if (a->later == NULL)
        a->later = sh_calloc(COORD_LATER_PLACES, sizeof *a->later);
    if (a->later == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for who comes later");
    double now = (double)s->now_ms, step = 1000 / (SLOT_SHARE * per_second(s->c, which));
    double slot = fmax(rate->slot_ms, now + COORD_LATER_MIN_MS) + step;
    rate->slot_ms = fmin(slot, now + COORD_LATER_MAX_MS); /* past it slots fall together */
    uint64_t wait_ms = (uint64_t)ceil(rate->slot_ms - now) + after_ms;
    *place_of(a, node) =
        (struct coord_later){.node = *node, .from_ms = s->now_ms + wait_ms, .told_ms = s->now_ms};
    return tell(s, node, wait_ms, text);
}

/* The kind of message and what it takes of its rate; false: it is always taken. */
static bool what_it_takes(const sh_coord *c, const sh_msg *msg, unsigned *rate, double *cost)
{
    uint64_t chunks = SH_MIN(c->options.chunk_budget, (uint64_t)SH_WIRE_WANT_MAX);
    *cost = 1;
    switch (msg->type) {
    case SH_MSG_ENROL:
    case SH_MSG_CHECKIN:
        *rate = COORD_RATE_CHECKIN;
        return c->options.checkins_per_s > 0;
    case SH_MSG_ITEM:
        *rate = COORD_RATE_ITEM;
        return c->options.items_per_s > 0;
    case SH_MSG_WANT:
        *rate = COORD_RATE_SERVED;
        *cost = (double)SH_MIN(chunks, (uint64_t)msg->want.n);
        return c->options.served_bytes_per_s > 0;
    default:
        return false;
    }
}

sh_status coord_admit(coord_step *s, const sh_hash *node, const sh_msg *msg, bool *admitted)
{
    sh_coord *c = s->c;
    unsigned rate = 0;
    double cost = 0;
    *admitted = true;
    if (!what_it_takes(c, msg, &rate, &cost))
        return SH_OK;
    struct coord_later *l = c->admission.later == NULL ? NULL : place_of(&c->admission, node);
    if (l != NULL && (l->from_ms == 0 || !sh_hash_equal(&l->node, node)))
        l = NULL;
    /* A clock that was set back makes nobody wait longer than anyone is told to. */
    if (l != NULL && l->from_ms > s->now_ms + COORD_LATER_MAX_MS + c->options.checkin_ms)
        l = NULL;
    if (l != NULL && s->now_ms < l->from_ms) {
        *admitted = false;
        if (s->now_ms < l->told_ms + TELL_MS)
            return SH_OK;
        l->told_ms = s->now_ms;
        return tell(s, node, l->from_ms - s->now_ms, "not yet: come back later");
    }
    bool due = l != NULL && s->now_ms < l->from_ms + PASS_MS && l->used++ < PASS_MESSAGES;
    if (take(c, rate, cost, s->now_ms, due))
        return SH_OK;
    *admitted = false;
    return coord_later(s, node, rate, 0, "many nodes are here at once: come back later");
}

/* ---- when nodes come back ---- */

static uint64_t period_ms(const sh_coord *c)
{
    return SH_MAX(4 * coord_admit_return_ms(c), (uint64_t)SEEN_MS);
}

void coord_admit_load(sh_coord *c, uint64_t last_ms, uint64_t now_ms)
{
    c->admission.period_ms = now_ms;
    if (last_ms != 0 && last_ms + SEEN_BEFORE_MS > now_ms)
        c->admission.seen_before++;
}

void coord_admit_seen(coord_step *s, uint64_t last_ms)
{
    coord_admission *a = &s->c->admission;
    if (s->now_ms < a->period_ms || s->now_ms >= a->period_ms + period_ms(s->c)) {
        a->period_ms = s->now_ms;
        a->seen_before = a->seen;
        a->seen = 0;
    }
    a->seen += last_ms < a->period_ms || last_ms == 0;
}

uint64_t coord_admit_return_ms(const sh_coord *c)
{
    const sh_coord_options *o = &c->options;
    const coord_admission *a = &c->admission;
    double share = o->load_share > 0 ? o->load_share : LOAD_SHARE;
    if (o->checkins_per_s == 0)
        return o->checkin_ms;
    double least = 1000 * (double)SH_MAX(a->seen, a->seen_before) / (share * o->checkins_per_s);
    return SH_MAX(o->checkin_ms, (uint64_t)least);
}
