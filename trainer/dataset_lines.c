/*
 * JSON Lines (jsonlines.org): a line is an object of one of three shapes, which dataset.h has.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/json.h"
#include "trainer/dataset_internal.h"

#define PLACE_BYTES 320 /* of an error's text */

static const sh_json_limits limits = {SH_DATASET_LINE_BYTES_MAX, SH_DATASET_LINE_VALUES,
                                      SH_DATASET_LINE_DEPTH};

static void place_of(const sh_json_line *line, char place[PLACE_BYTES])
{
    snprintf(place, PLACE_BYTES, "%s:%zu", line->name, line->number);
}

static sh_status refuse(const sh_json_line *line, sh_error *err, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static sh_status refuse(const sh_json_line *line, sh_error *err, const char *format, ...)
{
    char text[SH_ERROR_TEXT_BYTES], place[PLACE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    place_of(line, place);
    return sh_fail(err, SH_ERR_INVALID, "%s: %s", place, text);
}

typedef struct {
    const char *text;
    size_t bytes;
} string;

static sh_status get_string(const sh_json_line *line, const json_t *object, const char *key,
                            string *out, sh_error *err)
{
    const json_t *value = json_object_get(object, key);
    if (!value)
        return refuse(line, err, "\"%s\" is missing: give it as a string", key);
    if (!json_is_string(value))
        return refuse(line, err, "\"%s\" must be a string", key);
    *out = (string){json_string_value(value), json_string_length(value)};
    return SH_OK;
}

/* ---- the shapes ---- */

static sh_status read_text(tr_reader *r, const sh_json_line *line, const json_t *root,
                           sh_error *err)
{
    string text = {0};
    SH_TRY(get_string(line, root, "text", &text, err));
    SH_TRY(tr_dataset_put_text(r, text.text, text.bytes, SH_TOKENIZE_BOS, SH_TRAIN_TARGET, err));
    if (text.bytes > 0 && r->options->eos != SH_DATASET_EOS_NONE)
        SH_TRY(tr_dataset_put_eos(r));
    return tr_dataset_close(
        r->dataset, (tr_document){.kind = TR_LINE_TEXT, .line = (uint32_t)line->number}, NULL);
}

static sh_status close_sample(tr_reader *r, const sh_json_line *line, tr_document_kind kind,
                              sh_error *err)
{
    bool kept = false;
    SH_TRY(tr_dataset_close(r->dataset, (tr_document){.kind = kind, .line = (uint32_t)line->number},
                            &kept));
    return kept ? SH_OK
                : refuse(line, err,
                         "nothing to learn: the completion is empty, or nothing is before it: "
                         "leave the line out");
}

/* The completion is tokenized apart from the prompt, as a generation goes on behind one. */
static sh_status read_prompt(tr_reader *r, const sh_json_line *line, const json_t *root,
                             sh_error *err)
{
    string prompt = {0}, completion = {0};
    SH_TRY(get_string(line, root, "prompt", &prompt, err));
    SH_TRY(get_string(line, root, "completion", &completion, err));
    SH_TRY(tr_dataset_put_text(r, prompt.text, prompt.bytes, SH_TOKENIZE_BOS, 0, err));
    SH_TRY(tr_dataset_put_text(r, completion.text, completion.bytes,
                               prompt.bytes > 0 ? SH_TOKENIZE_CONTINUE : 0, SH_TRAIN_TARGET, err));
    SH_TRY(tr_dataset_put_eos(r));
    return close_sample(r, line, TR_PROMPT, err);
}

static sh_status read_message(const sh_json_line *line, const json_t *value, size_t i,
                              sh_chat_message *out, sh_error *err)
{
    const json_t *role = json_object_get(value, "role");
    const json_t *content = json_object_get(value, "content");
    if (!json_is_object(value) || !json_is_string(role) || !json_is_string(content))
        return refuse(line, err,
                      "message %zu: it must be an object with the strings \"role\" and \"content\"",
                      i);
    *out = (sh_chat_message){json_string_value(role), json_string_value(content),
                             json_string_length(content)};
    return SH_OK;
}

static sh_status put_chat(tr_reader *r, const sh_json_line *line, const sh_chat_message *messages,
                          size_t n, sh_error *err)
{
    sh_dataset *d = r->dataset;
    sh_chat_tokens chat = {0};
    sh_error why = {0};
    char place[PLACE_BYTES];
    sh_status status =
        sh_chat_tokenize_spoken(r->options->tokenizer, r->options->chat, messages, n, &chat, &why);
    if (status != SH_OK) {
        place_of(line, place);
        return sh_fail(err, status, "%s: %s", place, why.text);
    }
    status = tr_dataset_put(d, chat.tokens, chat.n, 0);
    for (size_t i = 0; status == SH_OK && i < chat.n; i++)
        d->mask[d->open_at + i] = chat.spoken[i] ? SH_TRAIN_TARGET : 0;
    free(chat.tokens);
    free(chat.spoken);
    return status == SH_OK ? close_sample(r, line, TR_CHAT, err) : status;
}

static sh_status read_chat(tr_reader *r, const sh_json_line *line, const json_t *root,
                           sh_error *err)
{
    sh_status status = SH_OK;
    const json_t *array = json_object_get(root, "messages");
    const size_t n = json_array_size(array);
    size_t n_used = 0; /* up to the assistant's last */
    if (!json_is_array(array) || n == 0)
        return refuse(line, err, "\"messages\" must be an array of at least one message");
    sh_chat_message *messages = sh_calloc(n, sizeof *messages);
    if (!messages)
        return SH_ERR_NO_MEMORY;
    for (size_t i = 0; i < n; i++) {
        SH_GOTO(read_message(line, json_array_get(array, i), i, &messages[i], err));
        if (strcmp(messages[i].role, "assistant") == 0)
            n_used = i + 1;
    }
    if (n_used == 0)
        SH_GOTO(refuse(line, err,
                       "no message has the role assistant: nothing to learn: leave the line out"));
    SH_GOTO(put_chat(r, line, messages, n_used, err));
cleanup:
    free(messages);
    return status;
}

/* ---- lines ---- */

static sh_status read_object(tr_reader *r, const sh_json_line *line, const json_t *root,
                             sh_error *err)
{
    if (!json_is_object(root))
        return refuse(line, err, "the line is no JSON object: write one object a line");
    const bool text = json_object_get(root, "text") != NULL;
    const bool chat = json_object_get(root, "messages") != NULL;
    const bool prompt = json_object_get(root, "prompt") || json_object_get(root, "completion");
    if (text + chat + prompt > 1)
        return refuse(line, err,
                      "more than one of \"text\", \"messages\" and \"prompt\" with \"completion\": "
                      "keep one");
    if (text + chat + prompt == 0)
        return refuse(line, err,
                      "the object has none of \"text\", \"messages\" and \"prompt\" with "
                      "\"completion\": give one");
    return text   ? read_text(r, line, root, err)
           : chat ? read_chat(r, line, root, err)
                  : read_prompt(r, line, root, err);
}

static sh_status read_line(tr_reader *r, const sh_json_line *line, sh_error *err)
{
    json_t *root = NULL;
    sh_error why = {0};
    char place[PLACE_BYTES];
    sh_status status = sh_json_decode_line(line, &limits, &root, &why);
    if (status != SH_OK)
        return sh_fail(err, status, "%s: %s", why.text,
                       status == SH_ERR_LIMIT ? "split the document over more lines"
                                              : "write one JSON object a line");
    status = read_object(r, line, root, err);
    json_decref(root);
    place_of(line, place);
    return status == SH_OK ? SH_OK : tr_dataset_full(status, place, err);
}

static bool is_blank(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (text[i] != ' ' && text[i] != '\t' && text[i] != '\r')
            return false;
    return true;
}

sh_status tr_dataset_read_lines(tr_reader *r, const char *bytes, size_t n, sh_error *err)
{
    const sh_dataset *d = r->dataset;
    sh_json_line line = {.name = d->files[d->n_files - 1]};
    if (n >= 3 && memcmp(bytes, "\xef\xbb\xbf", 3) == 0) { /* a byte order mark */
        bytes += 3;
        n -= 3;
    }
    for (size_t at = 0; at < n; at += line.bytes + 1) {
        const char *end = memchr(bytes + at, '\n', n - at);
        line.number++;
        line.text = bytes + at;
        line.bytes = end ? (size_t)(end - line.text) : n - at;
        if (!is_blank(line.text, line.bytes))
            SH_TRY(read_line(r, &line, err));
    }
    return SH_OK;
}
