/*
 * tokenizer.json (Hugging Face's tokenizers) to the keys tokenizer.ggml.*: byte-level BPE becomes
 * `gpt2`, SentencePiece's BPE with byte fallback `llama`. Whatever of normalizing, splitting and
 * merging has no counterpart there is refused, because other ids are worse than none; --pre says
 * that the caller knows better.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/model/convert_internal.h"

#define MARK         "\xe2\x96\x81" /* ▁ */
#define SPACE_SYMBOL "\xc4\xa0"     /* Ġ, a space in byte-level texts */
#define PAD_BYTES    20             /* "[PAD4194303]" */
#define SHOWN_BYTES  60             /* of a regular expression, in an error */

enum { KIND_NORMAL = 1, KIND_UNKNOWN, KIND_CONTROL, KIND_USER, KIND_UNUSED, KIND_BYTE };

typedef struct {
    const sh_hf_tokenizer *t;
    const json_t *model, *vocab;
    const char **texts; /* [n] */
    uint32_t *lengths;
    int32_t *kinds;
    float *scores;
    char (*padding)[PAD_BYTES]; /* texts of ids that no token has */
    uint32_t n;
    sh_buf merges; /* "a b\0" one after another */
    const char **merge_texts;
    uint32_t *merge_lengths;
    size_t n_merges;
    bool byte_level;
} table;

static sh_status fail(const table *b, sh_error *err, sh_status code, const char *what)
{
    return sh_fail(err, code, "%s/tokenizer.json: %s", b->t->folder, what);
}

static const char *type_of(const json_t *object)
{
    const char *type = json_string_value(json_object_get(object, "type"));
    return type != NULL ? type : "";
}

/* The i-th of what a Sequence holds under `key`, or the thing itself; NULL after the last. */
static const json_t *part_of(const json_t *object, const char *key, size_t i)
{
    if (object == NULL || json_is_null(object))
        return NULL;
    if (strcmp(type_of(object), "Sequence") == 0)
        return json_array_get(json_object_get(object, key), i);
    return i == 0 ? object : NULL;
}

static const json_t *find_part(const json_t *object, const char *key, const char *type)
{
    const json_t *part;
    for (size_t i = 0; (part = part_of(object, key, i)) != NULL; i++)
        if (strcmp(type_of(part), type) == 0)
            return part;
    return NULL;
}

/* ---- tokens ---- */

static sh_status put_token(table *b, const char *text, json_int_t id, int32_t kind, sh_error *err)
{
    if (id < 0 || id >= (json_int_t)b->n)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s/tokenizer.json: the token '%.32s' has the id %lld, the model has %u "
                       "('vocab_size')",
                       b->t->folder, text, (long long)id, b->n);
    if (b->texts[id] != NULL && strcmp(b->texts[id], text) != 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s/tokenizer.json: '%.32s' and '%.32s' have the same id %lld", b->t->folder,
                       b->texts[id], text, (long long)id);
    b->texts[id] = text;
    b->lengths[id] = (uint32_t)strlen(text);
    b->kinds[id] = kind;
    return SH_OK;
}

static bool is_byte_token(const char *text)
{
    return strlen(text) == 6 && strncmp(text, "<0x", 3) == 0 && isxdigit((unsigned char)text[3]) &&
           isxdigit((unsigned char)text[4]) && text[5] == '>';
}

static sh_status read_vocab(table *b, sh_error *err)
{
    const char *unknown = json_string_value(json_object_get(b->model, "unk_token"));
    const char *text;
    json_t *id;
    b->vocab = json_object_get(b->model, "vocab");
    if (!json_is_object(b->vocab))
        return fail(b, err, SH_ERR_INVALID, "'model.vocab' is no object");
    json_object_foreach((json_t *)(uintptr_t)b->vocab, text, id)
    {
        int32_t kind = KIND_NORMAL;
        if (!json_is_integer(id))
            return fail(b, err, SH_ERR_INVALID, "an id in 'model.vocab' is no integer");
        if (!b->byte_level && is_byte_token(text))
            kind = KIND_BYTE;
        else if (!b->byte_level && unknown != NULL && strcmp(text, unknown) == 0)
            kind = KIND_UNKNOWN;
        SH_TRY(put_token(b, text, json_integer_value(id), kind, err));
    }
    return SH_OK;
}

/* Added tokens that look like markers and are not said to be: llama.cpp's converter takes them for
 * control tokens, too. */
static bool looks_special(const char *text)
{
    const size_t n = strlen(text);
    return strcmp(text, "<pad>") == 0 || strcmp(text, "<mask>") == 0 ||
           (n >= 4 && strncmp(text, "<|", 2) == 0 && strcmp(text + n - 2, "|>") == 0);
}

static sh_status read_added(table *b, sh_error *err)
{
    const json_t *added = json_object_get(b->t->tokenizer, "added_tokens"), *token;
    size_t i;
    json_array_foreach(added, i, token)
    {
        const char *text = json_string_value(json_object_get(token, "content"));
        const json_t *id = json_object_get(token, "id");
        if (text == NULL || !json_is_integer(id))
            return fail(b, err, SH_ERR_INVALID, "an added token has no 'content' or no 'id'");
        const json_int_t v = json_integer_value(id);
        const bool special = json_is_true(json_object_get(token, "special")) || looks_special(text);
        int32_t kind = special ? KIND_CONTROL : KIND_USER;
        if (v >= 0 && v < (json_int_t)b->n && b->kinds[v] == KIND_UNKNOWN)
            kind = KIND_UNKNOWN;
        SH_TRY(put_token(b, text, v, kind, err));
    }
    return SH_OK;
}

static void fill_gaps(table *b)
{
    for (uint32_t i = 0; i < b->n; i++) {
        if (b->texts[i] != NULL)
            continue;
        b->lengths[i] = (uint32_t)snprintf(b->padding[i], PAD_BYTES, "[PAD%u]", i);
        b->texts[i] = b->padding[i];
        b->kinds[i] = KIND_UNUSED;
    }
}

/* -1: no token has this text. Added tokens first: their text is whole. */
static int64_t find_token(const table *b, const char *text)
{
    const json_t *added = json_object_get(b->t->tokenizer, "added_tokens"), *token;
    size_t i;
    json_array_foreach(added, i, token)
    {
        const char *content = json_string_value(json_object_get(token, "content"));
        if (content != NULL && strcmp(content, text) == 0)
            return json_integer_value(json_object_get(token, "id"));
    }
    const json_t *id = json_object_get(b->vocab, text);
    return id != NULL ? json_integer_value(id) : -1;
}

/* ---- merges ---- */

/* The text of one half; spaces, which separate the halves, as the byte-level alphabet has them. */
static sh_status append_half(sh_buf *out, const char *text)
{
    for (; *text != '\0'; text++) {
        if (*text == ' ')
            SH_TRY(sh_buf_append(out, SPACE_SYMBOL, strlen(SPACE_SYMBOL)));
        else
            SH_TRY(sh_buf_append(out, text, 1));
    }
    return SH_OK;
}

/* "a b", or ["a", "b"]. */
static sh_status read_merge(table *b, const json_t *merge, size_t i, sh_error *err)
{
    const char *first = json_string_value(json_array_get(merge, 0));
    const char *second = json_string_value(json_array_get(merge, 1));
    const char *both = json_string_value(merge);
    const char *space = both != NULL ? strchr(both, ' ') : NULL;
    const size_t start = b->merges.len;
    sh_status status = SH_OK;
    if (both != NULL
            ? space == NULL || space == both || space[1] == '\0' || strchr(space + 1, ' ') != NULL
            : first == NULL || second == NULL || json_array_size(merge) != 2)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s/tokenizer.json: entry %zu of 'model.merges' is neither \"a b\" nor "
                       "[\"a\", \"b\"]",
                       b->t->folder, i);
    if (both != NULL) {
        status = sh_buf_append(&b->merges, both, strlen(both));
    } else {
        status = append_half(&b->merges, first);
        if (status == SH_OK)
            status = sh_buf_append(&b->merges, " ", 1);
        if (status == SH_OK)
            status = append_half(&b->merges, second);
    }
    b->merge_lengths[i] = (uint32_t)(b->merges.len - start);
    if (status == SH_OK)
        status = sh_buf_append(&b->merges, "", 1);
    return status == SH_OK ? SH_OK : fail(b, err, status, "out of memory for the merges");
}

static sh_status read_merges(table *b, sh_error *err)
{
    const json_t *merges = json_object_get(b->model, "merges"), *merge;
    size_t i;
    if (!json_is_array(merges) || json_array_size(merges) == 0)
        return fail(b, err, SH_ERR_INVALID, "'model.merges' is no list, or empty");
    b->n_merges = json_array_size(merges);
    b->merge_texts = sh_calloc(b->n_merges, sizeof *b->merge_texts);
    b->merge_lengths = sh_calloc(b->n_merges, sizeof *b->merge_lengths);
    if (b->merge_texts == NULL || b->merge_lengths == NULL)
        return fail(b, err, SH_ERR_NO_MEMORY, "out of memory for the merges");
    json_array_foreach(merges, i, merge) SH_TRY(read_merge(b, merge, i, err));
    const char *at = (const char *)b->merges.data;
    for (i = 0; i < b->n_merges; i++) {
        b->merge_texts[i] = at;
        at += b->merge_lengths[i] + 1;
    }
    return SH_OK;
}

/* The id that a merge makes, -1 when it is not in the vocabulary. */
static sh_status merged_id(const table *b, size_t i, sh_buf *scratch, int64_t *out)
{
    const char *space = strchr(b->merge_texts[i], ' ');
    const size_t n = (size_t)(space - b->merge_texts[i]);
    sh_buf_clear(scratch);
    SH_TRY(sh_buf_append(scratch, b->merge_texts[i], n));
    SH_TRY(sh_buf_append(scratch, space + 1, b->merge_lengths[i] - n));
    const json_t *id = json_object_get(b->vocab, (const char *)scratch->data);
    *out = id != NULL ? json_integer_value(id) : -1;
    return SH_OK;
}

/* SentencePiece merges by the score of what comes out, so a token that is merged earlier has the
 * higher one. Its own files have them in the order of ids; where that is not the order of the
 * merges, the first merge that makes a token decides. */
static sh_status make_scores(table *b, sh_error *err)
{
    sh_status status = SH_OK;
    sh_buf scratch;
    bool ordered = true;
    int64_t id = 0, before = -1;
    sh_buf_init(&scratch, SH_JSON_BYTES_MAX);
    for (uint32_t i = 0; i < b->n; i++)
        b->scores[i] = b->kinds[i] == KIND_NORMAL ? -(float)i : 0;
    for (size_t i = 0; i < b->n_merges; i++) {
        SH_GOTO(merged_id(b, i, &scratch, &id));
        if (id < 0)
            continue;
        ordered = ordered && id >= before;
        before = id;
    }
    for (size_t i = b->n_merges; !ordered && i-- > 0;) { /* the first one is the last to write */
        SH_GOTO(merged_id(b, i, &scratch, &id));
        if (id >= 0 && b->kinds[id] == KIND_NORMAL)
            b->scores[id] = -(float)i;
    }

cleanup:
    sh_buf_release(&scratch);
    return status == SH_OK ? SH_OK : fail(b, err, status, "out of memory for the scores");
}

/* ---- how text is cut before merging ---- */

#define CONTRACTIONS  "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
#define CONTRACTIONS2 "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
#define WORD          "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define REST          "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* NULL: none that we know. Llama 3's merges are ignored where a whole word is a token; smaug-bpe
 * has its expression without that. */
static const char *pre_of_expression(const char *text, bool keeps_merges)
{
    static const struct {
        const char *text, *pre;
    } known[] = {
        {CONTRACTIONS WORD "\\p{N}{1,3}" REST, "llama-bpe"},
        {CONTRACTIONS2 WORD "\\p{N}{1,3}" REST, "llama-bpe"},
        {CONTRACTIONS WORD "\\p{N}" REST, "qwen2"},
        {CONTRACTIONS2 WORD "\\p{N}" REST, "qwen2"},
        {"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
         "gpt-2"},
        {"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
         "gpt-2"},
    };
    for (size_t i = 0; i < SH_COUNT(known); i++)
        if (strcmp(known[i].text, text) == 0)
            return keeps_merges && strcmp(known[i].pre, "llama-bpe") == 0 ? "smaug-bpe"
                                                                          : known[i].pre;
    return NULL;
}

static sh_status refuse_parts(const table *b, const json_t *parts, sh_error *err)
{
    char types[160] = "";
    const json_t *part;
    for (size_t i = 0; (part = part_of(parts, "pretokenizers", i)) != NULL; i++) {
        const size_t n = strlen(types);
        snprintf(types + n, sizeof types - n, "%s%.32s", i > 0 ? ", " : "", type_of(part));
    }
    return sh_fail(
        err, SH_ERR_UNSUPPORTED,
        "%s/tokenizer.json: a pre_tokenizer of %s is not known; name the rule that it is "
        "with --pre NAME",
        b->t->folder, types[0] != '\0' ? types : "nothing");
}

/* A Split by a regular expression, then bytes. */
static sh_status pre_of_split(const table *b, const json_t *split, const char **out, sh_error *err)
{
    const char *text =
        json_string_value(json_object_get(json_object_get(split, "pattern"), "Regex"));
    const char *behavior = json_string_value(json_object_get(split, "behavior"));
    const bool keeps_merges = json_is_false(json_object_get(b->model, "ignore_merges"));
    const char *pre = text != NULL ? pre_of_expression(text, keeps_merges) : NULL;
    if (pre != NULL && behavior != NULL && strcmp(behavior, "Isolated") == 0 &&
        !json_is_true(json_object_get(split, "invert"))) {
        *out = pre;
        return SH_OK;
    }
    return sh_fail(
        err, SH_ERR_UNSUPPORTED,
        "%s/tokenizer.json: the pre_tokenizer's expression \"%.*s%s\" is not known; name "
        "the rule that it is with --pre NAME",
        b->t->folder, SHOWN_BYTES, text != NULL ? text : "(none)",
        text != NULL && strlen(text) > SHOWN_BYTES ? "..." : "");
}

/* Only what has no counterpart: NFC is left out, as llama.cpp does. */
static sh_status check_byte_normalizer(const table *b, sh_error *err)
{
    const json_t *normalizer = json_object_get(b->t->tokenizer, "normalizer"), *part;
    for (size_t i = 0; (part = part_of(normalizer, "normalizers", i)) != NULL; i++)
        if (strcmp(type_of(part), "NFC") != 0)
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "%s/tokenizer.json: the normalizer '%.32s' is not supported",
                           b->t->folder, type_of(part));
    return SH_OK;
}

static sh_status find_pre(const table *b, const char **out, sh_error *err)
{
    const json_t *parts = json_object_get(b->t->tokenizer, "pre_tokenizer");
    const json_t *first = part_of(parts, "pretokenizers", 0);
    const json_t *second = part_of(parts, "pretokenizers", 1);
    const json_t *bytes = second != NULL ? second : first;
    if (b->t->pre != NULL) {
        *out = b->t->pre;
        return SH_OK;
    }
    SH_TRY(check_byte_normalizer(b, err));
    const bool cuts = !json_is_false(json_object_get(bytes, "use_regex"));
    if (strcmp(type_of(bytes), "ByteLevel") != 0 || part_of(parts, "pretokenizers", 2) != NULL)
        return refuse_parts(b, parts, err);
    if (json_is_true(json_object_get(bytes, "add_prefix_space")))
        return fail(b, err, SH_ERR_UNSUPPORTED,
                    "'add_prefix_space' of the pre_tokenizer is not supported");
    if (second == NULL && cuts)
        *out = "gpt-2";
    else if (second != NULL && cuts && strcmp(type_of(first), "Digits") == 0 &&
             json_is_true(json_object_get(first, "individual_digits")))
        *out = "smollm";
    else if (second != NULL && !cuts && strcmp(type_of(first), "Split") == 0)
        return pre_of_split(b, first, out, err);
    else
        return refuse_parts(b, parts, err);
    return SH_OK;
}

/* SentencePiece's form: spaces become MARK, one may be put before the text. */
static sh_status find_prefix(const table *b, bool *out, sh_error *err)
{
    const json_t *normalizer = json_object_get(b->t->tokenizer, "normalizer"), *part;
    const json_t *cutter = json_object_get(b->t->tokenizer, "pre_tokenizer");
    bool prefix = false, marks = false;
    for (size_t i = 0; (part = part_of(normalizer, "normalizers", i)) != NULL; i++) {
        const char *type = type_of(part), *mark = NULL;
        if (strcmp(type, "Prepend") == 0)
            mark = json_string_value(json_object_get(part, "prepend"));
        else if (strcmp(type, "Replace") == 0)
            mark = json_string_value(json_object_get(part, "content"));
        if (mark == NULL || strcmp(mark, MARK) != 0)
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "%s/tokenizer.json: the normalizer '%.32s' is not supported",
                           b->t->folder, type);
        prefix |= strcmp(type, "Prepend") == 0;
        marks |= strcmp(type, "Replace") == 0;
    }
    for (size_t i = 0; (part = part_of(cutter, "pretokenizers", i)) != NULL; i++) {
        const char *scheme = json_string_value(json_object_get(part, "prepend_scheme"));
        if (strcmp(type_of(part), "Metaspace") != 0 || json_is_true(json_object_get(part, "split")))
            return refuse_parts(b, cutter, err);
        marks = true;
        prefix |= scheme != NULL ? strcmp(scheme, "never") != 0
                                 : !json_is_false(json_object_get(part, "add_prefix_space"));
    }
    if (!marks)
        return fail(b, err, SH_ERR_UNSUPPORTED,
                    "neither its normalizer nor its pre_tokenizer replaces spaces: this form of "
                    "byte fallback is not supported");
    *out = prefix;
    return sh_hf_get_bool(b->t->settings, "tokenizer_config.json", "add_prefix_space", out, err);
}

/* ---- special tokens ---- */

static const char *setting_text(const table *b, const char *key)
{
    const json_t *value = json_object_get(b->t->settings, key);
    return json_string_value(json_is_object(value) ? json_object_get(value, "content") : value);
}

/* By tokenizer_config.json's text, else by config.json's id (of a list the first); -1: none. */
static int64_t special_id(const table *b, const char *role)
{
    char key[32];
    int64_t id = -1;
    snprintf(key, sizeof key, "%s_token", role);
    const char *text = setting_text(b, key);
    if (text != NULL)
        id = find_token(b, text);
    if (id < 0 && strcmp(role, "unk") == 0 && !b->byte_level) {
        text = json_string_value(json_object_get(b->model, "unk_token"));
        id = text != NULL ? find_token(b, text) : -1;
    }
    if (id < 0) {
        snprintf(key, sizeof key, "%s_token_id", role);
        const json_t *value = json_object_get(b->t->config, key);
        if (json_is_array(value))
            value = json_array_get(value, 0);
        if (json_is_integer(value))
            id = json_integer_value(value);
    }
    return id < (int64_t)b->n ? id : -1;
}

/* Whether the post_processor puts the token first (or last) around a text. */
static bool template_has(const table *b, int64_t id, bool last)
{
    const json_t *processor = json_object_get(b->t->tokenizer, "post_processor");
    const json_t *single =
        json_object_get(find_part(processor, "processors", "TemplateProcessing"), "single");
    const size_t n = json_array_size(single);
    const json_t *edge = json_array_get(single, last && n > 0 ? n - 1 : 0);
    const char *text =
        json_string_value(json_object_get(json_object_get(edge, "SpecialToken"), "id"));
    return text != NULL && id >= 0 && find_token(b, text) == id;
}

static sh_status write_special(const table *b, sh_gguf_writer *w, sh_error *err)
{
    static const struct {
        const char *role, *key;
    } roles[] = {
        {"bos", "tokenizer.ggml.bos_token_id"},
        {"eos", "tokenizer.ggml.eos_token_id"},
        {"unk", "tokenizer.ggml.unknown_token_id"},
        {"pad", "tokenizer.ggml.padding_token_id"},
    };
    const char *file = "tokenizer_config.json";
    for (size_t i = 0; i < SH_COUNT(roles); i++) {
        const int64_t id = special_id(b, roles[i].role);
        if (id >= 0)
            SH_TRY(sh_gguf_writer_set_u32(w, roles[i].key, (uint32_t)id));
    }
    bool bos = template_has(b, special_id(b, "bos"), false);
    bool eos = template_has(b, special_id(b, "eos"), true);
    const bool said = b->byte_level || bos || sh_hf_has(b->t->settings, "add_bos_token");
    SH_TRY(sh_hf_get_bool(b->t->settings, file, "add_bos_token", &bos, err));
    SH_TRY(sh_hf_get_bool(b->t->settings, file, "add_eos_token", &eos, err));
    if (said) /* else the format's default: yes for `llama` */
        SH_TRY(sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_bos_token", bos));
    return sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_eos_token", eos);
}

/* A text, or of a list of {name, template} the one named default. */
static const char *chat_template(const table *b)
{
    const json_t *value = json_object_get(b->t->settings, "chat_template"), *entry;
    size_t i;
    if (b->t->template != NULL)
        return b->t->template;
    json_array_foreach(value, i, entry)
    {
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name != NULL && strcmp(name, "default") == 0)
            return json_string_value(json_object_get(entry, "template"));
    }
    return json_string_value(value);
}

/* ---- whole ---- */

static sh_status write_tokens(const table *b, sh_gguf_writer *w)
{
    SH_TRY(sh_gguf_writer_set_strings(w, "tokenizer.ggml.tokens", b->texts, b->lengths, b->n));
    if (!b->byte_level)
        SH_TRY(sh_gguf_writer_set_f32s(w, "tokenizer.ggml.scores", b->scores, b->n));
    SH_TRY(sh_gguf_writer_set_i32s(w, "tokenizer.ggml.token_type", b->kinds, b->n));
    if (b->byte_level)
        SH_TRY(sh_gguf_writer_set_strings(w, "tokenizer.ggml.merges", b->merge_texts,
                                          b->merge_lengths, b->n_merges));
    return SH_OK;
}

static sh_status write_kind(table *b, sh_gguf_writer *w, sh_error *err)
{
    if (b->byte_level) {
        const char *pre = NULL;
        SH_TRY(find_pre(b, &pre, err));
        SH_TRY(sh_gguf_writer_set_string(w, "tokenizer.ggml.model", "gpt2"));
        return sh_gguf_writer_set_string(w, "tokenizer.ggml.pre", pre);
    }
    bool prefix = false;
    SH_TRY(find_prefix(b, &prefix, err));
    SH_TRY(make_scores(b, err));
    SH_TRY(sh_gguf_writer_set_string(w, "tokenizer.ggml.model", "llama"));
    SH_TRY(sh_gguf_writer_set_string(w, "tokenizer.ggml.pre", "default"));
    return sh_gguf_writer_set_bool(w, "tokenizer.ggml.add_space_prefix", prefix);
}

static sh_status check_kind(table *b, sh_error *err)
{
    b->model = json_object_get(b->t->tokenizer, "model");
    const char *type = type_of(b->model);
    if (strcmp(type, "BPE") != 0 && (type[0] != '\0' || !sh_hf_has(b->model, "merges")))
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "%s/tokenizer.json: 'model.type' is '%.32s', only BPE is supported",
                       b->t->folder, type);
    if (json_is_true(json_object_get(b->model, "byte_fallback")))
        return SH_OK;
    b->byte_level =
        find_part(json_object_get(b->t->tokenizer, "pre_tokenizer"), "pretokenizers",
                  "ByteLevel") != NULL ||
        find_part(json_object_get(b->t->tokenizer, "decoder"), "decoders", "ByteLevel") != NULL;
    if (!b->byte_level)
        return fail(b, err, SH_ERR_UNSUPPORTED,
                    "a BPE that is neither byte-level nor has 'byte_fallback' is not supported");
    return SH_OK;
}

static sh_status write_all(table *b, sh_gguf_writer *w, sh_error *err)
{
    SH_TRY(check_kind(b, err));
    b->texts = sh_calloc(b->n, sizeof *b->texts);
    b->lengths = sh_calloc(b->n, sizeof *b->lengths);
    b->kinds = sh_calloc(b->n, sizeof *b->kinds);
    b->scores = sh_calloc(b->n, sizeof *b->scores);
    b->padding = sh_calloc(b->n, sizeof *b->padding);
    if (b->texts == NULL || b->lengths == NULL || b->kinds == NULL || b->scores == NULL ||
        b->padding == NULL)
        return fail(b, err, SH_ERR_NO_MEMORY, "out of memory for the tokens");
    SH_TRY(read_vocab(b, err));
    SH_TRY(read_added(b, err));
    SH_TRY(read_merges(b, err));
    fill_gaps(b);
    SH_TRY(write_kind(b, w, err));
    SH_TRY(write_tokens(b, w));
    SH_TRY(write_special(b, w, err));
    const char *text = chat_template(b);
    return text != NULL ? sh_gguf_writer_set_string(w, "tokenizer.chat_template", text) : SH_OK;
}

sh_status sh_hf_tokenizer_write(const sh_hf_tokenizer *t, sh_gguf_writer *w, sh_error *err)
{
    table b = {.t = t, .n = t->vocab};
    sh_error local = {0};
    sh_buf_init(&b.merges, SH_JSON_BYTES_MAX);
    sh_status status = write_all(&b, w, &local);
    if (status != SH_OK && local.text[0] == '\0')
        sh_fail(&local, status, "%s/tokenizer.json: cannot write its keys: %s", t->folder,
                sh_status_name(status));
    if (status != SH_OK && err != NULL)
        *err = local;
    free(b.texts);
    free(b.lengths);
    free(b.kinds);
    free(b.scores);
    free(b.padding);
    sh_buf_release(&b.merges);
    free(b.merge_texts);
    free(b.merge_lengths);
    return status;
}
