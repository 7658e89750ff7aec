/*
 * Commands over the admin socket, one JSON object each:
 *     {"command": "status"}
 *     {"command": "erase", "user": NAME} or {"command": "erase", "all": true}
 *                                        answered when it is gone from the file, {"rows": N}
 *     {"command": "log-level", "level": "debug"}
 *     {"command": "stop"}
 *
 * An erasure waits until the requests that run have ended, and the engine has forgotten the texts
 * in its slots; it commits what waits, lets the core delete, and then rewrites the store without
 * the pages that were freed; the core is made again after that.
 */
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

static const char *const policy_names[SH_POLICIES] = {"feedback", "windows", "download", "train"};

static void device_json(sh_daemon *d, json_t *o, const sh_node_status *s)
{
    char text[64], key[48];
    for (int i = 0; i < SH_POLICIES; i++) {
        snprintf(key, sizeof key, "policy_%s", policy_names[i]);
        sh_json_set(o, key, json_boolean(s->holds[i]));
    }
    snprintf(text, sizeof text, "%#x", s->conditions);
    sh_json_set(o, "conditions", json_string(text));
    sh_json_set(o, "bytes_up_day", json_integer((json_int_t)s->bytes_up_day));
    sh_json_set(o, "bytes_down_day", json_integer((json_int_t)s->bytes_down_day));
    sh_json_set(o, "bytes_up_month", json_integer((json_int_t)s->bytes_up_month));
    sh_json_set(o, "bytes_down_month", json_integer((json_int_t)s->bytes_down_month));
    sh_json_set(o, "wall_ms", json_integer((json_int_t)s->wall_ms));
    sh_json_set(o, "clock_trusted", json_boolean(s->clock_trusted));
    sh_json_set(o, "refused_full", json_integer((json_int_t)(s->refused_full + d->refused_full)));
    uint64_t dropped = 0;
    for (int c = 0; c < SH_CLASSES; c++)
        dropped += s->dropped[c];
    sh_json_set(o, "dropped_quota", json_integer((json_int_t)dropped));
}

/* "link": up, refused, down, off; why it is refused, and what an operator can do about it. */
static void link_json(sh_daemon *d, json_t *o)
{
    const char *why = daemon_refused(d);
    char key[SH_HASH_HEX_BYTES], advice[512];
    sh_json_set(o, "link",
                json_string(why         ? "refused"
                            : d->net_up ? "up"
                            : d->client ? "down"
                                        : "off"));
    if (!why)
        return;
    sh_hex(d->keys.public_key.b, sizeof d->keys.public_key.b, key);
    if (d->rotate.trying)
        snprintf(advice, sizeof advice, "wait: the key before it is tried again by itself");
    else
        snprintf(advice, sizeof advice,
                 "if it is to be let in, on the aggregator's machine: shoal aggregator enrol %s%s",
                 key,
                 d->options.token.n > 0 ? "; or stop this node, write another token (shoal "
                                          "aggregator token add) into " SH_NODE_FILE_TOKEN
                                          " in its folder, and start it"
                                        : "");
    sh_json_set(o, "link_reason", json_string(why));
    sh_json_set(o, "link_advice", json_string(advice));
}

static json_t *status_json(sh_daemon *d)
{
    char text[SH_HASH_HEX_BYTES];
    sh_engine_status engine = sh_engine_get_status(d->engine);
    json_t *o = json_object();
    sh_json_set(o, "ok", json_true());
    sh_json_set(o, "version", json_string(SHOAL_VERSION));
    sh_json_set(o, "pid", json_integer(getpid()));
    sh_hex(d->keys.public_key.b, sizeof d->keys.public_key.b, text);
    sh_json_set(o, "key", json_string(text));
    sh_json_set(o, "uptime_seconds",
                json_integer((json_int_t)((sh_clock_mono_ms() - d->started_ms) / 1000)));
    sh_json_set(o, "http_port", json_integer(sh_api_port(d->api)));
    link_json(d, o);
    sh_json_set(o, "store_bytes", json_integer((json_int_t)daemon_store_bytes(d)));
    sh_json_set(o, "store_full", json_boolean(d->full.is));
    sh_json_set(o, "stores_lost", json_integer(d->stores_lost));
    sh_json_set(o, "serving_version", json_integer((json_int_t)d->active_version));
    sh_json_set(o, "requests", json_integer((json_int_t)engine.requests));
    sh_json_set(o, "running", json_integer(engine.running));
    if (!d->node)
        return o;
    sh_node_status s = sh_node_get_status(d->node);
    snprintf(text, sizeof text, "%016llx", (unsigned long long)s.epoch);
    sh_json_set(o, "epoch", json_string(text));
    sh_json_set(o, "renewals", json_integer((json_int_t)s.renewals));
    sh_json_set(o, "rotating", json_string(daemon_rotation_state(d)));
    sh_json_set(o, "active_version", json_integer((json_int_t)s.active_version));
    sh_json_set(o, "confirmed_version", json_integer((json_int_t)s.confirmed_version));
    sh_json_set(o, "active_slot", json_integer(s.active_slot));
    sh_json_set(o, "inferences", json_integer((json_int_t)s.inferences));
    sh_json_set(o, "feedback_tokens", json_integer((json_int_t)s.feedback_tokens));
    sh_json_set(o, "windows", json_integer((json_int_t)s.windows));
    sh_json_set(o, "alarms", json_integer((json_int_t)s.alarms));
    sh_json_set(o, "drifting", json_boolean(s.drifting));
    sh_json_set(o, "training_round", json_integer(s.training_round));
    sh_json_set(o, "updates_made", json_integer((json_int_t)s.updates_made));
    sh_json_set(o, "updates_acked", json_integer((json_int_t)s.updates_acked));
    sh_json_set(o, "outbox_items", json_integer((json_int_t)s.outbox_items));
    sh_json_set(o, "outbox_bytes", json_integer((json_int_t)s.outbox_bytes));
    sh_json_set(o, "last_sync_ms", json_integer((json_int_t)s.last_sync_ms));
    device_json(d, o, &s);
    return o;
}

static json_t *refuse(sh_status status, const char *text)
{
    sh_error err = {0};
    (void)sh_fail(&err, status, "%s", text);
    return sh_admin_error(&err);
}

static json_t *accept_command(void)
{
    json_t *o = json_object();
    sh_json_set(o, "ok", json_true());
    return o;
}

/* NULL: it has begun and is answered at its end. */
static json_t *begin_erasure(sh_daemon *d, const json_t *request, sh_admin_caller caller)
{
    const char *user = json_string_value(json_object_get(request, "user"));
    bool all = json_is_true(json_object_get(request, "all"));
    if (all == (user != NULL && user[0] != 0))
        return refuse(SH_ERR_USAGE, "erase: either \"user\" or \"all\": true");
    if (d->erase.wanted || d->erase.running)
        return refuse(SH_ERR_LIMIT, "erase: another erasure runs; try again");
    memset(&d->erase, 0, sizeof d->erase);
    d->erase.wanted = d->erase.has_caller = true;
    d->erase.user = all ? 0 : sh_engine_user(user);
    d->erase.caller = caller;
    sh_engine_forget_soon(d->engine); /* a request may still run for long: the loop looks again */
    return NULL;
}

/* Goes on by itself, over restarts; status says how far it is. */
static json_t *begin_rotation(sh_daemon *d)
{
    sh_error err = {0};
    char hex[SH_HASH_HEX_BYTES];
    if (daemon_rotation_begin(d, &err) != SH_OK)
        return sh_admin_error(&err);
    sh_hex(d->rotate.next.public_key.b, sizeof d->rotate.next.public_key.b, hex);
    json_t *o = accept_command();
    sh_json_set(o, "key", json_string(hex));
    return o;
}

static json_t *set_level(const json_t *request)
{
    const char *level = json_string_value(json_object_get(request, "level"));
    sh_log_level parsed;
    sh_error err = {0};
    if (sh_log_parse_level(level ? level : "", &parsed, &err) != SH_OK)
        return sh_admin_error(&err);
    sh_log_set_level(parsed);
    return accept_command();
}

static json_t *run_command(sh_daemon *d, const json_t *request, sh_admin_caller caller)
{
    const char *command = json_string_value(json_object_get(request, "command"));
    if (!command)
        return refuse(SH_ERR_USAGE, "no \"command\" in the request");
    if (strcmp(command, "status") == 0)
        return status_json(d);
    if (strcmp(command, "erase") == 0)
        return begin_erasure(d, request, caller);
    if (strcmp(command, "rotate") == 0)
        return begin_rotation(d);
    if (strcmp(command, "log-level") == 0)
        return set_level(request);
    if (strcmp(command, "stop") == 0) {
        daemon_stop(d, "command");
        return accept_command();
    }
    return refuse(SH_ERR_USAGE,
                  "unknown command; there are status, erase, rotate, log-level, stop");
}

void daemon_take_commands(sh_daemon *d)
{
    for (;;) {
        json_t *request = NULL;
        sh_admin_caller caller;
        sh_error err = {0};
        if (sh_admin_next(d->admin, &request, &caller, &err) != SH_OK) {
            sh_log(SH_LOG_WARN, "admin", "error=\"%s\"", err.text);
            return;
        }
        if (!request)
            return;
        json_t *reply = run_command(d, request, caller);
        json_decref(request);
        if (reply)
            sh_admin_reply(d->admin, caller, reply);
    }
}

/* ---- erasure ---- */

static void end_erasure(sh_daemon *d, sh_status status, const sh_error *err)
{
    json_t *reply = status == SH_OK ? accept_command() : sh_admin_error(err);
    if (status == SH_OK)
        sh_json_set(reply, "rows", json_integer((json_int_t)d->erase.rows));
    else
        sh_log(SH_LOG_ERROR, "erase_failed", "error=\"%s\"", err->text);
    if (d->erase.has_caller)
        sh_admin_reply(d->admin, d->erase.caller, reply);
    else
        json_decref(reply);
    memset(&d->erase, 0, sizeof d->erase);
}

static void start_erasure(sh_daemon *d)
{
    sh_error err = {0};
    sh_node_event e = {.kind = SH_NODE_ERASE, .user = d->erase.user};
    d->erase.wanted = false;
    d->erase.running = true;
    d->erase.done = false;
    daemon_flush(d);
    sh_status status = daemon_mark_erasing(&err);
    if (status == SH_OK)
        status = daemon_step(d, &e, &err);
    if (status != SH_OK)
        end_erasure(d, status, &err);
}

static sh_status compact(sh_daemon *d, sh_error *err)
{
    sh_node_destroy(&d->node);
    if (d->store)
        SH_TRY(sh_store_compact(d->store, err));
    daemon_store_forget_aside();
    (void)unlink(SH_NODE_FILE_ERASING);
    return d->store ? daemon_make_core(d, err) : SH_OK;
}

void daemon_resume_erasure(sh_daemon *d)
{
    if (!sh_file_exists(SH_NODE_FILE_ERASING))
        return;
    d->erase.running = true;
    d->erase.done = !sh_node_get_status(d->node).erasing;
}

void daemon_advance_erasure(sh_daemon *d)
{
    sh_error err = {0};
    if (d->erase.wanted && sh_engine_is_forgotten(d->engine))
        start_erasure(d);
    if (!d->erase.running || !d->erase.done || !daemon_worker_idle(d))
        return;
    d->erase.running = false; /* what follows makes the core again on purpose */
    daemon_cancel_training(d);
    daemon_empty_work();
    sh_status status = compact(d, &err);
    if (!d->node)
        d->remake = true;
    end_erasure(d, status, &err);
}
