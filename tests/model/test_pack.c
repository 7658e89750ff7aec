/* sh_model_pack: the same rows, from memory and from a cache, and every way a cache can be wrong.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <sys/stat.h>

#include "shared/base/file.h"
#include "shared/model/synth.h"
#include "tests/model/util.h"

#define PATH_BYTES 128

/* A folder with a model in it. */
typedef struct {
    char dir[64], model[PATH_BYTES], cache[PATH_BYTES];
} place;

static void place_make(place *p, const char *shape, sh_type type, uint64_t seed)
{
    sh_synth_options o = {.type = type, .seed = seed, .sigma = 0.1f};
    snprintf(p->dir, sizeof p->dir, "/tmp/shoal-pack-XXXXXX");
    assert_non_null(mkdtemp(p->dir));
    snprintf(p->model, sizeof p->model, "%s/model.gguf", p->dir);
    snprintf(p->cache, sizeof p->cache, "%s/model.gguf.packed", p->dir);
    CHECK_OK(sh_synth_find(shape, &o.shape, err));
    CHECK_OK(sh_synth_model(&o, p->model, err));
}

static void place_remove(place *p)
{
    unlink(p->model);
    unlink(p->cache);
    assert_int_equal(rmdir(p->dir), 0); /* nothing temporary is left */
}

static sh_model *open_packed(const place *p, const char *cache, sh_team *team, bool expected)
{
    sh_model *model = NULL;
    bool cached = !expected;
    const sh_pack_options o = {.cache = cache, .team = team};
    CHECK_OK(sh_model_open(p->model, &model, err));
    CHECK_OK(sh_model_pack(model, &o, &cached, err));
    assert_int_equal(cached, expected);
    return model;
}

static void expect_rows(const sh_matrix *plain, const sh_matrix *packed)
{
    float *a = calloc(plain->in, sizeof *a), *b = calloc(plain->in, sizeof *b);
    assert_non_null(a);
    assert_non_null(b);
    assert_non_null(packed->packed);
    for (uint32_t row = 0; row < plain->out; row++) {
        sh_matrix_row(plain, row, a);
        sh_matrix_row(packed, row, b);
        assert_memory_equal(a, b, plain->in * sizeof *a);
    }
    free(a);
    free(b);
}

static void expect_same(const place *p, const sh_model *packed)
{
    sh_model *plain = NULL;
    CHECK_OK(sh_model_open(p->model, &plain, err));
    expect_rows(&plain->token_embd, &packed->token_embd);
    expect_rows(&plain->output, &packed->output);
    for (uint32_t i = 0; i < plain->config.n_layers; i++)
        for (int m = 0; m < SH_LAYER_MATRICES; m++)
            expect_rows(&plain->layers[i].m[m], &packed->layers[i].m[m]);
    sh_model_close(&plain);
}

static void test_in_memory(void **state)
{
    (void)state;
    static const char *const names[] = {"tiny-llama", "tiny-qwen2", "tiny-qwen3"};
    static const sh_type types[] = {SH_TYPE_Q8_0, SH_TYPE_Q4_0};
    sh_team *team = NULL;
    CHECK_OK(sh_team_create(3, &team, err));
    for (size_t i = 0; i < SH_COUNT(names) * SH_COUNT(types); i++) {
        place p;
        place_make(&p, names[i / 2], types[i % 2], i);
        sh_model *model = open_packed(&p, NULL, i % 2 == 0 ? team : NULL, false);
        expect_same(&p, model);
        assert_int_equal(model->output.packed == model->token_embd.packed,
                         model->config.tied_output);
        sh_model_close(&model);
        place_remove(&p);
    }
    sh_team_destroy(&team);
}

static void test_floats_stay_in_place(void **state)
{
    (void)state;
    place p;
    place_make(&p, "tiny-llama", SH_TYPE_F16, 1);
    sh_model *model = open_packed(&p, p.cache, NULL, false);
    assert_null(model->token_embd.packed);
    assert_false(sh_file_exists(p.cache));
    sh_model_close(&model);
    place_remove(&p);
}

static void test_cache_is_made_and_used(void **state)
{
    (void)state;
    place p;
    struct stat made, after;
    place_make(&p, "tiny-llama", SH_TYPE_Q4_0, 1);
    sh_model *model = open_packed(&p, p.cache, NULL, true);
    expect_same(&p, model);
    sh_model_close(&model);
    assert_int_equal(stat(p.cache, &made), 0);
    model = open_packed(&p, p.cache, NULL, true);
    expect_same(&p, model);
    sh_model_close(&model);
    assert_int_equal(stat(p.cache, &after), 0);
    assert_int_equal(made.st_ino, after.st_ino); /* it was not made again */
    place_remove(&p);
}

static ino_t inode_of(const char *path)
{
    struct stat info;
    assert_int_equal(stat(path, &info), 0);
    return info.st_ino;
}

static void change_byte(const char *path, off_t at)
{
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseeko(f, at, SEEK_SET), 0);
    const int byte = fgetc(f);
    assert_true(byte != EOF);
    assert_int_equal(fseeko(f, at, SEEK_SET), 0);
    assert_true(fputc(byte ^ 1, f) != EOF);
    assert_int_equal(fclose(f), 0);
}

/* Whatever is wrong with the cache, it is made anew and the weights are right. */
static void test_wrong_caches_are_made_anew(void **state)
{
    (void)state;
    enum { SHORT, EMPTY, LONG, VERSION, BYTE_ORDER_, TABLE, CHANGED_MODEL, CASES };
    for (int kind = 0; kind < CASES; kind++) {
        place p;
        struct stat info;
        place_make(&p, "tiny-llama", SH_TYPE_Q8_0, 1);
        sh_model *model = open_packed(&p, p.cache, NULL, true);
        sh_model_close(&model);
        assert_int_equal(stat(p.cache, &info), 0);
        if (kind == SHORT)
            assert_int_equal(truncate(p.cache, info.st_size - 1), 0);
        else if (kind == EMPTY)
            assert_int_equal(truncate(p.cache, 0), 0);
        else if (kind == LONG)
            assert_int_equal(truncate(p.cache, info.st_size + 1), 0);
        else if (kind == VERSION)
            change_byte(p.cache, 8);
        else if (kind == BYTE_ORDER_)
            change_byte(p.cache, 12);
        else if (kind == TABLE)
            change_byte(p.cache, 110);
        else { /* the same size and keys, other weights */
            place other;
            place_make(&other, "tiny-llama", SH_TYPE_Q8_0, 2);
            assert_int_equal(rename(other.model, p.model), 0);
            assert_int_equal(rmdir(other.dir), 0);
        }
        const ino_t before = inode_of(p.cache);
        model = open_packed(&p, p.cache, NULL, true);
        if (inode_of(p.cache) == before)
            fail_msg("case %d: the wrong cache was used", kind);
        expect_same(&p, model);
        sh_model_close(&model);
        place_remove(&p);
    }
}

static void test_cache_that_cannot_be_written(void **state)
{
    (void)state;
    place p;
    char nowhere[PATH_BYTES + 32];
    place_make(&p, "tiny-llama", SH_TYPE_Q8_0, 1);
    snprintf(nowhere, sizeof nowhere, "%s/no-such-folder/cache", p.dir);
    sh_model *model = open_packed(&p, nowhere, NULL, false);
    expect_same(&p, model);
    sh_model_close(&model);
    place_remove(&p);
}

static void test_other_files_are_not_overwritten(void **state)
{
    (void)state;
    place p;
    sh_model *model = NULL;
    sh_error e = {0};
    place_make(&p, "tiny-llama", SH_TYPE_Q8_0, 1);
    CHECK_OK(sh_model_open(p.model, &model, err));
    const sh_hash before = sh_model_hash(model);
    const sh_pack_options o = {.cache = p.model};
    assert_int_equal(sh_model_pack(model, &o, NULL, &e), SH_ERR_EXISTS);
    assert_non_null(strstr(e.text, p.model));
    assert_null(model->pack);
    assert_null(model->token_embd.packed);
    sh_model_close(&model);
    CHECK_OK(sh_model_open(p.model, &model, err));
    const sh_hash after = sh_model_hash(model);
    assert_true(sh_hash_equal(&before, &after));
    sh_model_close(&model);
    place_remove(&p);
}

/* A file that was replaced after it was opened must not give its name to a cache. */
static void test_replaced_model_is_not_cached(void **state)
{
    (void)state;
    place p, other;
    sh_model *model = NULL;
    bool cached = true;
    place_make(&p, "tiny-llama", SH_TYPE_Q8_0, 1);
    place_make(&other, "tiny-llama", SH_TYPE_Q8_0, 2);
    CHECK_OK(sh_model_open(p.model, &model, err));
    assert_int_equal(rename(other.model, p.model), 0);
    const sh_pack_options o = {.cache = p.cache};
    CHECK_OK(sh_model_pack(model, &o, &cached, err));
    assert_false(cached);
    assert_false(sh_file_exists(p.cache));
    sh_model_close(&model);
    place_remove(&p);
    assert_int_equal(rmdir(other.dir), 0);
}

static void test_a_scale_that_is_no_number_is_named(void **state)
{
    (void)state;
    static const uint16_t bad[] = {0x7e00, 0xfc00};
    for (size_t i = 0; i < SH_COUNT(bad); i++) {
        place p;
        sh_model *model = NULL;
        sh_error e = {0};
        place_make(&p, "tiny-llama", SH_TYPE_Q8_0, 1);
        CHECK_OK(sh_model_open(p.model, &model, err));
        size_t n;
        const sh_matrix *m = &model->layers[1].m[SH_FFN_UP];
        const uint8_t *row = (const uint8_t *)m->data + 7 * sh_type_row_bytes(m->type, m->in);
        const off_t at = row - sh_gguf_bytes(model->gguf, &n);
        sh_model_close(&model);
        FILE *f = fopen(p.model, "r+b");
        assert_non_null(f);
        assert_int_equal(fseeko(f, at, SEEK_SET), 0);
        assert_int_equal(fwrite(&bad[i], 2, 1, f), 1);
        assert_int_equal(fclose(f), 0);
        CHECK_OK(sh_model_open(p.model, &model, err));
        const sh_pack_options o = {.cache = i == 0 ? NULL : p.cache};
        assert_int_equal(sh_model_pack(model, &o, NULL, &e), SH_ERR_INVALID);
        if (strstr(e.text, "blk.1.ffn_up.weight: row 7") == NULL || strstr(e.text, p.model) == NULL)
            fail_msg("unclear: \"%s\"", e.text);
        assert_false(sh_file_exists(p.cache));
        sh_model_close(&model);
        place_remove(&p);
    }
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    place p;
    place_make(&p, "tiny-llama", SH_TYPE_Q8_0, 1);
    for (size_t n = 1;; n++) {
        sh_model *model = NULL;
        sh_error e = {0};
        const sh_pack_options o = {.cache = p.cache};
        CHECK_OK(sh_model_open(p.model, &model, err));
        sh_alloc_fail_after(n);
        const sh_status status = sh_model_pack(model, &o, NULL, &e);
        sh_alloc_fail_after(0);
        assert_true(status == SH_OK || status == SH_ERR_NO_MEMORY);
        assert_int_equal(model->pack != NULL, status == SH_OK);
        sh_model_close(&model);
        if (status == SH_OK) {
            assert_true(n > 3);
            break;
        }
    }
    place_remove(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_in_memory),
        cmocka_unit_test(test_floats_stay_in_place),
        cmocka_unit_test(test_cache_is_made_and_used),
        cmocka_unit_test(test_wrong_caches_are_made_anew),
        cmocka_unit_test(test_cache_that_cannot_be_written),
        cmocka_unit_test(test_other_files_are_not_overwritten),
        cmocka_unit_test(test_replaced_model_is_not_cached),
        cmocka_unit_test(test_a_scale_that_is_no_number_is_named),
        cmocka_unit_test(test_every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
