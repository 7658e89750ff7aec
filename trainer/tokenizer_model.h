/*
 * A trained tokenizer on its way to GGUF. Internal to trainer/.
 */
#ifndef SH_TRAINER_TOKENIZER_MODEL_H
#define SH_TRAINER_TOKENIZER_MODEL_H

#include "trainer/tokenizer_pairs.h"
#include "trainer/tokenizer_train.h"

#define TR_UNKNOWN "<unk>" /* the first token of SPM */

/* The alphabet is the first n_alphabet of the tokens: of BPE the bytes, of SPM the characters. */
typedef struct {
    const sh_tokenizer_train_options *options;
    const char *const *controls; /* all special tokens, by id: <unk> of SPM, BOS, EOS, others */
    size_t n_controls;
    const tr_pairs *pairs;
    size_t n_alphabet;
} tr_tokenizer;

SH_MUST_USE sh_status tr_tokenizer_save(const tr_tokenizer *t, const char *path, sh_error *err);

#endif
