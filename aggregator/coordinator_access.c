/*
 * Who may speak: enrolment by operator or token, further keys of a node, and revocation.
 *
 * Rows of the table ACCESS, integers little-endian:
 *   't', BLAKE2b-256 of the token -> version 1, made 8, expires 8, uses 4, uses left 4, name
 *   'k', key -> version 1, state 1, first key of its node 32, BLAKE2b-256 of the rotation's token
 *        32, since 8
 *
 * A node is its first key; everything is filed under that. A message's key is resolved once, at the
 * door (coord_sender_find), and answers go to the key that the message came from. A key without a
 * row in ACCESS is its own node. One with a row is pending (announced by ROTATE under the node's
 * present key: it may send ENROL with the rotation's token), current, or retired, for ever.
 *
 * A claim to a key is no proof of having it: an operator's enrolment of a pending key, or its own
 * ENROL with an enrolment token, goes before another node's announcement of it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define TAG_TOKEN       't'
#define TAG_KEY         'k'
#define ACCESS_VERSION  1
#define ACCESS_KEY_SIZE 33

typedef struct {
    coord_key_state state;
    sh_hash node, token;
    uint64_t at_ms;
} key_row;

static void access_key(uint8_t out[ACCESS_KEY_SIZE], char tag, const sh_hash *hash)
{
    out[0] = (uint8_t)tag;
    memcpy(out + 1, hash->b, sizeof hash->b);
}

static sh_status access_delete(coord_step *s, char tag, const sh_hash *hash)
{
    uint8_t key[ACCESS_KEY_SIZE];
    access_key(key, tag, hash);
    return sh_txn_del(s->txn, SH_COORD_T_ACCESS, key, sizeof key, s->err);
}

/* ---- rows of keys ---- */

static sh_status key_decode(sh_slice value, key_row *out, sh_error *err)
{
    coord_reader r = coord_reader_of(value);
    key_row row = {0};
    bool good = coord_get_uint(&r, 1) == ACCESS_VERSION;
    unsigned state = (unsigned)coord_get_uint(&r, 1);
    row.state = (coord_key_state)state;
    row.node = coord_get_hash(&r);
    row.token = coord_get_hash(&r);
    row.at_ms = coord_get_uint(&r, 8);
    if (!good || r.bad || r.p != r.end || state < COORD_KEY_PENDING || state > COORD_KEY_RETIRED)
        return coord_row_corrupt(err, SH_COORD_T_ACCESS);
    *out = row;
    return SH_OK;
}

/* A key without a row is its own node's. */
static sh_status key_get(sh_txn *txn, const sh_hash *key, key_row *out, sh_error *err)
{
    uint8_t name[ACCESS_KEY_SIZE];
    sh_slice value;
    access_key(name, TAG_KEY, key);
    sh_status status = sh_txn_get(txn, SH_COORD_T_ACCESS, name, sizeof name, &value);
    if (status == SH_ERR_NOT_FOUND) {
        *out = (key_row){.state = COORD_KEY_FIRST, .node = *key};
        return SH_OK;
    }
    SH_TRY(status);
    return key_decode(value, out, err);
}

static sh_status key_put(coord_step *s, const sh_hash *key, const key_row *row)
{
    uint8_t name[ACCESS_KEY_SIZE];
    coord_writer w;
    access_key(name, TAG_KEY, key);
    coord_writer_init(&w);
    coord_put_uint(&w, ACCESS_VERSION, 1);
    coord_put_uint(&w, (uint64_t)row->state, 1);
    coord_put_hash(&w, &row->node);
    coord_put_hash(&w, &row->token);
    coord_put_uint(&w, row->at_ms, 8);
    return coord_row_put(s->txn, SH_COORD_T_ACCESS, (sh_slice){name, sizeof name}, &w, s->err);
}

sh_status coord_sender_find(coord_step *s, const sh_hash *key)
{
    key_row row;
    SH_TRY(key_get(s->txn, key, &row, s->err));
    s->from = *key;
    s->node = row.node;
    s->key_state = row.state;
    s->rotation = row.token;
    return SH_OK;
}

/* The node's announcement of its next key, if there is one, is void. */
static sh_status drop_pending(coord_step *s, sh_node_row *node)
{
    if (sh_hash_is_zero(&node->next_key))
        return SH_OK;
    SH_TRY(access_delete(s, TAG_KEY, &node->next_key));
    coord_set_key(s, &node->next_key, SH_KEY_UNKNOWN);
    node->next_key = (sh_hash){0};
    return SH_OK;
}

/* Another node's announcement of a key whose owner came itself, or was enrolled by the operator. */
static sh_status void_claim(coord_step *s, const sh_hash *key, const sh_hash *claimer)
{
    sh_node_row node;
    sh_status status = coord_node_get(s->txn, claimer, &node, s->err);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(s->err, SH_ERR_CORRUPT, "coordinator: a key's node is not there");
    SH_TRY(status);
    if (sh_hash_equal(&node.next_key, key))
        node.next_key = (sh_hash){0};
    SH_TRY(access_delete(s, TAG_KEY, key));
    return coord_node_put(s->txn, &node, s->err);
}

/* ---- rotation ---- */

/* Why the node may not have `key` as its next one; NULL: it may. */
static sh_status rotation_refused(coord_step *s, const sh_node_row *node, const sh_hash *key,
                                  const char **why)
{
    key_row row;
    sh_node_row other;
    *why = NULL;
    SH_TRY(key_get(s->txn, key, &row, s->err));
    if (row.state == COORD_KEY_PENDING && sh_hash_equal(&row.node, &node->key))
        return SH_OK; /* said again, perhaps with another token */
    sh_status status = coord_node_get(s->txn, key, &other, s->err);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    if (status == SH_OK || row.state != COORD_KEY_FIRST || sh_hash_is_zero(key))
        *why = "this key cannot be the next one: it is, was, or is about to be somebody's";
    else if (node->n_rotations >= COORD_ROTATIONS_MAX ||
             sh_txn_count(s->txn, SH_COORD_T_ACCESS) >= COORD_ACCESS_MAX)
        *why = "no more rotations are kept: ask the operator to enrol a new key";
    return SH_OK;
}

sh_status coord_on_rotate(coord_step *s, sh_node_row *node, const sh_msg_rotate *rotate)
{
    const char *why = NULL;
    if (rotate->token.n < COORD_ROTATE_TOKEN_MIN)
        return coord_bad_message(s, &node->key, SH_ERR_INVALID,
                                 "the rotation's token is too short");
    SH_TRY(rotation_refused(s, node, &rotate->key, &why));
    if (why != NULL)
        return coord_send_error(s, &node->key, SH_ERR_EXISTS, why);
    if (!sh_hash_equal(&node->next_key, &rotate->key))
        SH_TRY(drop_pending(s, node));
    key_row row = {.state = COORD_KEY_PENDING,
                   .node = node->key,
                   .token = sh_blake2b(rotate->token.data, rotate->token.n),
                   .at_ms = s->now_ms};
    SH_TRY(key_put(s, &rotate->key, &row));
    node->next_key = rotate->key;
    SH_TRY(coord_node_put(s->txn, node, s->err));
    coord_set_key(s, &rotate->key, SH_KEY_ALLOWED);
    sh_msg msg = {.type = SH_MSG_ROTATE, .rotate = {.key = rotate->key}};
    return coord_send(s, &node->key, &msg);
}

/* The pending key that the ENROL came from is the node's from now on, and the one before is not. */
static sh_status complete_rotation(coord_step *s, sh_node_row *node)
{
    char name[SH_HASH_HEX_BYTES], from[SH_HASH_HEX_BYTES], to[SH_HASH_HEX_BYTES];
    sh_hash old = node->current_key;
    key_row row = {.state = COORD_KEY_RETIRED, .node = node->key, .at_ms = s->now_ms};
    SH_TRY(key_put(s, &old, &row));
    row.state = COORD_KEY_CURRENT;
    SH_TRY(key_put(s, &s->from, &row));
    node->current_key = s->from;
    node->next_key = (sh_hash){0};
    node->n_rotations++;
    s->c->state.rotations++;
    s->c->dirty = true;
    s->key_state = COORD_KEY_CURRENT;
    coord_set_key(s, &old, SH_KEY_SHUT);
    coord_note(s, SH_CNOTE_ROTATED, &node->key, node->n_rotations);
    sh_hex(node->key.b, sizeof node->key.b, name);
    sh_hex(old.b, sizeof old.b, from);
    sh_hex(s->from.b, sizeof s->from.b, to);
    return coord_audit(s, "rotated node=%.16s from=%.16s to=%.16s", name, from, to);
}

/* ---- tokens ---- */

static sh_status token_decode(sh_slice key, sh_slice value, sh_token_row *out, sh_error *err)
{
    coord_reader r = coord_reader_of(value);
    sh_token_row row = {0};
    bool good = coord_get_uint(&r, 1) == ACCESS_VERSION && key.n == ACCESS_KEY_SIZE;
    if (good)
        memcpy(row.hash.b, (const uint8_t *)key.data + 1, sizeof row.hash.b);
    row.made_ms = coord_get_uint(&r, 8);
    row.expires_ms = coord_get_uint(&r, 8);
    row.uses = (uint32_t)coord_get_uint(&r, 4);
    row.uses_left = (uint32_t)coord_get_uint(&r, 4);
    coord_get_text(&r, row.name, sizeof row.name);
    if (!good || r.bad || r.p != r.end)
        return coord_row_corrupt(err, SH_COORD_T_ACCESS);
    *out = row;
    return SH_OK;
}

static sh_status token_put(coord_step *s, const sh_token_row *row)
{
    uint8_t key[ACCESS_KEY_SIZE];
    coord_writer w;
    access_key(key, TAG_TOKEN, &row->hash);
    coord_writer_init(&w);
    coord_put_uint(&w, ACCESS_VERSION, 1);
    coord_put_uint(&w, row->made_ms, 8);
    coord_put_uint(&w, row->expires_ms, 8);
    coord_put_uint(&w, row->uses, 4);
    coord_put_uint(&w, row->uses_left, 4);
    coord_put_text(&w, row->name);
    return coord_row_put(s->txn, SH_COORD_T_ACCESS, (sh_slice){key, sizeof key}, &w, s->err);
}

static sh_status token_get(coord_step *s, const sh_hash *hash, sh_token_row *out)
{
    uint8_t key[ACCESS_KEY_SIZE];
    sh_slice value;
    access_key(key, TAG_TOKEN, hash);
    SH_TRY(sh_txn_get(s->txn, SH_COORD_T_ACCESS, key, sizeof key, &value));
    return token_decode((sh_slice){key, sizeof key}, value, out, s->err);
}

sh_status sh_coord_each_token(sh_txn *txn, sh_status (*fn)(void *arg, const sh_token_row *row),
                              void *arg, sh_error *err)
{
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    const uint8_t tag = TAG_TOKEN;
    SH_TRY(sh_cursor_open(txn, SH_COORD_T_ACCESS, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, &tag, 1, &key, &value);
    while (status == SH_OK && key.n > 0 && ((const uint8_t *)key.data)[0] == tag) {
        sh_token_row row;
        status = token_decode(key, value, &row, err);
        if (status == SH_OK)
            status = fn(arg, &row);
        if (status == SH_OK)
            status = sh_cursor_next(cursor, &key, &value);
    }
    sh_cursor_close(&cursor);
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

static sh_status count_token(void *arg, const sh_token_row *row)
{
    sh_coord *c = arg;
    c->n_tokens++;
    c->tokens_until_ms = SH_MAX(c->tokens_until_ms, row->expires_ms);
    return SH_OK;
}

sh_status coord_tokens_load(sh_coord *c, sh_txn *txn, sh_error *err)
{
    c->n_tokens = 0;
    c->tokens_until_ms = 0;
    return sh_coord_each_token(txn, count_token, c, err);
}

typedef struct {
    uint64_t now_ms;
    sh_hash hashes[COORD_TOKENS_MAX];
    size_t n;
} expired_tokens;

static sh_status find_expired(void *arg, const sh_token_row *row)
{
    expired_tokens *e = arg;
    if (row->expires_ms <= e->now_ms && e->n < SH_COUNT(e->hashes))
        e->hashes[e->n++] = row->hash;
    return SH_OK;
}

static sh_status tokens_expire(coord_step *s)
{
    expired_tokens *e = sh_calloc(1, sizeof *e);
    if (e == NULL)
        return sh_fail(s->err, SH_ERR_NO_MEMORY, "coordinator: no memory for a list of tokens");
    e->now_ms = s->now_ms;
    sh_status status = sh_coord_each_token(s->txn, find_expired, e, s->err);
    for (size_t i = 0; i < e->n && status == SH_OK; i++)
        status = access_delete(s, TAG_TOKEN, &e->hashes[i]);
    free(e);
    return status;
}

sh_status coord_token_add(coord_step *s, const sh_coord_event *event, bool *done)
{
    sh_coord *c = s->c;
    sh_token_row row = {.hash = event->node,
                        .made_ms = s->now_ms,
                        .expires_ms = event->until_ms,
                        .uses = (uint32_t)event->number,
                        .uses_left = (uint32_t)event->number};
    SH_TRY(tokens_expire(s));
    SH_TRY(coord_tokens_load(c, s->txn, s->err));
    *done = event->number >= 1 && event->number <= SH_COORD_NODES_MAX &&
            event->until_ms > s->now_ms && c->n_tokens < COORD_TOKENS_MAX &&
            (event->name == NULL || coord_good_name(event->name));
    if (!*done)
        return SH_OK;
    if (event->name != NULL)
        memcpy(row.name, event->name, strlen(event->name) + 1);
    SH_TRY(token_put(s, &row));
    return coord_tokens_load(c, s->txn, s->err);
}

sh_status coord_token_remove(coord_step *s, const sh_hash *hash, bool *done)
{
    sh_token_row row;
    sh_status status = token_get(s, hash, &row);
    *done = status == SH_OK;
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    SH_TRY(status);
    SH_TRY(access_delete(s, TAG_TOKEN, hash));
    return coord_tokens_load(s->c, s->txn, s->err);
}

static sh_status token_find(coord_step *s, sh_bytes token, sh_token_row *row, bool *good)
{
    sh_hash hash = sh_blake2b(token.data, token.n);
    sh_status status = token.n == 0 ? SH_ERR_NOT_FOUND : token_get(s, &hash, row);
    *good = status == SH_OK && row->expires_ms > s->now_ms && row->uses_left > 0;
    return status == SH_ERR_NOT_FOUND ? SH_OK : status;
}

static sh_status token_use(coord_step *s, sh_token_row *row)
{
    sh_coord *c = s->c;
    c->dirty = true;
    c->state.token_enrolments++;
    if (--row->uses_left > 0)
        SH_TRY(token_put(s, row));
    else
        SH_TRY(access_delete(s, TAG_TOKEN, &row->hash));
    char name[SH_HASH_HEX_BYTES], key[SH_HASH_HEX_BYTES];
    sh_hex(row->hash.b, sizeof row->hash.b, name);
    sh_hex(s->from.b, sizeof s->from.b, key);
    SH_TRY(coord_audit(s, "token=%.16s enrols node=%.16s left=%u", name, key, row->uses_left));
    return coord_tokens_load(c, s->txn, s->err);
}

/* ---- ENROL ---- */

static sh_status refuse(coord_step *s, const char *text, uint64_t retry_after_ms)
{
    sh_msg msg = {.type = SH_MSG_WELCOME,
                  .welcome = {.text = text, .retry_after_ms = retry_after_ms}};
    return coord_send(s, &s->from, &msg);
}

static void copy_text(char *out, size_t out_bytes, const char *text)
{
    (void)snprintf(out, out_bytes, "%s", text == NULL ? "" : text);
}

static void describe(sh_node_row *node, const sh_msg_enrol *enrol)
{
    copy_text(node->agent, sizeof node->agent, enrol->agent);
    copy_text(node->kernel, sizeof node->kernel, enrol->kernel);
    copy_text(node->device_class, sizeof node->device_class, enrol->device_class);
    node->cores = enrol->cores;
    node->slots = enrol->slots;
    node->memory_bytes = enrol->memory_bytes;
    node->disk_bytes = enrol->disk_bytes;
}

/* What becomes of an ENROL. `why` NULL and admitted: it is taken. */
typedef struct {
    const sh_msg *msg;
    sh_node_row node;
    bool is_new, admitted;
    const char *why;   /* refused */
    uint64_t later_ms; /* when it may come again */
} enrolment;

/* Strangers have a rate of their own, which keeps no good token waiting: past it they are refused
 * all the same, and nothing is written of them. */
static void refuse_stranger(coord_step *s, enrolment *e)
{
    sh_coord *c = s->c;
    bool has_token = e->msg->enrol.token.n > 0;
    e->why = has_token ? "this token is not valid, used up or expired: ask the operator for another"
                       : "this key is not enrolled: ask the operator";
    if (s->now_ms < c->strangers_since_ms ||
        s->now_ms - c->strangers_since_ms >= COORD_STRANGERS_MS) {
        c->strangers_since_ms = s->now_ms;
        c->strangers = 0;
    }
    if (c->strangers >= COORD_STRANGERS_MAX) {
        uint64_t left_ms = COORD_STRANGERS_MS - (s->now_ms - c->strangers_since_ms);
        e->later_ms = SH_MAX(e->later_ms, left_ms);
        return;
    }
    c->strangers++;
    c->state.tokens_refused += has_token;
    c->dirty = c->dirty || has_token;
}

/* Whether the key may be enrolled now as a node of its own. */
static sh_status admit_new(coord_step *s, enrolment *e)
{
    bool pending = s->key_state == COORD_KEY_PENDING, good = false;
    bool any = s->c->options.enrol_any && !pending;
    sh_token_row token;
    if (sh_txn_count(s->txn, SH_COORD_T_NODE) >= SH_COORD_NODES_MAX) {
        e->why = "the fleet is full";
        return SH_OK;
    }
    if (!any)
        SH_TRY(token_find(s, e->msg->enrol.token, &token, &good));
    if (!any && !good) {
        refuse_stranger(s, e);
        return SH_OK;
    }
    SH_TRY(coord_admit(s, &s->from, e->msg, &e->admitted));
    if (!e->admitted)
        return SH_OK;
    if (good)
        SH_TRY(token_use(s, &token));
    if (good && pending)
        SH_TRY(void_claim(s, &s->from, &s->node));
    if (good) {
        s->node = s->from;
        s->key_state = COORD_KEY_FIRST;
    }
    e->is_new = true;
    e->node = (sh_node_row){.key = s->from, .current_key = s->from, .enrolled_ms = s->now_ms};
    return SH_OK;
}

/* Fills in the sender's row, or one for it that is new. */
static sh_status identify(coord_step *s, enrolment *e)
{
    const sh_bytes *token = &e->msg->enrol.token;
    bool pending = s->key_state == COORD_KEY_PENDING;
    if (s->key_state == COORD_KEY_RETIRED) {
        e->why = "this key was replaced by another one of its node";
        return SH_OK;
    }
    sh_status status = coord_node_get(s->txn, &s->node, &e->node, s->err);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    bool known = status == SH_OK;
    if (known && pending) {
        sh_hash hash = sh_blake2b(token->data, token->n);
        known = token->n > 0 && sh_hash_equal(&hash, &s->rotation);
    }
    if (!known)
        return admit_new(s, e);
    if (e->node.revoked) {
        e->why = "this key is revoked";
        return SH_OK;
    }
    SH_TRY(coord_admit(s, pending ? &s->from : &s->node, e->msg, &e->admitted));
    return pending && e->admitted ? complete_rotation(s, &e->node) : SH_OK;
}

static coord_barred *barred_place(const coord_step *s)
{
    return &s->c->barred[s->connection % COORD_BARRED_PLACES];
}

bool coord_is_barred(const coord_step *s)
{
    const coord_barred *b = barred_place(s);
    return b->used && b->connection == s->connection && sh_hash_equal(&b->key, &s->from);
}

static void bar(coord_step *s, bool renew)
{
    if (renew)
        *barred_place(s) =
            (coord_barred){.key = s->from, .connection = s->connection, .used = true};
    else if (coord_is_barred(s))
        *barred_place(s) = (coord_barred){0};
}

sh_status coord_on_enrol(coord_step *s, const sh_msg *message)
{
    sh_coord *c = s->c;
    const sh_msg_enrol *enrol = &message->enrol;
    enrolment e = {.msg = message, .admitted = true, .later_ms = c->options.checkin_ms};
    bool changed = false, known = false;
    uint8_t parted[SH_WIRE_START_BYTES];
    SH_TRY(identify(s, &e));
    if (e.why != NULL) {
        SH_TRY(refuse(s, e.why, e.later_ms));
        coord_drop_peer(s, &s->from);
        return SH_OK;
    }
    if (!e.admitted)
        return SH_OK;
    sh_node_row *node = &e.node;
    SH_TRY(coord_epoch_see(s, node, enrol->epoch, &known, &changed));
    if (!known)
        return refuse(s, COORD_TOO_MANY_STORES, 0);
    sh_msg msg = {.type = SH_MSG_WELCOME,
                  .welcome = {.accepted = true, .text = "welcome", .epoch = enrol->epoch}};
    SH_TRY(coord_epoch_claim(s, node, enrol, &msg.welcome, parted));
    bar(s, msg.welcome.renew);
    if (msg.welcome.renew)
        msg.welcome.text = "another sender has this epoch: take a new one";
    describe(node, enrol);
    SH_TRY(coord_node_put(s->txn, node, s->err));
    if (e.is_new) {
        c->enrolled++;
        coord_note(s, SH_CNOTE_ENROLLED, &node->key, c->enrolled);
        coord_set_key(s, &node->key, SH_KEY_ALLOWED);
    }
    return coord_send(s, &node->key, &msg);
}

sh_status coord_may_speak(coord_step *s, sh_node_row *node, bool *may)
{
    const char *why = NULL;
    sh_status status = coord_node_get(s->txn, &s->node, node, s->err);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    if (s->key_state == COORD_KEY_RETIRED)
        why = "this key was replaced by another one of its node";
    else if (status == SH_ERR_NOT_FOUND || s->key_state == COORD_KEY_PENDING)
        why = "this key is not enrolled: send ENROL first";
    else if (node->revoked)
        why = "this key is revoked";
    *may = why == NULL;
    if (*may)
        return SH_OK;
    SH_TRY(coord_send_error(s, &s->from, SH_ERR_AUTH, why));
    if (!s->c->options.enrol_any || status == SH_OK)
        coord_drop_peer(s, &s->from); /* else it may still enrol on this connection */
    return SH_OK;
}

sh_status coord_drop_stranger(coord_step *s)
{
    sh_node_row node;
    if (s->c->options.enrol_any)
        return SH_OK;
    sh_status status = coord_node_get(s->txn, &s->node, &node, s->err);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    if (status == SH_ERR_NOT_FOUND || node.revoked || s->key_state == COORD_KEY_PENDING ||
        s->key_state == COORD_KEY_RETIRED)
        coord_drop_peer(s, &s->from);
    return SH_OK;
}

/* ---- operators ---- */

/* Printable, so that it can stand in logs and tables. */
bool coord_good_name(const char *name)
{
    size_t n = strnlen(name, SH_NODE_NAME_MAX + 1);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f)
            return false;
    return n <= SH_NODE_NAME_MAX;
}

sh_status coord_enrol_key(coord_step *s, const sh_hash *key, const char *name, bool *done)
{
    sh_coord *c = s->c;
    sh_node_row node = {0};
    key_row row;
    uint32_t drifting = 0;
    SH_TRY(key_get(s->txn, key, &row, s->err));
    *done = name == NULL || coord_good_name(name);
    if (!*done)
        return SH_OK;
    if (row.state == COORD_KEY_PENDING)
        SH_TRY(void_claim(s, key, &row.node));
    /* A node is known by any key that it has or had; it connects with the one that it has. */
    const sh_hash *first = row.state == COORD_KEY_PENDING ? key : &row.node;
    sh_status status = coord_node_get(s->txn, first, &node, s->err);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    bool counted = status == SH_OK && !node.revoked;
    if (status == SH_ERR_NOT_FOUND) {
        *done = sh_txn_count(s->txn, SH_COORD_T_NODE) < SH_COORD_NODES_MAX;
        if (!*done)
            return SH_OK;
        node.key = node.current_key = *first;
        node.enrolled_ms = s->now_ms;
    }
    node.revoked = false;
    if (name != NULL) /* without one it keeps that which it has */
        memcpy(node.name, name, strlen(name) + 1);
    SH_TRY(coord_node_put(s->txn, &node, s->err));
    coord_set_key(s, &node.current_key, SH_KEY_ALLOWED);
    if (!counted) {
        c->enrolled++;
        SH_TRY(coord_drifting(s->txn, &node.key, &node.checkin, &drifting, s->err));
        c->drifting += drifting;
        coord_note(s, SH_CNOTE_ENROLLED, &node.key, c->enrolled);
    }
    return SH_OK;
}

sh_status coord_first_key(sh_txn *txn, const sh_hash *key, sh_hash *first, sh_error *err)
{
    key_row row;
    SH_TRY(key_get(txn, key, &row, err));
    *first = row.state == COORD_KEY_CURRENT ? row.node : *key;
    return SH_OK;
}

/* By any key that the node has, had or is about to have. Its updates that are not merged yet never
 * will be. */
sh_status coord_revoke_key(coord_step *s, const sh_hash *key, bool *done)
{
    sh_coord *c = s->c;
    sh_node_row node = {0};
    key_row row;
    uint32_t drifting = 0;
    SH_TRY(key_get(s->txn, key, &row, s->err));
    sh_status status = coord_node_get(s->txn, &row.node, &node, s->err);
    if (status == SH_ERR_NOT_FOUND || (status == SH_OK && node.revoked)) {
        *done = false;
        return SH_OK;
    }
    SH_TRY(status);
    node.revoked = true;
    SH_TRY(drop_pending(s, &node));
    SH_TRY(coord_node_put(s->txn, &node, s->err));
    coord_set_key(s, &node.current_key, SH_KEY_SHUT);
    c->enrolled--;
    SH_TRY(coord_drifting(s->txn, &node.key, &node.checkin, &drifting, s->err));
    c->drifting -= drifting;
    SH_TRY(coord_canary_forget(s, &node.key));
    SH_TRY(coord_waiting_refuse(s, &node.key, SH_REASON_REVOKED));
    SH_TRY(coord_refuse_node(s, &node.key, SH_REASON_REVOKED));
    return coord_advance(s);
}

/* ---- all keys, for the transport ---- */

typedef struct {
    sh_txn *txn;
    void *arg;
    sh_status (*fn)(void *arg, const sh_hash *key, bool allowed);
    sh_error *err;
} key_reader;

static sh_status read_node(void *arg, const sh_node_row *row)
{
    key_reader *r = arg;
    bool current = sh_hash_equal(&row->key, &row->current_key);
    return r->fn(r->arg, &row->key, current && !row->revoked);
}

static sh_status read_access(void *arg, sh_slice key, sh_slice value)
{
    key_reader *r = arg;
    const uint8_t *k = key.data;
    sh_node_row node;
    key_row row;
    sh_hash name;
    if (key.n != ACCESS_KEY_SIZE || k[0] != TAG_KEY)
        return SH_OK;
    memcpy(name.b, k + 1, sizeof name.b);
    SH_TRY(key_decode(value, &row, r->err));
    SH_TRY(coord_node_get(r->txn, &row.node, &node, r->err));
    if (sh_hash_equal(&name, &row.node)) /* a first key that was replaced: said as a node */
        return SH_OK;
    return r->fn(r->arg, &name, row.state != COORD_KEY_RETIRED && !node.revoked);
}

sh_status sh_coord_each_key(sh_txn *txn,
                            sh_status (*fn)(void *arg, const sh_hash *key, bool allowed), void *arg,
                            sh_error *err)
{
    key_reader r = {.txn = txn, .arg = arg, .fn = fn, .err = err};
    SH_TRY(sh_coord_each_node(txn, read_node, &r, err));
    return coord_each_row(txn, SH_COORD_T_ACCESS, read_access, &r, err);
}
