/* `shoal-aggregator init`. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "aggregator/folder_internal.h"
#include "aggregator/jobs.h"
#include "shared/base/clock.h"
#include "shared/base/file.h"

#define TEXT_BYTES_MAX (1u << 20)

static const char readme[] =
    "Texts that judge every candidate: one slice a file, NAME.txt, plain UTF-8.\n"
    "Without any, nothing is released: a merge waits until there are some.\n";

static sh_status in(char *out, const char *dir, const char *name, sh_error *err)
{
    return sh_path_join(out, SH_PATH_BYTES, dir, name, err);
}

static sh_status write_text(const char *dir, const char *name, const char *text, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(in(path, dir, name, err));
    return sh_file_write_atomic(path, text, strlen(text), err);
}

static sh_status write_hex(const char *dir, const char *name, const void *bytes, sh_error *err)
{
    char text[SH_HASH_HEX_BYTES + 1];
    sh_hex(bytes, 32, text);
    memcpy(text + SH_HASH_HEX_BYTES - 1, "\n", 2);
    sh_status status = write_text(dir, name, text, err);
    explicit_bzero(text, sizeof text);
    return status;
}

static sh_status make_pair(const char *dir, const char *name, sh_hash *public_key, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_net_keys keys;
    SH_TRY(in(path, dir, name, err));
    SH_TRY(sh_net_keys_make(&keys, err));
    sh_status status = sh_net_keys_save(path, &keys, err);
    *public_key = keys.public_key;
    sh_net_keys_forget(&keys);
    return status;
}

static sh_status make_keys(const char *dir, const char *bundle, sh_sign_secret_key *sk,
                           sh_sign_public_key *pk, sh_error *err)
{
    sh_hash aggregator, admin;
    uint8_t seed[32];
    SH_TRY(make_pair(dir, SH_FOLDER_KEY, &aggregator, err));
    SH_TRY(make_pair(dir, SH_FOLDER_ADMIN, &admin, err));
    SH_TRY(write_hex(bundle, "aggregator.pub", aggregator.b, err));
    sh_random_bytes(seed, sizeof seed);
    sh_sign_keypair(seed, pk, sk);
    sh_status status = write_hex(dir, SH_FOLDER_RELEASE, seed, err);
    explicit_bzero(seed, sizeof seed);
    SH_TRY(status);
    return write_hex(bundle, "release.pub", pk->b, err);
}

static sh_status copy_suites(const char *from, const char *to, sh_error *err)
{
    struct dirent *e;
    uint64_t bytes, n = 0;
    sh_hash sha256;
    sh_status status = SH_OK;
    char source[SH_PATH_BYTES], target[SH_PATH_BYTES];
    DIR *d = opendir(from);
    if (d == NULL)
        return sh_fail(err, errno == ENOENT ? SH_ERR_NOT_FOUND : SH_ERR_IO, "--suites %s: %s", from,
                       strerror(errno));
    while (status == SH_OK && (e = readdir(d)) != NULL) {
        const char *dot = strrchr(e->d_name, '.');
        if (dot == NULL || strcmp(dot, ".txt") != 0)
            continue;
        SH_GOTO(in(source, from, e->d_name, err));
        SH_GOTO(in(target, to, e->d_name, err));
        SH_GOTO(folder_copy(source, target, &sha256, &bytes, err));
        n++;
    }
    if (n == 0)
        status = sh_fail(err, SH_ERR_NOT_FOUND, "--suites %s: there is no *.txt file in it", from);
cleanup:
    closedir(d);
    return status;
}

/* The first release: the coordinator's own genesis, in a new store, so that its manifest is the one
 * that nodes are set up with. */
static sh_status make_store(const char *dir, const char *bundle, const sh_coord_options *options,
                            const sh_genesis *genesis, uint64_t bytes_max, sh_error *err)
{
    static sh_coord_actions actions;
    char path[SH_PATH_BYTES];
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    sh_coord *coord = NULL;
    sh_bytes manifest;
    sh_rng rng;
    uint64_t seed;
    sh_status status = SH_OK;
    SH_TRY(in(path, dir, SH_FOLDER_STORE, err));
    SH_TRY(sh_folder_open_store(path, bytes_max, &store, err));
    sh_random_bytes(&seed, sizeof seed);
    sh_rng_init(&rng, seed, 0, 0x494e4954);
    SH_GOTO(sh_txn_begin(store, SH_TXN_WRITE, &txn, err));
    SH_GOTO(
        sh_coord_create(options, genesis, sh_clock_wall_ms(), &rng, txn, &actions, &coord, err));
    SH_GOTO(sh_coord_get_manifest(txn, sh_coord_get_status(coord).version, &manifest, err));
    SH_GOTO(in(path, bundle, "genesis.manifest", err));
    SH_GOTO(sh_file_write_atomic(path, manifest.data, manifest.n, err));
    SH_GOTO(sh_txn_commit(&txn, err));
cleanup:
    sh_coord_actions_clear(&actions);
    sh_coord_destroy(&coord);
    sh_txn_abort(&txn);
    sh_store_close(&store);
    return status;
}

static sh_status make_genesis(const sh_folder_init *o, const char *bundle,
                              const sh_coord_options *options, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_hash master;
    sh_buf model;
    sh_status status = SH_OK;
    sh_buf_init(&model, (size_t)SH_CHUNK_BYTES * SH_BLOB_CHUNKS_MAX);
    SH_GOTO(in(path, o->dir, SH_FOLDER_OBJECTS, err));
    SH_GOTO(sh_dir_make(path, err));
    SH_GOTO(sh_job_genesis(o->base, SH_TYPE_Q8_0, path, &master, &model, err));
    SH_GOTO(in(path, bundle, "genesis.gguf", err));
    SH_GOTO(sh_file_write_atomic(path, model.data, model.len, err));
    sh_genesis genesis = {.model = {model.data, model.len}, .format = "Q8_0", .master = master};
    status =
        make_store(o->dir, bundle, options, &genesis, (uint64_t)o->settings->store_bytes_max, err);
cleanup:
    sh_buf_release(&model);
    return status;
}

/* ---- a relay ---- */

/* Copies a file of the parent's bundle. */
static sh_status copy_in(const char *bundle, const char *name, const char *to, sh_error *err)
{
    char source[SH_PATH_BYTES];
    sh_hash sha256;
    uint64_t bytes;
    SH_TRY(in(source, bundle, name, err));
    return folder_copy(source, to, &sha256, &bytes, err);
}

static sh_status relay_keys(const sh_folder_init *o, const char *bundle, sh_hash *upstream,
                            sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_hash aggregator, admin, parent;
    SH_TRY(in(path, o->relay, "aggregator.pub", err));
    SH_TRY(sh_folder_read_public(path, &parent, err));
    SH_TRY(write_hex(o->dir, SH_FOLDER_UP_PUB, parent.b, err));
    SH_TRY(make_pair(o->dir, SH_FOLDER_UP_KEY, upstream, err));
    SH_TRY(make_pair(o->dir, SH_FOLDER_KEY, &aggregator, err));
    SH_TRY(make_pair(o->dir, SH_FOLDER_ADMIN, &admin, err));
    return write_hex(bundle, "aggregator.pub", aggregator.b, err);
}

/* The parent's first release is this relay's: under the parent's signature, and in objects/ as what
 * updates have the shapes of. */
static sh_status relay_genesis(const sh_folder_init *o, const char *bundle,
                               sh_coord_options *options, sh_error *err)
{
    char path[SH_PATH_BYTES];
    uint8_t *manifest = NULL, *model = NULL;
    size_t n_manifest = 0, n_model = 0;
    sh_hash key, sha256;
    sh_status status = SH_OK;
    SH_GOTO(in(path, o->relay, "release.pub", err));
    SH_GOTO(sh_folder_read_public(path, &key, err));
    memcpy(options->release_pk.b, key.b, sizeof options->release_pk.b);
    SH_GOTO(in(path, bundle, "release.pub", err));
    SH_GOTO(copy_in(o->relay, "release.pub", path, err));
    SH_GOTO(in(path, o->relay, "genesis.manifest", err));
    SH_GOTO(sh_file_read(path, SH_WIRE_MANIFEST_MAX, &manifest, &n_manifest, err));
    SH_GOTO(in(path, bundle, "genesis.gguf", err));
    SH_GOTO(copy_in(o->relay, "genesis.gguf", path, err));
    SH_GOTO(sh_file_read(path, (size_t)SH_CHUNK_BYTES * SH_BLOB_CHUNKS_MAX, &model, &n_model, err));
    SH_GOTO(in(path, o->dir, SH_FOLDER_OBJECTS, err));
    SH_GOTO(sh_dir_make(path, err));
    SH_GOTO(sh_job_put_file(path, model, n_model, &sha256, err));
    sh_genesis genesis = {.model = {model, n_model}, .manifest = {manifest, n_manifest}};
    status =
        make_store(o->dir, bundle, options, &genesis, (uint64_t)o->settings->store_bytes_max, err);
    if (status != SH_OK)
        (void)sh_fail_in(err, "--relay %s", o->relay);
cleanup:
    free(manifest);
    free(model);
    return status;
}

static sh_status write_config(const sh_folder_init *o, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_buf text;
    sh_buf_init(&text, TEXT_BYTES_MAX);
    sh_status status = SH_OK;
    SH_GOTO(in(path, o->dir, SH_FOLDER_CONFIG, err));
    SH_GOTO(sh_aggregator_settings_write(o->settings, &text, err));
    SH_GOTO(sh_file_write_atomic(path, text.data, text.len, err));
cleanup:
    sh_buf_release(&text);
    return status;
}

static sh_status make_releasing(const sh_folder_init *o, const char *bundle,
                                sh_coord_options *options, sh_error *err)
{
    SH_TRY(make_keys(o->dir, bundle, &options->release_sk, &options->release_pk, err));
    sh_status status = make_genesis(o, bundle, options, err);
    explicit_bzero(&options->release_sk, sizeof options->release_sk);
    return status;
}

sh_status sh_folder_make(const sh_folder_init *o, sh_hash *upstream, sh_error *err)
{
    char bundle[SH_PATH_BYTES], suites[SH_PATH_BYTES];
    sh_coord_options options = sh_aggregator_settings_coord(o->settings);
    sh_hash key = {{0}};
    if (o->relay != NULL && !sh_file_exists(o->relay))
        return sh_fail(err, SH_ERR_NOT_FOUND, "--relay %s is not there", o->relay);
    if (o->relay == NULL && !sh_file_exists(o->base))
        return sh_fail(err, SH_ERR_NOT_FOUND, "--base %s is not there", o->base);
    SH_TRY(folder_begin(o->dir, "init", err));
    if (chmod(o->dir, 0700) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", o->dir, strerror(errno));
    SH_TRY(in(bundle, o->dir, SH_FOLDER_BUNDLE, err));
    SH_TRY(in(suites, o->dir, SH_FOLDER_SUITES, err));
    SH_TRY(sh_dir_make(bundle, err));
    SH_TRY(sh_dir_make(suites, err));
    SH_TRY(write_text(suites, "README", readme, err));
    if (o->suites != NULL)
        SH_TRY(copy_suites(o->suites, suites, err));
    if (o->relay != NULL) {
        SH_TRY(relay_keys(o, bundle, &key, err));
        SH_TRY(relay_genesis(o, bundle, &options, err));
    } else {
        SH_TRY(make_releasing(o, bundle, &options, err));
    }
    SH_TRY(write_config(o, err));
    if (upstream != NULL)
        *upstream = key;
    return folder_end(o->dir, err);
}
