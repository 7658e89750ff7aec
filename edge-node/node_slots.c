/*
 * Releases whose files the shell has lost (a disk that tore them): what is left becomes active, the
 * aggregator offers the newest one again, and a release on its way is installed anew, because the
 * slot that it goes to may be another one now.
 */
#include "edge-node/node_internal.h"

static sh_status make_genesis(node_step *s, sh_bytes genesis)
{
    sh_node *n = s->n;
    sh_manifest manifest;
    if (sh_manifest_verify(genesis.data, genesis.n, &n->options.release_key, &manifest, s->err) !=
        SH_OK)
        return sh_fail_in(s->err, "genesis manifest");
    n->state.slots[0] =
        (node_release){manifest.version, manifest.model.sha256, manifest.model.bytes};
    return node_manifest_put(s, node_meta_slot0, genesis);
}

static sh_status fall_to(node_step *s, uint32_t slot)
{
    node_state *st = &s->n->state;
    st->active_slot = slot;
    st->healthy = 0;
    st->confirmed_version = node_active(s->n)->version;
    if (st->take > TAKE_DOWNLOAD) {
        st->take = TAKE_DOWNLOAD; /* its chunks are here: it is installed again */
        st->take_tries = 0;
    }
    node_monitor_release(s);
    node_note(s, SH_NOTE_RELEASE_ACTIVE, node_active(s->n)->version);
    return SH_OK;
}

sh_status node_slots_lost(node_step *s, sh_bytes genesis)
{
    node_state *st = &s->n->state;
    uint32_t lost = s->n->options.lost_slots, active = st->active_slot;
    if (lost == 0)
        return SH_OK;
    for (uint32_t i = 0; i < NODE_SLOTS; i++) {
        if (!(lost & 1u << i) || st->slots[i].version == 0)
            continue;
        st->slots[i] = (node_release){0};
        SH_TRY(node_manifest_del(s, i == 0 ? node_meta_slot0 : node_meta_slot1));
    }
    s->n->dirty = true;
    if (st->slots[active].version != 0) { /* nothing is left to fall back to */
        st->confirmed_version = st->slots[active].version;
        return SH_OK;
    }
    if (st->slots[1 - active].version != 0)
        return fall_to(s, 1 - active);
    SH_TRY(make_genesis(s, genesis));
    return fall_to(s, 0);
}
