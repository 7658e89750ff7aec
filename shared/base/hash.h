/*
 * Hashes and signatures: the one file of the project that knows libsodium.
 * SHA-256 (FIPS 180-4) names whole files and releases; BLAKE2b-256 (RFC 7693) names chunks and
 * messages; Ed25519 (RFC 8032) signs manifests. Thread-safe after sh_crypto_init.
 */
#ifndef SH_BASE_HASH_H
#define SH_BASE_HASH_H

#include "shared/base/status.h"

typedef struct {
    uint8_t b[32];
} sh_hash;

typedef struct {
    uint8_t b[32];
} sh_sign_public_key;
typedef struct {
    uint8_t b[64];
} sh_sign_secret_key;
typedef struct {
    uint8_t b[64];
} sh_signature;

#define SH_HASH_HEX_BYTES 65

SH_MUST_USE sh_status sh_crypto_init(sh_error *err); /* idempotent; call first in main */

sh_hash sh_sha256(const void *bytes, size_t n);
sh_hash sh_blake2b(const void *bytes, size_t n);
SH_MUST_USE sh_status sh_sha256_file(const char *path, sh_hash *out, uint64_t *bytes,
                                     sh_error *err);

/* Streaming SHA-256 for results that are hashed as they come. */
typedef struct {
    uint64_t opaque[16];
} sh_sha256_state;
void sh_sha256_init(sh_sha256_state *state);
void sh_sha256_update(sh_sha256_state *state, const void *bytes, size_t n);
sh_hash sh_sha256_final(sh_sha256_state *state);

bool sh_hash_equal(const sh_hash *a, const sh_hash *b);
bool sh_hash_is_zero(const sh_hash *h);
void sh_hex(const void *bytes, size_t n, char *out); /* 2n + 1 bytes */
SH_MUST_USE sh_status sh_hash_parse(const char *hex, sh_hash *out, sh_error *err);

/* From the system's generator: for keys, epochs and seeds of real processes. The simulator and the
 * cores never call it. */
void sh_random_bytes(void *out, size_t n);
bool sh_bytes_equal(const void *a, const void *b, size_t n); /* in constant time: for secrets */

/* A key pair from a 32-byte seed: the same seed, the same pair. */
void sh_sign_keypair(const uint8_t seed[32], sh_sign_public_key *pk, sh_sign_secret_key *sk);
sh_signature sh_sign(const void *bytes, size_t n, const sh_sign_secret_key *sk);
SH_MUST_USE sh_status sh_sign_verify(const void *bytes, size_t n, const sh_signature *sig,
                                     const sh_sign_public_key *pk, sh_error *err); /* SH_ERR_AUTH */

#endif
