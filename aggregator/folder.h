/*
 * The aggregator's folder: what lies where, its keys, and how it is made, copied and made again.
 *
 *     DIR/aggregator.yaml  settings             DIR/aggregator.key  CURVE pair of the aggregator
 *     DIR/store/           LMDB                 DIR/admin.key       CURVE pair of the tools
 *     DIR/objects/         jobs.h               DIR/release.key     Ed25519 seed, 64 hex digits
 *     DIR/suites/          texts, a gate slice each; DIR/admin.sock while it runs
 *     DIR/bundle/          what a node needs to be set up, nothing secret: genesis.gguf,
 *                          genesis.manifest, aggregator.pub, release.pub
 *     of a relay, instead of release.key and with an empty suites/:
 *     DIR/upstream.key     CURVE pair that its parent knows it by, as a node
 *     DIR/upstream.pub     the parent's public key
 *     DIR/unfinished       only while init or restore works, or when it was cut off
 *
 * A backup has the same files (objects: the current master and the releases that are kept), a store
 * that is marked (sh_coord_mark_backup), and backup.json, written last: path, bytes and SHA-256 of
 * every file.
 */
#ifndef SH_AGGREGATOR_FOLDER_H
#define SH_AGGREGATOR_FOLDER_H

#include "aggregator/settings.h"
#include "shared/net/net.h"

#define SH_FOLDER_STORE   "store"
#define SH_FOLDER_OBJECTS "objects"
#define SH_FOLDER_SUITES  "suites"
#define SH_FOLDER_BUNDLE  "bundle"
#define SH_FOLDER_KEY     "aggregator.key"
#define SH_FOLDER_ADMIN   "admin.key"
#define SH_FOLDER_RELEASE "release.key"
#define SH_FOLDER_CONFIG  "aggregator.yaml"
#define SH_FOLDER_UP_KEY  "upstream.key"
#define SH_FOLDER_UP_PUB  "upstream.pub"
#define SH_FOLDER_PUB     SH_FOLDER_BUNDLE "/release.pub"

#define SH_BACKUP_FILES_MAX 4096u

/* A folder that init or restore finished. SH_ERR_NOT_FOUND says which command makes one. */
SH_MUST_USE sh_status sh_folder_check(const char *dir, sh_error *err);
/* Of the folder that is the working directory. SH_ERR_AUTH: others may read the file. */
SH_MUST_USE sh_status sh_folder_release_key(sh_sign_public_key *pk, sh_sign_secret_key *sk,
                                            sh_error *err);
/* 64 hexadecimal digits, as the bundle's public keys are written. */
SH_MUST_USE sh_status sh_folder_read_public(const char *path, sh_hash *out, sh_error *err);
/* The store of a folder, with its limits. */
SH_MUST_USE sh_status sh_folder_open_store(const char *path, uint64_t bytes_max, sh_store **out,
                                           sh_error *err);

typedef struct {
    const char *dir, *base, *suites; /* suites may be NULL */
    const char *relay; /* the parent's bundle: makes a relay; base and suites are not used */
    const sh_aggregator_settings *settings;
} sh_folder_init;
/* Makes dir, which must be empty or absent. upstream (may be NULL): a relay's key, for the parent
 * to enrol. */
SH_MUST_USE sh_status sh_folder_make(const sh_folder_init *options, sh_hash *upstream,
                                     sh_error *err);

/* Copies the folder that is the working directory while it is used; to must be empty or absent.
 * *version is the release that the copy has. */
SH_MUST_USE sh_status sh_folder_backup(sh_store *store, const char *to, uint64_t now_ms,
                                       uint64_t *version, sh_error *err);
/* Checks every hash of a backup and makes dir, which must be empty or absent, from it. */
SH_MUST_USE sh_status sh_folder_restore(const char *from, const char *dir, sh_error *err);

/* What must stay in objects/: models and masters of the newest `releases` releases, genesis too. */
typedef struct {
    sh_hash *files; /* owned; sorted */
    size_t n;
} sh_folder_keep;
SH_MUST_USE sh_status sh_folder_keep_read(sh_txn *txn, uint64_t releases, sh_folder_keep *out,
                                          sh_error *err);
void sh_folder_keep_release(sh_folder_keep *keep);
/* Deletes what else is in objects/ of the working directory. *n: files. */
SH_MUST_USE sh_status sh_folder_prune(const sh_folder_keep *keep, uint64_t *n, sh_error *err);

#endif
