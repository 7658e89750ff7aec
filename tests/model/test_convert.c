/* Hugging Face's folders to GGUF, and adapters between PEFT and GGUF. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/base/file.h"
#include "shared/model/convert_internal.h"
#include "tests/model/hf_small.h"
#include "tests/model/util.h"

static char folder[64], out_path[80];

static int make_folder(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/shoal-convert-XXXXXX");
    assert_non_null(mkdtemp(folder));
    snprintf(out_path, sizeof out_path, "%s.gguf", folder);
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    unlink(out_path);
    hf_remove(folder);
    return 0;
}

static sh_model *convert(sh_type type)
{
    sh_model *model = NULL;
    const sh_convert_options options = {.type = type};
    CHECK_OK(sh_convert_model(folder, out_path, &options, err));
    CHECK_OK(sh_model_open(out_path, &model, err));
    return model;
}

/* ---- models ---- */

/* The converted model's logits are those of transformers' forward pass. */
static void check_logits(const hf_model *hf, const sh_model *model)
{
    static const int32_t tokens[] = {5, 17, 256, 90, 3, 200, 120, 121, 44, 256, 7, 30};
    enum { N = SH_COUNT(tokens) };
    const uint32_t vocab = model->config.vocab;
    assert_int_equal(vocab, hf->vocab);
    double *theirs = calloc((size_t)N * vocab, sizeof *theirs), worst = 0;
    float *ours = calloc((size_t)N * vocab, sizeof *ours);
    sh_context *context = NULL;
    assert_non_null(theirs);
    assert_non_null(ours);
    CHECK_OK(sh_context_create(model, &(sh_context_options){.n_tokens_max = 32}, &context, err));
    CHECK_OK(sh_context_decode(context, tokens, N, SH_LOGITS_ALL, ours, err));
    hf_forward(hf, tokens, N, theirs);
    for (size_t i = 0; i < (size_t)N * vocab; i++)
        worst = fmax(worst, fabs(theirs[i] - (double)ours[i]));
    if (!(worst < 2e-4)) /* floats; logits are of the order of 1 */
        fail_msg("%s: logits differ by %g", hf->o.architecture, worst);
    sh_context_destroy(&context);
    free(theirs);
    free(ours);
}

static void test_logits(void **state)
{
    (void)state;
    static const char llama3[] =
        "{\"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 4.0, \"low_freq_factor\": 1.0,"
        " \"high_freq_factor\": 4.0, \"original_max_position_embeddings\": 32}}";
    static const char linear[] = "{\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 2.0}}";
    const hf_options cases[] = {
        {.architecture = "LlamaForCausalLM", .seed = 1},
        {.architecture = "LlamaForCausalLM", .seed = 2, .tied = true, .sentencepiece = true},
        {.architecture = "LlamaForCausalLM", .seed = 3, .bias = true, .shards = 3},
        {.architecture = "LlamaForCausalLM", .seed = 4, .config = llama3},
        {.architecture = "LlamaForCausalLM", .seed = 5, .config = linear, .type = SH_TYPE_BF16},
        {.architecture = "Qwen2ForCausalLM", .seed = 6, .type = SH_TYPE_F16},
        {.architecture = "Qwen2ForCausalLM", .seed = 7, .tied = true, .shards = 2},
        {.architecture = "Qwen3ForCausalLM", .seed = 8},
        {.architecture = "Qwen3ForCausalLM", .seed = 9, .tied = true, .config = linear},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        make_folder(NULL);
        hf_model *hf = hf_make(folder, &cases[i]);
        sh_model *model = convert(SH_TYPE_F32);
        check_logits(hf, model);
        assert_int_equal(model->config.tied_output, cases[i].tied);
        sh_model_close(&model);
        hf_destroy(&hf);
        remove_folder(NULL);
    }
}

/* Rows of q in the order of the formula in convert.h; vectors stay F32 in a quantized file. */
static void test_rows_and_types(void **state)
{
    (void)state;
    hf_model *hf = hf_make(folder, &(hf_options){.architecture = "LlamaForCausalLM", .seed = 11});
    sh_model *model = convert(SH_TYPE_F32);
    const hf_tensor *q = hf_find(hf, "model.layers.1.self_attn.q_proj.weight");
    const float *rows = sh_gguf_tensor_find(model->gguf, "blk.1.attn_q.weight")->data;
    const uint32_t hd = hf->head_size, w = hf->width;
    for (uint32_t h = 0; h < hf->n_heads; h++)
        for (uint32_t s = 0; s < 2; s++)
            for (uint32_t j = 0; j < hd / 2; j++)
                assert_memory_equal(rows + (size_t)(h * hd + 2 * j + s) * w,
                                    q->values + (size_t)(h * hd + s * hd / 2 + j) * w,
                                    w * sizeof *rows);
    sh_model_close(&model);
    model = convert(SH_TYPE_Q8_0);
    assert_int_equal(sh_gguf_tensor_find(model->gguf, "blk.0.attn_norm.weight")->type, SH_TYPE_F32);
    assert_int_equal(sh_gguf_tensor_find(model->gguf, "blk.0.ffn_up.weight")->type, SH_TYPE_Q8_0);
    assert_int_equal(sh_gguf_tensor_find(model->gguf, "token_embd.weight")->type, SH_TYPE_Q8_0);
    sh_model_close(&model);
    hf_destroy(&hf);
}

static void expect_ids(const sh_model *model, const char *text, unsigned flags, const int32_t *ids,
                       size_t n)
{
    int32_t *got = NULL;
    size_t n_got = 0;
    CHECK_OK(sh_tokenize(model->tokenizer, text, strlen(text), flags, &got, &n_got, err));
    if (n_got != n || memcmp(got, ids, n * sizeof *ids) != 0)
        fail_msg("'%s': %zu tokens beginning with %d, %zu expected", text, n_got,
                 n_got > 0 ? got[0] : -1, n);
    free(got);
}

static void test_byte_level(void **state)
{
    (void)state;
    static const char settings[] =
        "{\"bos_token\": null, \"eos_token\": {\"content\": \"<|end|>\"},"
        " \"add_bos_token\": false, \"chat_template\": [{\"name\": \"tool_use\", \"template\": "
        "\"no\"}, {\"name\": \"default\", \"template\": \"<|im_start|>\"}]}";
    hf_model *hf = hf_make(folder, &(hf_options){.architecture = "Qwen2ForCausalLM",
                                                 .seed = 12,
                                                 .tokenizer_config = settings});
    sh_model *model = convert(SH_TYPE_F16);
    const char *text = NULL;
    size_t n = 0;
    CHECK_OK(sh_gguf_get_string(model->gguf, "tokenizer.ggml.pre", &text, &n, err));
    assert_int_equal(n, strlen("gpt-2"));
    assert_memory_equal(text, "gpt-2", n);
    CHECK_OK(sh_gguf_get_string(model->gguf, "tokenizer.chat_template", &text, &n, err));
    assert_memory_equal(text, "<|im_start|>", n);
    assert_int_equal(sh_tokenizer_eos(model->tokenizer), 261);
    assert_false(sh_tokenizer_adds_bos(model->tokenizer));
    expect_ids(model, "the", SH_TOKENIZE_BOS, (int32_t[]){257}, 1);
    expect_ids(model, "in the<|end|>", SH_TOKENIZE_SPECIAL, (int32_t[]){259, 260, 261}, 3);
    int32_t kinds[280];
    CHECK_OK(sh_gguf_get_i32s(model->gguf, "tokenizer.ggml.token_type", kinds, 280, err));
    assert_int_equal(kinds[257], 1);
    assert_int_equal(kinds[261], 3);
    assert_int_equal(kinds[262], 4);
    assert_int_equal(kinds[263], 5); /* no token: filled up */
    sh_model_close(&model);
    hf_destroy(&hf);
}

static void test_sentencepiece(void **state)
{
    (void)state;
    hf_model *hf = hf_make(
        folder,
        &(hf_options){.architecture = "LlamaForCausalLM", .seed = 13, .sentencepiece = true});
    sh_model *model = convert(SH_TYPE_F16);
    assert_int_equal(sh_tokenizer_bos(model->tokenizer), 1);
    assert_true(sh_tokenizer_adds_bos(model->tokenizer));
    expect_ids(model, "the", SH_TOKENIZE_BOS, (int32_t[]){1, 266}, 2);
    expect_ids(model, "the a", 0, (int32_t[]){266, 267}, 2);
    expect_ids(model, "a!", 0, (int32_t[]){267, 3 + '!'}, 2);
    sh_model_close(&model);
    hf_destroy(&hf);
}

/* Which rule a regular expression is. */
static void test_expressions(void **state)
{
    (void)state;
    static const char split[] =
        "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\""
        ": \"%s\"}, \"behavior\": \"Isolated\", \"invert\": false}, {\"type\": \"ByteLevel\", "
        "\"add_prefix_space\": false, \"use_regex\": false}]}";
#define HEAD "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}"
#define TAIL "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"
    static const struct {
        const char *expression, *parts, *given, *pre;
    } cases[] = {
        {HEAD TAIL, NULL, NULL, "qwen2"},
        {HEAD "{1,3}" TAIL, NULL, NULL, "llama-bpe"},
        {"\\\\d+|\\\\S+", NULL, NULL, NULL},
        {"\\\\d+|\\\\S+", NULL, "starcoder", "starcoder"},
        {NULL,
         "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Digits\", "
         "\"individual_digits\": true}, {\"type\": \"ByteLevel\", \"add_prefix_space\": false}]}",
         NULL, "smollm"},
        {NULL, "{\"type\": \"Whitespace\"}", NULL, NULL},
        {NULL, "{\"type\": \"ByteLevel\", \"add_prefix_space\": true}", NULL, NULL},
    };
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        char text[1024], path[SH_PATH_BYTES];
        hf_model *hf = hf_make(folder, &(hf_options){.architecture = "Qwen2ForCausalLM"});
        json_t *tokenizer = NULL;
        CHECK_OK(sh_path_join(path, sizeof path, folder, "tokenizer.json", err));
        CHECK_OK(sh_json_load(path, &tokenizer, err));
        if (cases[i].expression != NULL) {
            const char *slot = strstr(split, "%s");
            snprintf(text, sizeof text, "%.*s%s%s", (int)(slot - split), split, cases[i].expression,
                     slot + 2);
        } else {
            snprintf(text, sizeof text, "%s", cases[i].parts);
        }
        json_t *parts = json_loads(text, 0, NULL);
        assert_non_null(parts);
        sh_json_set(tokenizer, "pre_tokenizer", parts);
        sh_gguf_writer *w = NULL;
        sh_error e = {0};
        const sh_hf_tokenizer t = {
            .tokenizer = tokenizer, .folder = "f", .pre = cases[i].given, .vocab = 280};
        CHECK_OK(sh_gguf_writer_create(&w, err));
        sh_status status = sh_hf_tokenizer_write(&t, w, &e);
        if (cases[i].pre == NULL) {
            assert_int_equal(status, SH_ERR_UNSUPPORTED);
            assert_non_null(strstr(e.text, cases[i].expression != NULL ? "--pre" : "pre_tokeniz"));
        } else {
            assert_int_equal(status, SH_OK);
            sh_buf bytes;
            sh_gguf *g = NULL;
            const char *pre = NULL;
            size_t n = 0;
            sh_buf_init(&bytes, 1u << 20);
            CHECK_OK(sh_gguf_writer_encode(w, &bytes, err));
            CHECK_OK(sh_gguf_open_memory(bytes.data, bytes.len, "keys", &g, err));
            CHECK_OK(sh_gguf_get_string(g, "tokenizer.ggml.pre", &pre, &n, err));
            assert_int_equal(n, strlen(cases[i].pre));
            assert_memory_equal(pre, cases[i].pre, n);
            sh_gguf_close(&g);
            sh_buf_release(&bytes);
        }
        sh_gguf_writer_destroy(&w);
        json_decref(tokenizer);
        hf_destroy(&hf);
    }
}

/* What is wrong in config.json is named, and no file is left behind. */
static void test_bad_configs(void **state)
{
    (void)state;
    static const struct {
        const char *config;
        sh_status status;
        const char *part;
    } cases[] = {
        {"{\"architectures\": [\"MixtralForCausalLM\"]}", SH_ERR_UNSUPPORTED, "Mixtral"},
        {"{\"architectures\": []}", SH_ERR_INVALID, "architectures"},
        {"{\"hidden_size\": \"32\"}", SH_ERR_INVALID, "'hidden_size'"},
        {"{\"hidden_size\": null}", SH_ERR_INVALID, "'hidden_size' is missing"},
        {"{\"num_hidden_layers\": 3}", SH_ERR_INVALID, "model.layers.2"},
        {"{\"num_hidden_layers\": 1}", SH_ERR_UNSUPPORTED, "model.layers.1"},
        {"{\"num_hidden_layers\": 100000}", SH_ERR_INVALID, "'num_hidden_layers'"},
        {"{\"intermediate_size\": 65}", SH_ERR_INVALID, "65"},
        {"{\"num_key_value_heads\": 3}", SH_ERR_INVALID, "num_key_value_heads"},
        {"{\"hidden_act\": \"gelu\"}", SH_ERR_UNSUPPORTED, "gelu"},
        {"{\"use_sliding_window\": true}", SH_ERR_UNSUPPORTED, "use_sliding_window"},
        {"{\"layer_types\": [\"sliding_attention\"]}", SH_ERR_UNSUPPORTED, "layer_types"},
        {"{\"quantization_config\": {\"bits\": 4}}", SH_ERR_UNSUPPORTED, "quantization_config"},
        {"{\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 2}}", SH_ERR_UNSUPPORTED,
         "dynamic"},
        {"{\"rope_scaling\": {\"type\": \"linear\"}}", SH_ERR_INVALID, "'factor'"},
        {"{\"vocab_size\": 100}", SH_ERR_INVALID, "280"},
        {"{\"tie_word_embeddings\": 1}", SH_ERR_INVALID, "tie_word_embeddings"},
    };
    const sh_convert_options options = {.type = SH_TYPE_F16};
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_error e = {0};
        hf_model *hf = hf_make(
            folder, &(hf_options){.architecture = "LlamaForCausalLM", .config = cases[i].config});
        sh_status status = sh_convert_model(folder, out_path, &options, &e);
        if (status != cases[i].status || strstr(e.text, cases[i].part) == NULL)
            fail_msg("%s: %s, \"%s\"", cases[i].config, sh_status_name(status), e.text);
        assert_false(sh_file_exists(out_path));
        hf_destroy(&hf);
    }
}

/* YaRN in transformers' words and in llama.cpp's. */
static void test_yarn_keys(void **state)
{
    (void)state;
    static const char yarn[] =
        "{\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0,"
        " \"original_max_position_embeddings\": 16, \"attention_factor\": 1.5}}";
    hf_model *hf = hf_make(
        folder, &(hf_options){.architecture = "Qwen2ForCausalLM", .seed = 14, .config = yarn});
    sh_model *model = convert(SH_TYPE_F32);
    assert_int_equal(model->config.rope_scaling, SH_ROPE_YARN);
    assert_true(fabsf(model->rope_magnitude - 1.5f) < 1e-5f);
    sh_model_close(&model);
    hf_destroy(&hf);
}

static void test_no_memory(void **state)
{
    (void)state;
    const sh_convert_options options = {.type = SH_TYPE_Q8_0};
    hf_model *hf = hf_make(
        folder,
        &(hf_options){.architecture = "LlamaForCausalLM", .sentencepiece = true, .shards = 2});
    bool done = false;
    size_t step = 1;
    for (size_t n = 1; !done; n += step, step = n / 50 + 1) {
        sh_alloc_fail_after(n);
        sh_status status = sh_convert_model(folder, out_path, &options, NULL);
        sh_alloc_fail_after(0);
        done = status == SH_OK;
        if (!done && status != SH_ERR_NO_MEMORY)
            fail_msg("allocation %zu: %s", n, sh_status_name(status));
        assert_int_equal(done, sh_file_exists(out_path));
    }
    hf_destroy(&hf);
}

/* ---- adapters ---- */

static const sh_model_config llama = {.arch = SH_ARCH_LLAMA,
                                      .n_layers = 2,
                                      .width = 24,
                                      .n_heads = 3,
                                      .n_kv_heads = 1,
                                      .head_size = 8,
                                      .ffn = 40};

static sh_adapter *random_adapter(const sh_model_config *config, uint32_t rank)
{
    sh_rng rng;
    sh_adapter *a = NULL;
    sh_rng_init(&rng, 7, 0, 1);
    CHECK_OK(sh_adapter_create(config, rank, 2.5f * (float)rank, &a, err));
    for (size_t i = 0; i < (size_t)a->n_layers * SH_LAYER_MATRICES; i++) {
        for (size_t k = 0; k < (size_t)rank * a->pairs[i].in; k++)
            a->pairs[i].a[k] = sh_rng_normal(&rng);
        for (size_t k = 0; k < (size_t)rank * a->pairs[i].out; k++)
            a->pairs[i].b[k] = sh_rng_normal(&rng);
    }
    return a;
}

static void expect_equal(const sh_adapter *a, const sh_adapter *b)
{
    assert_int_equal(a->rank, b->rank);
    assert_true(a->alpha == b->alpha);
    for (size_t i = 0; i < sh_lora_pair_count(a->n_layers); i++) {
        const sh_lora_pair *x = &a->pairs[i], *y = &b->pairs[i];
        assert_int_equal(x->a != NULL, y->a != NULL);
        if (x->a == NULL)
            continue;
        assert_int_equal(x->rank, y->rank);
        assert_memory_equal(x->a, y->a, (size_t)x->rank * x->in * sizeof *x->a);
        assert_memory_equal(x->b, y->b, (size_t)x->rank * x->out * sizeof *x->b);
    }
}

static sh_safetensors *open_tensors(void)
{
    char path[SH_PATH_BYTES];
    sh_safetensors *file = NULL;
    CHECK_OK(sh_path_join(path, sizeof path, folder, "adapter_model.safetensors", err));
    CHECK_OK(sh_safetensors_open(path, &file, err));
    return file;
}

/* All of one rank; then some away and one of another rank. */
static void test_round_trip(void **state)
{
    (void)state;
    for (int part = 0; part < 2; part++) {
        for (int arch = SH_ARCH_LLAMA; arch <= SH_ARCH_QWEN3; arch++) {
            sh_model_config config = llama;
            config.arch = (sh_arch)arch;
            sh_adapter *a = random_adapter(&config, 4), *b = NULL;
            if (part == 1) {
                sh_lora_pair *gone = &a->pairs[SH_LAYER_MATRICES + SH_FFN_UP];
                free(gone->a);
                free(gone->b);
                gone->a = gone->b = NULL;
                a->pairs[SH_ATTN_Q].rank = 3; /* what is behind its end is not looked at */
            }
            CHECK_OK(sh_adapter_save_peft(a, &config, folder, "base", err));
            CHECK_OK(sh_adapter_open_any(folder, &config, &b, err));
            expect_equal(a, b);
            sh_adapter_destroy(&b);
            sh_safetensors *file = open_tensors();
            const sh_safetensor *t = sh_safetensors_find(
                file, "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight");
            assert_non_null(t);
            float row[4];
            sh_safetensor_floats(t, 4 * 4, 4, row); /* row 4 of PEFT is row 1 of llama's GGUF */
            const float *ours = a->pairs[SH_LAYER_MATRICES + SH_ATTN_K].b;
            assert_memory_equal(row, ours + (arch == SH_ARCH_LLAMA ? 4 : 16), sizeof row);
            sh_safetensors_close(&file);
            sh_adapter_destroy(&a);
        }
    }
}

/* tensors of `adapter_model.safetensors` and one more. */
static void add_tensor(const char *name, uint32_t rows, uint32_t columns)
{
    char path[SH_PATH_BYTES];
    sh_safetensors *file = open_tensors();
    const size_t n = sh_safetensors_count(file);
    sh_safetensor *all = calloc(n + 1, sizeof *all);
    float *values = calloc((size_t)rows * columns, sizeof *values);
    assert_true(all != NULL && values != NULL);
    for (size_t i = 0; i < n; i++)
        all[i] = *sh_safetensors_at(file, i);
    all[n] = (sh_safetensor){.name = name,
                             .type = SH_TYPE_F32,
                             .is_float = true,
                             .n_dims = 2,
                             .shape = {rows, columns, 1, 1},
                             .data = values,
                             .bytes = (size_t)rows * columns * sizeof *values};
    CHECK_OK(sh_path_join(path, sizeof path, folder, "adapter_model.safetensors", err));
    CHECK_OK(sh_safetensors_save(path, all, n + 1, err));
    sh_safetensors_close(&file);
    free(all);
    free(values);
}

static json_t *settings_of_folder(void)
{
    char path[SH_PATH_BYTES];
    CHECK_OK(sh_path_join(path, sizeof path, folder, "adapter_config.json", err));
    json_t *settings = json_load_file(path, 0, NULL);
    assert_non_null(settings);
    return settings;
}

/* lm_head is the output matrix, of a rank of its own; PEFT saves the base's matrix beside it. */
static void test_lm_head(void **state)
{
    (void)state;
    static const char base_name[] = "base_model.model.lm_head.base_layer.weight";
    sh_model_config config = llama, tied = llama;
    sh_error failure = {0};
    config.vocab = tied.vocab = 30;
    tied.tied_output = true;
    for (int alone = 0; alone < 2; alone++) {
        sh_adapter *a = NULL, *b = NULL;
        if (alone)
            CHECK_OK(sh_adapter_create_empty(&config, 7, &a, err));
        else
            a = random_adapter(&config, 4);
        CHECK_OK(sh_adapter_add_output(a, &config, 2, err));
        sh_lora_pair *p = &a->pairs[sh_lora_output_pair(config.n_layers)];
        for (size_t i = 0; i < 2 * (size_t)p->out; i++)
            p->b[i] = (float)i; /* rows that are permuted would show */
        for (size_t i = 0; i < 2 * (size_t)p->in; i++)
            p->a[i] = -(float)i;
        CHECK_OK(sh_adapter_save_peft(a, &config, folder, "base", err));
        CHECK_OK(sh_adapter_open_any(folder, &config, &b, err));
        expect_equal(a, b);
        sh_adapter_destroy(&b);
        sh_safetensors *file = open_tensors();
        const sh_safetensor *t =
            sh_safetensors_find(file, "base_model.model.lm_head.lora_B.weight");
        assert_true(t != NULL && t->shape[0] == 30 && t->shape[1] == 2);
        sh_safetensors_close(&file);
        json_t *settings = settings_of_folder();
        const json_t *targets = json_object_get(settings, "target_modules");
        assert_string_equal(json_string_value(json_array_get(targets, alone ? 0 : 7)), "lm_head");
        assert_int_equal(json_array_size(targets), alone ? 1 : 8);
        json_decref(settings);

        assert_int_equal(sh_adapter_open_any(folder, &tied, &b, &failure), SH_ERR_MISMATCH);
        assert_non_null(strstr(failure.text, "lm_head.lora_A"));
        assert_int_equal(sh_adapter_save_peft(a, &tied, folder, "base", &failure), SH_ERR_MISMATCH);
        add_tensor(base_name, 30, llama.width);
        CHECK_OK(sh_adapter_open_any(folder, &config, &b, err));
        expect_equal(a, b);
        sh_adapter_destroy(&b);
        CHECK_OK(sh_adapter_save_peft(a, &config, folder, "base", err));
        add_tensor(base_name, 31, llama.width);
        assert_int_equal(sh_adapter_open_any(folder, &config, &b, &failure), SH_ERR_MISMATCH);
        assert_non_null(strstr(failure.text, "base_layer"));
        sh_adapter_destroy(&a);
    }
    sh_adapter *none = random_adapter(&config, 4), *b = NULL;
    CHECK_OK(sh_adapter_save_peft(none, &config, folder, "base", err));
    add_tensor(base_name, 30, llama.width);
    assert_int_equal(sh_adapter_open_any(folder, &config, &b, &failure), SH_ERR_UNSUPPORTED);
    sh_adapter_destroy(&none);
}

/* A module's own alpha and rank, and rsLoRA, change the scale as PEFT says. */
static void test_scales(void **state)
{
    (void)state;
    static const struct {
        const char *more;
        double factor; /* of layer 0's q_proj, against alpha / r */
    } cases[] = {
        {"{}", 1},
        {"{\"use_rslora\": true}", 2}, /* 4 / sqrt(4) */
        {"{\"alpha_pattern\": {\"layers.0.self_attn.q_proj\": 30}}", 3},
        {"{\"alpha_pattern\": {\"q_proj\": 5, \"k_proj\": 7}}", 0.5},
        {"{\"alpha_pattern\": {\"^q_proj\": 5, \"layers.1.self_attn.q_proj\": 6}}", 1},
        {"{\"use_rslora\": true, \"alpha_pattern\": {\"q_proj\": 20}}", 4},
    };
    sh_adapter *a = random_adapter(&llama, 4), *b = NULL;
    CHECK_OK(sh_adapter_save_peft(a, &llama, folder, "", err));
    sh_safetensors *file = open_tensors();
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        json_t *settings =
            json_pack("{s:s, s:i, s:i}", "peft_type", "LORA", "r", 4, "lora_alpha", 10);
        json_t *more = json_loads(cases[i].more, 0, NULL);
        assert_int_equal(json_object_update(settings, more), 0);
        CHECK_OK(sh_peft_decode(settings, "c.json", file, &llama, &b, err));
        for (size_t k = 0; k < 20; k++) {
            const double wanted = (double)a->alpha * (double)a->pairs[0].b[k] * cases[i].factor;
            const double got = (double)b->alpha * (double)b->pairs[0].b[k];
            if (fabs(wanted - got) > 1e-5 * fabs(wanted))
                fail_msg("%s: %g, expected %g", cases[i].more, got, wanted);
        }
        sh_adapter_destroy(&b);
        json_decref(more);
        json_decref(settings);
    }
    sh_safetensors_close(&file);
    sh_adapter_destroy(&a);
}

static void test_bad_adapters(void **state)
{
    (void)state;
    static const struct {
        const char *more;
        sh_status status;
        const char *part;
    } cases[] = {
        {"{\"use_dora\": true}", SH_ERR_UNSUPPORTED, "use_dora"},
        {"{\"bias\": \"all\"}", SH_ERR_UNSUPPORTED, "'bias'"},
        {"{\"modules_to_save\": [\"lm_head\"]}", SH_ERR_UNSUPPORTED, "modules_to_save"},
        {"{\"fan_in_fan_out\": true}", SH_ERR_UNSUPPORTED, "fan_in_fan_out"},
        {"{\"peft_type\": \"LOHA\"}", SH_ERR_UNSUPPORTED, "LOHA"},
        {"{\"init_lora_weights\": \"pissa_niter_4\"}", SH_ERR_UNSUPPORTED, "pissa"},
        {"{\"rank_pattern\": {\".*_proj\": 2}}", SH_ERR_UNSUPPORTED, "rank_pattern"},
        {"{\"r\": 8}", SH_ERR_MISMATCH, "lora_A"},
        {"{\"r\": -1}", SH_ERR_INVALID, "'r'"},
        {"{\"lora_alpha\": \"much\"}", SH_ERR_INVALID, "lora_alpha"},
    };
    sh_adapter *a = random_adapter(&llama, 4), *b = NULL;
    CHECK_OK(sh_adapter_save_peft(a, &llama, folder, "", err));
    sh_safetensors *file = open_tensors();
    for (size_t i = 0; i < SH_COUNT(cases); i++) {
        sh_error e = {0};
        json_t *settings =
            json_pack("{s:s, s:i, s:i}", "peft_type", "LORA", "r", 4, "lora_alpha", 10);
        json_t *more = json_loads(cases[i].more, 0, NULL);
        assert_int_equal(json_object_update(settings, more), 0);
        sh_status status = sh_peft_decode(settings, "c.json", file, &llama, &b, &e);
        if (status != cases[i].status || strstr(e.text, cases[i].part) == NULL)
            fail_msg("%s: %s, \"%s\"", cases[i].more, sh_status_name(status), e.text);
        json_decref(more);
        json_decref(settings);
    }
    sh_safetensors_close(&file);
    sh_error e = {0};
    sh_model_config other = llama;
    other.n_layers = 1;
    assert_int_equal(sh_adapter_open_any(folder, &other, &b, &e), SH_ERR_MISMATCH);
    assert_non_null(strstr(e.text, "more than 1 layers"));
    other = llama;
    other.ffn = 48;
    assert_int_equal(sh_adapter_open_any(folder, &other, &b, &e), SH_ERR_MISMATCH);
    char path[SH_PATH_BYTES];
    CHECK_OK(sh_path_join(path, sizeof path, folder, "adapter_model.safetensors", err));
    assert_int_equal(sh_adapter_open_any(path, &llama, &b, &e), SH_ERR_USAGE);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(sh_adapter_open_any(folder, &llama, &b, &e), SH_ERR_NOT_FOUND);
    assert_non_null(strstr(e.text, "adapter_model.safetensors"));
    assert_null(b);
    sh_adapter_destroy(&a);
}

int main(void)
{
#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, make_folder, remove_folder)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits), IN_FOLDER(test_rows_and_types), IN_FOLDER(test_byte_level),
        IN_FOLDER(test_sentencepiece), IN_FOLDER(test_expressions),    IN_FOLDER(test_bad_configs),
        IN_FOLDER(test_yarn_keys),     IN_FOLDER(test_no_memory),      IN_FOLDER(test_round_trip),
        IN_FOLDER(test_lm_head),       IN_FOLDER(test_scales),         IN_FOLDER(test_bad_adapters),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
