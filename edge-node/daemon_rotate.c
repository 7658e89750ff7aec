/*
 * Rotation of the node's key (docs/protocol.md, "ROTATE"). node.key.next holds the next pair from
 * before the aggregator hears of it until it has welcomed the node under it; then that file becomes
 * node.key. Its token is a hash of the pair's secret, so that one file is all there is to keep.
 *
 *   asked     under the old key: the core tells the aggregator, until it answers. So begins every
 *             start that finds node.key.next; to be told again changes nothing there
 *   trying    connected with the next pair. Refused for DAEMON_ROTATE_TRY_MS: back to asked
 *
 * An old key that is refused while the next one is there was shut out when the aggregator took the
 * next one, and a kill kept that from being written down: it goes on with trying.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

#define KEY_FILE_BYTES 256

static sh_bytes token_of(sh_daemon *d)
{
    static const char purpose[] = "shoal-rotate";
    uint8_t bytes[sizeof purpose - 1 + sizeof d->rotate.next.secret];
    memcpy(bytes, purpose, sizeof purpose - 1);
    memcpy(bytes + sizeof purpose - 1, d->rotate.next.secret, sizeof d->rotate.next.secret);
    d->rotate.token = sh_blake2b(bytes, sizeof bytes);
    explicit_bzero(bytes, sizeof bytes);
    return (sh_bytes){d->rotate.token.b, sizeof d->rotate.token.b};
}

sh_status daemon_rotation_load(sh_daemon *d, sh_error *err)
{
    if (!sh_file_exists(SH_NODE_FILE_KEYS_NEXT))
        return SH_OK;
    SH_TRY(sh_net_keys_load(SH_NODE_FILE_KEYS_NEXT, &d->rotate.next, err));
    d->rotate.pending = !sh_hash_equal(&d->rotate.next.public_key, &d->keys.public_key);
    if (!d->rotate.pending)
        (void)unlink(SH_NODE_FILE_KEYS_NEXT); /* killed just before this */
    return SH_OK;
}

sh_status daemon_rotation_begin(sh_daemon *d, sh_error *err)
{
    if (!d->client)
        return sh_fail(err, SH_ERR_USAGE, "rotate: this node has no aggregator, or does not sync");
    if (d->rotate.pending)
        return SH_OK; /* the same one goes on */
    SH_TRY(sh_net_keys_make(&d->rotate.next, err));
    SH_TRY(sh_net_keys_save(SH_NODE_FILE_KEYS_NEXT, &d->rotate.next, err));
    d->rotate.pending = true;
    d->rotate.told_life = 0;
    daemon_failpoint(d, "node.rotate");
    return SH_OK;
}

const char *daemon_rotation_state(const sh_daemon *d)
{
    return !d->rotate.pending ? "no" : d->rotate.trying ? "trying" : "asked";
}

/* Leaves the link and begins another life of the core on a new one, with the next key or not. */
static sh_status connect_as(sh_daemon *d, bool next, sh_error *err)
{
    d->rotate.trying = next;
    d->rotate.answered = false;
    d->rotate.since_ms = sh_clock_mono_ms();
    d->options.rotate_token = next ? token_of(d) : (sh_bytes){0};
    d->net_up = d->net_refused = false;
    d->remake = true;
    sh_log(SH_LOG_INFO, "rotate", "state=%s", daemon_rotation_state(d));
    sh_net_client_destroy(&d->client, 0);
    return daemon_connect(d, next ? &d->rotate.next : &d->keys, err);
}

/* Welcomed: the next pair is the node's. */
static sh_status finish(sh_daemon *d, sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    sh_status status = SH_OK;
    SH_GOTO(sh_file_read(SH_NODE_FILE_KEYS_NEXT, KEY_FILE_BYTES, &bytes, &n, err));
    SH_GOTO(sh_file_write_private(SH_NODE_FILE_KEYS, bytes, n, err));
    daemon_failpoint(d, "node.rotated");
    (void)unlink(SH_NODE_FILE_KEYS_NEXT);
    sh_net_keys_forget(&d->keys);
    d->keys = d->rotate.next;
    sh_net_keys_forget(&d->rotate.next);
    d->rotate.pending = d->rotate.trying = false;
    d->options.rotate_token = (sh_bytes){0};
    d->remake = true; /* without the token */
    sh_log(SH_LOG_INFO, "rotate", "state=done");
    SH_GOTO(daemon_open_admin(d, err)); /* its callers look for the new key */
cleanup:
    if (bytes)
        explicit_bzero(bytes, n);
    free(bytes);
    return status;
}

static sh_status advance(sh_daemon *d, sh_error *err)
{
    uint64_t waited = sh_clock_mono_ms() - d->rotate.since_ms;
    bool refused_long = d->net_refused && waited >= DAEMON_ROTATE_TRY_MS;
    if (d->rotate.trying) {
        if (d->node && d->net_up && sh_node_get_status(d->node).welcome)
            return d->erase.running || d->erase.wanted ? SH_OK : finish(d, err);
        return refused_long ? connect_as(d, false, err) : SH_OK;
    }
    if (d->rotate.answered || refused_long)
        return connect_as(d, true, err);
    if (!d->node || d->remake || d->rotate.told_life == d->lives)
        return SH_OK;
    d->rotate.told_life = d->lives;
    sh_node_event e = {
        .kind = SH_NODE_ROTATE, .key = d->rotate.next.public_key, .token = token_of(d)};
    return daemon_step(d, &e, err);
}

void daemon_advance_rotation(sh_daemon *d)
{
    sh_error err = {0};
    if (!d->rotate.pending || !d->client || d->stopping || d->fatal != SH_OK)
        return;
    sh_status status = advance(d, &err);
    if (status == SH_OK || d->client)
        return;        /* a step that failed is told again to the core's next life */
    d->fatal = status; /* without a client or keys that can be read nothing goes on */
    d->fatal_err = err;
}
