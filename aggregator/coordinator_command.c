/*
 * Operator commands. One that cannot be carried out changes nothing and is noted as refused; all
 * others are in the audit log.
 */
#include <math.h>
#include <string.h>

#include "aggregator/coordinator_internal.h"

#define SERVER_SCALE_MAX 1000.0

/* Printable, so that it can stand in logs and tables. */
static bool good_name(const char *name)
{
    size_t n = strnlen(name, SH_NODE_NAME_MAX + 1);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f)
            return false;
    return n <= SH_NODE_NAME_MAX;
}

static sh_status enrol(coord_step *s, const sh_hash *key, const char *name)
{
    sh_coord *c = s->c;
    sh_node_row node = {0};
    uint32_t drifting = 0;
    sh_status status = coord_node_get(s->txn, key, &node, s->err);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    bool counted = status == SH_OK && !node.revoked;
    if (status == SH_ERR_NOT_FOUND) {
        node.key = node.current_key = *key;
        node.enrolled_ms = s->now_ms;
    }
    node.revoked = false;
    if (name != NULL) /* without one it keeps that which it has */
        memcpy(node.name, name, strlen(name) + 1);
    SH_TRY(coord_node_put(s->txn, &node, s->err));
    if (!counted) {
        c->enrolled++;
        SH_TRY(coord_drifting(s->txn, key, &node.checkin, &drifting, s->err));
        c->drifting += drifting;
        coord_note(s, SH_CNOTE_ENROLLED, key, c->enrolled);
    }
    return SH_OK;
}

/* Its updates that are not merged yet never will be. */
static sh_status revoke(coord_step *s, const sh_hash *key, bool *done)
{
    sh_coord *c = s->c;
    sh_node_row node = {0};
    uint32_t drifting = 0;
    sh_status status = coord_node_get(s->txn, key, &node, s->err);
    if (status == SH_ERR_NOT_FOUND || (status == SH_OK && node.revoked)) {
        *done = false;
        return SH_OK;
    }
    SH_TRY(status);
    node.revoked = true;
    SH_TRY(coord_node_put(s->txn, &node, s->err));
    c->enrolled--;
    SH_TRY(coord_drifting(s->txn, key, &node.checkin, &drifting, s->err));
    c->drifting -= drifting;
    SH_TRY(coord_canary_forget(s, key));
    SH_TRY(coord_waiting_refuse(s, key, SH_REASON_REVOKED));
    SH_TRY(coord_refuse_node(s, key, SH_REASON_REVOKED));
    return coord_advance(s);
}

static sh_status carry_out(coord_step *s, const sh_coord_event *event, bool *done)
{
    sh_coord *c = s->c;
    if (c->relay != NULL &&
        (event->command == SH_COMMAND_ROLLBACK || event->command == SH_COMMAND_SERVER_SCALE)) {
        *done = false; /* the root's to decide */
        return SH_OK;
    }
    switch (event->command) {
    case SH_COMMAND_PAUSE:
        c->state.paused = true;
        return SH_OK;
    case SH_COMMAND_RESUME:
        c->state.paused = false;
        return coord_advance(s);
    case SH_COMMAND_ROLLBACK:
        SH_TRY(coord_rollback(s, event->number, event->message, done));
        if (!*done)
            return SH_OK;
        c->state.round += c->state.rounds_begun;
        return coord_advance(s);
    case SH_COMMAND_SERVER_SCALE:
        *done = isfinite(event->real) && event->real > 0 && event->real <= SERVER_SCALE_MAX;
        if (*done)
            c->state.server_scale = (float)event->real;
        return SH_OK;
    case SH_COMMAND_ENROL:
        *done = sh_txn_count(s->txn, SH_COORD_T_NODE) < SH_COORD_NODES_MAX &&
                (event->name == NULL || good_name(event->name));
        return *done ? enrol(s, &event->node, event->name) : SH_OK;
    case SH_COMMAND_REVOKE:
        return revoke(s, &event->node, done);
    case SH_COMMAND_CLOSE:
        c->state.closing = true;
        SH_TRY(coord_waiting_refuse(s, NULL, SH_REASON_CLOSED));
        return coord_advance(s);
    case SH_COMMAND_RELAY:
        return coord_relay_permit(s, &event->node, event->number != 0, done);
    }
    *done = false;
    return SH_OK;
}

sh_status coord_on_command(coord_step *s, const sh_coord_event *event)
{
    static const char *const names[] = {
        [SH_COMMAND_PAUSE] = "pause",       [SH_COMMAND_RESUME] = "resume",
        [SH_COMMAND_ROLLBACK] = "rollback", [SH_COMMAND_SERVER_SCALE] = "server-scale",
        [SH_COMMAND_ENROL] = "enrol",       [SH_COMMAND_REVOKE] = "revoke",
        [SH_COMMAND_CLOSE] = "close",       [SH_COMMAND_RELAY] = "relay",
    };
    unsigned command = (unsigned)event->command;
    bool done = command < SH_COUNT(names) && names[command] != NULL;
    if (done)
        SH_TRY(carry_out(s, event, &done));
    if (!done) {
        coord_note(s, SH_CNOTE_COMMAND_REFUSED, &event->node, command);
        return SH_OK;
    }
    s->c->dirty = true;
    char node[SH_HASH_HEX_BYTES];
    sh_hex(event->node.b, sizeof event->node.b, node);
    return coord_audit(s, "command %s number=%llu real=%.9g node=%.16s", names[command],
                       (unsigned long long)event->number, event->real, node);
}
