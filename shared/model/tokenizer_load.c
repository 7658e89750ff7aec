/*
 * The vocabulary from GGUF: texts and their index, kinds, special tokens, what ends a generation.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "shared/model/blame.h"
#include "shared/model/tokenizer_internal.h"

#define TEXT_BYTES_MAX (64u << 20) /* all tokens' texts together */
#define EMPTY_TEXT_MAX 24          /* "[EMPTY_1048576]" */

const char *sh_token_text(const sh_tokenizer *t, uint32_t id, uint32_t *n)
{
    *n = t->offsets[id + 1] - t->offsets[id];
    return t->texts + t->offsets[id];
}

static uint32_t hash_text(const char *s, uint32_t n)
{
    uint32_t h = 2166136261u; /* FNV-1a, then a mix, since slots are its low bits */
    for (uint32_t i = 0; i < n; i++)
        h = (h ^ (uint8_t)s[i]) * 16777619u;
    h ^= h >> 15;
    h *= 0x2c1b3c6du;
    return h ^ (h >> 12);
}

int32_t sh_token_find(const sh_tokenizer *t, const char *s, uint32_t n)
{
    if (n > t->text_max)
        return -1;
    for (uint32_t i = hash_text(s, n) & t->slot_mask;; i = (i + 1) & t->slot_mask) {
        if (t->slots[i] == 0)
            return -1;
        uint32_t id = t->slots[i] - 1, m;
        const char *text = sh_token_text(t, id, &m);
        if (m == n && memcmp(text, s, n) == 0)
            return (int32_t)id;
    }
}

int sh_token_parse_byte(const char *s, uint32_t n)
{
    static const char digits[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>')
        return -1;
    const char *high = memchr(digits, s[3], 16), *low = memchr(digits, s[4], 16);
    return high == NULL || low == NULL ? -1 : (int)((high - digits) * 16 + (low - digits));
}

/* ---- texts ---- */

static sh_status index_texts(sh_tokenizer *t, sh_error *err)
{
    uint32_t size = 16;
    while (size < 2 * t->n)
        size *= 2;
    t->slots = sh_calloc(size, sizeof *t->slots);
    if (t->slots == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    t->slot_mask = size - 1;
    for (uint32_t id = 0; id < t->n; id++) {
        uint32_t n;
        const char *text = sh_token_text(t, id, &n);
        t->text_max = SH_MAX(t->text_max, n);
        if (sh_token_find(t, text, n) >= 0)
            return sh_fail(err, SH_ERR_INVALID, "tokenizer.ggml.tokens: token %u is there twice",
                           id);
        uint32_t i = hash_text(text, n) & t->slot_mask;
        while (t->slots[i] != 0)
            i = (i + 1) & t->slot_mask;
        t->slots[i] = id + 1;
    }
    return SH_OK;
}

/* Copies the texts out of the file; an empty one gets the name that llama.cpp gives it. */
static sh_status copy_texts(sh_tokenizer *t, const char **texts, const uint32_t *lengths,
                            sh_error *err)
{
    size_t total = 0;
    for (uint32_t i = 0; i < t->n; i++)
        total += lengths[i] != 0 ? lengths[i] : EMPTY_TEXT_MAX;
    if (total > TEXT_BYTES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "tokenizer.ggml.tokens: over %u bytes of text",
                       TEXT_BYTES_MAX);
    t->texts = sh_calloc(total + 1, 1);
    t->offsets = sh_calloc((size_t)t->n + 1, sizeof *t->offsets);
    if (t->texts == NULL || t->offsets == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    uint32_t at = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        uint32_t n = lengths[i];
        if (n != 0)
            memcpy(t->texts + at, texts[i], n);
        else
            n = (uint32_t)snprintf(t->texts + at, EMPTY_TEXT_MAX, "[EMPTY_%u]", i);
        at += n;
        t->offsets[i + 1] = at;
    }
    return SH_OK;
}

static sh_status load_texts(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    sh_status status;
    const char **texts = sh_calloc(t->n, sizeof *texts);
    uint32_t *lengths = sh_calloc(t->n, sizeof *lengths);
    if (texts == NULL || lengths == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
        goto cleanup;
    }
    SH_GOTO(sh_gguf_get_strings(gguf, "tokenizer.ggml.tokens", texts, lengths, t->n, err));
    SH_GOTO(copy_texts(t, texts, lengths, err));
    SH_GOTO(index_texts(t, err));

cleanup:
    free(texts);
    free(lengths);
    return status;
}

/* ---- kinds ---- */

static sh_token_kind unstated_kind(const sh_tokenizer *t, uint32_t id)
{
    uint32_t n;
    const char *text = sh_token_text(t, id, &n);
    return t->pre == NULL && sh_token_parse_byte(text, n) >= 0 ? SH_TOKEN_BYTE : SH_TOKEN_NORMAL;
}

static sh_status load_kinds(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    static const char key[] = "tokenizer.ggml.token_type";
    size_t n;
    sh_status status;
    sh_error local = {0};
    int32_t *types = sh_calloc(t->n, sizeof *types);
    t->kinds = sh_calloc(t->n, 1);
    if (types == NULL || t->kinds == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
        goto cleanup;
    }
    status = sh_gguf_get_array_count(gguf, key, &n, &local);
    if (status != SH_OK && status != SH_ERR_NOT_FOUND) {
        status = sh_fail(err, status, "%s", local.text);
        goto cleanup;
    }
    const bool stated = status == SH_OK;
    if (stated && n != t->n) {
        status = sh_fail(err, SH_ERR_INVALID, "%s has %zu elements for %u tokens", key, n, t->n);
        goto cleanup;
    }
    status = SH_OK;
    if (stated)
        SH_GOTO(sh_gguf_get_i32s(gguf, key, types, n, err));
    for (uint32_t i = 0; i < t->n; i++) {
        if (!stated)
            t->kinds[i] = (uint8_t)unstated_kind(t, i);
        else if (types[i] >= SH_TOKEN_NORMAL && types[i] <= SH_TOKEN_BYTE)
            t->kinds[i] = (uint8_t)types[i];
    }

cleanup:
    free(types);
    return status;
}

/* ---- special tokens ---- */

static int32_t find_string(const sh_tokenizer *t, const char *text)
{
    return sh_token_find(t, text, (uint32_t)strlen(text));
}

/* The id under a key, or `standard` where the file has none or one out of range. */
static int32_t get_token_id(const sh_tokenizer *t, const sh_gguf *gguf, const char *key,
                            int32_t standard)
{
    uint64_t id;
    if (sh_gguf_get_u64(gguf, key, &id, NULL) == SH_OK && id < t->n)
        return (int32_t)id;
    return (uint32_t)standard < t->n ? standard : -1;
}

static void add_end(sh_tokenizer *t, int32_t id)
{
    if (id >= 0 && !sh_tokenizer_is_end(t, id) && t->n_ends < SH_TOKEN_ENDS_MAX)
        t->ends[t->n_ends++] = id;
}

/* What a token is for when the file does not say, by its text. Where several of a purpose are
 * there we take the first of the list; llama.cpp takes whichever its hash table has first. */
typedef struct {
    const char *key, *old_key;
    const char *texts[8];
    bool ends; /* it ends a generation */
} purpose;
enum { PURPOSE_EOT };
static const purpose purposes[] = {
    [PURPOSE_EOT] = {.key = "tokenizer.ggml.eot_token_id",
                     .texts = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>",
                               "<|endoftext|>", "<EOT>", "<｜end▁of▁sentence｜>"},
                     .ends = true},
    {.key = "tokenizer.ggml.eom_token_id", .texts = {"<|eom_id|>"}, .ends = true},
    {.key = "tokenizer.ggml.fim_pre_token_id",
     .old_key = "tokenizer.ggml.prefix_token_id",
     .texts = {"<|fim_prefix|>", "<fim-prefix>", "<｜fim▁begin｜>", "<PRE>"}},
    {.key = "tokenizer.ggml.fim_suf_token_id",
     .old_key = "tokenizer.ggml.suffix_token_id",
     .texts = {"<|fim_suffix|>", "<fim-suffix>", "<｜fim▁hole｜>", "<SUF>"}},
    {.key = "tokenizer.ggml.fim_mid_token_id",
     .old_key = "tokenizer.ggml.middle_token_id",
     .texts = {"<|fim_middle|>", "<fim-middle>", "<｜fim▁end｜>", "<MID>"}},
    {.key = "tokenizer.ggml.fim_pad_token_id",
     .texts = {"<|fim_pad|>", "<fim-pad>", "<PAD>"},
     .ends = true},
    {.key = "tokenizer.ggml.fim_rep_token_id",
     .texts = {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"},
     .ends = true},
    {.key = "tokenizer.ggml.fim_sep_token_id", .texts = {"<|file_sep|>"}, .ends = true},
};

/* A token that is found by its text is a control token, whatever the file says. */
static int32_t find_purpose(sh_tokenizer *t, const sh_gguf *gguf, const purpose *p)
{
    int32_t id = get_token_id(t, gguf, p->key, -1);
    if (p->old_key != NULL)
        id = get_token_id(t, gguf, p->old_key, id);
    for (size_t i = 0; id < 0 && i < SH_COUNT(p->texts) && p->texts[i] != NULL; i++) {
        id = find_string(t, p->texts[i]);
        if (id >= 0)
            t->kinds[id] = SH_TOKEN_CONTROL;
    }
    return id;
}

static void find_ends(sh_tokenizer *t, const sh_gguf *gguf)
{
    static const char *const always[] = {"<|eot_id|>",    "<|im_end|>", "<|end|>", "<end_of_turn>",
                                         "<|endoftext|>", "<|eom_id|>", "<EOT>"};
    for (size_t i = 0; i < SH_COUNT(purposes); i++) {
        const int32_t id = find_purpose(t, gguf, &purposes[i]);
        if (i == PURPOSE_EOT)
            t->eot = id;
        if (purposes[i].ends)
            add_end(t, id);
    }
    for (size_t i = 0; i < SH_COUNT(always); i++) {
        const int32_t id = find_string(t, always[i]);
        if (id >= 0)
            t->kinds[id] = SH_TOKEN_CONTROL;
        add_end(t, id);
    }
    add_end(t, t->eos);
}

static int compare_specials(const void *a, const void *b, void *arg)
{
    const sh_tokenizer *t = arg;
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    uint32_t nx, ny;
    sh_token_text(t, (uint32_t)x, &nx);
    sh_token_text(t, (uint32_t)y, &ny);
    if (nx != ny)
        return nx > ny ? -1 : 1;
    return x < y ? -1 : x > y;
}

static sh_status collect_specials(sh_tokenizer *t, sh_error *err)
{
    size_t n = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        const uint8_t kind = t->kinds[i];
        n += kind == SH_TOKEN_CONTROL || kind == SH_TOKEN_USER || kind == SH_TOKEN_UNKNOWN;
        t->has_user = t->has_user || kind == SH_TOKEN_USER;
    }
    t->specials = sh_calloc(n + 1, sizeof *t->specials);
    if (t->specials == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    for (uint32_t i = 0; i < t->n; i++) {
        const uint8_t kind = t->kinds[i];
        if (kind == SH_TOKEN_CONTROL || kind == SH_TOKEN_USER || kind == SH_TOKEN_UNKNOWN)
            t->specials[t->n_specials++] = (int32_t)i;
    }
    qsort_r(t->specials, t->n_specials, sizeof *t->specials, compare_specials, t);
    return SH_OK;
}

/* Whether the text under a key has a part, in any case of letters. */
static bool text_has(const sh_gguf *gguf, const char *key, const char *part)
{
    const char *text;
    size_t n;
    if (sh_gguf_get_string(gguf, key, &text, &n, NULL) != SH_OK)
        return false;
    for (size_t i = 0; i + strlen(part) <= n; i++)
        if (strncasecmp(text + i, part, strlen(part)) == 0)
            return true;
    return false;
}

/* Properties that GGUF does not hold; llama.cpp goes by the names of two families. */
static void find_strips(sh_tokenizer *t, const sh_gguf *gguf)
{
    t->strip_before_id = -1;
    if (text_has(gguf, "tokenizer.ggml.pre", "jina-v2-"))
        t->strip_before_id = find_string(t, "<mask>");
    else
        t->strip_after =
            text_has(gguf, "general.name", "phi-3") || text_has(gguf, "general.name", "phi3");
}

static sh_status load_settings(sh_tokenizer *t, const sh_gguf *gguf, sh_error *err)
{
    const bool llama = t->pre == NULL;
    t->bos = get_token_id(t, gguf, "tokenizer.ggml.bos_token_id",
                          llama            ? 1
                          : t->pre->no_bos ? -1
                                           : 11);
    t->eos = get_token_id(t, gguf, "tokenizer.ggml.eos_token_id", llama ? 2 : 11);
    t->add_bos = llama || t->pre->adds_bos;
    t->add_space_prefix = llama;
    bool v;
    if (sh_gguf_get_bool(gguf, "tokenizer.ggml.add_bos_token", &v, NULL) == SH_OK)
        t->add_bos = v;
    if (sh_gguf_get_bool(gguf, "tokenizer.ggml.add_eos_token", &v, NULL) == SH_OK)
        t->add_eos = v;
    if (llama && sh_gguf_get_bool(gguf, "tokenizer.ggml.add_space_prefix", &v, NULL) == SH_OK)
        t->add_space_prefix = v;
    if (t->add_bos && t->bos < 0)
        return sh_fail(err, SH_ERR_INVALID, "tokenizer: BOS is to be added, but there is none");
    if (t->add_eos && t->eos < 0)
        return sh_fail(err, SH_ERR_INVALID, "tokenizer: EOS is to be added, but there is none");
    return SH_OK;
}

static bool is_word(const char *text, size_t n, const char *word)
{
    return n == strlen(word) && memcmp(text, word, n) == 0;
}

static sh_status load(const sh_gguf *gguf, sh_tokenizer **out, sh_error *err)
{
    const char *model;
    size_t model_bytes, n;
    SH_TRY(sh_gguf_get_string(gguf, "tokenizer.ggml.model", &model, &model_bytes, err));
    const bool bpe = is_word(model, model_bytes, "gpt2");
    if (!bpe && !is_word(model, model_bytes, "llama"))
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "tokenizer '%.*s' is not supported (only 'llama' and 'gpt2' are)",
                       (int)SH_MIN(model_bytes, 64), model);
    SH_TRY(sh_gguf_get_array_count(gguf, "tokenizer.ggml.tokens", &n, err));
    if (n == 0 || n > SH_VOCAB_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "tokenizer.ggml.tokens has %zu tokens, not 1..%u", n,
                       SH_VOCAB_MAX);
    sh_status status;
    sh_tokenizer *t = sh_calloc(1, sizeof *t);
    if (t == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "tokenizer: out of memory");
    t->n = (uint32_t)n;
    SH_GOTO(load_texts(t, gguf, err));
    if (bpe)
        SH_GOTO(sh_bpe_load(t, gguf, err));
    SH_GOTO(load_kinds(t, gguf, err));
    if (!bpe)
        SH_GOTO(sh_spm_load(t, gguf, err));
    SH_GOTO(load_settings(t, gguf, err));
    find_ends(t, gguf);
    find_strips(t, gguf);
    SH_GOTO(collect_specials(t, err));
    *out = t;
    t = NULL;

cleanup:
    sh_tokenizer_destroy(&t);
    return status;
}

sh_status sh_tokenizer_load(const sh_gguf *gguf, sh_tokenizer **out, sh_error *err)
{
    const sh_status status = load(gguf, out, err);
    if (status != SH_OK)
        sh_blame_file(gguf, err);
    return status;
}

void sh_tokenizer_destroy(sh_tokenizer **tokenizer)
{
    sh_tokenizer *t = *tokenizer;
    if (t == NULL)
        return;
    free(t->texts);
    free(t->offsets);
    free(t->scores);
    free(t->kinds);
    free(t->slots);
    free(t->merges);
    free(t->merge_slots);
    free(t->specials);
    free(t);
    *tokenizer = NULL;
}
