/*
 * The clocks of a step.
 *   now_ms   steady, the shell's: intervals
 *   wall_ms  dates that others read (ledger, windows, alarms, check-ins) and the hours of policies
 *   row_ms   ages of rows and the periods of budgets: runs with now_ms, no setting of the clock
 * moves it, and it goes back only at a start, by what was not kept (CLOCK_SAVE_MS)
 *
 * The wall clock. The aggregator's plans carry its time, signed. It is a floor, which replays of
 * older stamps cannot lower; and as a plan answers a check-in, its time is also not far behind. The
 * first stamp of a life is verified, later ones only when they would move the clock by more than
 * CLOCK_SLACK_MS. From then on the device's own clock is not looked at. Until then the candidates
 * are the device's clock and that plus the skew that it last had; the earliest that is not before
 * the floor wins, and without one the floor itself: so a device whose clock is as wrong as it was
 * before is right at once, and so is one whose clock was put right.
 *
 * The rows' clock goes on at a start where it was when it was last kept. The time off is added when
 * signed time says how long it was. A node that never had such time adds what the device's clock
 * says, at most CLOCK_OFF_MAX_MS, so that a clock that is decades ahead at a start makes no row
 * old; one that had it does so when none has come after CLOCK_GRACE_MS.
 *
 * META "clock": version (1), floor_ms (8), skew (8), seen_row_ms (8), seen_wall_ms (8),
 * anchor_row_ms (8), anchor_wall_ms (8), since_ms (8), little-endian; the first 8 bytes of
 * BLAKE2b-256 of that.
 */
#include "edge-node/node_internal.h"

#include <string.h>

#define DAY_MS           (24ull * 3600 * 1000)
#define CLOCK_VERSION    1
#define CLOCK_BYTES      57
#define CLOCK_SUM        8
#define CLOCK_SLACK_MS   (5u * 60 * 1000)
#define CLOCK_SAVE_MS    (3600u * 1000) /* between two savings while nothing jumps */
#define CLOCK_OFF_MAX_MS (7 * DAY_MS)   /* switched off for so long is believed, unsigned */
#define CLOCK_GRACE_MS   (3600u * 1000)
#define CLOCK_FUTURE_MS  DAY_MS /* a row so far ahead is a wrong clock's */

static const char meta_clock[] = "clock";

static uint64_t apart(uint64_t a, uint64_t b)
{
    return a > b ? a - b : b - a;
}

static uint64_t floor_at(const node_clock *c, uint64_t now_ms)
{
    return c->floor_ms == 0 ? 0 : c->floor_ms + (now_ms - c->floor_now_ms);
}

static uint64_t choose_wall(const node_clock *c, uint64_t now_ms)
{
    uint64_t own = now_ms + c->shell_offset, corrected = own + c->skew;
    uint64_t floor = floor_at(c, now_ms), best = NODE_NEVER;
    if (own >= floor)
        best = own;
    if ((int64_t)corrected >= 0 && corrected >= floor)
        best = SH_MIN(best, corrected);
    return best == NODE_NEVER ? floor : best;
}

static void set_dates(node_step *s)
{
    node_clock *c = &s->n->clock;
    c->wall_ms = s->wall_ms = s->now_ms + c->wall_offset;
    c->row_ms = s->row_ms = s->now_ms + c->row_offset;
}

static sh_status load(node_step *s, bool *found)
{
    node_clock *c = &s->n->clock;
    sh_slice value;
    sh_status status =
        sh_txn_get(s->txn, SH_NODE_T_META, meta_clock, sizeof(meta_clock) - 1, &value);
    *found = status == SH_OK;
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    if (status != SH_OK)
        return sh_fail(s->err, status, "node clock: cannot be read");
    const uint8_t *p = value.data;
    if (value.n != CLOCK_BYTES + CLOCK_SUM || p[0] != CLOCK_VERSION)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node clock: %zu bytes of an unknown layout",
                       value.n);
    sh_hash sum = sh_blake2b(p, CLOCK_BYTES);
    if (memcmp(sum.b, p + CLOCK_BYTES, CLOCK_SUM) != 0)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node clock: the checksum does not hold");
    c->floor_ms = node_get_le(p + 1, 8);
    c->skew = node_get_le(p + 9, 8);
    c->seen_row_ms = node_get_le(p + 17, 8);
    c->seen_wall_ms = node_get_le(p + 25, 8);
    c->anchor_row_ms = node_get_le(p + 33, 8);
    c->anchor_wall_ms = node_get_le(p + 41, 8);
    c->since_ms = node_get_le(p + 49, 8);
    return SH_OK;
}

/* Where the rows' clock goes on. */
static uint64_t rows_start(node_clock *c, uint64_t wall_ms)
{
    uint64_t off = wall_ms > c->seen_wall_ms ? wall_ms - c->seen_wall_ms : 0;
    off = SH_MIN(off, CLOCK_OFF_MAX_MS);
    if (c->anchor_wall_ms != 0) {
        c->off_ms = off;
        return c->seen_row_ms;
    }
    uint64_t row = c->seen_row_ms + off;
    bool near = wall_ms >= c->seen_row_ms && apart(row, wall_ms) <= CLOCK_SLACK_MS;
    return near ? wall_ms : row;
}

sh_status node_clock_open(node_step *s)
{
    node_clock *c = &s->n->clock;
    bool found = false;
    SH_TRY(load(s, &found));
    c->floor_now_ms = c->saved_ms = c->start_ms = s->now_ms;
    c->asked_ms = NODE_NEVER;
    uint64_t wall = choose_wall(c, s->now_ms);
    uint64_t row = found ? rows_start(c, wall) : wall;
    c->wall_offset = wall - s->now_ms;
    c->row_offset = row - s->now_ms;
    if (!found) {
        c->since_ms = row;
        c->dirty = true;
    }
    set_dates(s);
    return SH_OK;
}

void node_clock_step(node_step *s, uint64_t wall_ms)
{
    node_clock *c = &s->n->clock;
    if (wall_ms != 0)
        c->shell_offset = wall_ms - s->now_ms;
    if (!c->trusted) {
        uint64_t wall = choose_wall(c, s->now_ms);
        if (apart(wall, s->now_ms + c->wall_offset) > CLOCK_SLACK_MS)
            c->dirty = true; /* seen_wall_ms is of another clock */
        c->wall_offset = wall - s->now_ms;
    }
    if (c->off_ms > 0 && s->now_ms - c->start_ms >= CLOCK_GRACE_MS) {
        c->row_offset += c->off_ms;
        c->off_ms = 0;
        c->dirty = true;
    }
    set_dates(s);
}

/* Longer than this ago the stamp was not made: the plan answers a check-in. */
static uint64_t age_max(const node_step *s)
{
    uint64_t asked = s->n->clock.asked_ms;
    return CLOCK_SLACK_MS + (asked <= s->now_ms ? s->now_ms - asked : 0);
}

/* The rows' clock makes up for the time off. */
static void credit_time_off(node_clock *c, uint64_t wall_ms, uint64_t now_ms)
{
    uint64_t row = now_ms + c->row_offset;
    c->off_ms = 0;
    if (c->anchor_wall_ms == 0 || wall_ms < c->anchor_wall_ms)
        return;
    uint64_t due = c->anchor_row_ms + (wall_ms - c->anchor_wall_ms);
    if (due > row)
        c->row_offset += due - row;
}

sh_status node_clock_stamp(node_step *s, sh_bytes stamp)
{
    node_clock *c = &s->n->clock;
    uint64_t said;
    if (stamp.n == 0)
        return SH_OK;
    if (sh_time_peek(stamp, &said, NULL) != SH_OK)
        return SH_ERR_INVALID;
    uint64_t wall = s->wall_ms, floor = floor_at(c, s->now_ms);
    bool behind = said > wall && said - wall > CLOCK_SLACK_MS;
    bool ahead = wall > said && wall - said > age_max(s);
    if (c->trusted && !behind && !ahead)
        return SH_OK;
    if (sh_time_verify(stamp, &s->n->options.release_key, &said, NULL) != SH_OK)
        return SH_ERR_AUTH;
    if (said < floor && floor - said > age_max(s))
        return SH_OK; /* of another day, said again */
    c->floor_ms = SH_MAX(floor, said);
    c->floor_now_ms = s->now_ms;
    if (behind || ahead) {
        wall = c->floor_ms;
        node_note(s, SH_NOTE_CLOCK_SET, apart(wall, s->wall_ms) / 1000);
    }
    c->wall_offset = wall - s->now_ms;
    c->skew = c->wall_offset - c->shell_offset;
    if (!c->trusted)
        credit_time_off(c, wall, s->now_ms);
    c->trusted = c->dirty = true;
    set_dates(s);
    return SH_OK;
}

uint64_t node_clock_steady(const sh_node *n, uint64_t row_ms)
{
    uint64_t steady = row_ms - n->clock.row_offset;
    if (row_ms == NODE_NEVER)
        return NODE_NEVER;
    return (int64_t)steady < 0 ? 0 : steady;
}

uint64_t node_clock_row(const node_step *s, uint64_t at_ms)
{
    bool future = at_ms > s->row_ms && at_ms - s->row_ms > CLOCK_FUTURE_MS;
    return future ? s->n->clock.since_ms : at_ms;
}

bool node_clock_is_off(const sh_node *n)
{
    const node_clock *c = &n->clock;
    uint64_t off = c->wall_offset - c->shell_offset;
    if ((int64_t)off < 0)
        off = 0 - off;
    return off > DAY_MS;
}

sh_status node_clock_save(node_step *s)
{
    node_clock *c = &s->n->clock;
    uint8_t value[CLOCK_BYTES + CLOCK_SUM] = {CLOCK_VERSION};
    if (!c->dirty && s->now_ms - c->saved_ms < CLOCK_SAVE_MS)
        return SH_OK;
    c->floor_ms = floor_at(c, s->now_ms);
    c->floor_now_ms = s->now_ms;
    c->seen_row_ms = s->row_ms;
    c->seen_wall_ms = s->wall_ms;
    if (c->trusted) {
        c->anchor_row_ms = s->row_ms;
        c->anchor_wall_ms = s->wall_ms;
    }
    node_put_le(value + 1, c->floor_ms, 8);
    node_put_le(value + 9, c->skew, 8);
    node_put_le(value + 17, c->seen_row_ms, 8);
    node_put_le(value + 25, c->seen_wall_ms, 8);
    node_put_le(value + 33, c->anchor_row_ms, 8);
    node_put_le(value + 41, c->anchor_wall_ms, 8);
    node_put_le(value + 49, c->since_ms, 8);
    sh_hash sum = sh_blake2b(value, CLOCK_BYTES);
    memcpy(value + CLOCK_BYTES, sum.b, CLOCK_SUM);
    c->dirty = false;
    c->saved_ms = s->now_ms;
    return sh_txn_put(s->txn, SH_NODE_T_META, meta_clock, sizeof(meta_clock) - 1, value,
                      sizeof(value), s->err);
}
