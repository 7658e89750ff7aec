#include "shared/model/text_filter.h"

#include <stdlib.h>
#include <string.h>

#define REPLACEMENT "\xef\xbf\xbd" /* U+FFFD */

sh_status sh_text_filter_init(sh_text_filter *filter, const char *const *stops, size_t n_stops,
                              uint32_t tokens_max, sh_error *err)
{
    sh_text_filter *f = filter;
    *f = (sh_text_filter){.stops = stops, .n_stops = n_stops, .tokens_max = tokens_max};
    sh_buf_init(&f->held, SH_FILTER_HELD_BYTES_MAX);
    for (size_t i = 0; i < n_stops; i++)
        SH_ASSERT(stops[i][0] != '\0');
    f->token_end = sh_calloc(tokens_max, sizeof(*f->token_end));
    if (f->token_end == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "a request of %u tokens: no memory", tokens_max);
    return SH_OK;
}

void sh_text_filter_release(sh_text_filter *filter)
{
    sh_buf_release(&filter->held);
    free(filter->token_end);
    filter->token_end = NULL;
}

/* Length of the character at p[0]: 1 to 4; 0: not UTF-8 (RFC 3629); -1: its end is missing. */
static int character(const uint8_t *p, size_t n)
{
    if (p[0] < 0x80)
        return 1;
    if (p[0] < 0xc2 || p[0] > 0xf4)
        return 0;
    const int length = p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : 4;
    /* the second byte keeps out overlong forms, surrogates and what is past U+10FFFF */
    const uint8_t low = p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80;
    const uint8_t high = p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == n)
            return -1;
        if (p[i] < (i == 1 ? low : 0x80) || p[i] > (i == 1 ? high : 0xbf))
            return 0;
    }
    return length;
}

/* Appends the first `bytes` of what is held; a character that is not whole yet stays unless this
 * is the end. */
static sh_status let_out(sh_text_filter *f, size_t bytes, bool at_end, sh_buf *text)
{
    size_t at = 0;
    const uint8_t *p = f->held.data;
    while (at < bytes) {
        int n = character(p + at, bytes - at);
        if (n < 0 && !at_end)
            break;
        if (n > 0) {
            SH_TRY(sh_buf_append(text, p + at, (size_t)n));
            at += (size_t)n;
            continue;
        }
        SH_TRY(sh_buf_append(text, REPLACEMENT, sizeof(REPLACEMENT) - 1));
        at++;
    }
    if (at > 0) {
        memmove(f->held.data, f->held.data + at, f->held.len - at);
        f->held.len -= at;
        f->n_out += at;
    }
    return SH_OK;
}

/* Where the first stop string begins; held.len when there is none. */
static size_t find_stop(const sh_text_filter *f)
{
    size_t first = f->held.len;
    for (size_t i = 0; i < f->n_stops && f->held.len > 0; i++) {
        const uint8_t *at = memmem(f->held.data, f->held.len, f->stops[i], strlen(f->stops[i]));
        if (at != NULL)
            first = SH_MIN(first, (size_t)(at - f->held.data));
    }
    return first;
}

/* How many bytes at the end may be the beginning of a stop string. */
static size_t maybe_stop(const sh_text_filter *f)
{
    size_t most = 0;
    for (size_t i = 0; i < f->n_stops; i++)
        for (size_t n = SH_MIN(strlen(f->stops[i]) - 1, f->held.len); n > most; n--)
            if (memcmp(f->held.data + f->held.len - n, f->stops[i], n) == 0)
                most = n;
    return most;
}

sh_status sh_text_filter_add(sh_text_filter *filter, const sh_tokenizer *tokenizer, int32_t token,
                             sh_buf *text, sh_error *err)
{
    sh_text_filter *f = filter;
    SH_ASSERT(!f->stopped && f->n_tokens < f->tokens_max);
    sh_status status = sh_detokenize(tokenizer, token, &f->held);
    if (status != SH_OK)
        return sh_fail(err, status, "the text of a token: %s", sh_status_name(status));
    f->token_end[f->n_tokens++] = f->n_out + f->held.len;
    size_t stop = find_stop(f);
    f->stopped = stop < f->held.len;
    status = let_out(f, f->stopped ? stop : f->held.len - maybe_stop(f), f->stopped, text);
    if (status != SH_OK)
        return sh_fail(err, status, "the text of a completion: %s", sh_status_name(status));
    return SH_OK;
}

sh_status sh_text_filter_end(sh_text_filter *filter, sh_buf *text, sh_error *err)
{
    sh_status status = let_out(filter, filter->held.len, true, text);
    if (status != SH_OK)
        return sh_fail(err, status, "the text of a completion: %s", sh_status_name(status));
    return SH_OK;
}

uint32_t sh_text_filter_tokens_shown(const sh_text_filter *filter)
{
    const sh_text_filter *f = filter;
    uint32_t n = f->n_tokens;
    while (f->stopped && n > 0 && f->token_end[n - 1] > f->n_out)
        n--;
    return n;
}

size_t sh_text_filter_bytes_behind(const sh_text_filter *filter)
{
    const uint32_t shown = sh_text_filter_tokens_shown(filter);
    if (shown == filter->n_tokens)
        return 0;
    return filter->n_out - (shown > 0 ? filter->token_end[shown - 1] : 0);
}

uint32_t sh_text_filter_tokens_out(const sh_text_filter *filter)
{
    uint32_t n = filter->n_tokens;
    while (n > 0 && filter->token_end[n - 1] > filter->n_out)
        n--;
    return n;
}
