/*
 * Model files. A release is written to models/slotN.gguf by a job (daemon_jobs.c); which slot is
 * active the core knows. Before a slot is served its file is held against the signed manifest that
 * the core has of it. A file that a power cut tore is replaced by genesis.gguf where that is what
 * it should be; else the core is told (sh_node_options.lost_slots) and goes back to the other slot,
 * or to the genesis release, and the aggregator offers the newest one again. Only a node whose
 * genesis.gguf is damaged too cannot start: its bundle has that file.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/log.h"
#include "shared/math/kernel.h"

#define COPY_BYTES (1u << 16)
#define SLOT_NONE  UINT32_MAX

void daemon_slot_path(uint32_t slot, char *out, size_t n)
{
    snprintf(out, n, SH_NODE_DIR_MODELS "/slot%u.gguf", slot);
}

static sh_status copy_bytes(int in, int out, const char *from, const char *to, sh_error *err)
{
    uint8_t bytes[COPY_BYTES];
    for (;;) {
        ssize_t n = read(in, bytes, sizeof bytes);
        if (n == 0)
            return SH_OK;
        if (n < 0)
            return sh_fail(err, SH_ERR_IO, "%s: %s", from, strerror(errno));
        for (ssize_t at = 0; at < n;) {
            ssize_t wrote = write(out, bytes + at, (size_t)(n - at));
            if (wrote < 0)
                return sh_fail(err, errno == ENOSPC ? SH_ERR_FULL : SH_ERR_IO, "%s: %s", to,
                               strerror(errno));
            at += wrote;
        }
    }
}

static sh_status sync_folder(const char *path, sh_error *err)
{
    char dir[SH_PATH_BYTES];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (slash)
        *slash = 0;
    int fd = open(slash ? dir : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno));
    int rc = fsync(fd);
    close(fd);
    return rc == 0 ? SH_OK : sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno));
}

sh_status daemon_file_end(int fd, const char *temporary, const char *path, sh_error *err)
{
    if (fsync(fd) != 0 || rename(temporary, path) != 0)
        return sh_fail(err, errno == ENOSPC ? SH_ERR_FULL : SH_ERR_IO, "%s: %s", path,
                       strerror(errno));
    return sync_folder(path, err);
}

sh_status daemon_copy_file(const char *from, const char *to, sh_error *err)
{
    char temporary[SH_PATH_BYTES + 8];
    snprintf(temporary, sizeof temporary, "%s.tmp", to);
    int in = open(from, O_RDONLY | O_CLOEXEC);
    if (in < 0)
        return sh_fail(err, errno == ENOENT ? SH_ERR_NOT_FOUND : SH_ERR_IO, "%s: %s", from,
                       strerror(errno));
    int out = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    sh_status status = SH_OK;
    if (out < 0)
        SH_GOTO(sh_fail(err, SH_ERR_IO, "%s: %s", temporary, strerror(errno)));
    SH_GOTO(copy_bytes(in, out, from, to, err));
    SH_GOTO(daemon_file_end(out, temporary, to, err));
cleanup:
    close(in);
    if (out >= 0)
        close(out);
    if (status != SH_OK)
        unlink(temporary);
    return status;
}

/* The store's manifest of a slot is damaged: the one beside the slot's file may be sound. */
static sh_status read_manifest(const sh_daemon *d, uint32_t slot, uint64_t version, sh_buf *copy,
                               sh_manifest *out)
{
    char path[64];
    uint8_t *bytes = NULL;
    size_t n = 0;
    daemon_manifest_path(slot, path, sizeof path);
    SH_TRY(sh_file_read(path, SH_WIRE_MANIFEST_MAX, &bytes, &n, NULL));
    copy->len = 0;
    sh_status status = sh_buf_append(copy, bytes, n);
    free(bytes);
    SH_TRY(status);
    SH_TRY(sh_manifest_verify(copy->data, copy->len, &d->options.release_key, out, NULL));
    return out->version == version ? SH_OK : SH_ERR_MISMATCH;
}

static sh_status stored_manifest(sh_daemon *d, uint32_t slot, sh_buf *copy, sh_manifest *out,
                                 sh_error *err)
{
    sh_txn *txn = NULL;
    sh_bytes bytes;
    SH_TRY(sh_txn_begin(d->store, SH_TXN_READ, &txn, err));
    sh_status status = sh_node_get_slot(txn, slot, &bytes, err);
    if (status == SH_OK && sh_buf_append(copy, bytes.data, bytes.n) != SH_OK)
        status = sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a manifest");
    sh_txn_abort(&txn);
    SH_TRY(status);
    return sh_manifest_verify(copy->data, copy->len, &d->options.release_key, out, err);
}

/* What the slot's file must be; copy: its manifest, initialized by the caller. SH_ERR_CORRUPT: no
 * sound manifest of it is left. */
static sh_status wanted(sh_daemon *d, uint32_t slot, uint64_t version, sh_hash *sha256,
                        sh_buf *copy, sh_error *err)
{
    sh_manifest manifest;
    sh_status status = stored_manifest(d, slot, copy, &manifest, err);
    if (status != SH_OK && status != SH_ERR_NO_MEMORY && status != SH_ERR_IO) {
        bool found = read_manifest(d, slot, version, copy, &manifest) == SH_OK;
        sh_log(SH_LOG_ERROR, "manifest_lost", "version=%llu slot=%u state=%s error=\"%s\"",
               (unsigned long long)version, slot, found ? "file-is-sound" : "lost", err->text);
        status = found ? SH_OK : SH_ERR_CORRUPT;
    }
    if (status == SH_OK)
        *sha256 = manifest.model.sha256;
    return status;
}

static sh_status open_model(const char *path, const sh_hash *sha256, sh_model **out, sh_error *err)
{
    sh_model *model = NULL;
    SH_TRY(sh_model_open(path, &model, err));
    sh_hash hash = sh_model_hash(model);
    if (!sh_hash_equal(&hash, sha256)) {
        sh_model_close(&model);
        return sh_fail(err, SH_ERR_CORRUPT, "%s: not the file that its manifest names", path);
    }
    *out = model;
    return SH_OK;
}

void daemon_slot_unpack(const char *path)
{
    char cache[96];
    snprintf(cache, sizeof cache, "%s" SH_PACK_SUFFIX, path);
    (void)unlink(cache);
}

/* The weights in the kernels' order, before anybody uses the model. While requests run on another
 * one they have the other processors. */
static sh_status pack_model(const sh_daemon *d, const char *path, sh_model *model, sh_error *err)
{
    const sh_node_settings_values *v = &d->settings->v;
    const sh_node_pack how = sh_settings_pack(v);
    char cache[96];
    sh_pack_options options = {0};
    bool cached = false;
    if (how != SH_NODE_PACK_FILE)
        daemon_slot_unpack(path);
    if (how == SH_NODE_PACK_NONE)
        return SH_OK;
    snprintf(cache, sizeof cache, "%s" SH_PACK_SUFFIX, path);
    if (how == SH_NODE_PACK_FILE)
        options.cache = cache;
    const unsigned threads = d->serving ? 1 : sh_settings_threads(v);
    if (threads > 1)
        SH_TRY(sh_team_create(threads, &options.team, err));
    sh_status status = sh_model_pack(model, &options, &cached, err);
    sh_team_destroy(&options.team);
    if (status == SH_OK && how == SH_NODE_PACK_FILE && !cached)
        sh_log(SH_LOG_WARN, "pack_not_kept", "file=%s", cache);
    return status;
}

/* Takes the model over, in either case. */
static sh_status serve(sh_daemon *d, const char *path, sh_model *model, uint64_t version,
                       sh_error *err)
{
    sh_status status = pack_model(d, path, model, err);
    sh_chat_family family = sh_chat_detect(model->gguf);
    if (status == SH_OK)
        status = sh_engine_activate(d->engine, &model, version, err);
    if (status != SH_OK) {
        sh_model_close(&model);
        return status;
    }
    sh_log(SH_LOG_INFO, "model_active", "release=%llu kernel=%s chat=%s",
           (unsigned long long)version, sh_kernel_level(), sh_chat_family_name(family));
    d->active_version = version;
    d->serving = true;
    return SH_OK;
}

/* Opens the slot's file, which a genesis model may be put into again. */
static sh_status open_slot(sh_daemon *d, uint32_t slot, uint64_t version, const char *path,
                           sh_model **model, sh_error *err)
{
    sh_hash sha256;
    sh_buf manifest;
    sh_buf_init(&manifest, SH_WIRE_MANIFEST_MAX);
    sh_status status = wanted(d, slot, version, &sha256, &manifest, err);
    if (status != SH_OK) {
        sh_buf_release(&manifest);
        return status;
    }
    status = open_model(path, &sha256, model, err);
    bool genesis = sh_hash_equal(&sha256, &d->genesis_sha256);
    if (status != SH_OK && status != SH_ERR_NO_MEMORY && genesis) {
        if (sh_file_exists(path))
            sh_log(SH_LOG_WARN, "slot_repaired", "slot=%u from=%s", slot, SH_NODE_FILE_GENESIS);
        status = daemon_copy_file(SH_NODE_FILE_GENESIS, path, err);
        if (status == SH_OK)
            status = open_model(path, &sha256, model, err);
    } else if (status != SH_OK && status != SH_ERR_NO_MEMORY) {
        status = SH_ERR_CORRUPT; /* whatever it is: the slot cannot be served */
    }
    if (status == SH_OK)
        daemon_keep_manifest(slot, (sh_bytes){manifest.data, manifest.len});
    sh_buf_release(&manifest);
    return status;
}

sh_status daemon_activate(sh_daemon *d, uint64_t version, uint32_t slot, sh_error *err)
{
    char path[64];
    sh_model *model = NULL;
    daemon_slot_path(slot, path, sizeof path);
    sh_status status = open_slot(d, slot, version, path, &model, err);
    if (status == SH_ERR_FULL) { /* no room for a copy */
        path[0] = 0;
        status = open_model(SH_NODE_FILE_GENESIS, &d->genesis_sha256, &model, err);
    }
    SH_TRY(status);
    SH_TRY(serve(d, path[0] ? path : SH_NODE_FILE_GENESIS, model, version, err));
    d->active_slot = slot;
    return SH_OK;
}

/* What the store says that is active. */
static sh_status serve_stored(sh_daemon *d, sh_error *err)
{
    sh_txn *txn = NULL;
    uint64_t version = 0;
    uint32_t slot = 0;
    SH_TRY(sh_txn_begin(d->store, SH_TXN_READ, &txn, err));
    sh_status status = sh_node_stored_active(txn, &version, &slot, err);
    sh_txn_abort(&txn);
    return status == SH_OK ? daemon_activate(d, version, slot, err) : status;
}

/* Without a store: what lies in models/. A store that is made later begins with the same. */
static sh_status serve_kept(sh_daemon *d, sh_error *err)
{
    char path[64];
    sh_model *model = NULL;
    sh_manifest manifest;
    uint64_t version = daemon_find_kept(d);
    if (version == 0)
        return sh_fail(err, SH_ERR_NOT_FOUND, "no release but the genesis one is here");
    const sh_bytes *kept = &d->options.kept_manifest;
    SH_TRY(sh_manifest_verify(kept->data, kept->n, &d->options.release_key, &manifest, err));
    daemon_slot_path(d->options.kept_slot, path, sizeof path);
    SH_TRY(open_model(path, &manifest.model.sha256, &model, err));
    SH_TRY(serve(d, path, model, version, err));
    d->active_slot = d->options.kept_slot;
    return SH_OK;
}

sh_status daemon_serve_without_core(sh_daemon *d, sh_error *err)
{
    sh_model *model = NULL;
    sh_manifest genesis;
    if ((d->store ? serve_stored(d, err) : serve_kept(d, err)) == SH_OK)
        return SH_OK;
    SH_TRY(sh_manifest_verify(d->genesis.data, d->genesis.len, &d->options.release_key, &genesis,
                              err));
    SH_TRY(open_model(SH_NODE_FILE_GENESIS, &d->genesis_sha256, &model, err));
    SH_TRY(serve(d, SH_NODE_FILE_GENESIS, model, genesis.version, err));
    d->active_slot = SLOT_NONE; /* the core's first ACTIVATE is another one */
    return SH_OK;
}
