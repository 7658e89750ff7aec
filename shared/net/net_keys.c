/*
 * The file of a key pair:
 *
 *     public <64 hexadecimal digits>
 *     secret <64 hexadecimal digits>
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "shared/base/file.h"
#include "shared/net/net_internal.h"

#define Z85_BYTES 41 /* 32 bytes as Z85 (ZeroMQ RFC 32), and the 0 */

sh_status sh_net_keys_make(sh_net_keys *out, sh_error *err)
{
    char public_key[Z85_BYTES], secret[Z85_BYTES];
    if (zmq_curve_keypair(public_key, secret) != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "net: no key pair: %s", zmq_strerror(zmq_errno()));
    zmq_z85_decode(out->public_key.b, public_key);
    zmq_z85_decode(out->secret, secret);
    explicit_bzero(secret, sizeof secret);
    return SH_OK;
}

void sh_net_keys_forget(sh_net_keys *keys)
{
    explicit_bzero(keys->secret, sizeof keys->secret);
}

sh_status sh_net_keys_save(const char *path, const sh_net_keys *keys, sh_error *err)
{
    char public_key[SH_HASH_HEX_BYTES], secret[SH_HASH_HEX_BYTES], text[NET_KEYFILE_BYTES];
    if (sh_file_exists(path))
        return sh_fail(err, SH_ERR_EXISTS,
                       "'%s' is there already: a key is never overwritten; move it away first",
                       path);
    sh_hex(keys->public_key.b, 32, public_key);
    sh_hex(keys->secret, 32, secret);
    int n = snprintf(text, sizeof text, "public %s\nsecret %s\n", public_key, secret);
    sh_status status = sh_file_write_private(path, text, (size_t)n, err);
    explicit_bzero(text, sizeof text);
    explicit_bzero(secret, sizeof secret);
    return status;
}

/* "word HEX\n" at *text, which moves behind it. */
static bool read_line(const char **text, const char *word, uint8_t out[32])
{
    char hex[SH_HASH_HEX_BYTES];
    sh_hash value;
    size_t n = strlen(word);
    if (strncmp(*text, word, n) != 0 || strnlen(*text + n, 65) < 65 || (*text)[n + 64] != '\n')
        return false;
    memcpy(hex, *text + n, 64);
    hex[64] = 0;
    bool good = sh_hash_parse(hex, &value, NULL) == SH_OK;
    memcpy(out, value.b, good ? 32 : 0);
    explicit_bzero(hex, sizeof hex);
    explicit_bzero(&value, sizeof value);
    *text += n + 65;
    return good;
}

static bool belong_together(const sh_net_keys *keys)
{
    char secret[Z85_BYTES], public_key[Z85_BYTES];
    uint8_t bytes[32];
    bool yes = zmq_z85_encode(secret, keys->secret, 32) &&
               zmq_curve_public(public_key, secret) == 0 && zmq_z85_decode(bytes, public_key) &&
               memcmp(bytes, keys->public_key.b, 32) == 0;
    explicit_bzero(secret, sizeof secret);
    return yes;
}

sh_status sh_net_keys_load(const char *path, sh_net_keys *out, sh_error *err)
{
    struct stat info;
    uint8_t *bytes = NULL;
    size_t n = 0;
    sh_net_keys keys = {0};
    if (stat(path, &info) == 0 && (info.st_mode & 077) != 0)
        return sh_fail(err, SH_ERR_AUTH,
                       "'%s': other users may read this secret key (mode %03o): run chmod 600 on "
                       "it, or make a new one",
                       path, (unsigned)info.st_mode & 0777);
    SH_TRY(sh_file_read(path, NET_KEYFILE_BYTES, &bytes, &n, err));
    const char *text = (const char *)bytes;
    sh_status status = SH_OK;
    if (!read_line(&text, "public ", keys.public_key.b) ||
        !read_line(&text, "secret ", keys.secret) || text != (const char *)bytes + n)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID,
                        "'%s' is no key file: two lines, 'public' and 'secret' with 64 hexadecimal "
                        "digits each",
                        path));
    if (!belong_together(&keys))
        SH_GOTO(sh_fail(err, SH_ERR_INVALID,
                        "'%s': the public key is not that of the secret one; make a new pair",
                        path));
    *out = keys;
cleanup:
    sh_net_keys_forget(&keys);
    explicit_bzero(bytes, n);
    free(bytes);
    return status;
}
