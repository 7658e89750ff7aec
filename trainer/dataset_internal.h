/* A dataset's inside, for the files that read and pack one. */
#ifndef SH_TRAINER_DATASET_INTERNAL_H
#define SH_TRAINER_DATASET_INTERNAL_H

#include "trainer/dataset.h"

typedef enum {
    TR_PLAIN_TEXT,
    TR_LINE_TEXT,
    TR_SESSION,
    TR_PROMPT, /* from here on samples */
    TR_CHAT
} tr_document_kind;

typedef struct {
    size_t at; /* of its first token */
    uint64_t session;
    uint32_t n, file, line; /* line: from 1; 0: not of lines */
    tr_document_kind kind;
} tr_document;

struct sh_dataset {
    int32_t *tokens; /* [n_tokens], documents one behind another */
    uint8_t *mask;   /* [n_tokens], SH_TRAIN_TARGET; never of a document's first token */
    size_t n_tokens, tokens_cap, mask_cap;
    size_t open_at; /* first token of the document that is being put together */
    tr_document *documents;
    size_t n_documents, documents_cap;
    char *name;   /* the path that was opened */
    char **files; /* what a line's errors name */
    size_t n_files, files_cap;
    size_t left_off;
    int32_t pad;
    bool one_text; /* opened from one plain text and nothing else */
    bool snapshot;
    bool view; /* only documents are its own */
};

static inline bool tr_is_sample(const tr_document *document)
{
    return document->kind >= TR_PROMPT;
}

typedef struct {
    const sh_dataset_options *options;
    sh_dataset *dataset;
} tr_reader;

/* Appends tokens to the document that is being put together; without an error text. */
SH_MUST_USE sh_status tr_dataset_put(sh_dataset *d, const int32_t *tokens, size_t n, uint8_t mask);
/* The same of a text's tokens, and of EOS where the vocabulary has one. flags: SH_TOKENIZE_. */
SH_MUST_USE sh_status tr_dataset_put_text(tr_reader *r, const char *text, size_t bytes,
                                          unsigned flags, uint8_t mask, sh_error *err);
SH_MUST_USE sh_status tr_dataset_put_eos(tr_reader *r);
/* Ends it: kind, line and session are the caller's, the rest is filled in. *kept (may be NULL) is
 * false when it has no target, and was left off. */
SH_MUST_USE sh_status tr_dataset_close(sh_dataset *d, tr_document document, bool *kept);
/* Text for what the above return; place: "FILE" or "FILE:LINE". Keeps a text that is there. */
sh_status tr_dataset_full(sh_status status, const char *place, sh_error *err);

/* All lines of a JSON Lines file; the file's name is the last of dataset->files. */
SH_MUST_USE sh_status tr_dataset_read_lines(tr_reader *r, const char *bytes, size_t n,
                                            sh_error *err);

#endif
