/*
 * Rows of the tables NODE and EPOCH: who a node is, and which sender each of its epochs belongs to.
 *
 * Integers little-endian; each value begins with a version byte.
 * NODE     first key -> version 3, revoked, enrolled_ms 8, last_ms 8, n_epochs 2, n_clones 4,
 *          n_rotations 4, current key 32, next key 32 (0: none), the last check-in's numbers, cores
 *          4, slots 4, memory 8, disk 8, agent, kernel, name, device class (length byte, text).
 *          Versions 1 and 2 are read: revoked, enrolled_ms, last_ms, n_epochs 1, epochs 8 each, the
 *          first of the check-in's numbers, agent, kernel, in version 2 name
 * EPOCH    first key, epoch 8 (big-endian) -> version 2, number of leases 1, newest first for each
 *          lease 32, the sequences that its start began at (sh_start_put's, 0: not known) 32,
 *          number of restores of this store when they were kept 4, first seen 8, last seen 8,
 *          clones 4. Version 1 is read: it has no sequences
 *
 * Leases: an epoch has one sender. A node draws a lease at each start and enrols with it and those
 * of its starts before, back to the last one that was welcomed. When the newest lease that is kept
 * for the epoch is among them, they are one store's, unless something of the epoch has come that
 * none of them can have sent: then the store was copied while that start went on. When it is not,
 * another copy of the store was here meanwhile. In both cases this one has to take a new epoch.
 * Where the two parted, the newest of its leases says that the other had, too: therefore older ones
 * are kept as well. Leases that were kept before this store was restored from a backup say nothing:
 * the node's may have gone on since.
 */
#include <string.h>

#include "aggregator/coordinator_internal.h"
#include "shared/base/canary.h"

#define NODE_VERSION    3
#define NODE_EPOCHS_MAX 16u /* in rows of versions 1 and 2 */
#define NODE_NUMBERS    17u /* of a check-in, dropped items included */
#define NODE_NUMBERS_3  27u
#define EPOCH_VERSION   2
#define EPOCH_KEY_BYTES 40

/* ---- NODE ---- */

static void checkin_to_numbers(const sh_msg_checkin *in, uint64_t out[NODE_NUMBERS_3])
{
    const uint64_t numbers[NODE_NUMBERS_3] = {
        in->epoch,
        in->now_ms,
        in->active_version,
        in->confirmed_version,
        in->installing_version,
        in->training_round,
        in->examples,
        in->example_tokens,
        in->outbox_items,
        in->outbox_bytes,
        in->inferences,
        in->windows,
        in->drifting,
        in->dropped[0],
        in->dropped[1],
        in->dropped[2],
        in->dropped[3],
        in->disk_free,
        in->store_bytes,
        in->store_bytes_max,
        in->refused_full,
        in->stores_lost,
        in->conditions,
        in->bytes_up_day,
        in->bytes_down_day,
        in->nodes,
        in->nodes_drifting,
    };
    _Static_assert(SH_CLASSES == 4, "each class has its number");
    memcpy(out, numbers, sizeof numbers);
}

static sh_msg_checkin checkin_of_numbers(const uint64_t n[NODE_NUMBERS_3])
{
    return (sh_msg_checkin){.epoch = n[0],
                            .now_ms = n[1],
                            .active_version = n[2],
                            .confirmed_version = n[3],
                            .installing_version = n[4],
                            .training_round = (uint32_t)n[5],
                            .examples = n[6],
                            .example_tokens = n[7],
                            .outbox_items = n[8],
                            .outbox_bytes = n[9],
                            .inferences = n[10],
                            .windows = n[11],
                            .drifting = n[12] != 0,
                            .dropped = {n[13], n[14], n[15], n[16]},
                            .disk_free = n[17],
                            .store_bytes = n[18],
                            .store_bytes_max = n[19],
                            .refused_full = n[20],
                            .stores_lost = (uint32_t)n[21],
                            .conditions = (uint32_t)n[22],
                            .bytes_up_day = n[23],
                            .bytes_down_day = n[24],
                            .nodes = (uint32_t)n[25],
                            .nodes_drifting = (uint32_t)n[26]};
}

sh_status coord_node_put(sh_txn *txn, const sh_node_row *row, sh_error *err)
{
    uint64_t numbers[NODE_NUMBERS_3];
    coord_writer w;
    coord_writer_init(&w);
    coord_put_uint(&w, NODE_VERSION, 1);
    coord_put_uint(&w, row->revoked, 1);
    coord_put_uint(&w, row->enrolled_ms, 8);
    coord_put_uint(&w, row->last_ms, 8);
    coord_put_uint(&w, row->n_epochs, 2);
    coord_put_uint(&w, row->n_clones, 4);
    coord_put_uint(&w, row->n_rotations, 4);
    coord_put_hash(&w, &row->current_key);
    coord_put_hash(&w, &row->next_key);
    checkin_to_numbers(&row->checkin, numbers);
    for (size_t i = 0; i < NODE_NUMBERS_3; i++)
        coord_put_uint(&w, numbers[i], 8);
    coord_put_uint(&w, row->cores, 4);
    coord_put_uint(&w, row->slots, 4);
    coord_put_uint(&w, row->memory_bytes, 8);
    coord_put_uint(&w, row->disk_bytes, 8);
    coord_put_text(&w, row->agent);
    coord_put_text(&w, row->kernel);
    coord_put_text(&w, row->name);
    coord_put_text(&w, row->device_class);
    return coord_row_put(txn, SH_COORD_T_NODE, (sh_slice){row->key.b, sizeof row->key.b}, &w, err);
}

/* Of versions 1 and 2, from behind last_ms on. */
static void decode_old(coord_reader *r, uint64_t version, sh_node_row *row,
                       uint64_t epochs[NODE_EPOCHS_MAX])
{
    uint64_t numbers[NODE_NUMBERS_3] = {0};
    row->n_epochs = (uint32_t)coord_get_uint(r, 1);
    r->bad = r->bad || row->n_epochs > NODE_EPOCHS_MAX;
    for (uint32_t i = 0; i < row->n_epochs && !r->bad; i++)
        epochs[i] = coord_get_uint(r, 8);
    for (size_t i = 0; i < NODE_NUMBERS; i++)
        numbers[i] = coord_get_uint(r, 8);
    row->checkin = checkin_of_numbers(numbers);
    row->current_key = row->key;
    coord_get_text(r, row->agent, sizeof row->agent);
    coord_get_text(r, row->kernel, sizeof row->kernel);
    if (version >= 2)
        coord_get_text(r, row->name, sizeof row->name);
}

static void decode_new(coord_reader *r, sh_node_row *row)
{
    uint64_t numbers[NODE_NUMBERS_3] = {0};
    row->n_epochs = (uint32_t)coord_get_uint(r, 2);
    row->n_clones = (uint32_t)coord_get_uint(r, 4);
    row->n_rotations = (uint32_t)coord_get_uint(r, 4);
    row->current_key = coord_get_hash(r);
    row->next_key = coord_get_hash(r);
    for (size_t i = 0; i < NODE_NUMBERS_3; i++)
        numbers[i] = coord_get_uint(r, 8);
    row->checkin = checkin_of_numbers(numbers);
    row->cores = (uint32_t)coord_get_uint(r, 4);
    row->slots = (uint32_t)coord_get_uint(r, 4);
    row->memory_bytes = coord_get_uint(r, 8);
    row->disk_bytes = coord_get_uint(r, 8);
    coord_get_text(r, row->agent, sizeof row->agent);
    coord_get_text(r, row->kernel, sizeof row->kernel);
    coord_get_text(r, row->name, sizeof row->name);
    coord_get_text(r, row->device_class, sizeof row->device_class);
}

/* epochs: filled from a row of version 1 or 2; *version says which it was. */
static sh_status decode(sh_slice key, sh_slice value, sh_node_row *row, uint64_t *version,
                        uint64_t epochs[NODE_EPOCHS_MAX], sh_error *err)
{
    sh_node_row out = {0};
    coord_reader r = coord_reader_of(value);
    *version = coord_get_uint(&r, 1);
    if (key.n != sizeof out.key.b || *version < 1 || *version > NODE_VERSION)
        return coord_row_corrupt(err, SH_COORD_T_NODE);
    memcpy(out.key.b, key.data, sizeof out.key.b);
    out.revoked = coord_get_uint(&r, 1) != 0;
    out.enrolled_ms = coord_get_uint(&r, 8);
    out.last_ms = coord_get_uint(&r, 8);
    if (*version < NODE_VERSION)
        decode_old(&r, *version, &out, epochs);
    else
        decode_new(&r, &out);
    if (r.bad || r.p != r.end)
        return coord_row_corrupt(err, SH_COORD_T_NODE);
    *row = out;
    return SH_OK;
}

sh_status coord_node_get(sh_txn *txn, const sh_hash *key, sh_node_row *row, sh_error *err)
{
    uint64_t version, epochs[NODE_EPOCHS_MAX];
    sh_slice value;
    SH_TRY(sh_txn_get(txn, SH_COORD_T_NODE, key->b, sizeof key->b, &value));
    return decode((sh_slice){key->b, sizeof key->b}, value, row, &version, epochs, err);
}

typedef struct {
    sh_status (*fn)(void *arg, const sh_node_row *row);
    void *arg;
    sh_txn *txn; /* of a migration */
    sh_error *err;
} reader;

static sh_status read_node(void *arg, sh_slice key, sh_slice value)
{
    reader *r = arg;
    sh_node_row row;
    uint64_t version, epochs[NODE_EPOCHS_MAX];
    SH_TRY(decode(key, value, &row, &version, epochs, r->err));
    return r->fn(r->arg, &row);
}

sh_status sh_coord_each_node(sh_txn *txn, sh_status (*fn)(void *arg, const sh_node_row *row),
                             void *arg, sh_error *err)
{
    reader r = {.fn = fn, .arg = arg, .err = err};
    return coord_each_row(txn, SH_COORD_T_NODE, read_node, &r, err);
}

/* ---- EPOCH ---- */

typedef struct {
    uint32_t n_leases;
    uint8_t leases[SH_WIRE_LEASES_MAX * sizeof(sh_hash)]; /* newest first */
    uint8_t starts[SH_WIRE_LEASES_MAX * SH_WIRE_START_BYTES];
    uint32_t restores;
    uint64_t first_ms, last_ms;
    uint32_t clones;
} epoch_row;

static void epoch_key(uint8_t out[EPOCH_KEY_BYTES], const sh_hash *node, uint64_t epoch)
{
    memcpy(out, node->b, sizeof node->b);
    sh_key_put_u64(out + sizeof node->b, epoch);
}

static sh_status epoch_put(sh_txn *txn, const sh_hash *node, uint64_t epoch, const epoch_row *row,
                           sh_error *err)
{
    uint8_t key[EPOCH_KEY_BYTES];
    coord_writer w;
    epoch_key(key, node, epoch);
    coord_writer_init(&w);
    coord_put_uint(&w, EPOCH_VERSION, 1);
    coord_put_uint(&w, row->n_leases, 1);
    for (uint32_t i = 0; i < row->n_leases; i++) {
        coord_put_bytes(&w, row->leases + i * sizeof(sh_hash), sizeof(sh_hash));
        coord_put_bytes(&w, row->starts + i * SH_WIRE_START_BYTES, SH_WIRE_START_BYTES);
    }
    coord_put_uint(&w, row->restores, 4);
    coord_put_uint(&w, row->first_ms, 8);
    coord_put_uint(&w, row->last_ms, 8);
    coord_put_uint(&w, row->clones, 4);
    return coord_row_put(txn, SH_COORD_T_EPOCH, (sh_slice){key, sizeof key}, &w, err);
}

/* SH_ERR_NOT_FOUND without text. */
static sh_status epoch_get(sh_txn *txn, const sh_hash *node, uint64_t epoch, epoch_row *row,
                           sh_error *err)
{
    uint8_t key[EPOCH_KEY_BYTES];
    sh_slice value;
    epoch_key(key, node, epoch);
    SH_TRY(sh_txn_get(txn, SH_COORD_T_EPOCH, key, sizeof key, &value));
    coord_reader r = coord_reader_of(value);
    epoch_row out = {0};
    uint64_t version = coord_get_uint(&r, 1);
    out.n_leases = (uint32_t)coord_get_uint(&r, 1);
    bool good = version >= 1 && version <= EPOCH_VERSION && out.n_leases <= SH_WIRE_LEASES_MAX;
    for (uint32_t i = 0; good && i < out.n_leases; i++) {
        coord_get_bytes(&r, out.leases + i * sizeof(sh_hash), sizeof(sh_hash));
        if (version >= 2)
            coord_get_bytes(&r, out.starts + i * SH_WIRE_START_BYTES, SH_WIRE_START_BYTES);
    }
    out.restores = (uint32_t)coord_get_uint(&r, 4);
    out.first_ms = coord_get_uint(&r, 8);
    out.last_ms = coord_get_uint(&r, 8);
    out.clones = (uint32_t)coord_get_uint(&r, 4);
    if (!good || r.bad || r.p != r.end)
        return coord_row_corrupt(err, SH_COORD_T_EPOCH);
    *row = out;
    return SH_OK;
}

sh_status coord_epoch_see(coord_step *s, sh_node_row *row, uint64_t epoch, bool *known,
                          bool *changed)
{
    epoch_row e = {.first_ms = s->now_ms};
    sh_status status = epoch_get(s->txn, &row->key, epoch, &e, s->err);
    bool is_new = status == SH_ERR_NOT_FOUND;
    if (status != SH_OK && !is_new)
        return status;
    *known = !is_new || row->n_epochs < COORD_EPOCHS_MAX;
    if (!*known)
        return SH_OK;
    row->n_epochs += is_new;
    *changed = *changed || is_new;
    /* A write for each message would be most of what a check-in costs. */
    bool recent = s->now_ms >= e.last_ms && s->now_ms - e.last_ms < COORD_EPOCH_SEEN_MS;
    if (!is_new && recent)
        return SH_OK;
    e.last_ms = s->now_ms;
    return epoch_put(s->txn, &row->key, epoch, &e, s->err);
}

/* Index of a lease among n; n: it is not there. */
static uint32_t find_lease(const uint8_t *leases, uint32_t n, const uint8_t *lease)
{
    uint32_t i = 0;
    while (i < n && memcmp(leases + i * sizeof(sh_hash), lease, sizeof(sh_hash)) != 0)
        i++;
    return i;
}

/* Index of the newest of the ENROL's leases that is kept; their number: none is. */
static uint32_t newest_common(const epoch_row *e, const sh_hash_list *leases)
{
    uint32_t i = 0;
    while (i < leases->n &&
           find_lease(e->leases, e->n_leases, leases->hashes + i * sizeof(sh_hash)) == e->n_leases)
        i++;
    return i;
}

/* The first `newer` of the ENROL's come before those that are kept; the oldest fall off. */
static void keep_leases(epoch_row *e, const sh_msg_enrol *enrol, uint32_t newer)
{
    uint32_t kept = SH_MIN(e->n_leases, SH_WIRE_LEASES_MAX - newer);
    memmove(e->leases + newer * sizeof(sh_hash), e->leases, kept * sizeof(sh_hash));
    memmove(e->starts + newer * SH_WIRE_START_BYTES, e->starts, kept * SH_WIRE_START_BYTES);
    memcpy(e->leases, enrol->leases.hashes, newer * sizeof(sh_hash));
    memset(e->starts, 0, newer * SH_WIRE_START_BYTES);
    if (enrol->starts.n > 0)
        memcpy(e->starts, enrol->starts.data, newer * SH_WIRE_START_BYTES);
    e->n_leases = newer + kept;
}

/* Whether something of the epoch has come that was made after lease i of the ENROL began. Of the
 * starts before the last one in its list the sender has sent nothing: they were not welcomed. */
static sh_status came_since(coord_step *s, const sh_hash *node, const sh_msg_enrol *enrol,
                            uint32_t i, bool *came)
{
    uint64_t next_seq[SH_CLASSES];
    *came = false;
    if (enrol->starts.n == 0)
        return SH_OK;
    sh_start_get((const uint8_t *)enrol->starts.data + i * SH_WIRE_START_BYTES, next_seq);
    for (uint8_t cls = 0; cls < SH_CLASSES; cls++) {
        uint64_t highest;
        SH_TRY(
            sh_inbox_highest(s->txn, SH_COORD_T_INBOX, node, enrol->epoch, cls, &highest, s->err));
        *came = *came || (next_seq[cls] != 0 && highest >= next_seq[cls]);
    }
    return SH_OK;
}

/* Another sender of this epoch was here before. The log of decisions names it at the 1st, 2nd, 4th,
 * 8th, ... time, so that a node that goes on and on does not fill it. */
static sh_status note_clone(coord_step *s, sh_node_row *row, uint64_t epoch, uint32_t clones)
{
    sh_coord *c = s->c;
    row->n_clones += row->n_clones < UINT32_MAX;
    c->state.clones++;
    c->dirty = true;
    coord_note(s, SH_CNOTE_CLONED, &row->key, c->state.clones);
    if ((clones & (clones - 1)) != 0)
        return SH_OK;
    char node[SH_HASH_HEX_BYTES];
    sh_hex(row->key.b, sizeof row->key.b, node);
    return coord_audit(s, "cloned node=%.16s epoch=%016llx times=%u", node,
                       (unsigned long long)epoch, clones);
}

/* Where the kept line of starts left the newest common one, that ENROL's list has too. */
static void say_parted(const epoch_row *e, const uint8_t *lease, uint8_t out[SH_WIRE_START_BYTES],
                       sh_msg_welcome *welcome)
{
    static const uint8_t unknown[SH_WIRE_START_BYTES];
    uint32_t i = find_lease(e->leases, e->n_leases, lease);
    const uint8_t *start = e->starts + (i - 1) * SH_WIRE_START_BYTES;
    if (memcmp(start, unknown, sizeof unknown) == 0)
        return;
    memcpy(out, start, SH_WIRE_START_BYTES);
    welcome->parted = (sh_bytes){out, SH_WIRE_START_BYTES};
}

static sh_status claim_refused(coord_step *s, sh_node_row *row, uint64_t epoch, epoch_row *e)
{
    e->clones += e->clones < UINT32_MAX;
    SH_TRY(epoch_put(s->txn, &row->key, epoch, e, s->err));
    return note_clone(s, row, epoch, e->clones);
}

/* When the start before is of a program that still runs, and this one began from a copy of its
 * store, that has to say who it is before it goes on. An update that it made since, and whose
 * chunks have not come, is not this one's of the same sequence. */
static sh_status take_over(coord_step *s, const sh_hash *node, const sh_msg_enrol *enrol,
                           uint32_t first)
{
    uint64_t next_seq[SH_CLASSES];
    coord_drop_others(s);
    if (enrol->starts.n == 0)
        return SH_OK;
    sh_start_get((const uint8_t *)enrol->starts.data + first * SH_WIRE_START_BYTES, next_seq);
    return coord_waiting_forget(s, node, enrol->epoch, next_seq[SH_CLASS_UPDATE], SH_SEQ_MAX);
}

sh_status coord_epoch_claim(coord_step *s, sh_node_row *row, const sh_msg_enrol *enrol,
                            sh_msg_welcome *welcome, uint8_t parted[SH_WIRE_START_BYTES])
{
    const sh_hash_list *leases = &enrol->leases;
    epoch_row e = {0};
    if (leases->n == 0 || SH_CANARY(NO_LEASE))
        return SH_OK;
    sh_status status = epoch_get(s->txn, &row->key, enrol->epoch, &e, s->err);
    if (status == SH_ERR_NOT_FOUND)
        return sh_fail(s->err, SH_ERR_CORRUPT, "coordinator: an epoch that was seen has no row");
    SH_TRY(status);
    welcome->lease = sh_lease_name(leases->hashes);
    uint32_t newer = leases->n, own = 0; /* from lease `own` on it may have sent in this epoch */
    bool restored = e.restores != s->c->state.restores;
    if (e.n_leases > 0)
        own = leases->n - 1;
    if (restored)
        e.n_leases = 0;
    e.restores = s->c->state.restores;
    if (e.n_leases > 0)
        own = newer = find_lease(leases->hashes, leases->n, e.leases);
    if (e.n_leases > 0 && newer == leases->n) {
        welcome->renew = true;
        welcome->common = newest_common(&e, leases);
        if (welcome->common < leases->n)
            say_parted(&e, leases->hashes + welcome->common * sizeof(sh_hash), parted, welcome);
        return claim_refused(s, row, enrol->epoch, &e);
    }
    if (own > 0)
        SH_TRY(came_since(s, &row->key, enrol, own - 1, &welcome->renew));
    if (welcome->renew) {
        welcome->common = own;
        return claim_refused(s, row, enrol->epoch, &e);
    }
    if (newer == 0)
        return SH_OK; /* the same start, on another connection */
    if (e.n_leases > 0)
        SH_TRY(take_over(s, &row->key, enrol, newer - 1));
    keep_leases(&e, enrol, newer);
    return epoch_put(s->txn, &row->key, enrol->epoch, &e, s->err);
}

sh_status coord_epoch_lease(coord_step *s, const sh_hash *node, uint64_t epoch, uint64_t *lease)
{
    epoch_row e;
    *lease = 0;
    sh_status status = epoch_get(s->txn, node, epoch, &e, s->err);
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    SH_TRY(status);
    if (e.n_leases > 0 && e.restores == s->c->state.restores)
        *lease = sh_lease_name(e.leases);
    return SH_OK;
}

/* ---- stores of schema 1 and 2 ---- */

static sh_status migrate_node(void *arg, sh_slice key, sh_slice value)
{
    reader *r = arg;
    sh_node_row row;
    uint64_t version, epochs[NODE_EPOCHS_MAX];
    SH_TRY(decode(key, value, &row, &version, epochs, r->err));
    if (version == NODE_VERSION)
        return SH_OK;
    for (uint32_t i = 0; i < row.n_epochs; i++) {
        epoch_row e = {.first_ms = row.enrolled_ms, .last_ms = row.last_ms};
        SH_TRY(epoch_put(r->txn, &row.key, epochs[i], &e, r->err));
    }
    return coord_node_put(r->txn, &row, r->err);
}

sh_status coord_epochs_migrate(coord_step *s)
{
    reader r = {.txn = s->txn, .err = s->err};
    return coord_each_row(s->txn, SH_COORD_T_NODE, migrate_node, &r, s->err);
}
