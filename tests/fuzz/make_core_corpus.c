/*
 * Writes the fuzzing corpora of the cores: make_core_corpus tests/fuzz/corpus
 * Each file is a script (ops.h) that reaches a state of its own; the numbers are those of the
 * targets' operations (tests/node/fuzz_core.c, tests/aggregator/fuzz_core.c).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "tests/fuzz/ops.h"

typedef struct {
    const char *name;
    /* Lines "OP A B [HEX]", numbers in decimal. */
    const char *script;
} entry;

/* 48 inferences of that likelihood: a window and a half. */
#define MANY_1  "10 15 1\n10 15 1\n10 15 1\n"
#define MANY_3  "10 15 3\n10 15 3\n10 15 3\n"
#define MANY_15 "10 15 15\n10 15 15\n10 15 15\n"

static const entry node[] = {
    {"enrolled", "9 0 0\n9 1 0\n2 1 0\n2 0 0 03e8\n8 1 0 2710\n"},
    {"renewed", MANY_3 "2 1 1\n8 1 0 0064\n2 1 0\n4 2 1\n13 0 0\n2 1 0\n4 2 2 05\n"},
    {"windows", MANY_3 MANY_3 MANY_3 "4 2 1\n4 2 9\n8 1 0 03e8\n4 130 1\n"},
    {"alarm", MANY_1 MANY_1 MANY_1 MANY_1 MANY_15 MANY_15 MANY_15 MANY_15 "4 1 1\n3 0 0\n"},
    {"trained", "10 15 3\n11 1 1 0102030405060708090a0b0c0d0e0f\n3 1 1\n12 0 0 03e8\n5 1 0\n"
                "8 1 0 03e8\n4 0 1\n3 1 2\n12 0 2\n3 1 3\n12 0 1\n"},
    {"release", "3 2 0\n6 0 0\n6 1 0\n12 0 0\n12 0 0\n10 5 131\n8 1 0 03e8\n3 17 4\n12 0 0\n"},
    {"bad-release", "3 2 0\n6 0 1\n6 1 2\n6 0 0\n6 1 0\n12 0 1\n8 1 0 ffff\n12 0 0\n13 0 0\n"},
    {"evaluated", "11 1 1 0102030405060708090a0b0c0d0e0f\n3 4 0\n6 0 0\n6 1 0\n12 0 0\n4 1 1\n"},
    {"errors", "7 0 0\n7 1 0\n8 1 0 03e8\n7 2 2 03e8\n7 3 1\n7 4 0 ffffffffffffffff\n8 1 0\n"},
    {"version-1", "7 1 0\n2 1 0\n3 32 0\n10 15 3\n10 15 3\n10 15 3\n4 2 1\n7 1 1\n"},
    {"erased", "11 1 9 0102030405\n11 2 8 0102030405\n15 0 9\n8 1 0\n15 0 0\n8 1 0\n"},
    {"bodies", "1 2 3 94c3a0c300\n1 4 3 9500c0c400c0c400\n1 6 3 9401020ac40101\n1 10 3 92c400c400\n"
               "1 7 1 91c400\n1 9 2 93a0a000\n0 0 0 940304c41000\n"},
    {"time", "3 8 0 0000018f00000000\n3 8 0 00\n3 8 0 ffffffffffffffff\n8 0 0 24000000\n3 8 0\n"},
    {"rotated", "14 0 0 0102030405060708\n2 1 0\n14 0 0\n13 0 0\n"},
};

static const entry coordinator[] = {
    {"enrolled", "2 0 1\n2 0 17\n2 0 33\n2 3 1\n3 3 0\n3 0 1\n2 65 0\n3 65 1\n2 129 0\n3 129 1\n"},
    {"clone", "2 0 1\n2 0 2\n15 0 0\n2 0 1\n2 0 1 05\n2 0 2 06\n3 0 1 06\n"},
    {"items",
     "2 0 1\n4 0 0 5348574e\n4 0 2 01\n4 0 2 01\n6 32 1\n4 0 0 00\n5 0 0\n5 0 1\n4 3 0 00\n"},
    {"tombstones",
     "6 0 0 04\n6 16 0 ff\n6 32 5 ffffffffffffffff\n6 32 0 0fffffffffffffff\n4 0 5 00\n"},
    {"update", "2 0 0\n3 0 17\n7 0 0\n8 0 0\n8 0 1\n7 0 0\n8 1 0\n9 0 0\n"},
    {"merged", "3 0 17\n3 1 17\n7 0 0\n8 0 0\n8 0 1\n7 1 0\n8 1 0\n8 1 1\n14 0 0\n14 0 0\n"
               "3 0 1\n10 0 0 0102\n3 1 1\n10 1 1\n11 1 0\n3 2 0\n"},
    {"refused", "7 0 0 01\n7 0 1 02\n7 0 2 08\n7 0 3 10\n7 0 4 20\n7 0 5 04\n7 3 0\n"},
    {"parts", "7 0 0 04\n8 0 0\n8 0 1\n7 1 0 44\n7 0 0 04\n15 0 0\n7 0 1 84\n"},
    {"bad-merge", "7 0 0\n8 0 0\n8 0 1\n7 1 0\n14 1 0\n11 1 0\n14 0 255\n14 2 0\n11 1 0 ffffff\n"},
    {"gated", "7 0 0\n8 0 0\n8 0 1\n7 1 0\n14 0 0\n14 2 0\n3 0 1\n15 0 0\n14 0 1\n13 0 2 01\n"},
    {"commands", "13 0 0\n13 0 1\n13 0 2 01\n13 0 3 03\n13 0 4\n2 0 1\n13 0 5\n13 1 6\n7 1 0\n"},
    {"chunks", "7 0 0\n8 0 128\n8 2 0\n12 0 0\n8 0 0\n15 0 0\n8 0 1\n7 0 0\n9 1 129 0102\n"},
    {"rotated",
     "2 0 1\n16 0 64\n16 0 0\n16 0 1\n2 32 1\n2 33 1\n3 33 1\n4 33 0 00\n3 0 1\n16 33 2\n"},
    {"bodies", "1 0 49 9a01a0a00000a00000c400c400\n1 0 51 90\n1 0 53 960102010301c400\n"
               "1 1 58 92c400c400\n1 3 55 91c400\n17 0 0\n17 3 0\n0 0 0 94\n0 3 0 940301c410\n"},
};

static void add(sh_buf *out, const char *line)
{
    unsigned op, a, b;
    int at = 0;
    uint8_t head[4], byte;
    if (sscanf(line, "%u %u %u%n", &op, &a, &b, &at) != 3)
        exit(2);
    size_t n = 0, start = out->len;
    sh_status status = sh_buf_append(out, head, sizeof head);
    for (const char *hex = line + at; *hex && *hex != '\n'; hex++) {
        unsigned digits;
        if (*hex == ' ' || sscanf(hex, "%2x", &digits) != 1)
            continue;
        byte = (uint8_t)digits;
        hex += hex[1] && hex[1] != '\n';
        n++;
        status = status == SH_OK ? sh_buf_append(out, &byte, 1) : status;
    }
    if (status != SH_OK || n > UINT8_MAX)
        exit(2);
    memcpy(out->data + start, (uint8_t[]){(uint8_t)op, (uint8_t)a, (uint8_t)b, (uint8_t)n}, 4);
}

static void save(const char *root, const char *folder, const entry *entries, size_t n)
{
    char dir[SH_PATH_BYTES], path[SH_PATH_BYTES];
    sh_error err = {0};
    for (size_t i = 0; i < n; i++) {
        sh_buf out;
        sh_buf_init(&out, SH_WIRE_MESSAGE_MAX);
        for (const char *line = entries[i].script; *line; line = strchr(line, '\n') + 1)
            add(&out, line);
        if (sh_path_join(dir, sizeof dir, root, folder, &err) != SH_OK ||
            sh_path_join(path, sizeof path, dir, entries[i].name, &err) != SH_OK ||
            sh_dir_make(dir, &err) != SH_OK ||
            sh_file_write_atomic(path, out.data, out.len, &err) != SH_OK) {
            fprintf(stderr, "make_core_corpus: %s\n", err.text);
            exit(1);
        }
        sh_buf_release(&out);
    }
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: make_core_corpus tests/fuzz/corpus\n");
        return 2;
    }
    save(argv[1], "node_core", node, SH_COUNT(node));
    save(argv[1], "coordinator_core", coordinator, SH_COUNT(coordinator));
    return 0;
}
