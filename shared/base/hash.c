#include "shared/base/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <string.h>
#include <unistd.h>

#define READ_BYTES 65536

_Static_assert(sizeof(crypto_hash_sha256_state) <= sizeof(sh_sha256_state), "state too small");
_Static_assert(crypto_hash_sha256_BYTES == sizeof(sh_hash), "hash size");
_Static_assert(crypto_sign_PUBLICKEYBYTES == sizeof(sh_sign_public_key), "public key size");
_Static_assert(crypto_sign_SECRETKEYBYTES == sizeof(sh_sign_secret_key), "secret key size");
_Static_assert(crypto_sign_BYTES == sizeof(sh_signature), "signature size");
_Static_assert(crypto_sign_SEEDBYTES == 32, "seed size");

sh_status sh_crypto_init(sh_error *err)
{
    if (sodium_init() < 0)
        return sh_fail(err, SH_ERR_IO, "libsodium found no source of random numbers");
    return SH_OK;
}

sh_hash sh_sha256(const void *bytes, size_t n)
{
    sh_hash hash;
    crypto_hash_sha256(hash.b, bytes, n);
    return hash;
}

sh_hash sh_blake2b(const void *bytes, size_t n)
{
    sh_hash hash;
    crypto_generichash(hash.b, sizeof hash.b, bytes, n, NULL, 0);
    return hash;
}

void sh_sha256_init(sh_sha256_state *state)
{
    crypto_hash_sha256_init((crypto_hash_sha256_state *)state);
}

void sh_sha256_update(sh_sha256_state *state, const void *bytes, size_t n)
{
    crypto_hash_sha256_update((crypto_hash_sha256_state *)state, bytes, n);
}

sh_hash sh_sha256_final(sh_sha256_state *state)
{
    sh_hash hash;
    crypto_hash_sha256_final((crypto_hash_sha256_state *)state, hash.b);
    return hash;
}

sh_status sh_sha256_file(const char *path, sh_hash *out, uint64_t *bytes, sh_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return sh_fail(err, errno == ENOENT ? SH_ERR_NOT_FOUND : SH_ERR_IO, "cannot open '%s': %s",
                       path, strerror(errno));
    sh_sha256_state state;
    sh_sha256_init(&state);
    uint8_t block[READ_BYTES];
    uint64_t total = 0;
    for (;;) {
        ssize_t n = read(fd, block, sizeof block);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            int reason = errno;
            close(fd);
            return sh_fail(err, SH_ERR_IO, "cannot read '%s': %s", path, strerror(reason));
        }
        if (n == 0)
            break;
        sh_sha256_update(&state, block, (size_t)n);
        total += (uint64_t)n;
    }
    close(fd);
    *out = sh_sha256_final(&state);
    if (bytes)
        *bytes = total;
    return SH_OK;
}

void sh_random_bytes(void *out, size_t n)
{
    randombytes_buf(out, n);
}

bool sh_bytes_equal(const void *a, const void *b, size_t n)
{
    return sodium_memcmp(a, b, n) == 0;
}

bool sh_hash_equal(const sh_hash *a, const sh_hash *b)
{
    return memcmp(a->b, b->b, sizeof a->b) == 0;
}

bool sh_hash_is_zero(const sh_hash *h)
{
    uint8_t any = 0;
    for (size_t i = 0; i < sizeof h->b; i++)
        any |= h->b[i];
    return any == 0;
}

void sh_hex(const void *bytes, size_t n, char *out)
{
    static const char digits[] = "0123456789abcdef";
    const uint8_t *b = bytes;
    for (size_t i = 0; i < n; i++) {
        out[2 * i] = digits[b[i] >> 4];
        out[2 * i + 1] = digits[b[i] & 15];
    }
    out[2 * n] = 0;
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

sh_status sh_hash_parse(const char *hex, sh_hash *out, sh_error *err)
{
    sh_hash hash;
    size_t length = strlen(hex);
    if (length != 2 * sizeof hash.b)
        return sh_fail(err, SH_ERR_INVALID, "a hash has %zu hexadecimal digits, this has %zu",
                       2 * sizeof hash.b, length);
    for (size_t i = 0; i < sizeof hash.b; i++) {
        int high = hex_digit(hex[2 * i]), low = hex_digit(hex[2 * i + 1]);
        if (high < 0 || low < 0)
            return sh_fail(err, SH_ERR_INVALID, "'%.64s' is not a hexadecimal hash", hex);
        hash.b[i] = (uint8_t)(high << 4 | low);
    }
    *out = hash;
    return SH_OK;
}

void sh_sign_keypair(const uint8_t seed[32], sh_sign_public_key *pk, sh_sign_secret_key *sk)
{
    crypto_sign_seed_keypair(pk->b, sk->b, seed);
}

sh_signature sh_sign(const void *bytes, size_t n, const sh_sign_secret_key *sk)
{
    sh_signature sig;
    crypto_sign_detached(sig.b, NULL, bytes, n, sk->b);
    return sig;
}

sh_status sh_sign_verify(const void *bytes, size_t n, const sh_signature *sig,
                         const sh_sign_public_key *pk, sh_error *err)
{
    if (crypto_sign_verify_detached(sig->b, bytes, n, pk->b) != 0)
        return sh_fail(err, SH_ERR_AUTH, "the signature does not hold for this key");
    return SH_OK;
}
