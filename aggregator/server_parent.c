/* A relay's connection to its parent: what its node's end is bound to. */
#include <string.h>

#include "aggregator/server_internal.h"
#include "shared/base/log.h"

sh_status server_parent_open(sh_server *s, sh_error *err)
{
    sh_hash key;
    sh_net_client_options options = {.endpoint = s->settings.upstream,
                                     .keys = &s->parent_keys,
                                     .message_max = SH_WIRE_MESSAGE_MAX};
    if (!s->options.relay)
        return SH_OK;
    SH_TRY(sh_net_keys_load(SH_FOLDER_UP_KEY, &s->parent_keys, err));
    SH_TRY(sh_folder_read_public(SH_FOLDER_UP_PUB, &key, err));
    options.server_key = key;
    return sh_net_client_create(s->net, &options, &s->parent, err);
}

/* What could not be sent goes out again when the core finds it due. */
void server_parent_send(sh_server *s, const sh_coord_action *a)
{
    sh_error err = {0};
    if (s->parent == NULL)
        return;
    sh_status status = sh_net_client_send(s->parent, a->message.data, a->message.len, &err);
    if (status != SH_OK && status != SH_ERR_LIMIT)
        sh_log(SH_LOG_WARN, "parent_send_failed", "error=\"%s\"", err.text);
}

/* The core hears of a change once, and of the state anew after each of its starts. */
static bool tell_link(sh_server *s)
{
    sh_coord_event e = {.kind = s->parent_up ? SH_COORD_PARENT_UP : SH_COORD_PARENT_DOWN};
    if (s->parent_told == s->parent_up)
        return true;
    s->parent_told = s->parent_up;
    return server_step(s, &e);
}

static void link_changed(sh_server *s, sh_net_event_kind kind)
{
    bool refused = kind == SH_NET_REFUSED;
    if (!refused || !s->parent_refused)
        sh_log(refused ? SH_LOG_WARN : SH_LOG_INFO, "parent", "state=%s",
               kind == SH_NET_UP ? "up" : (refused ? "refused" : "down"));
    s->parent_refused = refused;
    s->parent_up = kind == SH_NET_UP;
}

sh_status server_parent_serve(sh_server *s, sh_error *err)
{
    sh_net_event event;
    if (s->parent == NULL || s->coord == NULL)
        return SH_OK;
    for (;;) {
        if (!tell_link(s))
            return SH_OK;
        SH_TRY(sh_net_client_next(s->parent, &event, err));
        if (event.kind == SH_NET_NONE)
            break;
        if (event.kind != SH_NET_MESSAGE) {
            link_changed(s, event.kind);
            continue;
        }
        sh_coord_event e = {.kind = SH_COORD_PARENT_MESSAGE, .message = {event.data, event.n}};
        if (!server_step(s, &e))
            return SH_OK;
        if (server_group_full(s))
            break;
    }
    (void)server_commit(s, NULL);
    return SH_OK;
}
