#include "shared/sync/link_internal.h"

#include "shared/base/canary.h"

#include <string.h>

#define HASH_BYTES sizeof(sh_hash)

static sh_outbox outbox_of(const sh_link_step *s)
{
    sh_outbox outbox = s->link->options.outbox;
    outbox.arg = s->arg;
    return outbox;
}

void sh_link_arm(const sh_link_step *s, sh_retry *retry)
{
    const sh_link_options *o = &s->link->options;
    uint64_t limit = o->retry_min_ms;
    for (uint32_t i = 0; i < retry->attempt && limit < o->retry_max_ms; i++)
        limit *= 2;
    limit = SH_MIN(limit, o->retry_max_ms);
    retry->attempt++;
    retry->due_ms = s->now_ms + o->retry_min_ms + sh_rng_below(s->rng, limit + 1);
}

/* ---- open, up, down ---- */

static sh_status load_counts(const sh_link_step *s)
{
    sh_outbox outbox = outbox_of(s);
    return sh_outbox_get_counts(&outbox, s->txn, &s->link->counts, s->err);
}

/* Everything owed goes out again. */
static void forget_flight(sh_link *l)
{
    memset(l->in_flight, 0, sizeof(l->in_flight));
    memset(l->send_from, 0, sizeof(l->send_from));
}

static void set_state(const sh_link_step *s, sh_link_state state)
{
    sh_link *l = s->link;
    l->state = state;
    uint64_t due = state == SH_LINK_DOWN ? SH_LINK_NEVER : s->now_ms;
    l->enrol = l->checkin = (sh_retry){.due_ms = due};
    l->want = (sh_retry){.due_ms = SH_LINK_NEVER};
    l->version = SH_WIRE_VERSION;
    memset(l->bury, 0, sizeof(l->bury));
    forget_flight(l);
    l->n_serve = l->n_asked = l->asked_got = 0;
    l->want_size = SH_WIRE_WANT_MAX;
    if (l->n_token > 0)
        l->rotate = (sh_retry){.due_ms = s->now_ms};
    l->hold_ms = 0;
    l->renewals_here = 0;
}

sh_status sh_link_open(const sh_link_step *s, const sh_link_options *options)
{
    *s->link = (sh_link){.options = *options};
    set_state(s, SH_LINK_DOWN);
    SH_TRY(load_counts(s));
    return link_identity_open(s);
}

void sh_link_up(const sh_link_step *s)
{
    set_state(s, SH_LINK_TRYING);
}

void sh_link_down(const sh_link_step *s)
{
    set_state(s, SH_LINK_DOWN);
}

void sh_link_checkin_soon(const sh_link_step *s)
{
    if (s->link->state != SH_LINK_DOWN)
        s->link->checkin = (sh_retry){.due_ms = s->now_ms};
}

sh_status sh_link_put(const sh_link_step *s, sh_class cls, sh_item_kind kind, sh_bytes payload,
                      uint64_t *seq)
{
    sh_outbox outbox = outbox_of(s);
    uint64_t put;
    SH_TRY(sh_outbox_put(&outbox, s->txn, cls, kind, payload, &put, s->err));
    SH_ASSERT(put == s->link->counts.next_seq[cls]);
    if (seq != NULL)
        *seq = put;
    /* A tombstone that a quota put here has the sequence of the oldest item, which is in flight or
     * not sent yet: it goes out as that one would have. */
    return load_counts(s);
}

/* ---- what goes out ---- */

static bool may_send(const sh_link_step *s)
{
    return s->link->state != SH_LINK_DOWN && s->link->options.callbacks->may_send(s->arg);
}

static sh_status send_msg(const sh_link_step *s, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_msg mine = *msg;
    mine.version = s->link->version;
    sh_status status = sh_msg_encode(&mine, &bytes, s->err);
    if (status == SH_OK)
        s->link->options.callbacks->send(s->arg, &bytes);
    sh_buf_release(&bytes);
    return status;
}

static sh_status send_enrol(const sh_link_step *s)
{
    sh_link *l = s->link;
    sh_msg msg = {.type = SH_MSG_ENROL, .enrol = l->options.enrol};
    link_starts starts;
    uint8_t leases[SH_WIRE_LEASES_MAX * HASH_BYTES];
    uint8_t sequences[SH_WIRE_LEASES_MAX * SH_WIRE_START_BYTES];
    SH_TRY(link_starts_load(s, &starts));
    for (uint32_t i = 0; i < starts.n; i++) {
        uint64_t next_seq[SH_CLASSES];
        memcpy(leases + i * HASH_BYTES, starts.items[i].lease, HASH_BYTES);
        link_start_sequences(l, &starts.items[i], next_seq);
        sh_start_put(sequences + i * SH_WIRE_START_BYTES, next_seq);
    }
    msg.enrol.epoch = l->epoch;
    msg.enrol.leases = (sh_hash_list){starts.n, leases};
    msg.enrol.starts = (sh_bytes){sequences, starts.n * SH_WIRE_START_BYTES};
    sh_link_arm(s, &l->enrol);
    return send_msg(s, &msg);
}

static sh_status send_checkin(const sh_link_step *s)
{
    sh_link *l = s->link;
    sh_msg msg = {.type = SH_MSG_CHECKIN};
    sh_msg_checkin *c = &msg.checkin;
    *c = (sh_msg_checkin){.epoch = l->epoch, .now_ms = s->now_ms};
    for (int cls = 0; cls < SH_CLASSES; cls++) {
        c->outbox_items += l->counts.items[cls];
        c->outbox_bytes += l->counts.bytes[cls];
        c->dropped[cls] = l->counts.dropped[cls];
    }
    SH_TRY(l->options.callbacks->fill_checkin(s->arg, c));
    sh_link_arm(s, &l->checkin);
    return send_msg(s, &msg);
}

/* The bug behind a build flag (shared/base/canary.h): what was sent is taken for acknowledged. */
static sh_status forget_sent(const sh_link_step *s, const sh_msg_item *item)
{
    sh_outbox outbox = outbox_of(s);
    sh_msg_ack ack = {.cls = item->cls, .high_water = item->last_seq};
    sh_outbox_acked acked = {.ack = &ack};
    SH_TRY(sh_outbox_ack(&outbox, s->txn, &acked, NULL, NULL, s->err));
    return sh_outbox_get_counts(&outbox, s->txn, &s->link->counts, s->err);
}

/* What an item says of its sender: of an epoch that it had until others parted, nothing. */
static uint64_t lease_of(const sh_link *l, uint64_t epoch)
{
    return epoch == l->epoch ? l->lease : 0;
}

static sh_status send_item(const sh_link_step *s, sh_in_flight *f, const sh_msg_item *item)
{
    sh_msg msg = {.type = SH_MSG_ITEM, .item = *item};
    const sh_link *l = s->link;
    /* Of a tombstone that spans epochs the first one's part: the rest stays when it is taken. */
    uint64_t last = SH_MIN(item->last_seq, link_range_last(l, item->cls, item->seq));
    sh_wire_id id = sh_link_wire_id(&l->segments, item->cls, item->seq);
    msg.item.epoch = id.epoch;
    msg.item.seq = id.seq;
    msg.item.last_seq = id.seq + (last - item->seq);
    msg.item.lease = lease_of(l, id.epoch);
    sh_link_arm(s, &f->retry);
    SH_TRY(send_msg(s, &msg));
    if (SH_CANARY(DELETE_ON_SEND) && item->cls == SH_CLASS_WINDOW)
        return forget_sent(s, item);
    return SH_OK;
}

static bool is_in_flight(const sh_link *l, uint8_t cls, uint64_t seq)
{
    for (unsigned i = 0; i < SH_LINK_IN_FLIGHT_MAX; i++)
        if (l->in_flight[i].used && l->in_flight[i].cls == cls && l->in_flight[i].seq == seq)
            return true;
    return false;
}

static sh_status resend_items(const sh_link_step *s, const sh_outbox *outbox)
{
    for (unsigned i = 0; i < SH_LINK_IN_FLIGHT_MAX && may_send(s); i++) {
        sh_in_flight *f = &s->link->in_flight[i];
        sh_msg_item item;
        if (!f->used || f->retry.due_ms > s->now_ms || s->link->closed.items[f->cls])
            continue;
        sh_status status = sh_outbox_next(outbox, s->txn, f->cls, f->seq, &item);
        if (status != SH_OK && status != SH_ERR_NOT_FOUND)
            return sh_fail(s->err, status, "outbox: cannot be read");
        if (status == SH_ERR_NOT_FOUND || item.seq != f->seq)
            f->used = false; /* a tombstone has taken its place */
        else
            SH_TRY(send_item(s, f, &item));
    }
    return SH_OK;
}

/* One more item of cls may be on its way. Classes that wait for a policy or a budget take no place
 * from others, and none that is not acknowledged takes the last ones. */
static bool has_room(const sh_link *l, unsigned cls)
{
    unsigned all = 0, own = 0;
    for (unsigned i = 0; i < SH_LINK_IN_FLIGHT_MAX; i++) {
        const sh_in_flight *f = &l->in_flight[i];
        all += f->used && !l->closed.items[f->cls];
        own += f->used && f->cls == cls;
    }
    return all < SH_LINK_IN_FLIGHT_MAX && own < SH_LINK_CLASS_FLIGHT_MAX;
}

/* There is room. An item of a closed class that gives its place up is sent anew when it may. */
static sh_in_flight *free_flight(sh_link *l)
{
    sh_in_flight *closed = NULL;
    for (unsigned i = 0; i < SH_LINK_IN_FLIGHT_MAX; i++) {
        sh_in_flight *f = &l->in_flight[i];
        if (!f->used)
            return f;
        if (l->closed.items[f->cls])
            closed = f;
    }
    SH_ASSERT(closed != NULL);
    l->send_from[closed->cls] = SH_MIN(l->send_from[closed->cls], closed->seq);
    return closed;
}

/* Version 1 has no evaluations, and before version 3 no update has parts. */
static bool other_reads(const sh_link *l, const sh_msg_item *item)
{
    sh_update_meta meta;
    if (item->kind == SH_ITEM_EVALUATION)
        return l->version >= 2;
    return l->version >= 3 || item->kind != SH_ITEM_UPDATE ||
           sh_update_meta_decode(item->payload.data, item->payload.n, &meta, NULL) != SH_OK ||
           meta.parts.n == 0;
}

static sh_status send_items(const sh_link_step *s)
{
    sh_link *l = s->link;
    sh_outbox outbox = outbox_of(s);
    SH_TRY(resend_items(s, &outbox));
    for (unsigned cls = 0; cls < SH_CLASSES; cls++) {
        while (l->counts.items[cls] > 0 && l->send_from[cls] < l->counts.next_seq[cls]) {
            sh_msg_item item;
            if (!may_send(s))
                return SH_OK;
            if (l->closed.items[cls] || !has_room(l, cls))
                break;
            sh_status status =
                sh_outbox_next(&outbox, s->txn, (sh_class)cls, l->send_from[cls], &item);
            if (status == SH_ERR_NOT_FOUND) {
                l->send_from[cls] = l->counts.next_seq[cls];
                break;
            }
            if (status != SH_OK)
                return sh_fail(s->err, status, "outbox: cannot be read");
            l->send_from[cls] = item.seq + 1;
            if (!other_reads(l, &item) || is_in_flight(l, item.cls, item.seq))
                continue; /* it stays owed */
            sh_in_flight *f = free_flight(l);
            *f = (sh_in_flight){.used = true, .cls = item.cls, .seq = item.seq};
            SH_TRY(send_item(s, f, &item));
        }
    }
    return SH_OK;
}

static sh_status serve_chunks(const sh_link_step *s)
{
    sh_link *l = s->link;
    uint32_t done = 0;
    for (unsigned sent = 0;
         done < l->n_serve && sent < SH_LINK_SERVE_STEP_MAX && may_send(s) && !l->closed.chunks;
         done++) {
        sh_msg msg = {.type = SH_MSG_CHUNK};
        sh_slice bytes;
        memcpy(msg.chunk.hash.b, l->serve + done * HASH_BYTES, HASH_BYTES);
        sh_status status =
            sh_txn_get(s->txn, l->options.chunk_table, msg.chunk.hash.b, HASH_BYTES, &bytes);
        if (status == SH_ERR_NOT_FOUND)
            continue; /* its update was acknowledged or dropped since */
        if (status != SH_OK)
            return sh_fail(s->err, status, "chunk table: cannot be read");
        msg.chunk.bytes = (sh_bytes){bytes.data, bytes.n};
        SH_TRY(send_msg(s, &msg));
        sent++;
    }
    l->n_serve -= done;
    memmove(l->serve, l->serve + done * HASH_BYTES, l->n_serve * HASH_BYTES);
    return SH_OK;
}

/* There is an item that was not sent since the link came up, and room for it. */
static bool items_wait(const sh_link *l)
{
    for (unsigned cls = 0; cls < SH_CLASSES; cls++)
        if (l->counts.items[cls] > 0 && l->send_from[cls] < l->counts.next_seq[cls] &&
            !l->closed.items[cls] && has_room(l, cls))
            return true;
    return false;
}

/* ---- chunks down ---- */

void sh_link_want(const sh_link_step *s)
{
    if (s->link->state != SH_LINK_DOWN)
        s->link->want = (sh_retry){.due_ms = s->now_ms};
}

void sh_link_want_stop(const sh_link_step *s)
{
    sh_link *l = s->link;
    l->want.due_ms = SH_LINK_NEVER;
    l->n_asked = l->asked_got = 0;
}

static sh_status send_want(const sh_link_step *s)
{
    sh_link *l = s->link;
    /* Asked again with something missing: the peer sends so many at a time, or some were lost. */
    if (l->n_asked > 0 && l->asked_got > 0)
        l->want_size = SH_MAX(l->asked_got, SH_LINK_WANT_MIN);
    if (l->asked_got > 0)
        l->want.attempt = 0;
    l->asked_got = l->n_asked = 0;
    uint32_t max = l->want_size;
    if (l->closed.want_max > 0)
        max = SH_MIN(max, l->closed.want_max);
    SH_TRY(l->options.callbacks->missing(s->arg, l->asked, max, &l->n_asked));
    if (l->n_asked == 0) {
        sh_link_want_stop(s);
        return SH_OK;
    }
    sh_msg msg = {.type = SH_MSG_WANT, .want = {l->n_asked, l->asked}};
    sh_link_arm(s, &l->want);
    return send_msg(s, &msg);
}

static sh_status on_chunk(const sh_link_step *s, const sh_msg_chunk *chunk)
{
    sh_link *l = s->link;
    for (uint32_t i = 0; i < l->n_asked; i++) {
        uint8_t *asked = l->asked + i * HASH_BYTES;
        if (memcmp(asked, chunk->hash.b, HASH_BYTES) != 0)
            continue;
        sh_error local = {0};
        sh_status status = sh_chunk_put(s->txn, l->options.chunk_table, chunk, &local);
        if (status == SH_ERR_CORRUPT)
            return sh_link_refuse(s, status, "the chunk is not what it says");
        if (status != SH_OK && s->err != NULL)
            *s->err = local;
        SH_TRY(status);
        memmove(asked, l->asked + --l->n_asked * HASH_BYTES, HASH_BYTES);
        l->asked_got++;
        if (l->n_asked > 0)
            return SH_OK;
        l->want = (sh_retry){.due_ms = s->now_ms}; /* the next ones */
        return l->options.callbacks->on_chunks(s->arg);
    }
    return SH_OK; /* not asked for, or come twice */
}

/* ---- rotation ---- */

void sh_link_rotate(const sh_link_step *s, const sh_hash *key, sh_bytes token)
{
    sh_link *l = s->link;
    SH_ASSERT(token.n > 0 && token.n <= sizeof(l->token));
    l->next_key = *key;
    memcpy(l->token, token.data, token.n);
    l->n_token = (uint32_t)token.n;
    l->rotate = (sh_retry){.due_ms = s->now_ms};
}

static bool may_rotate(const sh_link *l)
{
    return l->n_token > 0 && l->state == SH_LINK_WELCOME && l->version >= 3;
}

static sh_status send_rotate(const sh_link_step *s)
{
    sh_link *l = s->link;
    sh_msg msg = {.type = SH_MSG_ROTATE,
                  .rotate = {.key = l->next_key, .token = {l->token, l->n_token}}};
    sh_link_arm(s, &l->rotate);
    return send_msg(s, &msg);
}

static void on_rotate(const sh_link_step *s, const sh_msg_rotate *rotate)
{
    sh_link *l = s->link;
    if (l->n_token == 0 || !sh_hash_equal(&rotate->key, &l->next_key))
        return; /* of an earlier one, or come twice */
    l->n_token = 0;
    l->options.callbacks->on_rotated(s->arg, &l->next_key);
}

/* ---- pump ---- */

/* More than ENROL may go out. Whether the epoch is ours alone, only WELCOME says. */
static bool is_open(const sh_link *l)
{
    return l->state == SH_LINK_WELCOME || (l->state == SH_LINK_TRYING && l->version < 3);
}

sh_status sh_link_pump(const sh_link_step *s)
{
    sh_link *l = s->link;
    if (l->state == SH_LINK_DOWN || l->hold_ms > s->now_ms)
        return SH_OK;
    bool contact = l->closed.contact_ms <= s->now_ms;
    if (l->enrol.due_ms <= s->now_ms && l->closed.enrol_ms <= s->now_ms && may_send(s))
        SH_TRY(send_enrol(s));
    if (!is_open(l))
        return SH_OK;
    if (may_rotate(l) && contact && l->rotate.due_ms <= s->now_ms && may_send(s))
        SH_TRY(send_rotate(s));
    if (l->checkin.due_ms <= s->now_ms && contact && may_send(s))
        SH_TRY(send_checkin(s));
    SH_TRY(send_items(s));
    SH_TRY(serve_chunks(s));
    if (l->want.due_ms <= s->now_ms && !l->closed.want && may_send(s))
        SH_TRY(send_want(s));
    return SH_OK;
}

uint64_t sh_link_due(const sh_link *l)
{
    if (l->state == SH_LINK_DOWN)
        return SH_LINK_NEVER;
    uint64_t contact = l->closed.contact_ms;
    uint64_t due = SH_MAX(l->enrol.due_ms, l->closed.enrol_ms);
    if (is_open(l)) {
        due = SH_MIN(due, SH_MAX(l->checkin.due_ms, contact));
        if (!l->closed.want)
            due = SH_MIN(due, l->want.due_ms);
        if (may_rotate(l))
            due = SH_MIN(due, SH_MAX(l->rotate.due_ms, contact));
        for (unsigned i = 0; i < SH_LINK_IN_FLIGHT_MAX; i++)
            if (l->in_flight[i].used && !l->closed.items[l->in_flight[i].cls])
                due = SH_MIN(due, l->in_flight[i].retry.due_ms);
        if ((l->n_serve > 0 && !l->closed.chunks) || items_wait(l))
            due = 0;
    }
    return SH_MAX(due, l->hold_ms);
}

/* ---- what comes in ---- */

sh_status sh_link_refuse(const sh_link_step *s, sh_status code, const char *text)
{
    sh_msg msg = {.type = SH_MSG_ERROR};
    msg.error = (sh_msg_error){.code = sh_status_name(code), .text = text};
    s->link->options.callbacks->on_refused(s->arg);
    return may_send(s) ? send_msg(s, &msg) : SH_OK;
}

static sh_status on_acked(void *arg, const sh_msg_item *item)
{
    const sh_link_step *s = arg;
    sh_link *l = s->link;
    for (unsigned i = 0; i < SH_LINK_IN_FLIGHT_MAX; i++)
        if (l->in_flight[i].cls == item->cls && l->in_flight[i].seq == item->seq)
            l->in_flight[i].used = false;
    return l->options.callbacks->on_acked(s->arg, item);
}

/* The first sequence above the high-water mark that the bitmap has; SH_SEQ_MAX + 1: none. */
static uint64_t first_marked(const sh_msg_ack *ack)
{
    for (unsigned w = 0; w < SH_ACK_BITMAP_WORDS; w++)
        for (unsigned bit = 0; bit < 64 && ack->bitmap[w] != 0; bit++)
            if (ack->bitmap[w] >> bit & 1)
                return ack->high_water + 1 + 64 * w + bit;
    return SH_SEQ_MAX + 1;
}

/* A restored aggregator may have forgotten what it acknowledged, and the sender has it no more: a
 * tombstone lets the high-water mark pass. An old acknowledgement looks the same; then it is a
 * duplicate there, and changes nothing. */
static sh_status bury_gap(const sh_link_step *s, const sh_outbox *outbox,
                          const sh_outbox_acked *acked)
{
    sh_link *l = s->link;
    const sh_msg_ack *ack = acked->ack;
    sh_retry *retry = &l->bury[ack->cls];
    sh_msg_item owed;
    uint64_t end = acked->last == 0 ? l->counts.next_seq[ack->cls] : acked->last + 1;
    sh_status status = sh_outbox_next(outbox, s->txn, ack->cls, acked->base + 1, &owed);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return sh_fail(s->err, status, "outbox: cannot be read");
    if (status == SH_OK)
        end = SH_MIN(end, owed.seq);
    end = SH_MIN(end - acked->base, first_marked(ack));
    if (end <= ack->high_water + 1) {
        *retry = (sh_retry){0};
        return SH_OK;
    }
    if (retry->due_ms > s->now_ms || !may_send(s))
        return SH_OK; /* the next acknowledgement shows it again */
    sh_msg msg = {.type = SH_MSG_ITEM};
    msg.item = (sh_msg_item){
        .epoch = ack->epoch,
        .cls = ack->cls,
        .seq = ack->high_water + 1,
        .kind = SH_ITEM_TOMBSTONE,
        .last_seq = end - 1,
        .lease = lease_of(l, ack->epoch),
    };
    sh_link_arm(s, retry);
    return send_msg(s, &msg);
}

/* The epoch is another's too: takes a new one. See link_renew. */
static sh_status renew(const sh_link_step *s, uint32_t common, const uint64_t parted[SH_CLASSES])
{
    sh_link *l = s->link;
    SH_TRY(link_renew(s, common, parted));
    forget_flight(l);
    memset(l->bury, 0, sizeof(l->bury));
    l->state = SH_LINK_TRYING;
    l->enrol = (sh_retry){.due_ms = s->now_ms, .attempt = l->renewals_here};
    if (l->renewals_here++ > 0)
        sh_link_arm(s, &l->enrol); /* one that goes on and on saying so is asked ever less often */
    l->checkin = (sh_retry){.due_ms = s->now_ms};
    l->options.callbacks->on_renewed(s->arg);
    return SH_OK;
}

static bool find_acked(const sh_link *l, const sh_msg_ack *ack, sh_outbox_acked *out)
{
    for (uint32_t i = 0; i < l->segments.n; i++)
        if (l->segments.items[i].epoch == ack->epoch) {
            bool current = i + 1 == l->segments.n;
            *out = (sh_outbox_acked){
                .ack = ack,
                .base = l->segments.items[i].base[ack->cls],
                .last = current ? 0 : link_segment_last(l, i, ack->cls),
            };
            /* It numbers nothing of this class. */
            return current || out->last > out->base;
        }
    return false;
}

static sh_status on_ack(const sh_link_step *s, const sh_msg_ack *ack)
{
    sh_link *l = s->link;
    sh_outbox outbox = outbox_of(s);
    sh_link_step mine = *s;
    sh_outbox_acked acked;
    sh_error local = {0};
    if (ack->cls >= SH_CLASSES || ack->high_water > SH_SEQ_MAX)
        return sh_link_refuse(s, SH_ERR_INVALID, "acknowledgement of an unknown class");
    bool ours = l->version < 3 || ack->lease == l->lease;
    if (!find_acked(l, ack, &acked))
        return l->renewals > 0 || !ours
                   ? SH_OK /* perhaps of one that it had, or of a copy that has our key */
                   : sh_link_refuse(s, SH_ERR_MISMATCH, "acknowledgement of another epoch");
    /* A copy that sends in this epoch has other items under the same sequences. */
    if (ack->epoch == l->epoch && !ours)
        return SH_OK;
    sh_status status = sh_outbox_ack(&outbox, s->txn, &acked, on_acked, &mine, &local);
    if (status == SH_ERR_INVALID)
        return renew(s, UINT32_MAX,
                     NULL); /* others went out under this epoch: this store was set back */
    if (status != SH_OK) {
        if (local.code != SH_OK && s->err != NULL)
            *s->err = local;
        return status;
    }
    if (acked.last != 0) /* a tombstone's rest begins with the next epoch */
        l->send_from[ack->cls] = SH_MIN(l->send_from[ack->cls], acked.last + 1);
    SH_TRY(load_counts(s));
    return bury_gap(s, &outbox, &acked);
}

static void on_want(const sh_link_step *s, const sh_hash_list *want)
{
    sh_link *l = s->link;
    for (uint32_t i = 0; i < want->n && l->n_serve < SH_LINK_SERVE_MAX; i++) {
        const uint8_t *hash = want->hashes + i * HASH_BYTES;
        bool queued = false;
        for (uint32_t k = 0; k < l->n_serve && !queued; k++)
            queued = memcmp(l->serve + k * HASH_BYTES, hash, HASH_BYTES) == 0;
        if (!queued)
            memcpy(l->serve + l->n_serve++ * HASH_BYTES, hash, HASH_BYTES);
    } /* what finds no room is asked for again */
}

static sh_status on_renew(const sh_link_step *s, const sh_msg_welcome *welcome)
{
    uint64_t parted[SH_CLASSES];
    if (welcome->parted.n == 0)
        return renew(s, welcome->common, NULL);
    sh_start_get(welcome->parted.data, parted);
    for (int cls = 0; cls < SH_CLASSES; cls++)
        if (parted[cls] == 0 || parted[cls] > SH_SEQ_MAX)
            return sh_link_refuse(s, SH_ERR_INVALID, "a copy parted at a sequence that is none");
    return renew(s, welcome->common, parted);
}

static sh_status on_welcome(const sh_link_step *s, const sh_msg_welcome *welcome)
{
    sh_link *l = s->link;
    if (l->state == SH_LINK_DOWN)
        return SH_OK; /* late: the next link enrols anew */
    if (!welcome->accepted) {
        l->state = SH_LINK_REJECTED;
        l->options.callbacks->on_rejected(s->arg, welcome->text);
        if (l->enrol.due_ms == SH_LINK_NEVER)
            sh_link_arm(s, &l->enrol);
        if (welcome->retry_after_ms > 0)
            l->enrol.due_ms = s->now_ms + SH_MIN(welcome->retry_after_ms, l->options.retry_max_ms);
        return SH_OK;
    }
    bool other = (welcome->epoch != 0 && welcome->epoch != l->epoch) ||
                 (welcome->lease != 0 && welcome->lease != l->lease);
    if (l->enrol.due_ms == SH_LINK_NEVER || other)
        return SH_OK; /* of an ENROL that was answered already, or not ours */
    if (welcome->renew)
        return on_renew(s, welcome);
    l->state = SH_LINK_WELCOME;
    l->options.enrol.token = (sh_bytes){0}; /* it has done its work */
    l->enrol = (sh_retry){.due_ms = SH_LINK_NEVER};
    return link_welcomed(s);
}

static sh_status on_plan(const sh_link_step *s, const sh_msg_plan *plan)
{
    sh_link *l = s->link;
    if (l->state != SH_LINK_DOWN) {
        uint64_t wait = SH_MAX(plan->return_after_ms, (uint64_t)SH_LINK_RETURN_MIN_MS);
        l->checkin =
            (sh_retry){.due_ms = s->now_ms + SH_MIN(wait, (uint64_t)SH_LINK_RETURN_MAX_MS)};
    }
    return l->options.callbacks->on_plan(s->arg, plan);
}

/* The other does not speak our version, but this one. */
static void speak(const sh_link_step *s, uint32_t version)
{
    sh_link *l = s->link;
    l->version = version;
    l->enrol = l->checkin = (sh_retry){.due_ms = s->now_ms};
    if (l->want.due_ms != SH_LINK_NEVER)
        l->want = (sh_retry){.due_ms = s->now_ms};
    forget_flight(l);
}

static void on_error(const sh_link_step *s, const sh_msg *msg)
{
    sh_link *l = s->link;
    const sh_msg_error *error = &msg->error;
    if (l->state == SH_LINK_DOWN)
        return;
    if (msg->version < l->version && strcmp(error->code, sh_status_name(SH_ERR_UNSUPPORTED)) == 0)
        speak(s, msg->version);
    uint64_t quiet = SH_MIN(error->retry_after_ms, l->options.retry_max_ms);
    if (quiet > 0 && !SH_CANARY(IGNORE_LATER))
        l->hold_ms = s->now_ms + quiet;
    if (strcmp(error->code, sh_status_name(SH_ERR_AUTH)) == 0 && l->enrol.due_ms == SH_LINK_NEVER)
        sh_link_arm(s, &l->enrol); /* it does not know us: enrol again */
}

sh_status sh_link_receive(const sh_link_step *s, sh_bytes message)
{
    sh_msg msg;
    sh_error local = {0};
    sh_msg_check check = SH_CANARY(INSTALL_UNCHECKED) ? SH_CHECK_ENVELOPE : SH_CHECK_NAME;
    sh_status status = sh_msg_decode_checked(message.data, message.n, check, &msg, &local);
    if (status == SH_ERR_NO_MEMORY)
        return sh_fail(s->err, status, "%s", local.text);
    if (status != SH_OK)
        return sh_link_refuse(s, status, "the message cannot be read");
    switch (msg.type) {
    case SH_MSG_WELCOME:
        return on_welcome(s, &msg.welcome);
    case SH_MSG_PLAN:
        return on_plan(s, &msg.plan);
    case SH_MSG_ACK:
        return on_ack(s, &msg.ack);
    case SH_MSG_WANT:
        on_want(s, &msg.want);
        return SH_OK;
    case SH_MSG_CHUNK:
        return on_chunk(s, &msg.chunk);
    case SH_MSG_ERROR:
        on_error(s, &msg);
        return SH_OK;
    case SH_MSG_ROTATE:
        on_rotate(s, &msg.rotate);
        return SH_OK;
    default:
        return sh_link_refuse(s, SH_ERR_INVALID, "a node does not take this message");
    }
}
