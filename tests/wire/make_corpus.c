/*
 * Writes the fuzzing corpora of wire: make_wire_corpus tests/fuzz/corpus
 * Seeded, so that a change of the format shows up as a change of the files.
 */
#include <stdio.h>
#include <stdlib.h>

#include "shared/base/file.h"
#include "tests/wire/sample.h"

#define SIZE_MAX_SMALL 96

static const char *root;

static void save(const char *corpus, const char *name, const void *bytes, size_t n)
{
    char dir[SH_PATH_BYTES], path[SH_PATH_BYTES];
    sh_error err = {0};
    if (sh_path_join(dir, sizeof(dir), root, corpus, &err) != SH_OK ||
        sh_path_join(path, sizeof(path), dir, name, &err) != SH_OK ||
        sh_dir_make(dir, &err) != SH_OK || sh_file_write_atomic(path, bytes, n, &err) != SH_OK) {
        fprintf(stderr, "make_wire_corpus: %s\n", err.text);
        exit(1);
    }
}

/* The message, and its type (with the highest bit: version 2; with the next: version 3) and body
 * alone, which the fuzzer can change. */
static void save_message(const char *name, const sh_msg *msg, sh_buf *buf)
{
    static const uint8_t bits[] = {0, 0x80, 0x40};
    char body[64];
    sh_buf_clear(buf);
    SH_ASSERT(sh_msg_encode(msg, buf, NULL) == SH_OK);
    save("wire_msg", name, buf->data, buf->len);
    size_t head = buf->len - 23 > 0xff ? 24 : 23;
    buf->data[head - 1] = (uint8_t)(msg->type | bits[msg->version - 1]);
    snprintf(body, sizeof(body), "%s-body", name);
    save("wire_msg", body, buf->data + head - 1, buf->len - head + 1);
}

/* The files of version 1 stay as version 1 of the program wrote them. */
static void messages(sh_rng *rng, sample *s, sh_buf *buf)
{
    for (int type = SH_MSG_ENROL; type <= SH_MSG_ERROR; type++)
        for (int i = 0; i < 3; i++) {
            char name[48];
            sample_msg(rng, (sh_msg_type)type, SIZE_MAX_SMALL, s);
            snprintf(name, sizeof(name), "%s-%d", sh_msg_type_name((sh_msg_type)type), i);
            save_message(name, &s->msg, buf);
        }
}

/* Those whose body version 2 changed. */
static void messages_2(sh_rng *rng, sample *s, sh_buf *buf)
{
    static const sh_msg_type types[] = {SH_MSG_PLAN, SH_MSG_ITEM};
    for (size_t t = 0; t < SH_COUNT(types); t++)
        for (int i = 0; i < 6; i++) {
            char name[48];
            sample_msg(rng, types[t], SIZE_MAX_SMALL, s);
            sample_msg_2(rng, s);
            snprintf(name, sizeof(name), "%s-%d-v2", sh_msg_type_name(types[t]), i);
            save_message(name, &s->msg, buf);
        }
}

/* Those whose body version 3 changed. */
static void messages_3(sh_rng *rng, sample *s, sh_buf *buf)
{
    static const sh_msg_type types[] = {SH_MSG_ENROL, SH_MSG_WELCOME, SH_MSG_CHECKIN, SH_MSG_PLAN,
                                        SH_MSG_ROTATE};
    for (size_t t = 0; t < SH_COUNT(types); t++)
        for (int i = 0; i < 4; i++) {
            char name[48];
            sample_msg(rng, types[t], SIZE_MAX_SMALL, s);
            sample_msg_2(rng, s);
            sample_msg_3(rng, s);
            snprintf(name, sizeof(name), "%s-%d-v3", sh_msg_type_name(types[t]), i);
            save_message(name, &s->msg, buf);
        }
}

static void relayed(sh_buf *buf)
{
    for (uint32_t i = 0; i < 4; i++) {
        static sample_payloads p;
        char name[64];
        sh_rng rng;
        sh_rng_init(&rng, i, 0, 11);
        sample_payload(&rng, &p);
        sample_relayed(i, 1 + 3 * i, &p);
        sh_buf_clear(buf);
        SH_ASSERT(sh_update_meta_encode(&p.update, buf, NULL) == SH_OK);
        snprintf(name, sizeof(name), "update-%u-v2", (unsigned)i);
        save("wire_payload", name, buf->data, buf->len);
    }
}

/* Stamps, for the fuzzer of what is signed: whole, and what the right key is to sign. */
static void times(sh_buf *buf)
{
    static const uint8_t seed[32] = {7};
    static const uint64_t at_ms[] = {0, 1767225600000, UINT64_MAX};
    sh_sign_public_key pk;
    sh_sign_secret_key sk;
    sh_sign_keypair(seed, &pk, &sk);
    for (size_t i = 0; i < SH_COUNT(at_ms); i++) {
        char name[64];
        sh_buf_clear(buf);
        SH_ASSERT(sh_time_sign(at_ms[i], &sk, buf, NULL) == SH_OK);
        snprintf(name, sizeof(name), "time-%zu", i);
        save("wire_manifest", name, buf->data, buf->len);
        snprintf(name, sizeof(name), "time-%zu-unsigned", i);
        save("wire_manifest", name, buf->data, buf->len - sizeof(sh_signature));
    }
}

static void payloads(sh_rng *rng, sh_buf *buf)
{
    static const uint8_t seed[32] = {7}; /* as in fuzz_manifest.c */
    sh_sign_public_key pk;
    sh_sign_secret_key sk;
    sh_sign_keypair(seed, &pk, &sk);
    for (int i = 0; i < 4; i++) {
        static sample_payloads p;
        char name[64];
        sample_payload(rng, &p);
        sh_buf_clear(buf);
        SH_ASSERT(sh_update_meta_encode(&p.update, buf, NULL) == SH_OK);
        snprintf(name, sizeof(name), "update-%d", i);
        save("wire_payload", name, buf->data, buf->len);
        sh_buf_clear(buf);
        SH_ASSERT(sh_alarm_encode(&p.alarm, buf, NULL) == SH_OK);
        snprintf(name, sizeof(name), "alarm-%d", i);
        save("wire_payload", name, buf->data, buf->len);
        sh_buf_clear(buf);
        SH_ASSERT(sh_evaluation_encode(&p.evaluation, buf, NULL) == SH_OK);
        snprintf(name, sizeof(name), "evaluation-%d", i);
        save("wire_payload", name, buf->data, buf->len);
        sh_buf_clear(buf);
        SH_ASSERT(sh_manifest_sign(&p.manifest, &sk, buf, NULL) == SH_OK);
        snprintf(name, sizeof(name), "manifest-%d", i);
        save("wire_manifest", name, buf->data, buf->len);
        snprintf(name, sizeof(name), "manifest-%d-unsigned", i);
        save("wire_manifest", name, buf->data, buf->len - sizeof(sh_signature));
    }
}

int main(int argc, char **argv)
{
    if (argc != 2 || sh_crypto_init(NULL) != SH_OK) {
        fprintf(stderr, "usage: make_wire_corpus tests/fuzz/corpus\n");
        return 2;
    }
    root = argv[1];
    static sample s;
    sh_rng rng;
    sh_rng_init(&rng, 1, 0, 0);
    sh_buf buf;
    sh_buf_init(&buf, SH_WIRE_MESSAGE_MAX);
    messages(&rng, &s, &buf);
    payloads(&rng, &buf);
    messages_2(&rng, &s, &buf);
    messages_3(&rng, &s, &buf);
    relayed(&buf);
    times(&buf);
    sh_buf_release(&buf);
    return 0;
}
