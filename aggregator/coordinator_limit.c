/*
 * How much one node may send: a bucket of messages and one of bytes for each key, filled at the
 * configured rates up to `limit_burst_s` seconds' worth. In memory only: a restart forgives.
 *
 * What comes over the limit is not read; its sender is told so once, and when to go on. It is
 * counted against the bucket all the same, so that a sender that goes on regardless gets ever
 * deeper, until it is disconnected at COORD_LIMIT_DROP_FACTOR times what a full bucket holds.
 *
 * The table is of fixed size: COORD_LIMIT_SETS sets of COORD_LIMIT_WAYS keys, and in a full set the
 * key that was not heard for the longest makes room. A bucket that is gone is a full one: only
 * enrolled keys get this far, so nobody makes room at will.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

struct coord_bucket {
    sh_hash key;
    double messages, bytes; /* that may still come; below 0: over the limit */
    uint64_t at_ms;         /* when they were filled; 0: the place is free */
    uint64_t told_until_ms; /* its sender knows: no answer before */
};

static bool is_on(const sh_coord_options *o)
{
    return o->limit_messages_s > 0 || o->limit_bytes_s > 0;
}

static double messages_max(const sh_coord_options *o)
{
    return SH_MAX(o->limit_messages_s * o->limit_burst_s, (double)COORD_LIMIT_MESSAGES_MIN);
}

/* What the aggregator asks for with one WANT must get through, whatever the rate. */
static double bytes_max(const sh_coord_options *o)
{
    return SH_MAX(o->limit_bytes_s * o->limit_burst_s, (double)COORD_LIMIT_BYTES_MIN);
}

sh_status coord_limit_check(const sh_coord_options *o, sh_error *err)
{
    if (!is_on(o))
        return SH_OK;
    if (o->limit_messages_s < 0 || o->limit_bytes_s < 0 || !(o->limit_burst_s > 0))
        return sh_fail(err, SH_ERR_INVALID,
                       "coordinator: a node's limits must not be negative, nor its burst 0");
    return SH_OK;
}

sh_status coord_limit_init(sh_coord *c, sh_error *err)
{
    if (!is_on(&c->options))
        return SH_OK;
    c->buckets = sh_calloc((size_t)COORD_LIMIT_SETS * COORD_LIMIT_WAYS, sizeof *c->buckets);
    if (c->buckets == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "coordinator: no memory for the nodes' limits");
    return SH_OK;
}

/* The key's bucket; a new one is full. */
static coord_bucket *find(coord_step *s, const sh_hash *key)
{
    sh_coord *c = s->c;
    uint32_t number = 0;
    memcpy(&number, key->b + sizeof key->b - sizeof number, sizeof number);
    coord_bucket *set = c->buckets + (size_t)(number % COORD_LIMIT_SETS) * COORD_LIMIT_WAYS;
    coord_bucket *oldest = set;
    for (size_t i = 0; i < COORD_LIMIT_WAYS; i++) {
        if (set[i].at_ms != 0 && sh_hash_equal(&set[i].key, key))
            return &set[i];
        if (set[i].at_ms < oldest->at_ms)
            oldest = &set[i];
    }
    *oldest = (coord_bucket){.key = *key,
                             .messages = messages_max(&c->options),
                             .bytes = bytes_max(&c->options),
                             .at_ms = SH_MAX(s->now_ms, UINT64_C(1))};
    return oldest;
}

/* Takes `cost` out of the bucket. *wait_s grows to how long it takes until it is not below 0; true
 * when it is so deep that its sender does not listen. */
static bool take(double *level, double rate, double max, double cost, double passed_s,
                 double *wait_s)
{
    if (rate <= 0)
        return false;
    *level = SH_MIN(*level + rate * passed_s, max) - cost;
    if (*level < 0)
        *wait_s = SH_MAX(*wait_s, -*level / rate);
    return *level <= -max * COORD_LIMIT_DROP_FACTOR;
}

sh_status coord_limit_pass(coord_step *s, const sh_hash *key, size_t bytes, bool *pass)
{
    sh_coord *c = s->c;
    const sh_coord_options *o = &c->options;
    double wait_s = 0;
    *pass = true;
    if (c->buckets == NULL)
        return SH_OK;
    coord_bucket *b = find(s, key);
    /* A clock that was set back fills nothing, and is the bucket's from then on. */
    double passed_s = s->now_ms > b->at_ms ? (double)(s->now_ms - b->at_ms) / 1000 : 0;
    b->at_ms = SH_MAX(s->now_ms, UINT64_C(1));
    b->told_until_ms = SH_MIN(b->told_until_ms, s->now_ms + COORD_LIMIT_TOLD_MS);
    bool deaf = take(&b->messages, o->limit_messages_s, messages_max(o), 1, passed_s, &wait_s);
    deaf |= take(&b->bytes, o->limit_bytes_s, bytes_max(o), (double)bytes, passed_s, &wait_s);
    *pass = wait_s == 0;
    if (*pass)
        return SH_OK;
    c->limited++;
    if (deaf) {
        b->messages = SH_MAX(b->messages, 0);
        b->bytes = SH_MAX(b->bytes, 0);
        b->told_until_ms = 0;
        c->disconnected++;
        coord_note(s, SH_CNOTE_LIMITED, key, c->disconnected);
        coord_drop_peer(s, key);
        return SH_OK;
    }
    if (s->now_ms < b->told_until_ms)
        return SH_OK;
    s->version = SH_WIRE_VERSION_MIN; /* an ERROR of that is read by all */
    uint64_t wait_ms = (uint64_t)(wait_s * 1000) + 1;
    b->told_until_ms = s->now_ms + SH_MIN(wait_ms, COORD_LIMIT_TOLD_MS);
    return coord_send_retry(s, key, SH_ERR_LIMIT, "more than a node may send: wait", wait_ms);
}
