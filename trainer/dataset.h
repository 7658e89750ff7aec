/*
 * What a training reads: documents of tokens, of which some are targets, and how they become the
 * sequences of sh_train_data.
 *
 * A document is one of
 *   - a plain text: a file that is none of the others, or standard input ("-");
 *   - a line of a JSON Lines file (*.jsonl, *.ndjson), one object:
 *       {"text": "..."}                         a text;
 *       {"prompt": "...", "completion": "..."}  a sample: the completion and the EOS are targets;
 *       {"messages": [{"role": "...", "content": "..."}, ...]}
 *                                               a sample, by the model's chat template: what the
 *                                               assistant says and the ends of its turns are
 *                                               targets; messages after its last one are left off;
 *     other keys of these objects are not read, blank lines are skipped;
 *   - a session of a node's snapshot of its feedback (snapshot.h), told by its magic, with the
 *     targets that it says: a text.
 * A folder is its *.txt, *.jsonl and *.ndjson files in the order of their names (bytes compared;
 * hidden files and folders in it are not looked at). A document without a target (of one token, or
 * of none) is left off and counted.
 *
 * What is written in the files is text and never a control token: those come from the template,
 * and as BOS and EOS, alone. (A vocabulary's user-defined tokens are text, here as in inference.)
 * A document begins with BOS if the model adds one. A prompt is tokenized as one is for inference,
 * and its completion as what is generated behind it.
 *
 * Packing. Texts make a stream, one behind another, that is cut into sequences of context + 1
 * tokens; each begins with the last token of the one before, so that every token but a document's
 * first is a target once. Samples are put whole into sequences of their own, best fit decreasing.
 * No token sees another document (SH_TRAIN_BEGINS), nor what is behind a cut what was before it:
 * the mean loss over documents that are not cut is that of each alone. What is left of a sequence
 * is padding: EOS (token 0 where there is none), no target. A dataset that was opened from one
 * plain text has no padding and no mask: what does not fill a last sequence (or, in a shuffled
 * pass, a first) is left off. Results that exist depend on these cuts: they do not change.
 * In-order packing gives each target once. Shuffled packing gives any piece of an endless run of
 * passes over the documents, each with its own cuts of the texts, its own company in the sequences
 * and its own order; but for one plain text each target is in a pass once.
 *
 * Threads: a dataset is immutable once opened. Deterministic: the same files, options and seed give
 * the same bytes. What is over a limit below is an error that names it.
 *
 *     SH_GOTO(sh_dataset_open(path, &(sh_dataset_options){.tokenizer = model->tokenizer,
 *             .chat = sh_chat_detect(model->gguf)}, &all, err));
 *     SH_GOTO(sh_dataset_split(all, 0.1, 1, &train, &heldout, err));
 *     SH_GOTO(sh_dataset_pack(train, &(sh_dataset_packing){.context = 128}, &rows, err));
 *     SH_GOTO(sh_lora_train(model, adapter, &rows.data, &options, &result, err)); // shuffles
 *   or, where the sequences are to be cut anew in each pass and the training takes them in order:
 *     SH_GOTO(sh_dataset_pack_shuffled(train, &pack,
 *             &(sh_dataset_range){.seed = 1, .want = (size_t)steps * batch}, &rows, err));
 */
#ifndef SH_TRAINER_DATASET_H
#define SH_TRAINER_DATASET_H

#include "shared/model/chat.h"
#include "trainer/trainer.h"

#define SH_DATASET_DOCUMENTS_MAX  (16u << 20)
#define SH_DATASET_TOKENS_MAX     (256u << 20)
#define SH_DATASET_FILES_MAX      65536                 /* of a folder */
#define SH_DATASET_TEXT_BYTES_MAX SH_TOKENIZE_BYTES_MAX /* of a plain text */
#define SH_DATASET_FILE_BYTES_MAX (1u << 30)            /* of a JSON Lines file */
#define SH_DATASET_LINE_BYTES_MAX (16u << 20)
#define SH_DATASET_LINE_VALUES    65536 /* of a line's JSON */
#define SH_DATASET_LINE_DEPTH     16
#define SH_DATASET_SEQUENCES_MAX  (1u << 28) /* a call */

typedef struct sh_dataset sh_dataset;

/* Whether EOS stands behind a text, where the vocabulary has one. Behind a completion it always
 * does, behind a conversation the template's end of a turn. */
typedef enum {
    SH_DATASET_EOS_LINES, /* behind the texts of JSON Lines, not behind plain ones */
    SH_DATASET_EOS_TEXTS, /* behind both */
    SH_DATASET_EOS_NONE
} sh_dataset_eos;

typedef struct {
    const sh_tokenizer *tokenizer; /* only used while opening */
    sh_chat_family chat;           /* sh_chat_detect's; SH_CHAT_PLAIN is worth a warning if there
                                      are conversations (sh_dataset_counts) */
    sh_dataset_eos eos;
} sh_dataset_options;

/* SH_ERR_INVALID: "FILE:LINE: what, what to do" of a line; a file that is no text; no document with
 * a target at all. SH_ERR_LIMIT names the limit. */
SH_MUST_USE sh_status sh_dataset_open(const char *path, const sh_dataset_options *options,
                                      sh_dataset **out, sh_error *err);
/* NULL is taken. What was split from a dataset goes before it. */
void sh_dataset_destroy(sh_dataset **dataset);

typedef struct {
    size_t files, documents;
    size_t samples, conversations; /* of the documents: prompts and chats; of these: chats */
    size_t left_off;               /* documents without a target */
    uint64_t tokens;               /* BOS and EOS among them */
    uint64_t targets;              /* tokens to be predicted; never a document's first */
} sh_dataset_counts;
sh_dataset_counts sh_dataset_count(const sh_dataset *dataset);

/* Every document goes to one side, by a hash of its tokens and the seed alone: documents of the
 * same tokens to the same, whatever else there is. About `share` of them are held out, in (0, 1),
 * and of two different documents at least one. Of a snapshot sh_snapshot_is_heldout chooses, and
 * share and seed are not looked at. *train and *heldout are views: they borrow the tokens of
 * dataset, which must outlive them. SH_ERR_USAGE: share; SH_ERR_INVALID: nothing for one side. */
SH_MUST_USE sh_status sh_dataset_split(const sh_dataset *dataset, double share, uint64_t seed,
                                       sh_dataset **train, sh_dataset **heldout, sh_error *err);

/* A sample of more than context + 1 tokens. */
typedef enum {
    SH_LONG_REFUSE, /* SH_ERR_LIMIT, with its file, line and length */
    SH_LONG_SKIP,   /* left off, and counted */
    SH_LONG_SPLIT   /* cut as texts are: what is behind a cut does not see what is before it. Pieces
                       without a target are left off */
} sh_long_samples;

typedef struct {
    uint32_t context; /* tokens that a sequence predicts; its length is one more */
    sh_long_samples long_samples;
} sh_dataset_packing;

typedef struct {
    sh_train_data data; /* tokens and mask belong to this struct */
    size_t skipped;     /* samples left off as too long */
    uint64_t targets;   /* of data */
    uint64_t padding;   /* tokens of data.n * data.length */
} sh_dataset_rows;
void sh_dataset_rows_release(sh_dataset_rows *rows);         /* takes a zeroed one */
double sh_dataset_rows_padding(const sh_dataset_rows *rows); /* share of all tokens, in [0, 1] */

/* Each target once: texts in order, then samples. SH_ERR_INVALID: one plain text, too short for
 * one sequence; every sample skipped. */
SH_MUST_USE sh_status sh_dataset_pack(const sh_dataset *dataset, const sh_dataset_packing *options,
                                      sh_dataset_rows *out, sh_error *err);

/* Sequences [first, first + want) of the run of passes that the seed names. */
typedef struct {
    uint64_t seed, first;
    size_t want; /* at least 1 */
} sh_dataset_range;
SH_MUST_USE sh_status sh_dataset_pack_shuffled(const sh_dataset *dataset,
                                               const sh_dataset_packing *options,
                                               const sh_dataset_range *range, sh_dataset_rows *out,
                                               sh_error *err);

#endif
