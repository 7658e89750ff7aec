/*
 * Bytes of messages a day and a month, up and down. Days and months are those of the rows' clock
 * (node_clock.c), so setting the device's clock gives no new budget. When one is used up, chunks,
 * windows and updates wait for the next period; what is small (enrolment, check-ins, alarms,
 * tombstones, WANTs) goes on until the overdraft is used up too: an OVERDRAFT_PART of the budget
 * and OVERDRAFT_BYTES. What comes down cannot be refused, only not be asked for.
 *
 * META "budget": version (1), day (8), month (8), up_day (8), up_month (8), down_day (8),
 * down_month (8), refused_full (8), little-endian; the first 8 bytes of BLAKE2b-256 of that.
 * Written in each step that counts something where there is a budget, and with each drop; else once
 * an hour, because nothing depends on it.
 */
#include "edge-node/node_internal.h"

#include <string.h>

#include "shared/base/canary.h"

#define BUDGET_VERSION    1
#define BUDGET_BYTES      57
#define BUDGET_SUM        8
#define BUDGET_SAVE_MS    (3600u * 1000) /* without a budget: between two savings */
#define OVERDRAFT_PART    8u
#define OVERDRAFT_BYTES   (64u << 10)
#define CHUNK_WIRE_BYTES  (SH_CHUNK_BYTES + 128u) /* with the message around it */
#define DAY_MS            (24ull * 3600 * 1000)
#define DAYS_OF_400_YEARS 146097u

static const char meta_budget[] = "budget";

static sh_status load(node_step *s)
{
    node_budget *b = &s->n->budget;
    sh_slice value;
    sh_status status =
        sh_txn_get(s->txn, SH_NODE_T_META, meta_budget, sizeof(meta_budget) - 1, &value);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    if (status != SH_OK)
        return sh_fail(s->err, status, "node budget: cannot be read");
    const uint8_t *p = value.data;
    if (value.n != BUDGET_BYTES + BUDGET_SUM || p[0] != BUDGET_VERSION)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node budget: %zu bytes of an unknown layout",
                       value.n);
    sh_hash sum = sh_blake2b(p, BUDGET_BYTES);
    if (memcmp(sum.b, p + BUDGET_BYTES, BUDGET_SUM) != 0)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node budget: the checksum does not hold");
    uint64_t *const fields[] = {&b->day,      &b->month,      &b->up_day,      &b->up_month,
                                &b->down_day, &b->down_month, &b->refused_full};
    for (size_t i = 0; i < SH_COUNT(fields); i++)
        *fields[i] = SH_CANARY(FORGET_BUDGET) ? 0 : node_get_le(p + 1 + 8 * i, 8);
    return SH_OK;
}

static uint64_t local_ms(const sh_node *n, uint64_t row_ms)
{
    int64_t local = (int64_t)row_ms + (int64_t)n->options.utc_offset_min * 60000;
    return local < 0 ? 0 : (uint64_t)local;
}

/* Months since March of year 0 of a day since 1970, proleptic Gregorian (the year begins in March,
 * so that the leap day is its last). */
static uint64_t month_of(uint64_t day)
{
    uint64_t z = day + 719468;
    uint64_t era = z / DAYS_OF_400_YEARS, at = z % DAYS_OF_400_YEARS;
    uint64_t year = (at - at / 1460 + at / 36524 - at / (DAYS_OF_400_YEARS - 1)) / 365;
    uint64_t in_year = at - (365 * year + year / 4 - year / 100);
    return (era * 400 + year) * 12 + (5 * in_year + 2) / 153;
}

static bool is_set(const sh_node *n)
{
    const sh_node_budgets *o = &n->options.budgets;
    return (o->up_day | o->up_month | o->down_day | o->down_month) != 0;
}

void node_budget_roll(node_step *s)
{
    node_budget *b = &s->n->budget;
    uint64_t day = local_ms(s->n, s->row_ms) / DAY_MS;
    if (day <= b->day)
        return; /* less: only where the offset was set anew */
    uint64_t month = month_of(day);
    b->day = day;
    b->up_day = b->down_day = 0;
    b->told_up = b->told_down = false;
    b->dirty = true;
    if (month == b->month)
        return;
    b->month = month;
    b->up_month = b->down_month = 0;
}

sh_status node_budget_open(node_step *s)
{
    SH_TRY(load(s));
    s->n->budget.saved_ms = s->now_ms;
    node_budget_roll(s);
    s->n->budget.dirty = false; /* nothing was counted yet: the same is found again */
    return SH_OK;
}

static bool within(uint64_t used, uint64_t budget, bool overdraft)
{
    if (budget == 0)
        return true;
    return used < budget + (overdraft ? budget / OVERDRAFT_PART + OVERDRAFT_BYTES : 0);
}

bool node_budget_bulk_up(const sh_node *n)
{
    return within(n->budget.up_day, n->options.budgets.up_day, false) &&
           within(n->budget.up_month, n->options.budgets.up_month, false);
}

bool node_budget_small_up(const sh_node *n)
{
    return within(n->budget.up_day, n->options.budgets.up_day, true) &&
           within(n->budget.up_month, n->options.budgets.up_month, true);
}

static uint64_t left(uint64_t used, uint64_t budget)
{
    return budget == 0 ? UINT64_MAX : budget - SH_MIN(used, budget);
}

uint32_t node_budget_chunks_down(const sh_node *n)
{
    uint64_t day = left(n->budget.down_day, n->options.budgets.down_day);
    uint64_t month = left(n->budget.down_month, n->options.budgets.down_month);
    uint64_t chunks = SH_MIN(day, month) / CHUNK_WIRE_BYTES;
    return (uint32_t)SH_MIN(chunks, (uint64_t)SH_WIRE_WANT_MAX);
}

bool node_budget_is_used_up(const sh_node *n)
{
    return !node_budget_bulk_up(n) || node_budget_chunks_down(n) == 0;
}

void node_budget_count(node_step *s, bool up, size_t bytes)
{
    node_budget *b = &s->n->budget;
    *(up ? &b->up_day : &b->down_day) += bytes;
    *(up ? &b->up_month : &b->down_month) += bytes;
    b->dirty = true;
    bool *told = up ? &b->told_up : &b->told_down;
    bool used_up = up ? !node_budget_bulk_up(s->n) : node_budget_chunks_down(s->n) == 0;
    if (used_up && !*told)
        node_note(s, SH_NOTE_BUDGET, up ? 0 : 1);
    *told = used_up;
}

uint64_t node_budget_due(const sh_node *n)
{
    if (!node_budget_is_used_up(n))
        return NODE_NEVER;
    int64_t next = (int64_t)((n->budget.day + 1) * DAY_MS);
    next -= (int64_t)n->options.utc_offset_min * 60000;
    return node_clock_steady(n, (uint64_t)next);
}

sh_status node_budget_save(node_step *s)
{
    node_budget *b = &s->n->budget;
    uint8_t value[BUDGET_BYTES + BUDGET_SUM] = {BUDGET_VERSION};
    bool now = b->now || is_set(s->n) || s->now_ms - b->saved_ms >= BUDGET_SAVE_MS;
    if (!b->dirty || !now)
        return SH_OK;
    const uint64_t fields[] = {b->day,      b->month,      b->up_day,      b->up_month,
                               b->down_day, b->down_month, b->refused_full};
    for (size_t i = 0; i < SH_COUNT(fields); i++)
        node_put_le(value + 1 + 8 * i, fields[i], 8);
    sh_hash sum = sh_blake2b(value, BUDGET_BYTES);
    memcpy(value + BUDGET_BYTES, sum.b, BUDGET_SUM);
    b->dirty = b->now = false;
    b->saved_ms = s->now_ms;
    return sh_txn_put(s->txn, SH_NODE_T_META, meta_budget, sizeof(meta_budget) - 1, value,
                      sizeof(value), s->err);
}
