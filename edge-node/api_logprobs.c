/*
 * Log-probabilities in OpenAI's two shapes: four parallel arrays of a completion, an array of
 * objects of a chat. A token's text is its own bytes; where they are no UTF-8 (a part of a
 * character) a completion says "bytes:\\xNN", a chat U+FFFD beside the bytes.
 */
#include "edge-node/api_internal.h"

#include <stdio.h>
#include <stdlib.h>

#define TOKEN_TEXT_MAX (64u << 10)

static void append(json_t *array, json_t *value)
{
    int failed = json_array_append_new(array, value);
    SH_ASSERT(!failed);
}

/* Characters, as far as bytes that begin one tell. */
static size_t count_characters(const sh_buf *text)
{
    size_t n = 0;
    for (size_t i = 0; i < text->len; i++)
        n += (text->data[i] & 0xc0) != 0x80;
    return n;
}

static json_t *token_text(const sh_buf *text, bool chat)
{
    json_t *value = json_stringn(text->len ? (const char *)text->data : "", text->len);
    if (value || chat)
        return value ? value : json_string("\xef\xbf\xbd");
    sh_buf hex;
    sh_buf_init(&hex, TOKEN_TEXT_MAX * 4 + 16);
    sh_status status = sh_buf_printf(&hex, "bytes:");
    for (size_t i = 0; i < text->len && status == SH_OK; i++)
        status = sh_buf_printf(&hex, "\\x%02x", text->data[i]);
    value = json_stringn((const char *)hex.data, hex.len);
    sh_buf_release(&hex);
    return value ? value : json_string("");
}

/* -infinity, which JSON cannot say, becomes the most negative value. */
static json_t *logprob_json(float logprob)
{
    double x = logprob;
    return json_real(x >= -9999.0 ? x : -9999.0);
}

static void read_text(const sh_generation *g, int32_t token, sh_buf *text)
{
    sh_buf_clear(text);
    if (sh_generation_token_text(g, token, text) != SH_OK)
        sh_buf_clear(text); /* memory is out, or a token of 64 KiB: it has no text here */
}

static json_t *chat_token(const sh_generation *g, int32_t token, float logprob, sh_buf *text)
{
    read_text(g, token, text);
    json_t *object = json_object(), *bytes = json_array();
    for (size_t i = 0; i < text->len; i++)
        append(bytes, json_integer(text->data[i]));
    sh_json_set(object, "token", token_text(text, true));
    sh_json_set(object, "logprob", logprob_json(logprob));
    sh_json_set(object, "bytes", bytes);
    return object;
}

static json_t *take_chat(api_logprobs *l, const sh_generation *g, uint32_t end, sh_buf *text)
{
    json_t *root = json_object(), *content = json_array();
    for (; l->n_taken < end; l->n_taken++) {
        sh_generation_token t = sh_generation_get_token(g, l->n_taken);
        json_t *token = chat_token(g, t.token, t.logprob, text), *top = json_array();
        for (uint32_t i = 0; i < t.n_likeliest; i++)
            append(top, chat_token(g, t.likeliest[i].token, t.likeliest[i].logprob, text));
        sh_json_set(token, "top_logprobs", top);
        append(content, token);
    }
    sh_json_set(root, "content", content);
    sh_json_set(root, "refusal", json_null());
    return root;
}

static json_t *take_completion(api_logprobs *l, const sh_generation *g, uint32_t end, sh_buf *text)
{
    json_t *root = json_object(), *tokens = json_array(), *logprobs = json_array();
    json_t *tops = json_array(), *offsets = json_array();
    for (; l->n_taken < end; l->n_taken++) {
        sh_generation_token t = sh_generation_get_token(g, l->n_taken);
        json_t *top = json_object();
        for (uint32_t i = t.n_likeliest; i-- > 0;) { /* of two with the same text the likelier */
            read_text(g, t.likeliest[i].token, text);
            json_t *key = token_text(text, false);
            sh_json_set(top, json_string_value(key), logprob_json(t.likeliest[i].logprob));
            json_decref(key);
        }
        read_text(g, t.token, text);
        append(tokens, token_text(text, false));
        append(logprobs, logprob_json(t.logprob));
        append(tops, top);
        append(offsets, json_integer((json_int_t)l->offset));
        l->offset += count_characters(text);
    }
    sh_json_set(root, "tokens", tokens);
    sh_json_set(root, "token_logprobs", logprobs);
    sh_json_set(root, "top_logprobs", tops);
    sh_json_set(root, "text_offset", offsets);
    return root;
}

json_t *api_logprobs_take(api_logprobs *logprobs, const sh_generation *generation)
{
    if (!logprobs)
        return json_null();
    sh_buf text;
    sh_buf_init(&text, TOKEN_TEXT_MAX);
    uint32_t end = sh_generation_shown(generation);
    json_t *taken = logprobs->chat ? take_chat(logprobs, generation, end, &text)
                                   : take_completion(logprobs, generation, end, &text);
    sh_buf_release(&text);
    return taken;
}
