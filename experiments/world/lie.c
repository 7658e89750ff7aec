/*
 * What a lying node sends in place of what its core made: the core is honest, its device is not.
 */
#include <string.h>

#include "experiments/world/world.h"
#include "shared/base/hash.h"

#define STREAM_LIE  0x4c494520u
#define VERSION_FAR 1000000u

static sh_status encode(const sh_msg *msg, sh_buf *message, sh_error *err)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    sh_status status = sh_msg_encode(msg, &bytes, err);
    if (status != SH_OK) {
        sh_buf_release(&bytes);
        return status;
    }
    sh_buf_release(message);
    *message = bytes;
    return SH_OK;
}

/* Another blob, or the same under another base, or one that says it stands for another node's. */
static sh_status lie_in_meta(sh_msg *msg, uint64_t draw, bool base, sh_buf *message, sh_error *err)
{
    sh_update_meta meta;
    sh_buf payload;
    sh_status status = SH_OK;
    if (sh_update_meta_decode(msg->item.payload.data, msg->item.payload.n, &meta, NULL) != SH_OK)
        return SH_OK;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    uint8_t part[SH_UPDATE_PART_BYTES];
    if (base && draw % 3 == 0) {
        sh_hash node = {.b = {(uint8_t)(draw >> 8)}};
        sh_update_part_put(
            part, &(sh_update_part){
                      .node = node, .epoch = draw, .seq = 1 + draw % 4, .samples = meta.samples});
        meta.parts = (sh_bytes){part, sizeof part};
    } else if (base)
        meta.base_version += draw % 2 ? VERSION_FAR : 1;
    else
        meta.blob.sha256.b[draw % sizeof meta.blob.sha256.b] ^= 1;
    SH_GOTO(sh_update_meta_encode(&meta, &payload, err));
    msg->item.payload = (sh_bytes){payload.data, payload.len};
    SH_GOTO(encode(msg, message, err));
cleanup:
    sh_buf_release(&payload);
    return status;
}

static sh_status lie_hash(sh_msg *msg, uint64_t draw, sh_buf *message, bool *did, sh_error *err)
{
    if (msg->type == SH_MSG_ITEM && msg->item.kind == SH_ITEM_UPDATE) {
        *did = true;
        return lie_in_meta(msg, draw, false, message, err);
    }
    if (msg->type != SH_MSG_CHUNK || msg->chunk.bytes.n == 0)
        return SH_OK;
    *did = true;
    return world_corrupt_chunk(message, draw, did, err);
}

static sh_status lie_version(sh_msg *msg, uint64_t draw, sh_buf *message, bool *did, sh_error *err)
{
    if (msg->type == SH_MSG_ITEM && msg->item.kind == SH_ITEM_UPDATE) {
        *did = true;
        return lie_in_meta(msg, draw, true, message, err);
    }
    if (msg->type != SH_MSG_CHECKIN)
        return SH_OK;
    *did = true;
    msg->checkin.active_version = draw % 3 == 0   ? UINT32_MAX
                                  : draw % 3 == 1 ? msg->checkin.active_version + 1
                                                  : 1;
    msg->checkin.confirmed_version = msg->checkin.active_version;
    return encode(msg, message, err);
}

/* Another payload under an earlier item's sequence, or under the epoch of nobody. */
static sh_status lie_replay(world_node *n, sh_msg *msg, uint64_t draw, sh_buf *more, bool *did,
                            sh_error *err)
{
    sh_msg old;
    if (msg->type != SH_MSG_ITEM || msg->item.kind == SH_ITEM_TOMBSTONE)
        return SH_OK;
    if (n->replay.len == 0 || draw % 8 == 0) {
        sh_buf_release(&n->replay);
        sh_buf_init(&n->replay, SH_WIRE_MESSAGE_MAX);
        return encode(msg, &n->replay, err);
    }
    if (sh_msg_decode(n->replay.data, n->replay.len, &old, NULL) != SH_OK)
        return SH_OK;
    *did = true;
    sh_buf_init(more, SH_WIRE_MESSAGE_MAX);
    if (draw % 3 == 0 && old.item.cls == msg->item.cls && old.item.kind == msg->item.kind)
        old.item.payload = msg->item.payload;
    if (draw % 5 == 0)
        old.item.epoch ^= draw | 1;
    return encode(&old, more, err);
}

sh_status world_corrupt_chunk(sh_buf *message, uint64_t draw, bool *done, sh_error *err)
{
    sh_msg msg;
    sh_buf bytes;
    sh_status status = SH_OK;
    if (sh_msg_decode(message->data, message->len, &msg, NULL) != SH_OK ||
        msg.type != SH_MSG_CHUNK || msg.chunk.bytes.n == 0)
        return SH_OK;
    sh_buf_init(&bytes, SH_CHUNK_BYTES);
    SH_GOTO(sh_buf_append(&bytes, msg.chunk.bytes.data, msg.chunk.bytes.n));
    bytes.data[draw % bytes.len] ^= 1;
    msg.chunk.bytes = (sh_bytes){bytes.data, bytes.len};
    SH_GOTO(encode(&msg, message, err));
    *done = true;
cleanup:
    sh_buf_release(&bytes);
    return status;
}

sh_status world_lie(world_part *p, uint32_t i, sh_buf *message, sh_buf *more, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    for (uint32_t k = 0; k < n->n_active; k++) {
        const world_fault *f = n->active[k].fault;
        sh_msg msg;
        bool did = false;
        uint64_t draw = world_draw(p->w, i, STREAM_LIE + (uint32_t)f->kind, n->messages[0]);
        if (!world_fault_is_lie(f->kind) || f->kind == WORLD_LIE_POISON ||
            (f->rate > 0 && world_unit(draw) >= f->rate))
            continue;
        if (sh_msg_decode(message->data, message->len, &msg, NULL) != SH_OK)
            return SH_OK;
        if (f->kind == WORLD_LIE_HASH)
            SH_TRY(lie_hash(&msg, draw, message, &did, err));
        else if (f->kind == WORLD_LIE_VERSION)
            SH_TRY(lie_version(&msg, draw, message, &did, err));
        else if (f->kind == WORLD_LIE_REPLAY && more->len == 0)
            SH_TRY(lie_replay(n, &msg, draw, more, &did, err));
        p->counts.faults[f->kind] += did;
    }
    return SH_OK;
}

/* *out: the release in the other slot, as it was signed; in place of it a newer one than all, of a
 * forger. Empty: there is none. */
static sh_status other_manifest(world_part *p, uint32_t i, bool forged, sh_buf *out, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_txn *txn = NULL;
    sh_bytes bytes;
    sh_manifest manifest;
    sh_status status = SH_OK;
    if (sh_txn_begin(n->store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return SH_OK; /* it cannot be read now */
    if (sh_node_get_slot(txn, 1 - n->slot, &bytes, NULL) != SH_OK ||
        sh_manifest_verify(bytes.data, bytes.n, &w->coord_options.release_pk, &manifest, NULL) !=
            SH_OK)
        goto cleanup;
    if (forged) {
        manifest.version += VERSION_FAR;
        SH_GOTO(sh_manifest_sign(&manifest, &w->other_sk, out, err));
    } else {
        SH_GOTO(sh_buf_append(out, bytes.data, bytes.n));
    }
cleanup:
    sh_txn_abort(&txn);
    return status;
}

sh_status world_lie_down(world_part *p, uint32_t i, sh_buf *message, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    const world_fault *f = world_node_active(n, WORLD_LIE_VERSION);
    uint64_t draw = world_draw(p->w, i, STREAM_LIE, n->messages[1]);
    sh_status status = SH_OK;
    sh_msg msg;
    sh_buf manifest;
    if (!f || world_unit(draw) >= f->rate ||
        sh_msg_decode(message->data, message->len, &msg, NULL) != SH_OK || msg.type != SH_MSG_PLAN)
        return SH_OK;
    sh_buf_init(&manifest, SH_WIRE_MESSAGE_MAX);
    SH_GOTO(other_manifest(p, i, draw % 4 == 0, &manifest, err));
    if (manifest.len == 0)
        goto cleanup;
    msg.plan.manifest = (sh_bytes){manifest.data, manifest.len};
    SH_GOTO(encode(&msg, message, err));
    p->counts.faults[f->kind]++;
cleanup:
    sh_buf_release(&manifest);
    return status;
}
