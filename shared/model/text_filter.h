/*
 * From tokens to the text that a user is shown: whole UTF-8 characters, what is no UTF-8 as U+FFFD,
 * and nothing of a stop string, which may begin in one token and end in another.
 *
 * Invariant: what is appended is valid UTF-8, and the pieces together do not depend on how the
 * text was split into tokens. Held back is at most one stop string, one character, one token.
 */
#ifndef SH_MODEL_TEXT_FILTER_H
#define SH_MODEL_TEXT_FILTER_H

#include "shared/model/tokenizer.h"

#define SH_FILTER_HELD_BYTES_MAX (1u << 20)

typedef struct {
    const char *const *stops; /* borrowed */
    size_t n_stops;
    sh_buf held;       /* bytes that were not appended yet */
    size_t n_out;      /* bytes before them */
    size_t *token_end; /* [tokens_max] in bytes from the start */
    uint32_t n_tokens, tokens_max;
    bool stopped;
} sh_text_filter;

/* stops, none of them empty, are borrowed and outlive the filter. release takes a zeroed one. */
SH_MUST_USE sh_status sh_text_filter_init(sh_text_filter *filter, const char *const *stops,
                                          size_t n_stops, uint32_t tokens_max, sh_error *err);
void sh_text_filter_release(sh_text_filter *filter);
/* Takes a token and appends what is now certain. At a stop string: all before it, and `stopped`;
 * then nothing may be added any more. */
SH_MUST_USE sh_status sh_text_filter_add(sh_text_filter *filter, const sh_tokenizer *tokenizer,
                                         int32_t token, sh_buf *text, sh_error *err);
/* The end without a stop string: appends what was held back. */
SH_MUST_USE sh_status sh_text_filter_end(sh_text_filter *filter, sh_buf *text, sh_error *err);
/* Tokens that have nothing of the stop string; all without one. */
uint32_t sh_text_filter_tokens_shown(const sh_text_filter *filter);
/* Bytes of the token behind these that come before the stop string, so that they are shown. */
size_t sh_text_filter_bytes_behind(const sh_text_filter *filter);
/* Tokens whose text was appended, all of it; at the end the same as shown. */
uint32_t sh_text_filter_tokens_out(const sh_text_filter *filter);

#endif
