/*
 * The store's environment. One that is corrupt, at the start or when a step finds it so, is set
 * aside as store.corrupt-N for whoever wants to look at it, at most STORE_ASIDE_MAX of them, and
 * the node goes on with a new store and a new epoch. How many there were so far is in stores.lost,
 * written before the folder is renamed, so that none goes uncounted.
 *   A disk that is too full to make a store on is waited for, as a full store is: until then
 * sh_daemon.store is NULL, and so is the node.
 *   What the node serves stays: beside a slot's file lies its signed manifest (slotN.manifest),
 * which a new store begins with where the file is what it names.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/log.h"

#define STORE_ASIDE     SH_NODE_DIR_STORE ".corrupt-"
#define STORE_ASIDE_MAX 2u
#define LOST_FILE       "stores.lost"
#define LOST_FILE_MAX   32u
#define SLOTS           2u

/* ---- set aside ---- */

static uint32_t read_lost(void)
{
    uint8_t *text = NULL;
    size_t n = 0;
    if (sh_file_read(LOST_FILE, LOST_FILE_MAX, &text, &n, NULL) != SH_OK)
        return 0;
    unsigned long lost = strtoul((const char *)text, NULL, 10);
    free(text);
    return (uint32_t)SH_MIN(lost, (unsigned long)UINT32_MAX);
}

static void empty_folder(int at, const char *name)
{
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (!dir) {
        if (fd >= 0)
            close(fd);
        return;
    }
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            (void)unlinkat(dirfd(dir), entry->d_name, 0);
    closedir(dir);
}

static void remove_store(const char *name)
{
    char compact[SH_PATH_BYTES]; /* of an interrupted compaction */
    snprintf(compact, sizeof compact, "%s/compact", name);
    empty_folder(AT_FDCWD, compact);
    (void)rmdir(compact);
    empty_folder(AT_FDCWD, name);
    (void)rmdir(name);
}

/* Removes those with numbers up to `last`. */
static void remove_aside(uint32_t last)
{
    DIR *dir = opendir(".");
    if (!dir)
        return;
    struct dirent *entry;
    while ((entry = readdir(dir)) != NULL) {
        if (strncmp(entry->d_name, STORE_ASIDE, sizeof STORE_ASIDE - 1) != 0)
            continue;
        if (strtoul(entry->d_name + sizeof STORE_ASIDE - 1, NULL, 10) <= last)
            remove_store(entry->d_name);
    }
    closedir(dir);
}

void daemon_store_forget_aside(void)
{
    remove_aside(UINT32_MAX);
}

static sh_status set_aside(sh_daemon *d, const sh_error *why, sh_error *err)
{
    char name[64], text[LOST_FILE_MAX];
    sh_error local = {0};
    uint32_t lost = d->stores_lost + 1;
    snprintf(name, sizeof name, STORE_ASIDE "%u", lost);
    int n = snprintf(text, sizeof text, "%u\n", lost);
    /* On a full disk it is counted for this life only. */
    if (sh_file_write_atomic(LOST_FILE, text, (size_t)n, &local) != SH_OK)
        sh_log(SH_LOG_WARN, "store", "error=\"%s\"", local.text);
    remove_store(name); /* where the count was lost */
    if (rename(SH_NODE_DIR_STORE, name) != 0)
        return sh_fail(err, SH_ERR_CORRUPT, "%s, and it cannot be set aside as %s: %s", why->text,
                       name, strerror(errno));
    d->stores_lost = lost;
    sh_log(SH_LOG_ERROR, "store", "state=corrupt set_aside=%s lost=%u error=\"%s\"", name, lost,
           why->text);
    if (lost > STORE_ASIDE_MAX)
        remove_aside(lost - STORE_ASIDE_MAX);
    return SH_OK;
}

/* ---- what is served goes on ---- */

void daemon_manifest_path(uint32_t slot, char *out, size_t n)
{
    snprintf(out, n, SH_NODE_DIR_MODELS "/slot%u.manifest", slot);
}

void daemon_keep_manifest(uint32_t slot, sh_bytes manifest)
{
    char path[64];
    uint8_t *old = NULL;
    size_t n = 0;
    sh_error err = {0};
    daemon_manifest_path(slot, path, sizeof path);
    bool same = sh_file_read(path, SH_WIRE_MANIFEST_MAX, &old, &n, NULL) == SH_OK &&
                n == manifest.n && memcmp(old, manifest.data, n) == 0;
    free(old);
    if (!same && sh_file_write_atomic(path, manifest.data, manifest.n, &err) != SH_OK)
        sh_log(SH_LOG_WARN, "manifest_not_kept", "slot=%u error=\"%s\"", slot, err.text);
}

/* Takes the slot's release as the one to begin with, if it is whole and newer than `version`. */
static void look_at_slot(sh_daemon *d, uint32_t slot, uint64_t *version)
{
    char path[64];
    uint8_t *bytes = NULL;
    size_t n = 0;
    sh_manifest manifest;
    sh_hash got;
    uint64_t size;
    daemon_manifest_path(slot, path, sizeof path);
    if (sh_file_read(path, SH_WIRE_MANIFEST_MAX, &bytes, &n, NULL) != SH_OK)
        return;
    bool good = sh_manifest_verify(bytes, n, &d->options.release_key, &manifest, NULL) == SH_OK &&
                manifest.version > *version;
    daemon_slot_path(slot, path, sizeof path);
    good = good && sh_sha256_file(path, &got, &size, NULL) == SH_OK &&
           sh_hash_equal(&got, &manifest.model.sha256);
    d->kept_bytes.len = good ? 0 : d->kept_bytes.len;
    if (good && sh_buf_append(&d->kept_bytes, bytes, n) == SH_OK) {
        *version = manifest.version;
        d->options.kept_manifest = (sh_bytes){d->kept_bytes.data, d->kept_bytes.len};
        d->options.kept_slot = slot;
    }
    free(bytes);
}

uint64_t daemon_find_kept(sh_daemon *d)
{
    uint64_t version = 0;
    sh_manifest genesis;
    d->options.kept_manifest = (sh_bytes){NULL, 0};
    if (sh_manifest_verify(d->genesis.data, d->genesis.len, &d->options.release_key, &genesis,
                           NULL) != SH_OK)
        return 0;
    version = genesis.version;
    sh_buf_release(&d->kept_bytes);
    sh_buf_init(&d->kept_bytes, SH_WIRE_MANIFEST_MAX);
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        look_at_slot(d, slot, &version);
    return d->options.kept_manifest.n > 0 ? version : 0;
}

/* A store that has no node yet begins with what was served before. */
static void begin_with_kept(sh_daemon *d)
{
    sh_txn *txn = NULL;
    uint64_t epoch;
    d->options.kept_manifest = (sh_bytes){NULL, 0};
    if (sh_txn_begin(d->store, SH_TXN_READ, &txn, NULL) != SH_OK)
        return;
    bool is_new = sh_node_stored_epoch(txn, &epoch, NULL) == SH_ERR_NOT_FOUND;
    sh_txn_abort(&txn);
    if (is_new)
        (void)daemon_find_kept(d);
}

/* ---- open ---- */

static sh_status open_once(sh_daemon *d, sh_error *err)
{
    sh_store_options o = {.tables = sh_node_tables,
                          .n_tables = SH_NODE_TABLES,
                          .bytes_max = (uint64_t)d->settings->v.store_bytes_max};
    return sh_store_open_lmdb(SH_NODE_DIR_STORE, &o, &d->store, err);
}

static bool is_damage(sh_status status)
{
    /* The latter: the file says that another LMDB wrote it. */
    return status == SH_ERR_CORRUPT || status == SH_ERR_UNSUPPORTED;
}

sh_status daemon_store_open(sh_daemon *d, sh_error *err)
{
    sh_error why = {0};
    d->stores_lost = SH_MAX(d->stores_lost, read_lost());
    sh_status status = open_once(d, &why);
    if (is_damage(status)) {
        SH_TRY(set_aside(d, &why, err));
        why = (sh_error){0};
        status = open_once(d, &why);
    }
    if (status == SH_OK) {
        begin_with_kept(d);
        return SH_OK;
    }
    *err = why;
    if (status == SH_ERR_EXISTS)
        return sh_fail_in(err, "%s: is another shoal-node running on it?", d->settings->dir);
    return status;
}

uint64_t daemon_store_bytes(const sh_daemon *d)
{
    return d->store ? sh_store_bytes_used(d->store) : 0;
}

sh_status daemon_store_replace(sh_daemon *d, sh_error *err)
{
    sh_error why = d->corrupt_err;
    daemon_drop_jobs(d);
    sh_store_close(&d->store);
    d->store_corrupt = false;
    SH_TRY(set_aside(d, &why, err));
    sh_status status = daemon_store_open(d, err);
    if (status != SH_OK && status != SH_ERR_FULL)
        return status;
    if (d->erase.running) { /* what was to be erased is not in the new one */
        daemon_store_forget_aside();
        d->erase.done = true;
    }
    return status;
}
