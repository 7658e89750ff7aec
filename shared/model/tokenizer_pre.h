/*
 * Pre-tokenizers of byte-level BPE: the rules by which a text is cut into words, within which alone
 * tokens are merged. `tokenizer.ggml.pre` names one. Each rule is one to four stages, each of which
 * cuts the pieces of the stage before; a stage is a scanner written by hand for what llama.cpp has
 * as a regular expression, and takes time linear in the text. Vocabularies of `llama` have no rule:
 * what is done to a text instead is here, too, since who trains a vocabulary needs both.
 */
#ifndef SH_MODEL_TOKENIZER_PRE_H
#define SH_MODEL_TOKENIZER_PRE_H

#include "shared/base/buf.h"
#include "shared/model/tokenizer_unicode.h"

/* A code point with its class above it. */
typedef uint32_t sh_pre_char;
static inline sh_pre_char sh_pre_char_of(uint32_t code)
{
    return code | (uint32_t)sh_char_class_of(code) << 24;
}
static inline uint32_t sh_pre_code(sh_pre_char c)
{
    return c & 0xFFFFFFu;
}

/* Where the piece that begins at `at` (< end) ends: at < result <= end. Sees nothing outside. */
typedef size_t (*sh_pre_stage)(const sh_pre_char *c, size_t at, size_t end);

enum { SH_PRE_STAGES_MAX = 5 };
typedef struct {
    const char *names[11];                      /* NULL-terminated */
    sh_pre_stage stages[SH_PRE_STAGES_MAX + 1]; /* NULL-terminated */
    bool whole_words;                           /* a word that is a token is not merged up to it */
    bool adds_bos;                              /* unless the file says otherwise */
    bool no_bos;                                /* no BOS token unless the file names one */
} sh_pre_rule;

/* NULL: there is no rule of this name. */
const sh_pre_rule *sh_pre_find(const char *name, size_t n);

/* The characters of a text, of which no byte is left out: what is no UTF-8 is U+FFFD. *chars has
 * room for *cap and grows; the caller frees it. SH_ERR_LIMIT past max characters. */
SH_MUST_USE sh_status sh_pre_decode(const char *text, size_t bytes, size_t max, sh_pre_char **chars,
                                    size_t *cap, size_t *n);
/* Calls `each` with one word after another, until it fails. */
typedef sh_status (*sh_pre_word)(void *arg, const sh_pre_char *c, size_t n);
SH_MUST_USE sh_status sh_pre_split(const sh_pre_rule *rule, const sh_pre_char *c, size_t n,
                                   sh_pre_word each, void *arg);

/* ---- `llama` ---- */

#define SH_SPACE_MARK      "\xe2\x96\x81" /* U+2581 */
#define SH_SPACE_MARK_SIZE 3
/* Appends a text with a mark for each space, and one before it all if prefix is true. */
SH_MUST_USE sh_status sh_spm_escape(const char *text, size_t bytes, bool prefix, sh_buf *out);

#endif
