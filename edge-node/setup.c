#include "edge-node/setup.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "edge-node/daemon_internal.h"

#define PUBLIC_FILE_MAX 1024u
#define CONFIG_MAX      (256u << 10)

static const char *const bundle_files[] = {SH_NODE_FILE_GENESIS, SH_NODE_FILE_MANIFEST,
                                           SH_NODE_FILE_AGGREGATOR, SH_NODE_FILE_RELEASE};

static sh_status read_public(const char *dir, const char *name, sh_hash *out, sh_error *err)
{
    char path[SH_PATH_BYTES];
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_path_join(path, sizeof path, dir, name, err));
    SH_TRY(sh_file_read(path, PUBLIC_FILE_MAX, &text, &n, err));
    while (n && (text[n - 1] == '\n' || text[n - 1] == '\r'))
        text[--n] = 0;
    sh_status status = sh_hash_parse((const char *)text, out, err);
    free(text);
    return status == SH_OK ? SH_OK : sh_fail_in(err, "%s", path);
}

/* The four files are there, well-formed and of one aggregator. */
static sh_status check_bundle(const char *bundle, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_hash release, aggregator, got;
    sh_sign_public_key key;
    sh_manifest manifest;
    uint8_t *bytes = NULL;
    size_t n = 0;
    uint64_t size;
    SH_TRY(read_public(bundle, SH_NODE_FILE_AGGREGATOR, &aggregator, err));
    SH_TRY(read_public(bundle, SH_NODE_FILE_RELEASE, &release, err));
    memcpy(key.b, release.b, sizeof key.b);
    SH_TRY(sh_path_join(path, sizeof path, bundle, SH_NODE_FILE_MANIFEST, err));
    SH_TRY(sh_file_read(path, SH_WIRE_MANIFEST_MAX, &bytes, &n, err));
    sh_status status = SH_OK;
    if (sh_manifest_verify(bytes, n, &key, &manifest, err) != SH_OK)
        status = sh_fail_in(err, "%s", path);
    else
        got = manifest.model.sha256;
    free(bytes);
    SH_TRY(status);
    sh_hash wanted = got;
    SH_TRY(sh_path_join(path, sizeof path, bundle, SH_NODE_FILE_GENESIS, err));
    SH_TRY(sh_sha256_file(path, &got, &size, err));
    if (!sh_hash_equal(&wanted, &got))
        return sh_fail(err, SH_ERR_MISMATCH, "%s: not the file that %s names; take the bundle anew",
                       path, SH_NODE_FILE_MANIFEST);
    return SH_OK;
}

static sh_status make_dirs(const char *dir, sh_error *err)
{
    static const char *const names[] = {"", SH_NODE_DIR_STORE, SH_NODE_DIR_MODELS,
                                        SH_NODE_DIR_WORK};
    char path[SH_PATH_BYTES];
    for (size_t i = 0; i < SH_COUNT(names); i++) {
        SH_TRY(sh_path_join(path, sizeof path, dir, names[i], err));
        SH_TRY(sh_dir_make(path, err));
        if (chmod(path, 0700) != 0)
            return sh_fail(err, SH_ERR_IO, "%s: %s", path, strerror(errno));
    }
    return SH_OK;
}

static sh_status make_keys(const char *dir, const char *name, sh_hash *public_key, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_net_keys keys;
    SH_TRY(sh_path_join(path, sizeof path, dir, name, err));
    sh_status status = SH_OK;
    if (sh_file_exists(path)) { /* of an interrupted call */
        status = sh_net_keys_load(path, &keys, err);
    } else {
        status = sh_net_keys_make(&keys, err);
        if (status == SH_OK)
            status = sh_net_keys_save(path, &keys, err);
    }
    if (status == SH_OK && public_key)
        *public_key = keys.public_key;
    sh_net_keys_forget(&keys);
    return status;
}

static sh_status write_config(const char *path, const char *aggregator, sh_error *err)
{
    sh_buf text;
    sh_buf_init(&text, CONFIG_MAX);
    sh_status status = sh_settings_sample(aggregator, &text);
    if (status != SH_OK)
        sh_fail(err, status, "%s: no memory", path);
    else
        status = sh_file_write_atomic(path, text.data, text.len, err);
    sh_buf_release(&text);
    return status;
}

sh_status sh_setup_read_token(const char *path, sh_hash *token, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, PUBLIC_FILE_MAX, &text, &n, err));
    while (n && (text[n - 1] == '\n' || text[n - 1] == '\r'))
        text[--n] = 0;
    sh_status status = sh_hash_parse((const char *)text, token, NULL);
    explicit_bzero(text, n);
    free(text);
    if (status == SH_OK)
        return SH_OK;
    return sh_fail(
        err, SH_ERR_INVALID,
        "%s: a token is one line of 64 hexadecimal digits, as shoal aggregator token add "
        "prints it",
        path);
}

static sh_status keep_token(const char *dir, const sh_hash *token, sh_error *err)
{
    char path[SH_PATH_BYTES], line[SH_HASH_HEX_BYTES + 1];
    SH_TRY(sh_path_join(path, sizeof path, dir, SH_NODE_FILE_TOKEN, err));
    sh_hex(token->b, sizeof token->b, line);
    line[SH_HASH_HEX_BYTES - 1] = '\n';
    sh_status status = sh_file_write_atomic(path, line, SH_HASH_HEX_BYTES, err);
    explicit_bzero(line, sizeof line);
    if (status == SH_OK && chmod(path, 0600) != 0) /* the folder is 0700 already */
        return sh_fail(err, SH_ERR_IO, "%s: %s", path, strerror(errno));
    return status;
}

sh_status sh_setup_node(const char *dir, const char *bundle, const char *aggregator,
                        const char *token_file, sh_hash *public_key, sh_error *err)
{
    sh_hash token;
    char config[SH_PATH_BYTES], from[SH_PATH_BYTES], to[SH_PATH_BYTES];
    if (strpbrk(aggregator, "\"\\\n") != NULL || strncmp(aggregator, "tcp://", 6) != 0)
        return sh_fail(err, SH_ERR_USAGE, "--aggregator: '%s' is not of the form tcp://HOST:PORT",
                       aggregator);
    SH_TRY(sh_path_join(config, sizeof config, dir, SH_NODE_FILE_CONFIG, err));
    if (sh_file_exists(config))
        return sh_fail(err, SH_ERR_EXISTS, "%s: a node is set up here already", dir);
    SH_TRY(check_bundle(bundle, err));
    if (token_file)
        SH_TRY(sh_setup_read_token(token_file, &token, err));
    SH_TRY(make_dirs(dir, err));
    if (token_file)
        SH_TRY(keep_token(dir, &token, err));
    for (size_t i = 0; i < SH_COUNT(bundle_files); i++) {
        SH_TRY(sh_path_join(from, sizeof from, bundle, bundle_files[i], err));
        SH_TRY(sh_path_join(to, sizeof to, dir, bundle_files[i], err));
        SH_TRY(daemon_copy_file(from, to, err));
    }
    SH_TRY(make_keys(dir, SH_NODE_FILE_ADMIN_KEYS, NULL, err));
    SH_TRY(make_keys(dir, SH_NODE_FILE_KEYS, public_key, err));
    return write_config(config, aggregator, err); /* last: it says that the node is whole */
}
