/*
 * Operators' commands. A command that changes something is one step of the core; its answer goes
 * out after the commit. Long lists come a page at a time: {"after": KEY, "limit": N}.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/server_internal.h"
#include "shared/base/clock.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

#define PAGE_ROWS_MAX    1000u
#define PAGE_ROWS        200u
#define MODEL_BYTES_MAX  ((size_t)SH_CHUNK_BYTES * SH_BLOB_CHUNKS_MAX)
#define ADMIN_TURN_CALLS 16 /* before the nodes get their turn again */

typedef struct {
    sh_server *s;
    const json_t *request;
    sh_admin_caller caller;
    json_t *reply; /* members after "ok" */
    bool later;    /* the answer comes from elsewhere */
    sh_error *err;
} call;

/* ---- arguments ---- */

static sh_status need_uint(const call *c, const char *name, uint64_t *out)
{
    const json_t *value = json_object_get(c->request, name);
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return sh_fail(c->err, SH_ERR_USAGE, "\"%s\" must be a whole number of 0 or more", name);
    *out = (uint64_t)json_integer_value(value);
    return SH_OK;
}

static sh_status need_text(const call *c, const char *name, const char **out)
{
    *out = json_string_value(json_object_get(c->request, name));
    if (*out == NULL || (*out)[0] == '\0')
        return sh_fail(c->err, SH_ERR_USAGE, "\"%s\" is missing", name);
    return SH_OK;
}

static sh_status need_key(const call *c, sh_hash *out)
{
    const char *text;
    SH_TRY(need_text(c, "key", &text));
    if (sh_hash_parse(text, out, NULL) != SH_OK)
        return sh_fail(c->err, SH_ERR_USAGE,
                       "a node's key is 64 hexadecimal digits, as shoal-node init prints it");
    return SH_OK;
}

static uint64_t get_limit(const call *c)
{
    const json_t *value = json_object_get(c->request, "limit");
    json_int_t n = json_is_integer(value) ? json_integer_value(value) : PAGE_ROWS;
    return (uint64_t)SH_MIN(SH_MAX(n, 1), (json_int_t)PAGE_ROWS_MAX);
}

static void set_uint(json_t *object, const char *key, uint64_t x)
{
    sh_json_set(object, key, json_integer((json_int_t)x));
}

static void set_hash(json_t *object, const char *key, const sh_hash *hash)
{
    char hex[SH_HASH_HEX_BYTES];
    sh_hex(hash->b, sizeof hash->b, hex);
    sh_json_set(object, key, json_string(hex));
}

/* ---- what changes something ---- */

static sh_status command(const call *c, sh_coord_event *e, const char *refused)
{
    sh_server *s = c->s;
    if (s->coord == NULL)
        return sh_fail(c->err, SH_ERR_IO,
                       "the aggregator starts again after a failed write (see its log); try later");
    s->command_refused = false;
    e->kind = SH_COORD_COMMAND;
    if (!server_step_alone(s, e, NULL))
        return sh_fail(c->err, SH_ERR_IO, "the command was not stored (see the aggregator's log)");
    if (s->command_refused)
        return sh_fail(c->err, SH_ERR_INVALID, "%s", refused);
    return SH_OK;
}

static sh_status on_pause(call *c)
{
    return command(c, &(sh_coord_event){.command = SH_COMMAND_PAUSE}, "refused");
}

static sh_status on_resume(call *c)
{
    return command(c, &(sh_coord_event){.command = SH_COMMAND_RESUME}, "refused");
}

static sh_status on_close(call *c)
{
    return command(c, &(sh_coord_event){.command = SH_COMMAND_CLOSE}, "refused");
}

static sh_status on_server_scale(call *c)
{
    const json_t *value = json_object_get(c->request, "value");
    sh_coord_event e = {.command = SH_COMMAND_SERVER_SCALE};
    if (!json_is_number(value))
        return sh_fail(c->err, SH_ERR_USAGE, "\"value\" must be a number");
    e.real = json_number_value(value);
    return command(c, &e, "a server scale is above 0 and at most 1000");
}

static sh_status on_enrol(call *c)
{
    sh_coord_event e = {.command = SH_COMMAND_ENROL};
    SH_TRY(need_key(c, &e.node));
    e.name = json_string_value(json_object_get(c->request, "name"));
    if (e.name != NULL && strlen(e.name) > SH_NODE_NAME_MAX)
        return sh_fail(c->err, SH_ERR_USAGE, "a node's name has at most %d bytes",
                       SH_NODE_NAME_MAX);
    SH_TRY(command(c, &e,
                   "no more nodes can be enrolled, or the key is one that a node has replaced"));
    e.command = SH_COMMAND_RELAY;
    e.number = json_is_true(json_object_get(c->request, "relay"));
    SH_TRY(command(c, &e, "the key is not enrolled"));
    set_hash(c->reply, "key", &e.node);
    return SH_OK;
}

static sh_status list_entry(const call *c, const json_t *entry, sh_coord_event *e)
{
    const char *key = json_string_value(json_object_get(entry, "key"));
    *e = (sh_coord_event){.kind = SH_COORD_COMMAND, .command = SH_COMMAND_ENROL};
    e->name = json_string_value(json_object_get(entry, "name"));
    if (key == NULL || sh_hash_parse(key, &e->node, NULL) != SH_OK ||
        (e->name != NULL && strlen(e->name) > SH_NODE_NAME_MAX))
        return sh_fail(c->err, SH_ERR_USAGE,
                       "\"nodes\" must be [{\"key\": 64 hexadecimal digits, \"name\": at most %d "
                       "bytes}, ...]",
                       SH_NODE_NAME_MAX);
    return SH_OK;
}

/* A batch of a list, in one transaction. Those that the core refuses are named. */
static sh_status on_enrol_list(call *c)
{
    sh_server *s = c->s;
    const json_t *nodes = json_object_get(c->request, "nodes");
    size_t n = json_array_size(nodes);
    sh_coord_event e;
    if (n == 0 || n > SERVER_ENROL_BATCH_MAX)
        return sh_fail(c->err, SH_ERR_USAGE, "\"nodes\" must be a list of 1 to %u",
                       SERVER_ENROL_BATCH_MAX);
    for (size_t i = 0; i < n; i++)
        SH_TRY(list_entry(c, json_array_get(nodes, i), &e));
    if (s->coord == NULL)
        return sh_fail(c->err, SH_ERR_IO,
                       "the aggregator starts again after a failed write (see its log); try later");
    uint64_t before = sh_coord_get_status(s->coord).commands_refused;
    json_t *refused = json_array();
    sh_json_set(c->reply, "refused", refused);
    for (size_t i = 0; i < n; i++) {
        const json_t *entry = json_array_get(nodes, i);
        SH_TRY(list_entry(c, entry, &e));
        if (!server_step(s, &e))
            return sh_fail(c->err, SH_ERR_IO, "the list was not stored (see the aggregator's log)");
        uint64_t now = sh_coord_get_status(s->coord).commands_refused;
        if (now != before)
            json_array_append(refused, json_object_get(entry, "key"));
        before = now;
    }
    if (!server_commit(s, NULL))
        return sh_fail(c->err, SH_ERR_IO, "the list was not stored (see the aggregator's log)");
    set_uint(c->reply, "enrolled", n - json_array_size(refused));
    return SH_OK;
}

static sh_status on_revoke(call *c)
{
    sh_coord_event e = {.command = SH_COMMAND_REVOKE};
    SH_TRY(need_key(c, &e.node));
    SH_TRY(command(c, &e, "no node with this key is enrolled (see shoal aggregator nodes)"));
    set_hash(c->reply, "key", &e.node);
    sh_log(SH_LOG_WARN, "revoked", "node=%s", json_string_value(json_object_get(c->reply, "key")));
    return SH_OK;
}

/* ---- enrolment tokens ---- */

#define TOKEN_BYTES    32
#define TOKEN_ID_BYTES 8 /* of its hash, in lists */
#define TOKEN_S_MAX    (10ull * 365 * 86400)

static void token_id(const sh_hash *hash, char out[2 * TOKEN_ID_BYTES + 1])
{
    sh_hex(hash->b, TOKEN_ID_BYTES, out);
}

/* The token is in the answer and nowhere else: the store has its hash. */
static sh_status on_token_add(call *c)
{
    sh_coord_event e = {.command = SH_COMMAND_TOKEN_ADD};
    uint8_t token[TOKEN_BYTES];
    char text[2 * TOKEN_BYTES + 1], id[2 * TOKEN_ID_BYTES + 1];
    uint64_t seconds = 0;
    SH_TRY(need_uint(c, "uses", &e.number));
    SH_TRY(need_uint(c, "seconds", &seconds));
    if (seconds == 0 || seconds > TOKEN_S_MAX)
        return sh_fail(c->err, SH_ERR_USAGE, "a token is valid for 1 second to 10 years");
    e.name = json_string_value(json_object_get(c->request, "name"));
    e.until_ms = sh_clock_wall_ms() + seconds * 1000;
    sh_random_bytes(token, sizeof token);
    e.node = sh_blake2b(token, sizeof token);
    sh_status status =
        command(c, &e,
                "a token enrols 1 to 100000 nodes, its name has at most 63 printable bytes, and "
                "at most 1024 tokens are kept (see shoal aggregator token list)");
    if (status == SH_OK) {
        sh_hex(token, sizeof token, text);
        token_id(&e.node, id);
        sh_json_set(c->reply, "token", json_string(text));
        sh_json_set(c->reply, "id", json_string(id));
        set_uint(c->reply, "uses", e.number);
        set_uint(c->reply, "expires_ms", e.until_ms);
    }
    explicit_bzero(token, sizeof token);
    explicit_bzero(text, sizeof text);
    return status;
}

typedef struct {
    json_t *rows;
    uint64_t now_ms;
    const char *wanted; /* id or name */
    sh_hash hash;
    size_t n; /* that are it */
} token_list;

static sh_status add_token(void *arg, const sh_token_row *row)
{
    token_list *l = arg;
    char id[2 * TOKEN_ID_BYTES + 1];
    token_id(&row->hash, id);
    if (l->wanted != NULL && (strcmp(l->wanted, id) == 0 || strcmp(l->wanted, row->name) == 0)) {
        l->hash = row->hash;
        l->n++;
    }
    if (l->rows == NULL)
        return SH_OK;
    json_t *r = json_object();
    sh_json_set(r, "id", json_string(id));
    sh_json_set(r, "name", json_string(row->name));
    set_uint(r, "uses", row->uses);
    set_uint(r, "uses_left", row->uses_left);
    set_uint(r, "made_ms", row->made_ms);
    set_uint(r, "expires_ms", row->expires_ms);
    sh_json_set(r, "expired", json_boolean(row->expires_ms <= l->now_ms));
    json_array_append_new(l->rows, r);
    return SH_OK;
}

static sh_status read_tokens(const call *c, token_list *l)
{
    sh_txn *txn = NULL;
    l->now_ms = sh_clock_wall_ms();
    SH_TRY(sh_txn_begin(c->s->store, SH_TXN_READ, &txn, c->err));
    sh_status status = sh_coord_each_token(txn, add_token, l, c->err);
    sh_txn_abort(&txn);
    return status;
}

static sh_status on_token_list(call *c)
{
    token_list l = {.rows = json_array()};
    sh_json_set(c->reply, "tokens", l.rows);
    return read_tokens(c, &l);
}

static sh_status on_token_remove(call *c)
{
    sh_coord_event e = {.command = SH_COMMAND_TOKEN_REMOVE};
    token_list l = {0};
    SH_TRY(need_text(c, "id", &l.wanted));
    SH_TRY(read_tokens(c, &l));
    if (l.n == 0)
        return sh_fail(c->err, SH_ERR_NOT_FOUND,
                       "there is no token '%s' (see shoal aggregator token list)", l.wanted);
    if (l.n > 1)
        return sh_fail(c->err, SH_ERR_USAGE, "%zu tokens have the name '%s': say an id", l.n,
                       l.wanted);
    e.node = l.hash;
    return command(c, &e, "there is no such token");
}

/* ---- releases ---- */

typedef struct {
    uint64_t version;
    sh_hash sha256;
    bool found;
} wanted_release;

static sh_status find_release(void *arg, const sh_release_row *row)
{
    wanted_release *w = arg;
    if (row->version != w->version)
        return SH_OK;
    w->found = true;
    w->sha256 = row->sha256;
    return SH_OK;
}

/* The bytes come along, because the store holds the chunks of the newest releases only. */
static sh_status on_rollback(call *c)
{
    wanted_release w = {0};
    sh_txn *txn = NULL;
    uint8_t *bytes = NULL;
    size_t n = 0;
    char path[SH_PATH_BYTES];
    SH_TRY(need_uint(c, "version", &w.version));
    SH_TRY(sh_txn_begin(c->s->store, SH_TXN_READ, &txn, c->err));
    sh_status status = sh_coord_each_candidate(txn, find_release, &w, c->err);
    sh_txn_abort(&txn);
    SH_TRY(status);
    if (!w.found || w.version == 0)
        return sh_fail(c->err, SH_ERR_NOT_FOUND,
                       "there is no release %llu (see shoal aggregator releases)",
                       (unsigned long long)w.version);
    SH_TRY(sh_job_path(path, SH_FOLDER_OBJECTS, &w.sha256, c->err));
    if (sh_file_exists(path))
        SH_TRY(sh_file_read(path, MODEL_BYTES_MAX, &bytes, &n, c->err));
    sh_coord_event e = {.command = SH_COMMAND_ROLLBACK, .number = w.version, .message = {bytes, n}};
    status = command(c, &e,
                     "the release is the current one, or its model is neither in the store nor in "
                     "objects/");
    free(bytes);
    SH_TRY(status);
    set_uint(c->reply, "release", sh_coord_get_status(c->s->coord).version);
    return SH_OK;
}

static sh_status on_backup(call *c)
{
    const char *dir;
    SH_TRY(need_text(c, "dir", &dir));
    if (dir[0] != '/' || strlen(dir) >= SH_PATH_BYTES)
        return sh_fail(c->err, SH_ERR_USAGE, "\"dir\" must be an absolute path");
    if (server_worker_has(&c->s->worker, TASK_BACKUP))
        return sh_fail(c->err, SH_ERR_EXISTS, "a backup is being made; wait for it");
    server_task *task = server_task_create(TASK_BACKUP);
    if (task == NULL)
        return sh_fail(c->err, SH_ERR_NO_MEMORY, "no memory for a backup");
    memcpy(task->dir, dir, strlen(dir) + 1);
    task->caller = c->caller;
    sh_status status = server_worker_submit(&c->s->worker, &task, c->err);
    server_task_destroy(&task);
    c->later = status == SH_OK;
    return status;
}

void server_answer_backup(sh_server *s, const server_task *task)
{
    json_t *reply;
    if (task->status != SH_OK) {
        reply = sh_admin_error(&task->err);
    } else {
        reply = json_object();
        sh_json_set(reply, "ok", json_true());
        sh_json_set(reply, "dir", json_string(task->dir));
        set_uint(reply, "release", task->version);
        sh_log(SH_LOG_INFO, "backed_up", "version=%llu ms=%llu", (unsigned long long)task->version,
               (unsigned long long)task->took_ms);
    }
    sh_admin_reply(s->admin, task->caller, reply);
}

static sh_status on_log_level(call *c)
{
    const char *name;
    sh_log_level level;
    SH_TRY(need_text(c, "level", &name));
    SH_TRY(sh_log_parse_level(name, &level, c->err));
    sh_log_set_level(level);
    return SH_OK;
}

static sh_status on_stop(call *c)
{
    c->s->stop = true;
    c->s->stop_reason = "command";
    return SH_OK;
}

/* ---- what only reads ---- */

static json_t *updates_of(const sh_coord_status *now)
{
    json_t *updates = json_object(), *refused = json_object();
    set_uint(updates, "in", now->updates_in);
    set_uint(updates, "merged", now->updates_merged);
    for (int i = SH_REASON_NONE + 1; i < SH_REASONS; i++)
        set_uint(refused, sh_reason_name((sh_reason)i), now->updates_refused[i]);
    sh_json_set(updates, "refused", refused);
    return updates;
}

static json_t *parent_of(const sh_server *s, const sh_coord_status *now)
{
    json_t *parent = json_object();
    char hex[17];
    sh_json_set(parent, "endpoint", json_string(s->settings.upstream));
    sh_json_set(parent, "state",
                json_string(now->parent_welcome ? "welcome"
                            : s->parent_refused ? "refused"
                            : now->parent_up    ? "up"
                                                : "down"));
    set_hash(parent, "key", &s->parent_keys.public_key);
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)now->parent_epoch);
    sh_json_set(parent, "epoch", json_string(hex));
    set_uint(parent, "updates", now->relayed);
    set_uint(parent, "owed", now->relay_owed);
    set_uint(parent, "taking", now->taking);
    return parent;
}

static sh_status on_status(call *c)
{
    sh_server *s = c->s;
    json_t *r = c->reply;
    char hex[17];
    sh_json_set(r, "program", json_string(SHOAL_VERSION));
    sh_json_set(r, "endpoint", json_string(sh_net_server_endpoint(s->nodes)));
    sh_json_set(r, "http",
                json_sprintf("%s:%u", s->settings.http_address, (unsigned)sh_http_port(s->http)));
    set_uint(r, "started_ms", s->started_ms);
    set_uint(r, "connections", sh_net_server_connections(s->nodes));
    set_uint(r, "handshakes_refused", sh_net_server_refused(s->nodes));
    set_uint(r, "store_bytes", sh_store_bytes_used(s->store));
    sh_json_set(r, "worker_busy", json_boolean(server_worker_busy(&s->worker)));
    sh_json_set(r, "up", json_boolean(s->coord != NULL));
    if (s->coord == NULL)
        return SH_OK;
    sh_coord_status now = sh_coord_get_status(s->coord);
    snprintf(hex, sizeof hex, "%016llx", (unsigned long long)now.epoch);
    sh_json_set(r, "epoch", json_string(hex));
    set_uint(r, "release", now.version);
    set_uint(r, "releases", now.releases);
    set_uint(r, "candidates_refused", now.candidates_refused);
    set_uint(r, "enrolled", now.enrolled);
    set_uint(r, "drifting", now.drifting);
    set_uint(r, "round", now.round);
    set_uint(r, "buffered", now.buffered);
    set_uint(r, "buffer", s->options.buffer);
    sh_json_set(r, "phase",
                json_string(now.merging      ? "merging"
                            : now.gating     ? "gating"
                            : now.evaluating ? "evaluating"
                                             : "idle"));
    set_uint(r, "candidate", now.candidate);
    set_uint(r, "evaluations", now.evaluations);
    sh_json_set(r, "rounds_begun", json_boolean(now.rounds_begun));
    sh_json_set(r, "paused", json_boolean(now.paused));
    sh_json_set(r, "closing", json_boolean(now.closing));
    sh_json_set(r, "closed", json_boolean(now.closed));
    sh_json_set(r, "server_scale", sh_json_number((double)now.server_scale));
    set_uint(r, "bad_messages", now.bad_messages);
    set_uint(r, "clones", now.clones);
    set_uint(r, "rotations", now.rotations);
    set_uint(r, "tokens", now.tokens);
    set_uint(r, "token_enrolments", now.token_enrolments);
    set_uint(r, "tokens_refused", now.tokens_refused);
    set_uint(r, "limited", now.limited);
    set_uint(r, "disconnected", now.disconnected);
    sh_json_set(r, "updates", updates_of(&now));
    set_uint(r, "parts", now.parts);
    set_uint(r, "relays", now.relays);
    if (now.relay)
        sh_json_set(r, "parent", parent_of(s, &now));
    return SH_OK;
}

typedef struct {
    json_t *rows;
    uint64_t limit, after;
    sh_hash after_key;
    bool has_after, more;
} page;

static sh_status add_release(void *arg, const sh_release_row *row)
{
    page *p = arg;
    json_t *r = json_object();
    set_uint(r, "candidate", row->candidate);
    set_uint(r, "version", row->version);
    set_uint(r, "parent", row->parent);
    set_uint(r, "at_ms", row->at_ms);
    set_hash(r, "sha256", &row->sha256);
    set_uint(r, "bytes", row->bytes);
    sh_json_set(r, "format", json_string(row->format));
    sh_json_set(r, "verdict", json_string(row->verdict));
    sh_json_set(r, "loss_parent", sh_json_number(row->loss_parent));
    sh_json_set(r, "loss_candidate", sh_json_number(row->loss_candidate));
    sh_json_set(r, "loss_adapter_form", sh_json_number(row->loss_adapter_form));
    sh_json_set(r, "worst_slice", sh_json_number(row->worst_slice));
    set_uint(r, "updates", row->updates);
    set_uint(r, "adapter_rank", row->adapter_rank);
    sh_json_set(r, "server_scale", sh_json_number((double)row->server_scale));
    set_uint(r, "canary_nodes", row->canary_nodes);
    set_uint(r, "canary_tokens", row->canary_tokens);
    sh_json_set(r, "canary_parent", sh_json_number(row->canary_parent));
    sh_json_set(r, "canary_candidate", sh_json_number(row->canary_candidate));
    json_array_append_new(p->rows, r);
    if (json_array_size(p->rows) > p->limit)
        json_array_remove(p->rows, 0); /* the newest are what is asked for */
    return SH_OK;
}

static sh_status add_node(void *arg, const sh_node_row *row)
{
    page *p = arg;
    if (p->has_after && memcmp(&row->key, &p->after_key, sizeof row->key) <= 0)
        return SH_OK;
    if (json_array_size(p->rows) >= p->limit) {
        p->more = true;
        return SH_OK;
    }
    const sh_msg_checkin *in = &row->checkin;
    json_t *r = json_object();
    uint64_t dropped = 0;
    for (int i = 0; i < SH_CLASSES; i++)
        dropped += in->dropped[i];
    set_hash(r, "key", &row->key);
    sh_json_set(r, "name", json_string(row->name));
    sh_json_set(r, "revoked", json_boolean(row->revoked));
    set_uint(r, "enrolled_ms", row->enrolled_ms);
    set_uint(r, "last_ms", row->last_ms);
    set_uint(r, "epochs", row->n_epochs);
    set_uint(r, "clones", row->n_clones);
    set_hash(r, "current_key", &row->current_key);
    set_uint(r, "rotations", row->n_rotations);
    sh_json_set(r, "device_class", json_string(row->device_class));
    set_uint(r, "cores", row->cores);
    set_uint(r, "memory_bytes", row->memory_bytes);
    sh_json_set(r, "agent", json_string(row->agent));
    sh_json_set(r, "kernel", json_string(row->kernel));
    set_uint(r, "version", in->active_version);
    set_uint(r, "confirmed", in->confirmed_version);
    set_uint(r, "training_round", in->training_round);
    set_uint(r, "example_tokens", in->example_tokens);
    set_uint(r, "outbox_items", in->outbox_items);
    set_uint(r, "dropped", dropped);
    set_uint(r, "inferences", in->inferences);
    set_uint(r, "windows", in->windows);
    sh_json_set(r, "drifting", json_boolean(in->drifting));
    json_array_append_new(p->rows, r);
    return SH_OK;
}

static sh_status add_audit(void *arg, uint64_t seq, uint64_t at_ms, const char *text)
{
    page *p = arg;
    json_t *r = json_object();
    set_uint(r, "seq", seq);
    set_uint(r, "at_ms", at_ms);
    sh_json_set(r, "text", json_string(text));
    json_array_append_new(p->rows, r);
    if (json_array_size(p->rows) > p->limit)
        json_array_remove(p->rows, 0);
    return SH_OK;
}

/* Runs a reader over the store as it is. rows go into the reply under `name`. */
typedef sh_status (*reader)(sh_txn *txn, page *p, sh_error *err);

static sh_status read_page(call *c, page *p, const char *name, reader read)
{
    sh_txn *txn = NULL;
    p->limit = get_limit(c);
    SH_TRY(sh_txn_begin(c->s->store, SH_TXN_READ, &txn, c->err));
    p->rows = json_array();
    sh_json_set(c->reply, name, p->rows);
    sh_status status = read(txn, p, c->err);
    sh_txn_abort(&txn);
    return status;
}

static sh_status read_releases(sh_txn *txn, page *p, sh_error *err)
{
    return sh_coord_each_candidate(txn, add_release, p, err);
}

static sh_status read_nodes(sh_txn *txn, page *p, sh_error *err)
{
    return sh_coord_each_node(txn, add_node, p, err);
}

static sh_status read_audit(sh_txn *txn, page *p, sh_error *err)
{
    return sh_coord_each_audit(txn, add_audit, p, err);
}

static sh_status on_releases(call *c)
{
    page p = {0};
    return read_page(c, &p, "releases", read_releases);
}

static sh_status on_nodes(call *c)
{
    page p = {0};
    const char *after = json_string_value(json_object_get(c->request, "after"));
    if (after != NULL) {
        SH_TRY(sh_hash_parse(after, &p.after_key, c->err));
        p.has_after = true;
    }
    SH_TRY(read_page(c, &p, "nodes", read_nodes));
    sh_json_set(c->reply, "more", json_boolean(p.more));
    return SH_OK;
}

/* Walks the whole log, whose chain it checks; the newest entries are shown. */
static sh_status on_audit(call *c)
{
    page p = {0};
    return read_page(c, &p, "audit", read_audit);
}

/* ---- dispatch ---- */

static const struct {
    const char *name;
    sh_status (*run)(call *c);
    bool logged;
} commands[] = {
    {"status", on_status, false},
    {"releases", on_releases, false},
    {"nodes", on_nodes, false},
    {"audit", on_audit, false},
    {"pause", on_pause, true},
    {"resume", on_resume, true},
    {"rollback", on_rollback, true},
    {"server-scale", on_server_scale, true},
    {"close", on_close, true},
    {"enrol", on_enrol, true},
    {"revoke", on_revoke, true},
    {"backup", on_backup, true},
    {"log-level", on_log_level, true},
    {"stop", on_stop, true},
    {"enrol-list", on_enrol_list, true},
    {"token-add", on_token_add, true},
    {"token-list", on_token_list, false},
    {"token-remove", on_token_remove, true},
};

static sh_status answer(call *c)
{
    const char *name = json_string_value(json_object_get(c->request, "command"));
    for (size_t i = 0; name != NULL && i < SH_COUNT(commands); i++) {
        if (strcmp(name, commands[i].name) != 0)
            continue;
        if (commands[i].logged)
            sh_log(SH_LOG_INFO, "command", "name=%s", commands[i].name);
        return commands[i].run(c);
    }
    return sh_fail(c->err, SH_ERR_USAGE, "this is no command of shoal-aggregator");
}

sh_status server_serve_admin(sh_server *s, sh_error *err)
{
    for (int i = 0; i < ADMIN_TURN_CALLS && !s->stop; i++) {
        json_t *request = NULL;
        sh_admin_caller caller;
        sh_error failed = {0};
        SH_TRY(sh_admin_next(s->admin, &request, &caller, err));
        if (request == NULL)
            break;
        call c = {
            .s = s, .request = request, .caller = caller, .reply = json_object(), .err = &failed};
        sh_json_set(c.reply, "ok", json_true());
        sh_status status = answer(&c);
        if (status != SH_OK) {
            json_decref(c.reply);
            failed.code = status;
            c.reply = sh_admin_error(&failed);
        }
        if (c.later)
            json_decref(c.reply);
        else
            sh_admin_reply(s->admin, caller, c.reply);
        json_decref(request);
    }
    return SH_OK;
}
