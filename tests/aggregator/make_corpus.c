/* Writes the fuzzing corpora of the aggregator's door: make_access_corpus tests/fuzz/corpus */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/wire/wire.h"

#define TOKEN    "sixteen bytes of"
#define ROTATION "the rotation's own token"

static const char *root;
static sh_buf file;

static void add(const void *bytes, size_t n)
{
    if (sh_buf_append(&file, bytes, n) != SH_OK)
        exit(1);
}

static void save(const char *corpus, const char *name)
{
    char dir[SH_PATH_BYTES], path[SH_PATH_BYTES];
    sh_error err = {0};
    if (sh_path_join(dir, sizeof dir, root, corpus, &err) != SH_OK ||
        sh_path_join(path, sizeof path, dir, name, &err) != SH_OK ||
        sh_dir_make(dir, &err) != SH_OK ||
        sh_file_write_atomic(path, file.data, file.len, &err) != SH_OK) {
        fprintf(stderr, "make_access_corpus: %s\n", err.text);
        exit(1);
    }
    sh_buf_clear(&file);
}

/* One message of a peer: its type and body, for the target puts the envelope around them. */
static void say(uint8_t peer, const sh_msg *msg)
{
    sh_buf bytes;
    sh_buf_init(&bytes, SH_WIRE_MESSAGE_MAX);
    SH_ASSERT(sh_msg_encode(msg, &bytes, NULL) == SH_OK);
    size_t head = bytes.len - 23 > 0xff ? 24 : 23, n = bytes.len - head;
    add((const uint8_t[]){peer, (uint8_t)msg->type, (uint8_t)n, (uint8_t)(n >> 8)}, 4);
    add(bytes.data + head, n);
    sh_buf_release(&bytes);
}

static void enrol(uint8_t peer, uint64_t epoch, const char *token, const char *leases)
{
    uint8_t hashes[SH_WIRE_LEASES_MAX * 32] = {0};
    uint32_t n = (uint32_t)strlen(leases);
    for (uint32_t i = 0; i < n; i++)
        hashes[32 * i] = (uint8_t)leases[i];
    say(peer, &(sh_msg){.type = SH_MSG_ENROL,
                        .enrol = {.epoch = epoch,
                                  .agent = "a",
                                  .kernel = "k",
                                  .device_class = "gateway",
                                  .token = {token, strlen(token)},
                                  .leases = {.n = n, .hashes = hashes}}});
}

static void rotate(uint8_t peer, uint8_t to)
{
    say(peer,
        &(sh_msg){.type = SH_MSG_ROTATE,
                  .rotate = {.key = {{(uint8_t)(1 + to)}}, .token = {ROTATION, strlen(ROTATION)}}});
}

static void checkin(uint8_t peer)
{
    say(peer, &(sh_msg){.type = SH_MSG_CHECKIN, .checkin = {.epoch = 5}});
}

static void doors(void)
{
    enrol(0, 5, "", "a");
    enrol(0, 5, "", "ba");
    enrol(0, 5, "", "xa");
    checkin(0);
    save("access", "leases");
    enrol(1, 5, "wrong", "a");
    enrol(1, 5, TOKEN, "a");
    enrol(2, 5, TOKEN, "");
    enrol(3, 5, TOKEN, "");
    checkin(1);
    save("access", "tokens");
    rotate(0, 1);
    checkin(1);
    enrol(1, 5, "wrong", "");
    enrol(1, 5, ROTATION, "a");
    checkin(0);
    rotate(1, 2);
    enrol(2, 5, ROTATION, "ba");
    save("access", "rotations");
    rotate(0, 3);
    enrol(3, 5, TOKEN, "");
    rotate(3, 0);
    rotate(0, 2);
    rotate(0, 1);
    enrol(2, 5, ROTATION, "");
    save("access", "claims");
}

static void frames(const char *const *texts, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++) {
        size_t bytes = strlen(texts[i]);
        add((const uint8_t[]){(uint8_t)bytes, (uint8_t)(bytes >> 8)}, 2);
        add(texts[i], bytes);
    }
    save("net_zap", name);
}

static void zap(void)
{
    const char *const curve[] = {
        "1.0", "1", "server-0", "127.0.0.1", "", "CURVE", "0123456789abcdef0123456789abcdef"};
    const char *const plain[] = {"1.0", "2", "server-1", "127.0.0.1", "", "PLAIN", "user", "word"};
    char long_text[400];
    memset(long_text, 'x', sizeof long_text - 1);
    long_text[sizeof long_text - 1] = '\0';
    const char *const large[] = {"1.0", "3", long_text, "127.0.0.1", "", "NULL", ""};
    frames(curve, SH_COUNT(curve), "curve");
    frames(plain, SH_COUNT(plain), "plain");
    frames(large, SH_COUNT(large), "large");
    frames(curve, 5, "short");
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fputs("use: make_access_corpus tests/fuzz/corpus\n", stderr);
        return 2;
    }
    root = argv[1];
    sh_buf_init(&file, 1u << 20);
    doors();
    zap();
    sh_buf_release(&file);
    return 0;
}
