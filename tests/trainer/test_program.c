/*
 * shoal-train from the outside: a model trained from nothing, an adapter on it, their losses; what
 * it prints and how it exits. The path of the program is argument 1.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/model/model.h"
#include "shared/model/synth.h"
#include "tests/model/tiny.h"
#include "tests/trainer/program_run.h"
#include "trainer/snapshot.h"

static void test_full(void **state)
{
    (void)state;
    json_t *j = run_json(FULL "--steps 40 --type F32 --out model.gguf --json");
    assert_true(number_of(j, "loss_last") < number_of(j, "loss_first") - 0.5);
    assert_true(number_of(j, "tokens_per_s") > 0);
    must_be_near(number_of(j, "tokens_seen"), 40 * 4 * 16, 0);
    assert_true(json_is_string(json_object_get(j, "blas_core")));

    /* The file holds what was trained, for the trainer and for the model library. */
    json_t *e = run_json("eval --model model.gguf --data text --context 16 --json");
    must_be_near(number_of(e, "mean_nll"), number_of(j, "heldout_loss"), 1e-9);
    sh_model *model = NULL;
    must_be_ok(sh_model_open(path_of("model.gguf"), &model, &err));
    assert_int_equal(model->config.width, 32);
    assert_int_equal(model->config.n_kv_heads, 2);
    assert_int_equal(model->config.context, 64);
    assert_int_equal(model->config.vocab, tiny_vocab());
    assert_true(model->config.tied_output);

    /* Saving again gives the same bytes; half precision nearly the same loss. */
    sh_full *full = NULL;
    uint8_t *bytes[2] = {0};
    size_t n[2];
    must_be_ok(sh_full_from_model(model, &full, &err));
    must_be_ok(sh_full_save(full, SH_TYPE_F32, path_of("again.gguf"), &err));
    must_be_ok(sh_full_save(full, SH_TYPE_F16, path_of("f16.gguf"), &err));
    must_be_ok(sh_file_read(path_of("model.gguf"), SIZE_MAX, &bytes[0], &n[0], &err));
    must_be_ok(sh_file_read(path_of("again.gguf"), SIZE_MAX, &bytes[1], &n[1], &err));
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(bytes[0], bytes[1], n[0]);
    must_fail(sh_full_save(full, SH_TYPE_Q6_K, path_of("again.gguf"), &err), SH_ERR_UNSUPPORTED);
    json_t *h = run_json("eval --model f16.gguf --data text --context 16 --json");
    must_be_near(number_of(h, "mean_nll"), number_of(e, "mean_nll"), 1e-3);

    free(bytes[0]);
    free(bytes[1]);
    sh_full_destroy(&full);
    sh_model_close(&model);
    json_decref(j);
    json_decref(e);
    json_decref(h);
}

/* Biases, norms of heads, scaled RoPE: an adapter that the engine loads. */
static void test_other_architectures(void **state)
{
    (void)state;
    sh_synth_options o = {.type = SH_TYPE_Q8_0, .rope = SH_ROPE_LINEAR, .rope_factor = 2};
    static const char *const shapes[] = {"tiny-qwen2", "tiny-qwen3", "tiny-llama"};
    for (size_t i = 0; i < SH_COUNT(shapes); i++) {
        sh_model *model = NULL;
        sh_adapter *adapter = NULL;
        must_be_ok(sh_synth_find(shapes[i], &o.shape, &err));
        must_be_ok(sh_synth_model(&o, path_of("other.gguf"), &err));
        json_t *j = run_json("lora --base other.gguf --data text --context 16 --steps 8 --lr 0.02 "
                             "--warmup 0 --heldout text --out other-a.gguf --json");
        must_be_ok(sh_model_open(path_of("other.gguf"), &model, &err));
        must_be_ok(sh_adapter_open(path_of("other-a.gguf"), &model->config, &adapter, &err));
        json_t *e = run_json("eval --model other.gguf --data text --context 16 --json");
        assert_true(number_of(j, "heldout_loss") < number_of(e, "mean_nll"));
        json_decref(j);
        json_decref(e);
        sh_adapter_destroy(&adapter);
        sh_model_close(&model);
    }
}

/* Trained whole and saved, a model of any architecture is what it was in the trainer. */
static void test_full_of_architectures(void **state)
{
    (void)state;
    static const struct {
        const char *shape;
        sh_rope_scaling rope;
        bool factors;
    } cases[] = {{"tiny-qwen2", SH_ROPE_YARN, false},
                 {"tiny-qwen3", SH_ROPE_LINEAR, false},
                 {"tiny-llama", SH_ROPE_PLAIN, true}};
    int32_t tokens[4 * 17];
    for (size_t i = 0; i < SH_COUNT(tokens); i++)
        tokens[i] = (int32_t)(i * i % 97);
    const sh_train_data data = {.tokens = tokens, .n = 4, .length = 17};
    const sh_train_options o = {.lr = 0.01f, .batch = 4, .steps = 3, .lr_final = 1};
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_synth_options synth = {.type = SH_TYPE_Q8_0,
                                  .rope = cases[i].rope,
                                  .rope_factor = 2,
                                  .rope_freqs = cases[i].factors};
        sh_model *model = NULL, *saved = NULL;
        sh_full *full = NULL;
        sh_train_result result;
        double before = 0, trained = 0, loaded = 0;
        must_be_ok(sh_synth_find(cases[i].shape, &synth.shape, &err));
        must_be_ok(sh_synth_model(&synth, path_of("whole.gguf"), &err));
        must_be_ok(sh_model_open(path_of("whole.gguf"), &model, &err));
        must_be_ok(sh_full_from_model(model, &full, &err));
        must_be_ok(sh_full_evaluate(full, &data, NULL, &before, &err));
        must_be_ok(sh_full_train(full, &data, &o, &result, &err));
        must_be_ok(sh_full_evaluate(full, &data, NULL, &trained, &err));
        assert_true(trained < before);
        must_be_ok(sh_full_save(full, SH_TYPE_F32, path_of("saved.gguf"), &err));
        must_be_ok(sh_model_open(path_of("saved.gguf"), &saved, &err));
        assert_int_equal(saved->config.arch, model->config.arch);
        must_be_ok(sh_train_evaluate(saved, NULL, &data, NULL, &loaded, &err));
        must_be_near(loaded, trained, 0);
        sh_full_destroy(&full);
        sh_model_close(&model);
        sh_model_close(&saved);
    }
}

static void test_full_is_deterministic(void **state)
{
    (void)state;
    json_t *a = run_json(FULL "--steps 3 --out again.gguf --json --threads 1");
    json_t *b = run_json(FULL "--steps 3 --out again.gguf --json --threads 2");
    json_t *c = run_json(FULL "--steps 3 --out again.gguf --json --seed 2");
    must_be_near(number_of(a, "heldout_loss"), number_of(b, "heldout_loss"), 0);
    assert_true(number_of(a, "heldout_loss") != number_of(c, "heldout_loss"));
    json_decref(a);
    json_decref(b);
    json_decref(c);
}

/* New models of each architecture; of the vocabulary's file they take the tokenizer alone. */
static void test_new_architectures(void **state)
{
    (void)state;
    static const struct {
        const char *options;
        sh_arch arch;
        uint32_t head_size;
        bool tied;
    } cases[] = {{"--arch llama --head-size 16", SH_ARCH_LLAMA, 16, true},
                 {"--arch qwen2 --untied", SH_ARCH_QWEN2, 8, false},
                 {"--arch qwen3 --head-size 16 --untied", SH_ARCH_QWEN3, 16, false}};
    sh_synth_options o = {.type = SH_TYPE_Q8_0, .rope = SH_ROPE_LINEAR, .rope_factor = 2};
    must_be_ok(sh_synth_find("tiny-qwen3", &o.shape, &err));
    must_be_ok(sh_synth_model(&o, path_of("scaled.gguf"), &err));
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        char command[512];
        sh_model *model = NULL;
        snprintf(command, sizeof command,
                 FULL "--vocab scaled.gguf --steps 12 --type F32 --out new.gguf --json %s",
                 cases[i].options);
        json_t *j = run_json(command);
        assert_true(number_of(j, "heldout_loss") < number_of(j, "loss_first"));
        must_be_ok(sh_model_open(path_of("new.gguf"), &model, &err));
        assert_int_equal(model->config.arch, cases[i].arch);
        assert_int_equal(model->config.head_size, cases[i].head_size);
        assert_int_equal(model->config.tied_output, cases[i].tied);
        assert_int_equal(model->config.rope_scaling, SH_ROPE_PLAIN);
        assert_true((model->layers[0].q_norm != NULL) == (cases[i].arch == SH_ARCH_QWEN3));
        assert_true((model->layers[0].bias[0] != NULL) == (cases[i].arch == SH_ARCH_QWEN2));
        json_t *e = run_json("eval --model new.gguf --data text --context 16 --json");
        must_be_near(number_of(e, "mean_nll"), number_of(j, "heldout_loss"), 1e-9);
        sh_model_close(&model);
        json_decref(j);
        json_decref(e);
    }
    expect_error(FULL "--steps 1 --arch qwen2 --head-size 16 --out x.gguf", 2, "qwen2");
    expect_error(FULL "--steps 1 --arch gpt2 --out x.gguf", 2, "llama, qwen2, qwen3");
}

static void test_lora(void **state)
{
    (void)state;
    json_t *base = run_json("eval --model model.gguf --data text --context 16 --json");
    json_t *j = run_json("lora --base model.gguf --data text --heldout text --rank 4 --alpha 8 "
                         "--batch 4 --context 16 --steps 30 --out adapter.gguf --json");
    json_t *e = run_json("eval --model model.gguf --lora adapter.gguf --data text --context 16 "
                         "--json");
    assert_true(number_of(j, "heldout_loss") < number_of(base, "mean_nll") - 0.01);
    must_be_near(number_of(e, "mean_nll"), number_of(j, "heldout_loss"), 1e-5);
    json_decref(base);
    json_decref(j);
    json_decref(e);
}

/* What is adapted, how it is scaled, where it begins and what of it is trained. */
static void test_lora_options(void **state)
{
    (void)state;
#define LORA "lora --base model.gguf --data text --rank 4 --alpha 8 --batch 4 --context 16 --json "
    sh_model *model = NULL;
    sh_adapter *first = NULL, *second = NULL;
    json_decref(run_json(LORA "--steps 4 --targets q,down --rslora --schedule cosine "
                              "--optimizer sgd --lr 0.5 --out first.gguf --peft peft"));
    json_decref(run_json(LORA "--steps 4 --start peft --freeze a --schedule constant --proximal 2 "
                              "--bf16 --memory-max 2G --out second.gguf"));
    must_be_ok(sh_model_open(path_of("model.gguf"), &model, &err));
    must_be_ok(sh_adapter_open(path_of("first.gguf"), &model->config, &first, &err));
    must_be_ok(sh_adapter_open(path_of("second.gguf"), &model->config, &second, &err));
    must_be_near((double)first->alpha / first->rank, 2, 1e-6); /* rsLoRA's factor is in B */
    for (size_t i = 0; i < (size_t)first->n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *a = &first->pairs[i], *b = &second->pairs[i];
        const size_t m = i % SH_LAYER_MATRICES;
        assert_int_equal(a->a != NULL, m == SH_ATTN_Q || m == SH_FFN_DOWN);
        assert_int_equal(b->a != NULL, a->a != NULL);
        if (!a->a)
            continue;
        assert_memory_equal(a->a, b->a, (size_t)a->rank * a->in * sizeof(float));
        assert_memory_not_equal(a->b, b->b, (size_t)a->rank * a->out * sizeof(float));
    }
    sh_adapter_destroy(&first);
    sh_adapter_destroy(&second);
    sh_model_close(&model);
    static const char *const wrong[][2] = {
        {LORA "--out x.gguf --targets q,x", "none of q, k, v, o, gate, up, down"},
        {LORA "--out x.gguf --targets ''", "no matrix is adapted"},
        {LORA "--out x.gguf --schedule warm", "linear, cosine, constant"},
        {LORA "--out x.gguf --freeze c", "none, a, b"},
        {LORA "--out x.gguf --memory-max 1M", "--memory-max"},
        {LORA "--out x.gguf --memory-max 1X", "whole number"},
    };
    for (size_t i = 0; i < SH_COUNT(wrong); i++)
        expect_error(wrong[i][0], 2, wrong[i][1]);
#undef LORA
}

/* What is read is never written, by no name of it, nor what is read-only. */
static void test_inputs_stay(void **state)
{
    (void)state;
#define LORA "lora --base model.gguf --data text --rank 4 --batch 4 --context 16 --steps 1 "
    static const char *const wrong[][2] = {
        {LORA "--out model.gguf", "which is read"},
        {LORA "--out ./model.gguf", "which is read"},
        {LORA "--out alias.gguf", "which is read"},
        {LORA "--out x.gguf --merged model.gguf", "which is read"},
        {LORA "--out x.gguf --metrics text", "which is read"},
        {LORA "--out kept.gguf", "read-only"},
        {FULL "--steps 1 --out vocab.gguf", "which is read"},
    };
    static const char *const inputs[] = {"model.gguf", "text", "vocab.gguf", "kept.gguf"};
    sh_hash before[SH_COUNT(inputs)];
    must_be_ok(sh_file_write_atomic(path_of("kept.gguf"), "kept", 4, &err));
    assert_int_equal(chmod(path_of("kept.gguf"), 0444), 0);
    assert_int_equal(symlink("model.gguf", path_of("alias.gguf")), 0);
    for (size_t round = 0; round < 2; round++) {
        for (size_t i = 0; i < SH_COUNT(inputs); i++) {
            uint8_t *bytes = NULL;
            size_t n = 0;
            must_be_ok(sh_file_read(path_of(inputs[i]), SIZE_MAX, &bytes, &n, &err));
            const sh_hash hash = sh_sha256(bytes, n);
            free(bytes);
            if (round == 0)
                before[i] = hash;
            else
                assert_memory_equal(&hash, &before[i], sizeof hash);
        }
        for (size_t i = 0; round == 0 && i < SH_COUNT(wrong); i++)
            expect_error(wrong[i][0], 2, wrong[i][1]);
    }
    assert_false(sh_file_exists(path_of("x.gguf")));
    unlink(path_of("kept.gguf"));
    unlink(path_of("alias.gguf"));
#undef LORA
}

/* ---- a vocabulary ---- */

/* From files and a folder's *.txt, then a model with it. */
static void test_tokenizer(void **state)
{
    (void)state;
    static const char words[] = "the sea the sea and the ships of the sea\n";
    must_be_ok(sh_dir_make(path_of("texts/c.txt"), &err)); /* a folder: not taken */
    must_be_ok(sh_file_write_atomic(path_of("texts/a.txt"), words, sizeof words - 1, &err));
    must_be_ok(sh_file_write_atomic(path_of("texts/b.txt"), words, 8, &err));
    must_be_ok(sh_file_write_atomic(path_of("texts/b.md"), "QQQQ", 4, &err));
#define TOKENIZER "tokenizer --data texts,text --out made.gguf --json "
    json_t *j = run_json(TOKENIZER "--vocab-size 300 --special '<|im_start|>,<|im_end|>'");
    must_be_near(number_of(j, "vocab"), 300, 0);
    must_be_near(number_of(j, "documents"), 3, 0);
    must_be_near(number_of(j, "bytes_per_token"),
                 number_of(j, "text_bytes") / number_of(j, "text_tokens"), 1e-9);
    json_decref(j);
    sh_gguf *gguf = NULL;
    sh_tokenizer *t = NULL;
    must_be_ok(sh_gguf_open(path_of("made.gguf"), &gguf, &err));
    must_be_ok(sh_tokenizer_load(gguf, &t, &err));
    assert_int_equal(sh_tokenizer_find(t, "<|im_end|>", 10), 2);
    assert_true(sh_tokenizer_find(t,
                                  "\xc4\xa0"
                                  "the",
                                  5) > 0);
    assert_int_equal(sh_tokenizer_find(t, "QQ", 2), -1);
    sh_tokenizer_destroy(&t);
    sh_gguf_close(&gguf);
    json_decref(run_json(TOKENIZER "--kind spm --vocab-size 320 --bos '<b>' --eos '<e>' "
                                   "--add-bos no --add-eos yes --coverage 1 --keep-numbers "
                                   "--no-space-prefix"));
    j = run_json(
        "full --vocab made.gguf --data text --width 32 --layers 1 --heads 2 --kv-heads 1 "
        "--ffn 32 --context-length 32 --context 16 --steps 2 --out made-model.gguf --json");
    json_decref(j);
    sh_model *model = NULL;
    must_be_ok(sh_model_open(path_of("made-model.gguf"), &model, &err));
    assert_int_equal(model->config.vocab, 320);
    assert_false(sh_tokenizer_adds_bos(model->tokenizer));
    assert_true(sh_tokenizer_adds_eos(model->tokenizer));
    assert_int_equal(sh_tokenizer_find(model->tokenizer, "<e>", 3), 2);
    sh_model_close(&model);
    static const char *const wrong[][2] = {
        {"--vocab-size 5000", "at most"},    {"--vocab-size 100", "at least 257"},
        {"--kind bpe2", "bpe, spm"},         {"--kind spm --pre gpt-2", "--pre"},
        {"--no-space-prefix", "--kind spm"}, {"--pre absent", "absent"},
        {"--add-bos maybe", "yes nor no"},   {"--special 'a,,b'", "special token 2"},
        {"--data text,,text", "--data"},     {"--data texts/c.txt", "no file *.txt"},
        {"--data absent.txt", "absent.txt"},
    };
    for (size_t i = 0; i < SH_COUNT(wrong); i++) {
        char arguments[256];
        snprintf(arguments, sizeof arguments, TOKENIZER "%s", wrong[i][0]);
        expect_error(arguments, 2, wrong[i][1]);
    }
    expect_error("tokenizer --out x.gguf", 2, "--data is missing");
#undef TOKENIZER
    static const char *const made[] = {"texts/a.txt", "texts/b.txt", "texts/b.md", "made.gguf",
                                       "made-model.gguf"};
    for (size_t i = 0; i < SH_COUNT(made); i++)
        unlink(path_of(made[i]));
    rmdir(path_of("texts/c.txt"));
    rmdir(path_of("texts"));
}

/* ---- a node's round ---- */

static void make_snapshot(size_t n_sessions)
{
    sh_snapshot s = {0};
    for (size_t i = 0; i < n_sessions; i++) {
        int32_t tokens[40];
        for (size_t k = 0; k < 40; k++)
            tokens[k] = (int32_t)(260 + (k * 7 + i % 3) % 13);
        must_be_ok(sh_snapshot_add(&s, 100 + i, tokens, 4, 0));
        must_be_ok(sh_snapshot_add(&s, 100 + i, tokens + 4, 36, SH_TOKEN_TARGET));
    }
    must_be_ok(sh_snapshot_save(&s, path_of("snapshot"), &err));
    sh_snapshot_release(&s);
}

#define ROUND                                                                                      \
    "round --snapshot snapshot --model model.gguf --out update.gguf --result result.json "         \
    "--a-seed=18446744073709551615 --shuffle-seed 5 --rank 4 --alpha 8 --lr 0.02 --lr-final 0.5 "  \
    "--batch 2 --context 16 --passes-milli 3000 --steps-max 12 --warmup 2 --heldout "

static void test_round(void **state)
{
    (void)state;
    char out[4096], hex[SH_HASH_HEX_BYTES];
    make_snapshot(24);
    assert_int_equal(run(ROUND "--idle --memory-max 4000000000", out, sizeof(out)), 0);
    /* A line a step, for the parent. */
    assert_memory_equal(out, "step 1/12\nstep 2/12\n", 20);
    assert_non_null(strstr(out, "step 12/12\n"));

    /* The same bytes as the library's. */
    sh_model *model = NULL;
    sh_snapshot s = {0};
    sh_round_result r = {0};
    must_be_ok(sh_model_open(path_of("model.gguf"), &model, &err));
    must_be_ok(sh_snapshot_load(path_of("snapshot"), &s, &err));
    sh_round_options o = {.a_seed = UINT64_MAX,
                          .shuffle_seed = 5,
                          .rank = 4,
                          .alpha = 8,
                          .lr = 0.02f,
                          .lr_final = 0.5f,
                          .clip = 1,
                          .batch = 2,
                          .context = 16,
                          .passes_milli = 3000,
                          .steps_max = 12,
                          .warmup = 2,
                          .threads = 2,
                          .heldout = true};
    must_be_ok(sh_round_train(model, &s, &o, &r, &err));
    uint8_t *bytes = NULL;
    size_t n = 0;
    must_be_ok(sh_file_read(path_of("update.gguf"), SIZE_MAX, &bytes, &n, &err));
    assert_int_equal(n, r.update.len);
    assert_memory_equal(bytes, r.update.data, n);

    json_t *j = NULL;
    must_be_ok(sh_json_load(path_of("result.json"), &j, &err));
    must_be_near(number_of(j, "samples"), (double)r.samples, 0);
    must_be_near(number_of(j, "tokens_seen"), (double)r.tokens_seen, 0);
    must_be_near(number_of(j, "heldout_before"), r.heldout_before, 0);
    must_be_near(number_of(j, "heldout_after"), r.heldout_after, 0);
    must_be_near(number_of(j, "steps"), 12, 0);
    sh_hash sha256 = sh_sha256(bytes, n);
    sh_hex(sha256.b, sizeof sha256.b, hex);
    assert_string_equal(json_string_value(json_object_get(j, "sha256")), hex);
    json_decref(j);
    free(bytes);
    sh_round_result_release(&r);
    sh_snapshot_release(&s);
    sh_model_close(&model);
}

static void test_round_errors(void **state)
{
    (void)state;
    make_snapshot(24);
    expect_error("round --snapshot snapshot", 2, "--model");
    expect_error(ROUND "--a-seed 18446744073709551616", 2, "a-seed");
    expect_error(ROUND "--shuffle-seed -1", 2, "shuffle-seed");
    expect_error(ROUND "--tokens-min 100000", 2, "100000");
    expect_error(ROUND "--snapshot text", 2, "snapshot");
    expect_error(ROUND "--memory-max 1000", 2, "memory-max");
    expect_error(ROUND "--memory-max 1000000000 --threads 2", 2, "--threads 1");
    expect_error(ROUND "--parent 1", 1, "did not start this one");
    expect_error(ROUND "--out absent/update.gguf", 2, "absent");
}

/* More memory than it may take: a line and an exit code, no hang and no signal. */
static void test_round_memory(void **state)
{
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    printf("SKIP: --memory-max was not tried: sanitizers take memory of their own\n");
#else
    make_snapshot(24);
    expect_error(ROUND "--memory-max 17M --rank 1024", 2, "the memory limit is 12750000");
#endif
}

static void test_errors(void **state)
{
    (void)state;
    char out[8192];
    must_exit("", 2);
    must_exit("full", 2);
    must_exit("lora --base model.gguf --data text --rnak 3 --out a.gguf", 2);
    must_exit("lora --base model.gguf --data text --rank 0 --out a.gguf", 2);
    must_exit("lora --base broken.gguf --data text --out a.gguf", 2);
    must_exit("lora --base absent.gguf --data text --out a.gguf", 2);
    must_exit("eval --model model.gguf --data text --context 65", 2);
    must_exit("eval --model model.gguf --data text --lora model.gguf", 2);
    must_exit(FULL "--steps 1 --heads 3 --out a.gguf", 2);
    must_exit(FULL "--steps 1 --type Q9_9 --out a.gguf", 2);
    must_exit(FULL "--steps 1 --out absent/a.gguf", 2);
    assert_int_equal(run("lora --help", out, sizeof(out)), 0);
    assert_non_null(strstr(out, "--rank"));
    assert_int_equal(run("--help", out, sizeof(out)), 0);
    assert_non_null(strstr(out, "usage"));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_full), /* leaves the model that others use */
        cmocka_unit_test(test_full_is_deterministic),
        cmocka_unit_test(test_other_architectures),
        cmocka_unit_test(test_full_of_architectures),
        cmocka_unit_test(test_new_architectures),
        cmocka_unit_test(test_lora),
        cmocka_unit_test(test_lora_options),
        cmocka_unit_test(test_inputs_stay),
        cmocka_unit_test(test_tokenizer),
        cmocka_unit_test(test_round),
        cmocka_unit_test(test_round_errors),
        cmocka_unit_test(test_round_memory),
        cmocka_unit_test(test_errors),
    };
    if (argc != 2) {
        fprintf(stderr, "usage: %s SHOAL-TRAIN\n", argv[0]);
        return 2;
    }
    program = argv[1];
    return cmocka_run_group_tests(tests, prepare, clean);
}
