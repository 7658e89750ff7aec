/* GGUF: round trips, every truncation, planted corruptions, out of memory at every place. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "shared/base/rng.h"
#include "shared/model/gguf.h"
#include "tests/model/gguf_small.h"

#define SEED      20260204
#define FILE_NAME "small.gguf"
#define BYTES_MAX (1u << 20)

static sh_buf small_file(void)
{
    sh_buf out;
    sh_buf_init(&out, BYTES_MAX);
    assert_int_equal(gguf_small(&out, NULL), SH_OK);
    return out;
}

/* Opens a copy of exactly n bytes, so that a sanitizer sees a read past them. */
static sh_status open_copy(const uint8_t *bytes, size_t n, uint8_t **copy, sh_gguf **out,
                           sh_error *err)
{
    *copy = malloc(n > 0 ? n : 1);
    assert_non_null(*copy);
    if (n > 0)
        memcpy(*copy, bytes, n);
    return sh_gguf_open_memory(*copy, n, FILE_NAME, out, err);
}

/* The bytes must be refused with this status and a line that names the file and has `part`. */
static void expect_refused(const uint8_t *bytes, size_t n, sh_status wanted, const char *part)
{
    sh_gguf *g = NULL;
    uint8_t *copy;
    sh_error err = {0};
    sh_status status = open_copy(bytes, n, &copy, &g, &err);
    if (status != wanted || strstr(err.text, part) == NULL ||
        strncmp(err.text, FILE_NAME ": ", strlen(FILE_NAME) + 2) != 0)
        fail_msg("status %s, wanted %s; text '%s', wanted '%s' in it", sh_status_name(status),
                 sh_status_name(wanted), err.text, part);
    assert_null(g);
    free(copy);
}

static void check_keys(const sh_gguf *g)
{
    uint64_t u = 0;
    double f = 0;
    bool b = false;
    const char *text = NULL, *texts[4];
    size_t n = 0;
    uint32_t lengths[4];
    float scores[4];
    int32_t kinds[4];
    assert_int_equal(sh_gguf_get_string(g, "general.architecture", &text, &n, NULL), SH_OK);
    assert_int_equal(n, 5);
    assert_memory_equal(text, "llama", 5);
    assert_int_equal(sh_gguf_get_u64(g, "llama.block_count", &u, NULL), SH_OK);
    assert_int_equal(u, 4);
    assert_int_equal(sh_gguf_get_u64(g, "large", &u, NULL), SH_OK);
    assert_true(u == UINT64_MAX);
    assert_int_equal(sh_gguf_get_f64(g, "llama.rope.freq_base", &f, NULL), SH_OK);
    assert_true(f == 10000);
    assert_int_equal(sh_gguf_get_bool(g, "tokenizer.ggml.add_bos_token", &b, NULL), SH_OK);
    assert_true(b);
    assert_int_equal(sh_gguf_get_array_count(g, "tokenizer.ggml.tokens", &n, NULL), SH_OK);
    assert_int_equal(n, 4);
    assert_int_equal(sh_gguf_get_strings(g, "tokenizer.ggml.tokens", texts, lengths, 4, NULL),
                     SH_OK);
    assert_int_equal(lengths[1], 0);
    assert_int_equal(lengths[2], 6);
    assert_memory_equal(texts[2], "\xe2\x96\x81the", 6);
    assert_memory_equal(texts[3], "a\nb", 3);
    assert_int_equal(sh_gguf_get_f32s(g, "tokenizer.ggml.scores", scores, 4, NULL), SH_OK);
    assert_true(scores[1] == -1.5f);
    assert_int_equal(sh_gguf_get_i32s(g, "tokenizer.ggml.token_type", kinds, 4, NULL), SH_OK);
    assert_int_equal(kinds[2], -1);
    assert_int_equal(sh_gguf_get_array_count(g, "empty", &n, NULL), SH_OK);
    assert_int_equal(n, 0);
}

static void check_tensors(const sh_gguf *g)
{
    assert_int_equal(sh_gguf_n_tensors(g), 4);
    const sh_gguf_tensor *t = sh_gguf_tensor_find(g, "blk.0.attn_q.weight");
    assert_non_null(t);
    assert_ptr_equal(t, sh_gguf_tensor_at(g, 0));
    assert_int_equal(t->n_dims, 2);
    assert_true(t->ne[0] == 64 && t->ne[1] == 3 && t->ne[2] == 1 && t->ne[3] == 1);
    assert_int_equal(t->bytes, 64 * 3 * 4);
    assert_true(((const float *)t->data)[5] == 5 * 0.25f - 20);
    t = sh_gguf_tensor_find(g, "output_norm.weight");
    assert_non_null(t);
    assert_true(((const float *)t->data)[4] == 5);
    t = sh_gguf_tensor_find(g, "token_embd.weight");
    assert_non_null(t);
    assert_int_equal(t->type, SH_TYPE_Q8_0);
    assert_int_equal(t->bytes, 4 * 34);
    t = sh_gguf_tensor_find(g, "cube");
    assert_non_null(t);
    assert_int_equal(t->bytes, 256);
    assert_null(sh_gguf_tensor_find(g, "cub"));
    assert_null(sh_gguf_tensor_find(g, "cubes"));
    assert_null(sh_gguf_tensor_find(g, ""));
}

static void test_round_trip(void **state)
{
    (void)state;
    sh_buf file = small_file();
    sh_gguf *g = NULL;
    assert_int_equal(sh_gguf_open_memory(file.data, file.len, FILE_NAME, &g, NULL), SH_OK);
    assert_int_equal(sh_gguf_version(g), 3);
    assert_string_equal(sh_gguf_path(g), FILE_NAME);
    check_keys(g);
    check_tensors(g);
    sh_gguf_close(&g);
    assert_null(g);
    sh_gguf_close(&g);
    sh_buf_release(&file);
}

/* Copying all keys and tensors gives the same bytes again. */
static void test_copy_is_equal(void **state)
{
    (void)state;
    sh_buf file = small_file(), again;
    sh_gguf *g = NULL;
    sh_gguf_writer *w = NULL;
    sh_buf_init(&again, BYTES_MAX);
    assert_int_equal(sh_gguf_open_memory(file.data, file.len, FILE_NAME, &g, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_copy_keys(w, g, NULL, NULL), SH_OK);
    for (size_t i = 0; i < sh_gguf_n_tensors(g); i++) {
        const sh_gguf_tensor *t = sh_gguf_tensor_at(g, i);
        assert_int_equal(
            sh_gguf_writer_add_tensor(w, t->name, t->type, t->ne, t->n_dims, t->data, NULL), SH_OK);
    }
    assert_int_equal(sh_gguf_writer_encode(w, &again, NULL), SH_OK);
    assert_int_equal(again.len, file.len);
    assert_memory_equal(again.data, file.data, file.len);
    sh_gguf_writer_destroy(&w);
    sh_gguf_close(&g);
    sh_buf_release(&file);
    sh_buf_release(&again);
}

static void test_file(void **state)
{
    (void)state;
    char dir[] = "/tmp/shoal-test-XXXXXX", path[SH_PATH_BYTES];
    sh_error err = {0};
    sh_gguf *g = NULL;
    sh_gguf_writer *w = NULL;
    const uint64_t ne[] = {2};
    const float values[] = {1, 2};
    assert_non_null(mkdtemp(dir));
    assert_int_equal(sh_path_join(path, sizeof path, dir, "a.gguf", NULL), SH_OK);
    assert_int_equal(sh_gguf_open(path, &g, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, path));
    assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_set_u32(w, "answer", 41), SH_OK);
    assert_int_equal(sh_gguf_writer_set_u32(w, "answer", 42), SH_OK); /* the last value counts */
    assert_int_equal(sh_gguf_writer_add_tensor(w, "x", SH_TYPE_F32, ne, 1, values, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_save(w, path, NULL), SH_OK);
    assert_int_equal(sh_gguf_open(path, &g, NULL), SH_OK);
    uint64_t answer = 0;
    assert_int_equal(sh_gguf_get_u64(g, "answer", &answer, NULL), SH_OK);
    assert_int_equal(answer, 42);
    assert_int_equal(sh_gguf_n_keys(g), 1);
    assert_true((uintptr_t)sh_gguf_tensor_at(g, 0)->data % 32 == 0);
    sh_gguf_close(&g);
    sh_gguf_writer_destroy(&w);
    unlink(path);
    rmdir(dir);
}

static void test_getter_errors(void **state)
{
    (void)state;
    sh_buf file = small_file();
    sh_gguf *g = NULL;
    sh_error err = {0};
    uint64_t u = 7;
    double f = 7;
    bool b = true;
    const char *text = "untouched";
    float floats[4];
    int32_t ints[4];
    size_t n = 7;
    assert_int_equal(sh_gguf_open_memory(file.data, file.len, FILE_NAME, &g, NULL), SH_OK);
    assert_int_equal(sh_gguf_get_u64(g, "absent", &u, &err), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(err.text, "'absent' is missing"));
    assert_int_equal(sh_gguf_get_u64(g, "general.architecture", &u, &err), SH_ERR_INVALID);
    assert_non_null(strstr(err.text, "string"));
    assert_int_equal(sh_gguf_get_u64(g, "llama.rope.freq_base", &u, &err), SH_ERR_INVALID);
    assert_int_equal(sh_gguf_get_f64(g, "llama.block_count", &f, &err), SH_ERR_INVALID);
    assert_int_equal(sh_gguf_get_bool(g, "llama.block_count", &b, &err), SH_ERR_INVALID);
    assert_int_equal(sh_gguf_get_string(g, "llama.block_count", &text, &n, &err), SH_ERR_INVALID);
    assert_int_equal(sh_gguf_get_array_count(g, "large", &n, &err), SH_ERR_INVALID);
    assert_int_equal(sh_gguf_get_f32s(g, "tokenizer.ggml.scores", floats, 3, &err), SH_ERR_INVALID);
    assert_int_equal(sh_gguf_get_f32s(g, "tokenizer.ggml.token_type", floats, 4, &err),
                     SH_ERR_INVALID);
    assert_int_equal(sh_gguf_get_i32s(g, "tokenizer.ggml.scores", ints, 4, &err), SH_ERR_INVALID);
    assert_true(u == 7 && f == 7 && b && n == 7 && strcmp(text, "untouched") == 0);
    sh_gguf_close(&g);
    sh_buf_release(&file);
}

static void test_key_text(void **state)
{
    (void)state;
    static const char *const expected[][3] = {
        {"general.architecture", "string", "llama"},
        {"llama.block_count", "u32", "4"},
        {"llama.rope.freq_base", "f32", "10000"},
        {"tokenizer.ggml.add_bos_token", "bool", "true"},
        {"large", "u64", "18446744073709551615"},
        {"tokenizer.ggml.tokens", "array of string",
         "[\"<unk>\", \"\", \"\xe2\x96\x81the\", \"a\\nb\"]"},
        {"tokenizer.ggml.scores", "array of f32", "[0, -1.5, 2, 0.00100000005]"},
        {"tokenizer.ggml.token_type", "array of i32", "[2, 3, -1, 1]"},
        {"empty", "array of i32", "[]"},
    };
    sh_buf file = small_file(), text[3];
    sh_gguf *g = NULL;
    assert_int_equal(sh_gguf_open_memory(file.data, file.len, FILE_NAME, &g, NULL), SH_OK);
    assert_int_equal(sh_gguf_n_keys(g), SH_COUNT(expected));
    for (size_t i = 0; i < SH_COUNT(expected); i++) {
        for (size_t k = 0; k < 3; k++)
            sh_buf_init(&text[k], 4096);
        assert_int_equal(sh_gguf_key_text(g, i, &text[0], &text[1], &text[2]), SH_OK);
        for (size_t k = 0; k < 3; k++) {
            assert_int_equal(text[k].len, strlen(expected[i][k]));
            assert_memory_equal(text[k].data, expected[i][k], text[k].len);
            sh_buf_release(&text[k]);
        }
    }
    sh_gguf_close(&g);
    sh_buf_release(&file);
}

/* Every shorter file is refused as truncated. */
static void test_truncated(void **state)
{
    (void)state;
    sh_buf file = small_file();
    for (size_t n = 0; n < file.len; n++)
        expect_refused(file.data, n, SH_ERR_INVALID, "truncated");
    sh_buf_release(&file);
}

/* Overwrites bytes of a copy of the small file and expects its refusal. */
static void expect_broken(const sh_buf *file, size_t at, const void *bytes, size_t n,
                          sh_status wanted, const char *part)
{
    uint8_t *copy = malloc(file->len);
    assert_non_null(copy);
    assert_true(at + n <= file->len);
    memcpy(copy, file->data, file->len);
    memcpy(copy + at, bytes, n);
    expect_refused(copy, file->len, wanted, part);
    free(copy);
}

static size_t place_of(const sh_buf *file, const char *text)
{
    const uint8_t *found = memmem(file->data, file->len, text, strlen(text));
    assert_non_null(found);
    return (size_t)(found - file->data);
}

static void break_u32(const sh_buf *file, size_t at, uint32_t v, sh_status wanted, const char *part)
{
    expect_broken(file, at, &v, sizeof v, wanted, part);
}

static void break_u64(const sh_buf *file, size_t at, uint64_t v, sh_status wanted, const char *part)
{
    expect_broken(file, at, &v, sizeof v, wanted, part);
}

static void test_broken_header(void **state)
{
    (void)state;
    sh_buf file = small_file();
    expect_broken(&file, 0, "ABCD", 4, SH_ERR_INVALID, "not a GGUF file");
    expect_broken(&file, 0, "FUGG", 4, SH_ERR_INVALID, "big-endian");
    expect_broken(&file, 0, "tjgg", 4, SH_ERR_INVALID, "old llama.cpp file");
    break_u32(&file, 4, 0x03000000, SH_ERR_UNSUPPORTED, "big-endian");
    break_u32(&file, 4, 1, SH_ERR_UNSUPPORTED, "version 1");
    break_u32(&file, 4, 4, SH_ERR_UNSUPPORTED, "version 4");
    break_u64(&file, 8, UINT64_MAX, SH_ERR_INVALID, "tensors");
    break_u64(&file, 8, 65537, SH_ERR_INVALID, "tensors");
    break_u64(&file, 16, UINT64_MAX, SH_ERR_INVALID, "keys");
    break_u64(&file, 16, (uint64_t)1 << 40, SH_ERR_INVALID, "keys");
    sh_buf_release(&file);
}

static void test_broken_keys(void **state)
{
    (void)state;
    sh_buf file = small_file();
    size_t at = place_of(&file, "llama.block_count");
    break_u64(&file, at - 8, UINT64_MAX, SH_ERR_INVALID, "string of");
    break_u64(&file, at - 8, 0, SH_ERR_INVALID, "empty");
    expect_broken(&file, at, "\0", 1, SH_ERR_INVALID, "0 byte");
    break_u32(&file, at + 17, 13, SH_ERR_INVALID, "unknown value type 13");
    at = place_of(&file, "tokenizer.ggml.add_bos_token") + 28;
    expect_broken(&file, at + 4, "\2", 1, SH_ERR_INVALID, "bool that is 2");
    at = place_of(&file, "tokenizer.ggml.tokens") + 21;
    break_u32(&file, at + 4, 9, SH_ERR_UNSUPPORTED, "array of arrays");
    break_u32(&file, at + 4, 99, SH_ERR_INVALID, "unknown value type 99");
    break_u64(&file, at + 8, UINT64_MAX, SH_ERR_INVALID, "elements");
    break_u64(&file, at + 8, SH_GGUF_ARRAY_MAX, SH_ERR_INVALID, "tokenizer.ggml.tokens");
    break_u64(&file, at + 16, (uint64_t)1 << 63, SH_ERR_INVALID, "string of");
    at = place_of(&file, "tokenizer.ggml.scores");
    expect_broken(&file, at, "tokenizer.ggml.tokens", 21, SH_ERR_INVALID,
                  "the key 'tokenizer.ggml.tokens' is there twice");
    sh_buf_release(&file);
}

static void test_broken_tensors(void **state)
{
    (void)state;
    sh_buf file = small_file();
    size_t name = place_of(&file, "blk.0.attn_q.weight"), at = name + 19;
    size_t cube = place_of(&file, "cube") + 4;
    break_u64(&file, name - 8, 65, SH_ERR_INVALID, "string of 65 bytes");
    break_u32(&file, at, 0, SH_ERR_INVALID, "0 dimensions");
    break_u32(&file, at, 5, SH_ERR_INVALID, "5 dimensions");
    break_u64(&file, at + 4, 0, SH_ERR_INVALID, "dimension of 0");
    break_u64(&file, at + 4, UINT64_MAX, SH_ERR_INVALID, "larger than any file");
    break_u64(&file, at + 12, (uint64_t)1 << 62, SH_ERR_INVALID, "larger than any file");
    break_u64(&file, at + 12, 1000, SH_ERR_INVALID, "truncated: tensor 'blk.0.attn_q.weight'");
    break_u32(&file, at + 20, 10, SH_ERR_UNSUPPORTED, "'blk.0.attn_q.weight' has type 10 (Q2_K)");
    break_u32(&file, at + 20, 4242, SH_ERR_UNSUPPORTED, "type 4242 (unknown)");
    break_u32(&file, at + 20, SH_TYPE_Q4_K, SH_ERR_INVALID, "block of 256");
    break_u64(&file, at + 24, 16, SH_ERR_INVALID, "no multiple of the alignment");
    break_u64(&file, at + 24, (uint64_t)1 << 63, SH_ERR_INVALID, "truncated");
    break_u64(&file, cube + 4 + 24 + 4, 0, SH_ERR_INVALID, "overlap");
    sh_buf_release(&file);
}

/* A tensor twice: written with one name, then renamed to the other's. */
static void test_duplicate_tensor(void **state)
{
    (void)state;
    sh_gguf_writer *w = NULL;
    sh_buf file;
    const uint64_t ne[] = {8};
    const float values[8] = {0};
    sh_error err = {0};
    sh_buf_init(&file, BYTES_MAX);
    assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_add_tensor(w, "one", SH_TYPE_F32, ne, 1, values, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_add_tensor(w, "two", SH_TYPE_F32, ne, 1, values, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_add_tensor(w, "two", SH_TYPE_F32, ne, 1, values, &err),
                     SH_ERR_EXISTS);
    assert_int_equal(sh_gguf_writer_encode(w, &file, NULL), SH_OK);
    expect_broken(&file, place_of(&file, "two"), "one", 3, SH_ERR_INVALID,
                  "the tensor 'one' is there twice");
    sh_gguf_writer_destroy(&w);
    sh_buf_release(&file);
}

static void test_writer_errors(void **state)
{
    (void)state;
    sh_gguf_writer *w = NULL;
    char name[65];
    const uint64_t ne[] = {8}, odd[] = {31, 2}, huge[] = {32, UINT64_MAX / 8};
    const float values[8] = {0};
    memset(name, 'x', 64);
    name[64] = '\0';
    assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
    assert_int_equal(sh_gguf_writer_add_tensor(w, name, SH_TYPE_F32, ne, 1, values, NULL),
                     SH_ERR_LIMIT);
    assert_int_equal(sh_gguf_writer_add_tensor(w, "", SH_TYPE_F32, ne, 1, values, NULL),
                     SH_ERR_LIMIT);
    assert_int_equal(sh_gguf_writer_add_tensor(w, "x", SH_TYPE_Q8_0, odd, 2, values, NULL),
                     SH_ERR_INVALID);
    assert_int_equal(sh_gguf_writer_add_tensor(w, "x", SH_TYPE_F32, huge, 2, values, NULL),
                     SH_ERR_INVALID);
    sh_gguf_writer_destroy(&w);
    sh_gguf_writer_destroy(&w);
}

/* Version 2 has the same bytes but for the number. */
static void test_version_2(void **state)
{
    (void)state;
    sh_buf file = small_file();
    sh_gguf *g = NULL;
    const uint32_t version = 2;
    memcpy(file.data + 4, &version, sizeof version);
    assert_int_equal(sh_gguf_open_memory(file.data, file.len, FILE_NAME, &g, NULL), SH_OK);
    assert_int_equal(sh_gguf_version(g), 2);
    check_tensors(g);
    sh_gguf_close(&g);
    sh_buf_release(&file);
}

/* Bytes at an odd address are copied, and floats are still read in place. */
static void test_unaligned_memory(void **state)
{
    (void)state;
    sh_buf file = small_file();
    uint8_t *shifted = malloc(file.len + 1);
    sh_gguf *g = NULL;
    assert_non_null(shifted);
    memcpy(shifted + 1, file.data, file.len);
    assert_int_equal(sh_gguf_open_memory(shifted + 1, file.len, FILE_NAME, &g, NULL), SH_OK);
    check_keys(g);
    check_tensors(g);
    sh_gguf_close(&g);
    free(shifted);
    sh_buf_release(&file);
}

static void test_alignment_key(void **state)
{
    (void)state;
    static const uint32_t bad[] = {0, 4, 24, 1u << 20};
    const uint64_t ne[] = {8};
    const float values[8] = {1};
    for (size_t i = 0; i < SH_COUNT(bad) + 1; i++) {
        sh_gguf_writer *w = NULL;
        sh_gguf *g = NULL;
        sh_buf file;
        sh_buf_init(&file, BYTES_MAX);
        assert_int_equal(sh_gguf_writer_create(&w, NULL), SH_OK);
        assert_int_equal(
            sh_gguf_writer_set_u32(w, "general.alignment", i < SH_COUNT(bad) ? bad[i] : 32), SH_OK);
        assert_int_equal(sh_gguf_writer_add_tensor(w, "x", SH_TYPE_F32, ne, 1, values, NULL),
                         SH_OK);
        assert_int_equal(sh_gguf_writer_encode(w, &file, NULL), SH_OK);
        if (i < SH_COUNT(bad)) {
            expect_refused(file.data, file.len, SH_ERR_INVALID, "general.alignment");
        } else {
            assert_int_equal(sh_gguf_open_memory(file.data, file.len, FILE_NAME, &g, NULL), SH_OK);
            sh_gguf_close(&g);
        }
        sh_gguf_writer_destroy(&w);
        sh_buf_release(&file);
    }
}

/* Random damage: opened or refused, never a crash; what opens can be read to its end. */
static void test_random_damage(void **state)
{
    (void)state;
    sh_buf file = small_file(), text;
    sh_rng rng;
    size_t refused = 0;
    sh_rng_init(&rng, SEED, 0, 1);
    sh_buf_init(&text, BYTES_MAX);
    for (int round = 0; round < 20000; round++) {
        uint8_t *damaged = malloc(file.len);
        sh_gguf *g = NULL;
        assert_non_null(damaged);
        memcpy(damaged, file.data, file.len);
        for (uint64_t i = 0; i <= sh_rng_below(&rng, 4); i++)
            damaged[sh_rng_below(&rng, round % 2 == 0 ? file.len : 500)] =
                (uint8_t)sh_rng_u32(&rng);
        if (sh_gguf_open_memory(damaged, file.len, FILE_NAME, &g, NULL) == SH_OK) {
            for (size_t i = 0; i < sh_gguf_n_keys(g); i++) {
                sh_buf_clear(&text);
                assert_int_equal(sh_gguf_key_text(g, i, &text, &text, &text), SH_OK);
            }
            for (size_t i = 0; i < sh_gguf_n_tensors(g); i++) {
                const sh_gguf_tensor *t = sh_gguf_tensor_at(g, i);
                const uint8_t *end = (const uint8_t *)t->data + t->bytes;
                assert_true((const uint8_t *)t->data >= damaged && end <= damaged + file.len);
            }
            sh_gguf_close(&g);
        } else {
            refused++;
        }
        free(damaged);
    }
    assert_true(refused > 1000 && refused < 20000);
    sh_buf_release(&text);
    sh_buf_release(&file);
}

/* Fails each allocation of writing and of reading in turn. */
static void test_no_memory(void **state)
{
    (void)state;
    sh_buf file = small_file();
    bool done = false;
    for (size_t n = 1; !done; n++) {
        sh_buf out;
        sh_buf_init(&out, BYTES_MAX);
        sh_alloc_fail_after(n);
        sh_status status = gguf_small(&out, NULL);
        sh_alloc_fail_after(0);
        done = status == SH_OK;
        assert_true(done || status == SH_ERR_NO_MEMORY);
        assert_int_equal(out.len, done ? file.len : 0);
        sh_buf_release(&out);
        assert_true(n < 1000);
    }
    done = false;
    for (size_t n = 1; !done; n++) {
        sh_gguf *g = NULL;
        sh_alloc_fail_after(n);
        sh_status status = sh_gguf_open_memory(file.data, file.len, FILE_NAME, &g, NULL);
        sh_alloc_fail_after(0);
        done = status == SH_OK;
        assert_true(done || (status == SH_ERR_NO_MEMORY && g == NULL));
        sh_gguf_close(&g);
        assert_true(n < 1000);
    }
    sh_buf_release(&file);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_copy_is_equal),
        cmocka_unit_test(test_file),
        cmocka_unit_test(test_getter_errors),
        cmocka_unit_test(test_key_text),
        cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_broken_header),
        cmocka_unit_test(test_broken_keys),
        cmocka_unit_test(test_broken_tensors),
        cmocka_unit_test(test_duplicate_tensor),
        cmocka_unit_test(test_writer_errors),
        cmocka_unit_test(test_version_2),
        cmocka_unit_test(test_unaligned_memory),
        cmocka_unit_test(test_alignment_key),
        cmocka_unit_test(test_random_damage),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
