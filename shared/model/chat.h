/*
 * Chat templates: how messages become the text that a model was tuned on. The families are told by
 * pieces of text in tokenizer.chat_template (no Jinja is run), as llama.cpp's llama-chat.cpp does;
 * a template that is none of them, and none at all, is `plain` ("role: content" lines, then
 * "assistant:"), which the caller says aloud.
 *
 * The text is tokenized with SH_TOKENIZE_SPECIAL for the template's own markers only: what users
 * wrote is kept apart as pieces, so that "<|im_end|>" in a message is text, not a token.
 */
#ifndef SH_MODEL_CHAT_H
#define SH_MODEL_CHAT_H

#include "shared/model/tokenizer.h"

typedef enum {
    SH_CHAT_PLAIN,
    SH_CHAT_CHATML, /* <|im_start|>role\n...<|im_end|>: SmolLM2, Qwen */
    SH_CHAT_LLAMA2, /* [INST] <<SYS>> ... [/INST], contents trimmed: llama.cpp's llama2-sys-strip */
    SH_CHAT_LLAMA3, /* <|start_header_id|>role<|end_header_id|> */
    SH_CHAT_ZEPHYR, /* <|user|>\n... and the model's EOS: TinyLlama, StableLM Zephyr */
    SH_CHAT_FAMILIES
} sh_chat_family;

#define SH_CHAT_MESSAGES_MAX 4096
#define SH_CHAT_TEXT_MAX     (16u << 20)

sh_chat_family sh_chat_detect(const sh_gguf *gguf);     /* from its tokenizer.chat_template */
const char *sh_chat_family_name(sh_chat_family family); /* "chatml" */
SH_MUST_USE sh_status sh_chat_parse_family(const char *name, sh_chat_family *out, sh_error *err);

typedef struct {
    const char *role; /* "system", "user", "assistant"; "developer" is "system" */
    const char *content;
    size_t content_bytes;
} sh_chat_message;

/* Tokens of the messages and of the start of the assistant's turn, BOS included where the model
 * adds one; *out is malloc'ed. SH_ERR_INVALID: no message, an unknown role, an order that the
 * family cannot say (Llama 2: a system message that is not the first). */
SH_MUST_USE sh_status sh_chat_tokenize(const sh_tokenizer *tokenizer, sh_chat_family family,
                                       const sh_chat_message *messages, size_t n, int32_t **out,
                                       size_t *n_out, sh_error *err);
/* The same for what goes on after an answer that was generated: messages[0] is the assistant's, of
 * whose content only that is given which is not among the tokens that the new ones go behind
 * (usually nothing, for a model that stopped at its end token, which is not among them either).
 * No BOS. */
SH_MUST_USE sh_status sh_chat_tokenize_after(const sh_tokenizer *tokenizer, sh_chat_family family,
                                             const sh_chat_message *messages, size_t n,
                                             int32_t **out, size_t *n_out, sh_error *err);
/* A conversation that is over, to learn from: the tokens that the assistant said, each of them as
 * it is generated (apart from the prompt before it) and with the end of its turn, are told from the
 * others. BOS as above; nothing stands behind the last message's end. Of `plain` the end of a turn
 * is sh_chat_stop_text, if the user's turn or nothing follows. */
typedef struct {
    int32_t *tokens; /* [n], malloc'ed as is spoken */
    uint8_t *spoken; /* [n], 1: by the assistant */
    size_t n;
} sh_chat_tokens;
SH_MUST_USE sh_status sh_chat_tokenize_spoken(const sh_tokenizer *tokenizer, sh_chat_family family,
                                              const sh_chat_message *messages, size_t n,
                                              sh_chat_tokens *out, sh_error *err);
/* Text that ends a turn where the family has no token for it, that sh_tokenizer_is_end would tell
 * ("\nuser:" of plain); NULL: none. */
const char *sh_chat_stop_text(sh_chat_family family);

#endif
