/*
 * Hugging Face's JSON files: any bytes end in a status. The first byte says which of them it is;
 * what is taken is written as GGUF.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/model/convert_internal.h"

#define VOCAB_MAX 300
#define BYTES_MAX (64u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void finish(sh_gguf_writer **w, sh_status status, const sh_error *err)
{
    sh_buf bytes;
    sh_buf_init(&bytes, BYTES_MAX);
    SH_ASSERT(status == SH_OK || err->text[0] != '\0');
    sh_status encoded = status == SH_OK ? sh_gguf_writer_encode(*w, &bytes, NULL) : SH_OK;
    SH_ASSERT(encoded == SH_OK);
    sh_buf_release(&bytes);
    sh_gguf_writer_destroy(w);
}

static void config(const json_t *json)
{
    sh_hf_config c;
    sh_error err = {0};
    sh_gguf_writer *w = NULL;
    sh_status status = sh_hf_config_read(json, "config.json", &c, &err);
    if (status != SH_OK || sh_gguf_writer_create(&w, NULL) != SH_OK)
        return;
    finish(&w, sh_hf_config_write(&c, w, &err), &err);
    float *factors = malloc((c.head_size / 2 + 1) * sizeof *factors);
    if (factors != NULL && c.rope == SH_HF_ROPE_LLAMA3)
        sh_hf_rope_factors(&c, factors);
    free(factors);
}

/* The same document is tokenizer.json, tokenizer_config.json and config.json. */
static void tokenizer(const json_t *json)
{
    sh_error err = {0};
    sh_gguf_writer *w = NULL;
    const sh_hf_tokenizer t = {
        .tokenizer = json, .settings = json, .config = json, .folder = "f", .vocab = VOCAB_MAX};
    if (sh_gguf_writer_create(&w, NULL) == SH_OK)
        finish(&w, sh_hf_tokenizer_write(&t, w, &err), &err);
}

/* With one pair of tensors that fits rank 2. */
static void adapter(const json_t *json)
{
    static const char header[] =
        "{\"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\":{\"dtype\":\"F32\","
        "\"shape\":[2,8],\"data_offsets\":[0,64]},"
        "\"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight\":{\"dtype\":\"F32\","
        "\"shape\":[8,2],\"data_offsets\":[64,128]}}";
    static const sh_model_config base = {
        .n_layers = 1, .width = 8, .n_heads = 2, .n_kv_heads = 1, .head_size = 4, .ffn = 8};
    uint8_t bytes[8 + sizeof header - 1 + 128] = {0};
    const uint64_t n = sizeof header - 1;
    sh_safetensors *file = NULL;
    sh_adapter *a = NULL;
    memcpy(bytes, &n, sizeof n);
    memcpy(bytes + 8, header, n);
    sh_status status = sh_safetensors_open_memory(bytes, sizeof bytes, "t", &file, NULL);
    SH_ASSERT(status == SH_OK);
    if (sh_peft_decode(json, "adapter_config.json", file, &base, &a, NULL) == SH_OK)
        SH_ASSERT(a->pairs[0].rank == 2);
    sh_adapter_destroy(&a);
    sh_safetensors_close(&file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const readers[])(const json_t *) = {config, tokenizer, adapter};
    json_t *json = NULL;
    if (size == 0 ||
        sh_json_decode(data + 1, size - 1, "fuzz", &sh_hf_settings_limits, &json, NULL) != SH_OK)
        return 0;
    readers[data[0] % SH_COUNT(readers)](json);
    json_decref(json);
    return 0;
}
