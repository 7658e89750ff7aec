/*
 * Messages of nodes. The sender is the key that the transport authenticated; a message that is
 * wrong is answered, counted and noted, and never ends the step with an error.
 */
#include <string.h>

#include "aggregator/coordinator_internal.h"
#include "shared/base/canary.h"

#define PURPOSE_A_SEED 0x61305f73u /* stream of rng that the rounds' seeds of A come from */

sh_status coord_bad_message(coord_step *s, const sh_hash *node, sh_status code, const char *text)
{
    s->c->state.bad_messages++;
    coord_note(s, SH_CNOTE_BAD_MESSAGE, node, (uint64_t)code);
    return coord_send_error(s, node, code, text);
}

/* ---- check-in ---- */

/* The same seed for every node of a round, whenever it asks: A0 is shared. */
static uint64_t round_seed(const sh_coord *c)
{
    sh_rng rng;
    sh_rng_init(&rng, c->state.seed, c->state.round, PURPOSE_A_SEED);
    return sh_rng_u64(&rng);
}

static bool training_is_on(const sh_coord *c)
{
    const coord_state *state = &c->state;
    return state->rounds_begun && !state->paused && !state->closing &&
           (c->options.rounds_max == 0 ||
            state->round - state->round_base <= c->options.rounds_max);
}

/* The signed time, not older than COORD_TIME_MS: a signature for each plan would be most of what a
 * check-in costs. */
static sh_status time_stamp(coord_step *s, sh_bytes *out)
{
    sh_coord *c = s->c;
    if (c->time_n == 0 || s->now_ms < c->time_ms || s->now_ms - c->time_ms >= COORD_TIME_MS) {
        sh_buf stamp;
        sh_buf_init(&stamp, SH_WIRE_TIME_MAX);
        sh_status status = sh_time_sign(s->now_ms, &c->options.release_sk, &stamp, s->err);
        if (status == SH_OK) {
            memcpy(c->time_stamp, stamp.data, stamp.len);
            c->time_n = stamp.len;
            c->time_ms = s->now_ms;
        }
        sh_buf_release(&stamp);
        SH_TRY(status);
    }
    *out = (sh_bytes){c->time_stamp, c->time_n};
    return SH_OK;
}

static sh_status send_plan(coord_step *s, const sh_hash *key, const sh_msg_checkin *checkin)
{
    sh_coord *c = s->c;
    const coord_release *current = &c->kept[0];
    double jitter = 0.75 + 0.5 * sh_rng_unit(&c->rng);
    sh_msg msg = {.type = SH_MSG_PLAN};
    msg.plan.return_after_ms = (uint64_t)((double)coord_admit_return_ms(c) * jitter);
    msg.plan.train = c->options.train;
    msg.plan.train.train = training_is_on(c);
    msg.plan.train.round = c->state.round;
    msg.plan.train.base_version = current->version;
    msg.plan.train.base_sha256 = current->manifest.model.sha256;
    msg.plan.train.a_seed = round_seed(c);
    if (c->relay != NULL)
        coord_relay_plan(s, &msg.plan);
    if (checkin->active_version < current->version)
        msg.plan.manifest = (sh_bytes){current->bytes, current->n};
    if (c->relay == NULL) /* a relay passes on what its parent has signed */
        SH_TRY(time_stamp(s, &msg.plan.time));
    SH_TRY(coord_canary_plan(s, key, checkin, &msg.plan.evaluate));
    return coord_send(s, key, &msg);
}

static sh_status on_checkin(coord_step *s, sh_node_row *node, const sh_msg_checkin *checkin)
{
    sh_coord *c = s->c;
    bool changed = false, known = false;
    uint32_t before = 0, after = 0;
    SH_TRY(coord_epoch_see(s, node, checkin->epoch, &known, &changed));
    if (!known)
        return coord_bad_message(s, &node->key, SH_ERR_LIMIT, COORD_TOO_MANY_STORES);
    SH_TRY(coord_drifting(s->txn, &node->key, &node->checkin, &before, s->err));
    SH_TRY(coord_drifting(s->txn, &node->key, checkin, &after, s->err));
    c->drifting += after;
    c->drifting -= before;
    if (after > before)
        coord_note(s, SH_CNOTE_DRIFTING, &node->key, c->drifting);
    coord_admit_seen(s, node->last_ms);
    node->checkin = *checkin;
    node->last_ms = s->now_ms;
    SH_TRY(coord_node_put(s->txn, node, s->err));
    SH_TRY(coord_lift(s, SH_MAX(checkin->active_version, checkin->confirmed_version)));
    SH_TRY(coord_begin_rounds(s));
    coord_renew_round(s);
    return send_plan(s, &node->key, checkin);
}

/* ---- items ---- */

sh_status coord_mark(coord_step *s, const sh_hash *node, const sh_msg_item *item, sh_msg *ack)
{
    *ack = (sh_msg){.type = SH_MSG_ACK};
    SH_TRY(sh_inbox_mark(s->txn, SH_COORD_T_INBOX, node, item, &ack->ack, s->err));
    ack->ack.lease = item->lease;
    return SH_OK;
}

/* Of each (node, epoch) and class only the last alarms and windows are kept: a sequence that is
 * marked, whatever it was, takes the place of the one so many before it. */
static uint32_t items_kept(const sh_coord *c)
{
    return c->options.node_items_max > 0 ? c->options.node_items_max : COORD_NODE_ITEMS_MAX;
}

/* Keeps an alarm or window, unless it came so late that its place is taken. */
static sh_status keep_item(coord_step *s, unsigned table, const sh_update_id *id, sh_bytes payload,
                           const sh_msg_ack *marks)
{
    uint8_t key[COORD_ID_BYTES];
    uint64_t by = id->seq + items_kept(s->c);
    if (sh_ack_covers(marks, by, by))
        return SH_OK;
    coord_id_put(key, id);
    return sh_txn_put(s->txn, table, key, sizeof key, payload.data, payload.n, s->err);
}

/* Deletes what the sequences of item take the places of. */
static sh_status displace(coord_step *s, unsigned table, const sh_update_id *id,
                          const sh_msg_item *item)
{
    uint8_t key[COORD_ID_BYTES];
    uint32_t kept = items_kept(s->c) - SH_CANARY(LOSE_ROW);
    sh_update_id old = {.node = id->node, .epoch = id->epoch};
    if (item->last_seq <= kept)
        return SH_OK;
    uint64_t last = item->last_seq - kept;
    old.seq = item->seq > kept ? item->seq - kept : 1;
    if (old.seq == last) {
        coord_id_put(key, &old);
        return sh_txn_del(s->txn, table, key, sizeof key, s->err);
    }
    for (;;) { /* as many as there are, and not as a tombstone names */
        sh_cursor *cursor = NULL;
        sh_slice at, value;
        coord_id_put(key, &old);
        SH_TRY(sh_cursor_open(s->txn, table, &cursor, s->err));
        sh_status status = sh_cursor_seek(cursor, key, sizeof key, &at, &value);
        sh_update_id found = {0};
        if (status == SH_OK && !coord_id_get(at, &found))
            status = SH_ERR_CORRUPT;
        sh_cursor_close(&cursor);
        if (status == SH_ERR_NOT_FOUND)
            return SH_OK;
        if (status != SH_OK)
            return sh_fail(s->err, status, "coordinator: the items cannot be read");
        if (!sh_hash_equal(&found.node, &id->node) || found.epoch != id->epoch || found.seq > last)
            return SH_OK;
        coord_id_put(key, &found);
        SH_TRY(sh_txn_del(s->txn, table, key, sizeof key, s->err));
        old.seq = found.seq + 1;
    }
}

/* The bug behind a build flag (shared/base/canary.h): acknowledged, and not marked. */
static sh_status only_acknowledge(coord_step *s, const sh_hash *node, const sh_msg_item *item)
{
    sh_msg msg = {.type = SH_MSG_ACK};
    SH_TRY(
        sh_inbox_get_ack(s->txn, SH_COORD_T_INBOX, node, item->epoch, item->cls, &msg.ack, s->err));
    if (item->seq <= msg.ack.high_water + 1)
        msg.ack.high_water = SH_MAX(msg.ack.high_water, item->last_seq);
    msg.ack.lease = item->lease;
    return coord_send(s, node, &msg);
}

static sh_status take_item(coord_step *s, const sh_update_id *id, const sh_msg_item *item)
{
    const sh_hash *node = &id->node;
    sh_msg ack;
    sh_alarm alarm;
    bool good = false, kept = false;
    switch ((sh_item_kind)item->kind) {
    case SH_ITEM_UPDATE:
        if (item->cls == SH_CLASS_UPDATE)
            return coord_on_update(s, id, item->payload);
        break;
    case SH_ITEM_ALARM:
        good = item->cls == SH_CLASS_ALARM &&
               sh_alarm_decode(item->payload.data, item->payload.n, &alarm, NULL) == SH_OK;
        kept = good;
        break;
    case SH_ITEM_WINDOW:
        good = item->cls == SH_CLASS_WINDOW && item->payload.n > 0 &&
               item->payload.n <= COORD_WINDOW_BYTES_MAX;
        kept = good;
        break;
    case SH_ITEM_EVALUATION:
        if (item->cls == SH_CLASS_ALARM)
            SH_TRY(coord_on_evaluation(s, id, item->payload, &good));
        break;
    case SH_ITEM_TOMBSTONE:
        if (item->cls == SH_CLASS_UPDATE)
            SH_TRY(coord_waiting_forget(s, node, item->epoch, item->seq, item->last_seq));
        if (SH_CANARY(TOMBSTONE_UNMARKED))
            return only_acknowledge(s, node, item);
        good = true;
        break;
    }
    /* What cannot be read now cannot be read later: it is acknowledged, or it came for ever. */
    SH_TRY(coord_mark(s, node, item, &ack));
    if (item->cls == SH_CLASS_ALARM || item->cls == SH_CLASS_WINDOW) {
        unsigned table = item->cls == SH_CLASS_ALARM ? SH_COORD_T_ALARM : SH_COORD_T_WINDOW;
        if (kept)
            SH_TRY(keep_item(s, table, id, item->payload, &ack.ack));
        SH_TRY(displace(s, table, id, item));
    }
    SH_TRY(coord_send(s, node, &ack));
    return good ? SH_OK : coord_bad_message(s, node, SH_ERR_INVALID, "the item is not readable");
}

/* Whether the start that the item names is the one that sends in its epoch. An item without a name
 * is of before copies parted: the same in all of them. */
static sh_status is_senders(coord_step *s, const sh_hash *node, const sh_msg_item *item, bool *own)
{
    uint64_t lease = 0;
    *own = item->lease == 0 || SH_CANARY(NO_LEASE);
    if (*own)
        return SH_OK;
    SH_TRY(coord_epoch_lease(s, node, item->epoch, &lease));
    *own = item->lease == lease;
    return SH_OK;
}

static sh_status on_item(coord_step *s, sh_node_row *node, const sh_msg_item *item)
{
    const sh_hash *key = &node->key;
    sh_inbox_verdict verdict = SH_INBOX_NEW;
    sh_status status = sh_inbox_check(s->txn, SH_COORD_T_INBOX, key, item, &verdict, s->err);
    if (status == SH_ERR_INVALID || status == SH_ERR_LIMIT)
        return coord_bad_message(s, key, status, "the item's sequences are no range");
    SH_TRY(status);
    if (SH_CANARY(UPDATE_TWICE) && item->kind == SH_ITEM_UPDATE && verdict == SH_INBOX_DUPLICATE)
        verdict = SH_INBOX_NEW;
    bool own = false;
    SH_TRY(is_senders(s, key, item, &own));
    if (!own)
        return coord_send_error(s, key, SH_ERR_AUTH,
                                "another start of this store has the epoch: send ENROL");
    if (verdict != SH_INBOX_NEW) { /* a duplicate, or too far ahead of what is committed */
        sh_msg msg = {.type = SH_MSG_ACK};
        SH_TRY(sh_inbox_get_ack(s->txn, SH_COORD_T_INBOX, key, item->epoch, item->cls, &msg.ack,
                                s->err));
        msg.ack.lease = item->lease;
        return coord_send(s, key, &msg);
    }
    bool changed = false, known = false;
    SH_TRY(coord_epoch_see(s, node, item->epoch, &known, &changed));
    if (!known)
        return coord_bad_message(s, key, SH_ERR_LIMIT, COORD_TOO_MANY_STORES);
    if (changed)
        SH_TRY(coord_node_put(s->txn, node, s->err));
    sh_update_id id = {.node = *key, .epoch = item->epoch, .seq = item->seq};
    return take_item(s, &id, item);
}

sh_status coord_on_message(coord_step *s, const sh_hash *key, sh_bytes message, bool checked)
{
    sh_msg msg;
    sh_error why = {0};
    bool pass = false;
    SH_TRY(coord_limit_pass(s, key, message.n, &pass));
    if (!pass)
        return SH_OK;
    SH_TRY(coord_sender_find(s, key));
    sh_status status = sh_msg_decode_checked(message.data, message.n,
                                             checked ? SH_CHECK_DONE : SH_CHECK_NAME, &msg, &why);
    if (status == SH_ERR_NO_MEMORY)
        return sh_fail(s->err, status, "%s", why.text);
    if (status != SH_OK) {
        /* Nobody knows what its sender reads: an ERROR of the oldest version is read by all. One of
         * a newer version than ours is told which is ours. */
        s->version = status == SH_ERR_UNSUPPORTED ? SH_WIRE_VERSION : SH_WIRE_VERSION_MIN;
        SH_TRY(coord_bad_message(s, key, status, why.text));
        return coord_drop_stranger(s);
    }
    s->version = msg.version;
    if (msg.type == SH_MSG_ENROL)
        return coord_on_enrol(s, &msg);
    sh_node_row node;
    bool may = false, admitted = false;
    /* Who may not speak takes nothing of the rate that all share. */
    SH_TRY(coord_may_speak(s, &node, &may));
    if (!may)
        return SH_OK;
    /* Its sender may have done so long ago: then an ENROL that came late barred it. It says again
     * which epoch it has, or all that it sends is lost for as long as the connection lasts. */
    if (coord_is_barred(s))
        return coord_send_error(s, key, SH_ERR_AUTH, "take a new epoch: send ENROL with it");
    key = &node.key;
    SH_TRY(coord_admit(s, key, &msg, &admitted));
    if (!admitted)
        return SH_OK;
    switch (msg.type) {
    case SH_MSG_CHECKIN:
        return on_checkin(s, &node, &msg.checkin);
    case SH_MSG_ITEM:
        return on_item(s, &node, &msg.item);
    case SH_MSG_WANT:
        return coord_on_want(s, key, &msg.want);
    case SH_MSG_CHUNK:
        return coord_on_chunk(s, key, &msg.chunk);
    case SH_MSG_ROTATE:
        return coord_on_rotate(s, &node, &msg.rotate);
    case SH_MSG_ERROR: /* answering an error with an error would never end */
        s->c->state.bad_messages++;
        coord_note(s, SH_CNOTE_BAD_MESSAGE, key, 0);
        return SH_OK;
    default:
        return coord_bad_message(s, key, SH_ERR_INVALID, "nodes do not send this type of message");
    }
}
