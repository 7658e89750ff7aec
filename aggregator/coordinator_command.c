/*
 * Operator commands. One that cannot be carried out changes nothing and is noted as refused; all
 * others are in the audit log.
 */
#include <math.h>

#include "aggregator/coordinator_internal.h"

#define SERVER_SCALE_MAX 1000.0

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
        return coord_enrol_key(s, &event->node, event->name, done);
    case SH_COMMAND_REVOKE:
        return coord_revoke_key(s, &event->node, done);
    case SH_COMMAND_TOKEN_ADD:
        return coord_token_add(s, event, done);
    case SH_COMMAND_TOKEN_REMOVE:
        return coord_token_remove(s, &event->node, done);
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
        [SH_COMMAND_PAUSE] = "pause",
        [SH_COMMAND_RESUME] = "resume",
        [SH_COMMAND_ROLLBACK] = "rollback",
        [SH_COMMAND_SERVER_SCALE] = "server-scale",
        [SH_COMMAND_ENROL] = "enrol",
        [SH_COMMAND_REVOKE] = "revoke",
        [SH_COMMAND_CLOSE] = "close",
        [SH_COMMAND_TOKEN_ADD] = "token-add",
        [SH_COMMAND_TOKEN_REMOVE] = "token-remove",
        [SH_COMMAND_RELAY] = "relay",
    };
    unsigned command = (unsigned)event->command;
    bool done = command < SH_COUNT(names) && names[command] != NULL;
    if (done)
        SH_TRY(carry_out(s, event, &done));
    if (!done) {
        s->c->commands_refused++;
        coord_note(s, SH_CNOTE_COMMAND_REFUSED, &event->node, command);
        return SH_OK;
    }
    s->c->dirty = true;
    char node[SH_HASH_HEX_BYTES];
    sh_hex(event->node.b, sizeof event->node.b, node);
    return coord_audit(s, "command %s number=%llu real=%.9g node=%.16s", names[command],
                       (unsigned long long)event->number, event->real, node);
}
