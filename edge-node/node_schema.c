/*
 * The version of a store, META "schema" (4 bytes, little-endian). A store without it is version 1:
 * the first. It becomes one of version 2 in the transaction of create: the state is read in its old
 * layout and saved in the new one, feedback rows get a user (none) and a time (now), the table of
 * completions is empty. One of version 2 becomes one of 3 as the link opens it: it has one epoch
 * and no lease (shared/sync/link_identity.c); its ledger's rows are read as they are. A step to a
 * later version is added here, and applied after those before.
 */
#include "edge-node/node_internal.h"

#define SCHEMA_VERSION 3u

static const char meta_schema[] = "schema";

static sh_status load_version(node_step *s, uint32_t *version)
{
    sh_slice value;
    node_state state;
    sh_status status =
        sh_txn_get(s->txn, SH_NODE_T_META, meta_schema, sizeof(meta_schema) - 1, &value);
    if (status == SH_OK && value.n != 4)
        return sh_fail(s->err, SH_ERR_CORRUPT, "node store: schema version of %zu bytes", value.n);
    if (status == SH_OK) {
        *version = (uint32_t)node_get_le(value.data, 4);
        return SH_OK;
    }
    if (status != SH_ERR_NOT_FOUND)
        return sh_fail(s->err, status, "node store: cannot be read");
    status = node_state_load(s->txn, &state, s->err);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND)
        return status;
    *version = status == SH_OK ? 1 : 0; /* 0: empty */
    return SH_OK;
}

static sh_status from_version_1(node_step *s)
{
    for (uint64_t seq = 0;; seq++) {
        sh_slice value;
        sh_status status = node_row_next(s, SH_NODE_T_FEEDBACK, seq, &seq, &value);
        if (status == SH_ERR_NOT_FOUND)
            break;
        SH_TRY(status);
        SH_TRY(node_feedback_migrate(s, seq));
    }
    s->n->dirty = true; /* the state is saved at the end of create */
    return SH_OK;
}

sh_status node_schema_open(node_step *s)
{
    uint32_t version = 0;
    SH_TRY(load_version(s, &version));
    if (version == SCHEMA_VERSION)
        return SH_OK;
    if (version > SCHEMA_VERSION)
        return sh_fail(s->err, SH_ERR_UNSUPPORTED,
                       "node store: it has schema version %u, this program knows up to %u: run the "
                       "newer program that made it",
                       version, SCHEMA_VERSION);
    if (version == 1)
        SH_TRY(from_version_1(s));
    uint8_t now[4];
    node_put_le(now, SCHEMA_VERSION, sizeof(now));
    return sh_txn_put(s->txn, SH_NODE_T_META, meta_schema, sizeof(meta_schema) - 1, now,
                      sizeof(now), s->err);
}
