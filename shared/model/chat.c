/*
 * A conversation is put together as a run of text and markers. A marker that the vocabulary has as
 * a special token becomes that token; the text between two of them is tokenized as one piece, so
 * that ids are those that llama.cpp has for the whole string, but without looking for special
 * tokens in it: what users wrote stays text. A marker that the vocabulary does not have is text
 * itself, as it was when such a model was tuned.
 */
#include "shared/model/chat.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROLE_BYTES 32

typedef struct {
    const sh_tokenizer *tokenizer;
    sh_chat_family family;
    sh_buf text; /* not tokenized yet */
    size_t text_bytes;
    bool goes_on;     /* the text continues what is before it, without a space of its own */
    bool inside_turn; /* Llama 2: after [INST], before the answer's end */
    bool keeps_spoken, speaking, opened; /* plain: the next turn's role is there already */
    int32_t *tokens;
    uint8_t *spoken; /* where it is kept */
    size_t n, cap, spoken_cap;
    sh_error *err;
} builder;

static const char *const family_names[SH_CHAT_FAMILIES] = {"plain", "chatml", "llama2", "llama3",
                                                           "zephyr"};

const char *sh_chat_family_name(sh_chat_family family)
{
    SH_ASSERT(family < SH_CHAT_FAMILIES);
    return family_names[family];
}

sh_status sh_chat_parse_family(const char *name, sh_chat_family *out, sh_error *err)
{
    for (int i = 0; i < SH_CHAT_FAMILIES; i++)
        if (strcmp(name, family_names[i]) == 0) {
            *out = (sh_chat_family)i;
            return SH_OK;
        }
    return sh_fail(err, SH_ERR_USAGE,
                   "'%.100s' is no chat template: chatml, llama2, llama3, zephyr, plain are", name);
}

sh_chat_family sh_chat_detect(const sh_gguf *gguf)
{
    const char *text;
    size_t n;
    if (sh_gguf_get_string(gguf, "tokenizer.chat_template", &text, &n, NULL) != SH_OK)
        return SH_CHAT_PLAIN;
#define HAS(piece) (memmem(text, n, piece, sizeof(piece) - 1) != NULL)
    /* In this order: templates quote each other's markers. */
    if (HAS("<|im_start|>"))
        return HAS("<|im_sep|>") ? SH_CHAT_PLAIN : SH_CHAT_CHATML; /* Phi 4 */
    if (HAS("[INST]"))
        return HAS("[SYSTEM_PROMPT]") || HAS("[AVAILABLE_TOOLS]") ||
                       HAS("' [INST] ' + system_message")
                   ? SH_CHAT_PLAIN /* Mistral's three, which share only the marker */
                   : SH_CHAT_LLAMA2;
    if (HAS("<|assistant|>") && HAS("<|end|>"))
        return SH_CHAT_PLAIN; /* Phi 3 */
    if (HAS("<|user|>") && HAS("<|assistant|>") && (HAS("</s>") || HAS("[gMASK]")))
        return SH_CHAT_PLAIN; /* Falcon 3, GLM Edge: no end token after a user's turn */
    if (HAS("<|user|>") && (HAS("eos_token") || HAS("<|endoftext|>")))
        return SH_CHAT_ZEPHYR;
    if (HAS("<|start_header_id|>") && HAS("<|end_header_id|>"))
        return SH_CHAT_LLAMA3;
#undef HAS
    return SH_CHAT_PLAIN;
}

const char *sh_chat_stop_text(sh_chat_family family)
{
    return family == SH_CHAT_PLAIN ? "\nuser:" : NULL;
}

/* ---- The builder ---- */

static sh_status put_tokens(builder *b, const int32_t *tokens, size_t n)
{
    sh_status status = sh_array_reserve((void **)&b->tokens, &b->cap, b->n + n, sizeof *b->tokens,
                                        SH_TOKENIZE_BYTES_MAX);
    if (status == SH_OK && b->keeps_spoken)
        status = sh_array_reserve((void **)&b->spoken, &b->spoken_cap, b->n + n, 1,
                                  SH_TOKENIZE_BYTES_MAX);
    if (status != SH_OK)
        return sh_fail(b->err, status, "a chat of %zu tokens: no memory", b->n + n);
    if (n > 0)
        memcpy(b->tokens + b->n, tokens, n * sizeof *tokens);
    if (n > 0 && b->keeps_spoken)
        memset(b->spoken + b->n, b->speaking, n);
    b->n += n;
    return SH_OK;
}

static sh_status flush(builder *b)
{
    int32_t *tokens = NULL;
    size_t n = 0;
    if (b->text.len == 0)
        return SH_OK;
    SH_TRY(sh_tokenize(b->tokenizer, (const char *)b->text.data, b->text.len,
                       b->goes_on ? SH_TOKENIZE_CONTINUE : 0, &tokens, &n, b->err));
    const sh_status status = put_tokens(b, tokens, n);
    free(tokens);
    sh_buf_clear(&b->text);
    b->goes_on = false;
    return status;
}

static sh_status put_token(builder *b, int32_t token)
{
    SH_TRY(flush(b));
    b->goes_on = false;
    return put_tokens(b, &token, 1);
}

static sh_status put_bytes(builder *b, const char *text, size_t n)
{
    b->text_bytes += n;
    const sh_status status =
        b->text_bytes <= SH_CHAT_TEXT_MAX ? sh_buf_append(&b->text, text, n) : SH_ERR_LIMIT;
    if (status != SH_OK)
        return sh_fail(b->err, status, "the messages are longer than %u bytes together",
                       SH_CHAT_TEXT_MAX);
    return SH_OK;
}

static sh_status put_text(builder *b, const char *text)
{
    return put_bytes(b, text, strlen(text));
}

static sh_status put_marker(builder *b, const char *marker)
{
    const int32_t token = sh_tokenizer_find(b->tokenizer, marker, strlen(marker));
    if (token >= 0 && sh_tokenizer_is_special(b->tokenizer, token))
        return put_token(b, token);
    return put_text(b, marker);
}

/* What the assistant says is tokenized apart, where that is asked for: a prompt ends before it. */
static sh_status speak(builder *b, bool speaking)
{
    const bool after_text = b->goes_on || b->text.len > 0;
    if (!b->keeps_spoken)
        return SH_OK;
    SH_TRY(flush(b));
    b->goes_on = after_text;
    b->speaking = speaking;
    return SH_OK;
}

static sh_status put_eos(builder *b)
{
    const int32_t eos = sh_tokenizer_eos(b->tokenizer);
    return eos >= 0 ? put_token(b, eos) : put_text(b, "</s>");
}

static sh_status put_content(builder *b, const sh_chat_message *message)
{
    const char *text = message->content;
    size_t n = message->content_bytes;
    if (b->family == SH_CHAT_LLAMA2 || b->family == SH_CHAT_LLAMA3) {
        for (; n > 0 && isspace((unsigned char)text[0]); n--)
            text++;
        while (n > 0 && isspace((unsigned char)text[n - 1]))
            n--;
    }
    return put_bytes(b, text, n);
}

/* ---- Turns ---- */

/* All before a message's content, for the families that name the role there. */
static sh_status open_turn(builder *b, const char *role)
{
    char marker[ROLE_BYTES];
    switch (b->family) {
    case SH_CHAT_CHATML:
        SH_TRY(put_marker(b, "<|im_start|>"));
        SH_TRY(put_text(b, role));
        return put_text(b, "\n");
    case SH_CHAT_LLAMA3:
        SH_TRY(put_marker(b, "<|start_header_id|>"));
        SH_TRY(put_text(b, role));
        SH_TRY(put_marker(b, "<|end_header_id|>"));
        return put_text(b, "\n\n");
    case SH_CHAT_ZEPHYR:
        snprintf(marker, sizeof marker, "<|%s|>", role);
        SH_TRY(put_marker(b, marker));
        return put_text(b, "\n");
    default:
        if (b->opened) {
            b->opened = false;
            return SH_OK;
        }
        SH_TRY(put_text(b, role));
        return put_text(b, ":");
    }
}

/* What ends a message, and a generation. */
static sh_status put_end(builder *b)
{
    switch (b->family) {
    case SH_CHAT_CHATML:
        return put_marker(b, "<|im_end|>");
    case SH_CHAT_LLAMA2:
        b->inside_turn = false;
        return put_eos(b);
    case SH_CHAT_LLAMA3:
        return put_marker(b, "<|eot_id|>");
    case SH_CHAT_ZEPHYR:
        return put_eos(b);
    default:
        return put_text(b, "\n");
    }
}

/* What stands between that and the next turn. */
static sh_status put_gap(builder *b)
{
    return b->family == SH_CHAT_CHATML || b->family == SH_CHAT_ZEPHYR ? put_text(b, "\n") : SH_OK;
}

static sh_status close_turn(builder *b)
{
    SH_TRY(put_end(b));
    return put_gap(b);
}

/* The end of what the assistant says, which is learnt with it: of plain that is the text by which
 * a generation is stopped, and so a part of the user's turn. */
static sh_status close_spoken(builder *b, const char *next_role)
{
    const char *stop = sh_chat_stop_text(b->family);
    const bool users = next_role != NULL && strcmp(next_role, "user") == 0;
    if (stop != NULL && (next_role == NULL || users)) {
        SH_TRY(put_text(b, stop));
        b->opened = users;
    } else {
        SH_TRY(put_end(b));
    }
    SH_TRY(speak(b, false));
    return next_role != NULL ? put_gap(b) : SH_OK;
}

/* Llama 2: a turn is a user's message, with the system's in it; the answer ends it. */
static sh_status open_llama2(builder *b, const sh_chat_message *message, const char *role)
{
    if (!b->inside_turn)
        SH_TRY(put_text(b, "[INST] "));
    b->inside_turn = true;
    if (strcmp(role, "system") == 0) {
        SH_TRY(put_text(b, "<<SYS>>\n"));
        SH_TRY(put_content(b, message));
        return put_text(b, "\n<</SYS>>\n\n");
    }
    if (strcmp(role, "user") != 0)
        return SH_OK;
    SH_TRY(put_content(b, message));
    return put_text(b, " [/INST]");
}

/* A role by the name that templates have for it; NULL: none. */
static const char *role_name(const char *role)
{
    static const char *const roles[] = {"system", "user", "assistant"};
    for (size_t i = 0; i < SH_COUNT(roles); i++)
        if (strcmp(role, roles[i]) == 0)
            return roles[i];
    return strcmp(role, "developer") == 0 ? roles[0] : NULL;
}

static sh_status put_message(builder *b, const sh_chat_message *messages, size_t n, size_t i)
{
    const sh_chat_message *message = &messages[i];
    const char *role = role_name(message->role);
    if (role == NULL)
        return sh_fail(b->err, SH_ERR_INVALID,
                       "message %zu: its role must be system, developer, user or assistant", i);
    const bool answers = strcmp(role, "assistant") == 0;
    if (b->family == SH_CHAT_LLAMA2) {
        if (i > 0 && strcmp(role, "system") == 0)
            return sh_fail(b->err, SH_ERR_INVALID,
                           "message %zu: in this model's template only the first message may be "
                           "the system's",
                           i);
        SH_TRY(open_llama2(b, message, role));
        if (!answers)
            return SH_OK;
    } else {
        SH_TRY(open_turn(b, role));
    }
    if (answers)
        SH_TRY(speak(b, true));
    if (b->family == SH_CHAT_PLAIN)
        SH_TRY(put_text(b, " "));
    SH_TRY(put_content(b, message));
    if (answers && b->keeps_spoken)
        return close_spoken(b, i + 1 < n ? role_name(messages[i + 1].role) : NULL);
    return close_turn(b);
}

static sh_status put_all(builder *b, const sh_chat_message *messages, size_t n, bool after)
{
    if (n == 0)
        return sh_fail(b->err, SH_ERR_INVALID, "a chat needs at least one message");
    if (n > SH_CHAT_MESSAGES_MAX)
        return sh_fail(b->err, SH_ERR_INVALID, "%zu messages: at most %d are taken", n,
                       SH_CHAT_MESSAGES_MAX);
    if (after) {
        SH_ASSERT(strcmp(messages[0].role, "assistant") == 0);
        b->goes_on = b->inside_turn = true;
        SH_TRY(put_bytes(b, messages[0].content, messages[0].content_bytes));
        SH_TRY(close_turn(b));
    } else if (sh_tokenizer_adds_bos(b->tokenizer) && sh_tokenizer_bos(b->tokenizer) >= 0) {
        SH_TRY(put_token(b, sh_tokenizer_bos(b->tokenizer)));
    }
    for (size_t i = after ? 1 : 0; i < n; i++)
        SH_TRY(put_message(b, messages, n, i));
    if (b->family != SH_CHAT_LLAMA2 && !b->keeps_spoken)
        SH_TRY(open_turn(b, "assistant"));
    return flush(b);
}

static sh_status build(const sh_tokenizer *tokenizer, sh_chat_family family,
                       const sh_chat_message *messages, size_t n, bool after, builder *b)
{
    b->tokenizer = tokenizer;
    b->family = family;
    sh_buf_init(&b->text, SH_CHAT_TEXT_MAX);
    const sh_status status = put_all(b, messages, n, after);
    sh_buf_release(&b->text);
    if (status != SH_OK) {
        free(b->tokens);
        free(b->spoken);
    }
    return status;
}

sh_status sh_chat_tokenize(const sh_tokenizer *tokenizer, sh_chat_family family,
                           const sh_chat_message *messages, size_t n, int32_t **out, size_t *n_out,
                           sh_error *err)
{
    builder b = {.err = err};
    SH_TRY(build(tokenizer, family, messages, n, false, &b));
    *out = b.tokens;
    *n_out = b.n;
    return SH_OK;
}

sh_status sh_chat_tokenize_after(const sh_tokenizer *tokenizer, sh_chat_family family,
                                 const sh_chat_message *messages, size_t n, int32_t **out,
                                 size_t *n_out, sh_error *err)
{
    builder b = {.err = err};
    SH_TRY(build(tokenizer, family, messages, n, true, &b));
    *out = b.tokens;
    *n_out = b.n;
    return SH_OK;
}

sh_status sh_chat_tokenize_spoken(const sh_tokenizer *tokenizer, sh_chat_family family,
                                  const sh_chat_message *messages, size_t n, sh_chat_tokens *out,
                                  sh_error *err)
{
    builder b = {.err = err, .keeps_spoken = true};
    SH_TRY(build(tokenizer, family, messages, n, false, &b));
    *out = (sh_chat_tokens){.tokens = b.tokens, .spoken = b.spoken, .n = b.n};
    return SH_OK;
}
