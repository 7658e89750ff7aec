/*
 * What the release key signs, manifests and times: the input as it is, and as the bytes that the
 * right key signed. What is accepted signs to the same bytes (Ed25519 is deterministic).
 */
#include <string.h>

#include "shared/wire/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_time(const uint8_t *data, size_t size, const sh_sign_public_key *pk,
                     const sh_sign_secret_key *sk)
{
    uint64_t now_ms = 0;
    sh_error err = {0};
    if (sh_time_verify((sh_bytes){data, size}, pk, &now_ms, &err) != SH_OK) {
        SH_ASSERT(err.text[0]);
        return;
    }
    sh_buf again;
    sh_buf_init(&again, SH_WIRE_TIME_MAX);
    SH_ASSERT(sh_time_sign(now_ms, sk, &again, NULL) == SH_OK);
    SH_ASSERT(again.len == size && memcmp(again.data, data, size) == 0);
    sh_buf_release(&again);
}

static void try(const uint8_t *data, size_t size, const sh_sign_public_key *pk,
                const sh_sign_secret_key *sk)
{
    try_time(data, size, pk, sk);
    sh_manifest manifest;
    sh_error err = {0};
    if (sh_manifest_verify(data, size, pk, &manifest, &err) != SH_OK) {
        SH_ASSERT(err.text[0]);
        return;
    }
    sh_buf again;
    sh_buf_init(&again, SH_WIRE_MESSAGE_MAX);
    SH_ASSERT(sh_manifest_sign(&manifest, sk, &again, NULL) == SH_OK);
    SH_ASSERT(again.len == size && memcmp(again.data, data, size) == 0);
    sh_buf_release(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint8_t seed[32] = {7};
    sh_sign_public_key pk;
    sh_sign_secret_key sk;
    SH_ASSERT(sh_crypto_init(NULL) == SH_OK);
    sh_sign_keypair(seed, &pk, &sk);
    try(data, size, &pk, &sk);
    sh_signature sig = sh_sign(data, size, &sk);
    sh_buf whole;
    sh_buf_init(&whole, SIZE_MAX);
    SH_ASSERT(sh_buf_append(&whole, data, size) == SH_OK);
    SH_ASSERT(sh_buf_append(&whole, sig.b, sizeof(sig.b)) == SH_OK);
    try(whole.data, whole.len, &pk, &sk);
    sh_buf_release(&whole);
    return 0;
}
