/* hash.h against published answers */
#include "shared/base/hash.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void assert_hash(sh_hash hash, const char *hex)
{
    char text[SH_HASH_HEX_BYTES];
    sh_hex(hash.b, sizeof hash.b, text);
    assert_string_equal(text, hex);
}

#define ABC_448 "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"

/* FIPS 180-4's examples. */
static void test_sha256(void **state)
{
    (void)state;
    assert_hash(sh_sha256("", 0),
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    assert_hash(sh_sha256("abc", 3),
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_hash(sh_sha256(ABC_448, 56),
                "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    sh_sha256_state stream;
    sh_sha256_init(&stream);
    for (int i = 0; i < 1000; i++) {
        char block[1000];
        memset(block, 'a', sizeof block);
        sh_sha256_update(&stream, block, sizeof block);
    }
    assert_hash(sh_sha256_final(&stream),
                "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

static void test_stream_equals_whole_at_every_split(void **state)
{
    (void)state;
    uint8_t bytes[150];
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)(i * 7);
    sh_hash whole = sh_sha256(bytes, sizeof bytes);
    for (size_t split = 0; split <= sizeof bytes; split++) {
        sh_sha256_state stream;
        sh_sha256_init(&stream);
        sh_sha256_update(&stream, bytes, split);
        sh_sha256_update(&stream, bytes + split, sizeof bytes - split);
        sh_hash hash = sh_sha256_final(&stream);
        assert_memory_equal(hash.b, whole.b, sizeof hash.b);
    }
}

/* BLAKE2b with a digest of 32 bytes: the reference implementation's answers. */
static void test_blake2b(void **state)
{
    (void)state;
    assert_hash(sh_blake2b("", 0),
                "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8");
    assert_hash(sh_blake2b("abc", 3),
                "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
}

static void test_hash_of_a_file(void **state)
{
    (void)state;
    char path[] = "/tmp/shoal-hash-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    enum { BYTES = 200001 }; /* over three reads */
    uint8_t *bytes = malloc(BYTES);
    assert_non_null(bytes);
    for (size_t i = 0; i < BYTES; i++)
        bytes[i] = (uint8_t)(i * i >> 3);
    assert_int_equal(write(fd, bytes, BYTES), BYTES);
    close(fd);
    sh_hash hash, want = sh_sha256(bytes, BYTES);
    uint64_t size = 0;
    assert_int_equal(sh_sha256_file(path, &hash, &size, NULL), SH_OK);
    assert_true(sh_hash_equal(&hash, &want));
    assert_int_equal(size, BYTES);
    assert_int_equal(sh_sha256_file(path, &hash, NULL, NULL), SH_OK);
    unlink(path);
    free(bytes);

    sh_error err = {0};
    sh_hash kept = hash;
    assert_int_equal(sh_sha256_file(path, &hash, &size, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, path));
    assert_true(sh_hash_equal(&hash, &kept));
    assert_int_equal(size, BYTES);
    assert_int_equal(sh_sha256_file("/", &hash, &size, &err), SH_ERR_IO);
}

static void test_hex_round_trip_and_refusals(void **state)
{
    (void)state;
    sh_hash hash = sh_sha256("x", 1), parsed, zero = {{0}};
    char hex[SH_HASH_HEX_BYTES];
    sh_hex(hash.b, sizeof hash.b, hex);
    assert_int_equal(sh_hash_parse(hex, &parsed, NULL), SH_OK);
    assert_true(sh_hash_equal(&hash, &parsed));
    hex[0] = 'A';
    assert_int_equal(sh_hash_parse(hex, &parsed, NULL), SH_OK);
    assert_int_equal(parsed.b[0] >> 4, 10);
    sh_error err = {0};
    parsed = hash;
    hex[63] = 'g';
    assert_int_equal(sh_hash_parse(hex, &parsed, &err), SH_ERR_INVALID);
    hex[63] = 0;
    assert_int_equal(sh_hash_parse(hex, &parsed, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "63"));
    assert_int_equal(sh_hash_parse("", &parsed, &err), SH_ERR_INVALID);
    assert_true(sh_hash_equal(&hash, &parsed));
    assert_true(sh_hash_is_zero(&zero));
    assert_false(sh_hash_is_zero(&hash));
    zero.b[31] = 1;
    assert_false(sh_hash_is_zero(&zero));
}

static void from_hex(const char *hex, uint8_t *out)
{
    for (size_t i = 0; hex[2 * i]; i++) {
        unsigned byte;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &byte), 1);
        out[i] = (uint8_t)byte;
    }
}

/* RFC 8032, section 7.1, tests 1 and 2. */
static void test_ed25519_known_answers(void **state)
{
    (void)state;
    static const struct {
        const char *seed, *public_key, *message, *signature;
    } vectors[] = {
        {"9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
         "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
         "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701"
         "cf9"
         "b46bd25bf5f0595bbe24655141438e7a100b"},
        {"4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
         "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
         "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d"
         "0f1"
         "1d8c387b2eaeb4302aeeb00d291612bb0c00"},
    };
    for (size_t i = 0; i < SH_COUNT(vectors); i++) {
        uint8_t seed[32], message[8];
        from_hex(vectors[i].seed, seed);
        from_hex(vectors[i].message, message);
        size_t n = strlen(vectors[i].message) / 2;
        sh_sign_public_key pk;
        sh_sign_secret_key sk;
        sh_sign_keypair(seed, &pk, &sk);
        char hex[129];
        sh_hex(pk.b, sizeof pk.b, hex);
        assert_string_equal(hex, vectors[i].public_key);
        sh_signature sig = sh_sign(message, n, &sk);
        sh_hex(sig.b, sizeof sig.b, hex);
        assert_string_equal(hex, vectors[i].signature);
        assert_int_equal(sh_sign_verify(message, n, &sig, &pk, NULL), SH_OK);
    }
}

static void test_every_forgery_is_refused(void **state)
{
    (void)state;
    const uint8_t seed[32] = {1}, other_seed[32] = {2};
    sh_sign_public_key pk, other;
    sh_sign_secret_key sk, other_sk;
    sh_sign_keypair(seed, &pk, &sk);
    sh_sign_keypair(other_seed, &other, &other_sk);
    char message[] = "release 7";
    sh_signature sig = sh_sign(message, sizeof message, &sk);
    sh_error err = {0};
    assert_int_equal(sh_sign_verify(message, sizeof message, &sig, &other, &err), SH_ERR_AUTH);
    assert_int_equal(err.code, SH_ERR_AUTH);
    assert_int_equal(sh_sign_verify(message, sizeof message - 1, &sig, &pk, NULL), SH_ERR_AUTH);
    for (size_t i = 0; i < sizeof sig.b; i++) {
        sh_signature forged = sig;
        forged.b[i] ^= 1;
        assert_int_equal(sh_sign_verify(message, sizeof message, &forged, &pk, NULL), SH_ERR_AUTH);
    }
    for (size_t i = 0; i < sizeof message; i++) {
        message[i] ^= 1;
        assert_int_equal(sh_sign_verify(message, sizeof message, &sig, &pk, NULL), SH_ERR_AUTH);
        message[i] ^= 1;
    }
    assert_int_equal(sh_sign_verify(message, sizeof message, &sig, &pk, NULL), SH_OK);
}

/* Every byte takes many values over some draws: a source that leaves one as it was cannot pass. */
static void test_random_bytes(void **state)
{
    (void)state;
    uint8_t seen[33] = {0}, first[33] = {0}, bytes[33] = {0};
    sh_random_bytes(first, 32);
    for (int draw = 0; draw < 64; draw++) {
        sh_random_bytes(bytes, 32);
        for (size_t i = 0; i < sizeof bytes; i++)
            seen[i] |= bytes[i] ^ first[i];
    }
    for (size_t i = 0; i < 32; i++)
        assert_int_not_equal(seen[i], 0);
    assert_int_equal(bytes[32], 0); /* and nothing beyond */
}

static void test_bytes_equal(void **state)
{
    (void)state;
    uint8_t a[32], b[32];
    sh_random_bytes(a, sizeof a);
    memcpy(b, a, sizeof b);
    assert_true(sh_bytes_equal(a, b, sizeof a));
    assert_true(sh_bytes_equal(a, b, 0));
    for (size_t i = 0; i < sizeof b; i++) {
        b[i] ^= 0x80;
        assert_false(sh_bytes_equal(a, b, sizeof a));
        b[i] ^= 0x80;
    }
}

static int setup(void **state)
{
    (void)state;
    return sh_crypto_init(NULL) == SH_OK && sh_crypto_init(NULL) == SH_OK ? 0 : -1;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sha256),
        cmocka_unit_test(test_stream_equals_whole_at_every_split),
        cmocka_unit_test(test_blake2b),
        cmocka_unit_test(test_hash_of_a_file),
        cmocka_unit_test(test_hex_round_trip_and_refusals),
        cmocka_unit_test(test_ed25519_known_answers),
        cmocka_unit_test(test_every_forgery_is_refused),
        cmocka_unit_test(test_random_bytes),
        cmocka_unit_test(test_bytes_equal),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
