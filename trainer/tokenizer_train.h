/*
 * Trains a tokenizer from text, and writes it as a GGUF without weights, which `shoal-train full
 * --vocab` and llama.cpp take. Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909) of two
 * kinds:
 *
 *   BPE  byte-level (`gpt2`): words as a rule of shared/model/tokenizer_pre.h cuts them, symbols
 * are bytes. Ids: special tokens, the 256 bytes, merges in order. SPM  SentencePiece's BPE
 * (`llama`; Kudo & Richardson 2018, arXiv:1808.06226): symbols are characters, a space is "▁". Rare
 * characters, and bytes that are no UTF-8, go to byte tokens. Ids: <unk>, BOS, EOS, other special
 * tokens, <0x00>..<0xFF>, merges in order (score: minus their rank), characters, most frequent
 * first (scores go on).
 *
 * The two neighbours within a word that are most frequent become a token, again and again. Of
 * equally frequent ones that with the shorter text (bytes) comes first, then that whose text is
 * less by memcmp. Every adjacent pair counts ("aaa" has two of "aa").
 *
 * SPM's words, which no piece crosses: "▁" begins one ("▁▁▁x": pieces are of "▁" alone or have one
 * in front); letters with marks, numbers and other signs are apart; white space other than " " and,
 * with split_digits, each number stands alone. ASCII's control characters (tabs, newlines) are byte
 * tokens only.
 *
 * Invariants. The ids that the engine gives for a text that it was trained on are those that the
 * trainer ended with. Special tokens' texts are cut out of the text. As the engine reads it, so is
 * a text read here: for BPE what is no UTF-8 is U+FFFD; for SPM U+2581 is a space, and a space
 * comes to be part of a character that is not finished before it. All other bytes come back from
 * their ids. Deterministic; the order of documents does not matter.
 *
 * Memory is linear in the bytes of distinct words (some 200 a byte at worst), time nearly so.
 * Threads: none; independent trainers may run at once. Owner: the caller.
 *
 *     sh_tokenizer_train_options o = sh_tokenizer_train_defaults(SH_TOKENIZER_BPE, 4096);
 *     SH_GOTO(sh_tokenizer_trainer_create(&o, &trainer, err));
 *     for (each document)
 *         SH_GOTO(sh_tokenizer_trainer_add(trainer, text, n, err));
 *     SH_GOTO(sh_tokenizer_trainer_run(trainer, &result, err));
 *     SH_GOTO(sh_tokenizer_trainer_save(trainer, "vocab.gguf", err));
 * cleanup:
 *     sh_tokenizer_trainer_destroy(&trainer);
 */
#ifndef SH_TRAINER_TOKENIZER_TRAIN_H
#define SH_TRAINER_TOKENIZER_TRAIN_H

#include "shared/base/status.h"

#define SH_TOKENIZER_TRAIN_BYTES_MAX   ((uint64_t)1 << 36) /* of text, all documents together */
#define SH_TOKENIZER_TRAIN_WORDS_MAX   (128u << 20)        /* bytes of distinct words */
#define SH_TOKENIZER_TOKEN_BYTES_MAX   64                  /* of text that a token stands for */
#define SH_TOKENIZER_SPECIALS_MAX      1024
#define SH_TOKENIZER_SPECIAL_BYTES_MAX 256

typedef enum { SH_TOKENIZER_BPE, SH_TOKENIZER_SPM } sh_tokenizer_kind;

/* Strings are borrowed until the trainer is destroyed. */
typedef struct {
    sh_tokenizer_kind kind;
    uint32_t vocab;        /* tokens, of all kinds together; at most SH_VOCAB_MAX (tokenizer.h) */
    const char *bos, *eos; /* texts of control tokens; may be the same */
    const char *const *specials; /* other control tokens, in the order of their ids */
    size_t n_specials;
    bool add_bos, add_eos; /* what the file says is to be put around a text */
    const char *pre;       /* BPE: a rule of tokenizer_pre.h */
    bool add_space_prefix; /* SPM: a text begins with a space */
    bool split_digits;     /* SPM: each number is a piece (BPE: the rule says) */
    double coverage;       /* SPM: share of the text's characters that have tokens, in (0, 1] */
    /* Called after each new token with how many there are; a false return cancels
     * (SH_ERR_CANCELLED). May be NULL. */
    bool (*progress)(void *arg, uint32_t tokens);
    void *progress_arg;
} sh_tokenizer_train_options;

/* BPE: rule "smollm" (GPT-2's with each digit alone: a small vocabulary has no room for numbers),
 * "<|endoftext|>" for BOS and EOS, neither added. SPM: "<s>", "</s>", BOS added, a space before a
 * text, digits split, coverage 0.9995. */
sh_tokenizer_train_options sh_tokenizer_train_defaults(sh_tokenizer_kind kind, uint32_t vocab);

typedef struct {
    uint32_t vocab; /* tokens, as was asked for */
    uint32_t merges;
    uint32_t characters; /* SPM: that have tokens of their own */
    uint64_t documents, words /* distinct */;
    uint64_t text_bytes, text_tokens; /* of all documents, without BOS and EOS */
} sh_tokenizer_train_result;

typedef struct sh_tokenizer_trainer sh_tokenizer_trainer;

/* SH_ERR_INVALID: a vocabulary without room for bytes and special tokens, a special token that is
 * empty, too long, no UTF-8 or there twice; SH_ERR_UNSUPPORTED: no such rule; SH_ERR_LIMIT. */
SH_MUST_USE sh_status sh_tokenizer_trainer_create(const sh_tokenizer_train_options *options,
                                                  sh_tokenizer_trainer **out, sh_error *err);
void sh_tokenizer_trainer_destroy(sh_tokenizer_trainer **trainer);
/* One document: any bytes, at most SH_TOKENIZE_BYTES_MAX of them; not kept. After an error the
 * trainer can only be destroyed. Before sh_tokenizer_trainer_run only. */
SH_MUST_USE sh_status sh_tokenizer_trainer_add(sh_tokenizer_trainer *trainer, const void *text,
                                               size_t bytes, sh_error *err);
/* Once. SH_ERR_INVALID says how many tokens the text allows, or needs, where that is not what was
 * asked for. */
SH_MUST_USE sh_status sh_tokenizer_trainer_run(sh_tokenizer_trainer *trainer,
                                               sh_tokenizer_train_result *result, sh_error *err);
/* After sh_tokenizer_trainer_run. Atomic; the same trainer, the same bytes. SH_ERR_INVALID when a
 * special token is spelt like a trained one. */
SH_MUST_USE sh_status sh_tokenizer_trainer_save(const sh_tokenizer_trainer *trainer,
                                                const char *path, sh_error *err);

#endif
