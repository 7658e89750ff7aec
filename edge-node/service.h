/*
 * The inference service: completes the word that a user is typing, or generates any text after it,
 * and measures itself while it does. A session is one text being typed into one model.
 *
 * Invariants
 *   - The cache holds what the author typed, never what the model proposed: a generation's tokens
 *     are cut off at its end.
 *   - What it remembers is at most n_tokens_max tokens; when they are used up, the later half stays
 *     and is run again. The same tokens typed give the same completions and the same numbers,
 *     however they are split into calls.
 *   - Of what was typed since the last completion the first 32 tokens are scored (prompt_nll), then
 *     one in 32: a long prompt is run nearly as fast as if nobody measured it.
 *   - Nothing is measured but numbers: a record holds no text (shared/stats/record.h).
 * Threads: an sh_frozen is immutable and shared; a session belongs to one thread at a time.
 * Ownership: model and frozen are borrowed and outlive the session.
 *
 *     SH_TRY(sh_frozen_create(genesis, &frozen, err));
 *     SH_TRY(sh_session_create(model, frozen, &(sh_session_options){.release_version = 1}, &s,
 * err)); SH_TRY(sh_session_begin(s, err)); SH_TRY(sh_session_type(s, typed, n_typed, err));
 *     SH_TRY(sh_session_complete(s, SH_WORD_TOKENS_MAX, &done, err));
 *     sh_completion_judge(&done, wanted, sh_word_length(frozen, wanted, n_wanted, 16));
 *     done.record.at_ms = now_ms; ... the record is the node core's SH_NODE_INFERENCE
 */
#ifndef SH_EDGE_SERVICE_H
#define SH_EDGE_SERVICE_H

#include "shared/model/model.h"
#include "shared/model/sampler.h"
#include "shared/stats/record.h"

#define SH_WORD_TOKENS_MAX        6u  /* proposed for one word */
#define SH_JUDGED_TOKENS_MAX      16u /* of what the author wrote, in sh_completion_judge */
#define SH_SESSION_TOKENS_DEFAULT 256u
#define SH_SESSION_TOKENS_MIN     32u
#define SH_PROJECTION_SEED        0x73686f616c5f7031u /* of the projection matrix; never changes */

/* What stays the same over all releases of a fleet: how tokens make words, and the frozen
 * embedding, that of the genesis model, projected: p = R·(e - mean) with R [16, width] of +1 and -1
 * from SH_PROJECTION_SEED, each component divided by its standard deviation over the vocabulary.
 * About 64 bytes a token of the vocabulary. */
typedef struct sh_frozen sh_frozen;
SH_MUST_USE sh_status sh_frozen_create(const sh_model *genesis, sh_frozen **out, sh_error *err);
void sh_frozen_destroy(sh_frozen **frozen);
/* Names the embedding and the projection: SHA-256 of a label, the genesis file's hash and the
 * seed. */
sh_hash sh_frozen_hash(const sh_frozen *frozen);
uint32_t sh_frozen_vocab(const sh_frozen *frozen);
/* How many of the first tokens make one word: the first, and those after it that go on with it (no
 * space before them, letters, digits, apostrophe, hyphen, bytes past ASCII); at most max. */
uint32_t sh_word_length(const sh_frozen *frozen, const int32_t *tokens, uint32_t n, uint32_t max);

/* Why a record's output ended. */
typedef enum {
    SH_STOP_WORD,
    SH_STOP_LIMIT,
    SH_STOP_END_OF_TEXT,
    SH_STOP_STRING,   /* a stop string of the request */
    SH_STOP_CANCELLED /* the user was gone before the end */
} sh_stop;

typedef struct {
    uint32_t n;
    int32_t tokens[SH_WORD_TOKENS_MAX]; /* the proposal */
    uint32_t evaluated; /* tokens run through the model since the last completion: cost */
    sh_record record;   /* at_ms, ttft_us, token_us are the caller's to set, feedback and
                           edit_distance sh_completion_judge's */
} sh_completion;

/* What the user did: accepted when the author's word is the proposal, edited when some of it is
 * right, rejected when nothing is. edit_distance is in tokens (Levenshtein). */
sh_feedback_kind sh_completion_judge(sh_completion *completion, const int32_t *author, uint32_t n);

/* How a session's tokens are run: in passes that it shares with others (edge-node/batch.h). The
 * numbers are the same bits as alone (model.h). */
typedef struct {
    sh_runner *runner; /* of the session's model; borrowed */
    sh_status (*run)(void *arg, const sh_run_item *item, sh_error *err);
    void *arg;
} sh_session_runner;

typedef struct sh_session sh_session;
typedef struct {
    uint32_t n_tokens_max;    /* cache; 0: SH_SESSION_TOKENS_DEFAULT or the model's context */
    uint32_t release_version; /* of the model, for the records */
    sh_kv_type kv;            /* of the cache */
    const sh_session_runner *runner; /* NULL: the session alone, on its caller's thread */
} sh_session_options;

/* SH_ERR_MISMATCH: the model's vocabulary is not the frozen one's. */
SH_MUST_USE sh_status sh_session_create(const sh_model *model, const sh_frozen *frozen,
                                        const sh_session_options *options, sh_session **out,
                                        sh_error *err);
void sh_session_destroy(sh_session **session);
/* A new text: forgets everything. */
SH_MUST_USE sh_status sh_session_begin(sh_session *session, sh_error *err);
/* A new text whose start is already there: taken as context, not measured. */
SH_MUST_USE sh_status sh_session_resume(sh_session *session, const int32_t *tokens, size_t n,
                                        sh_error *err);
/* Goes on with the same text on another model (a release became active). */
SH_MUST_USE sh_status sh_session_switch(sh_session *session, const sh_model *model,
                                        uint32_t release_version, sh_error *err);
/* The same in two steps: detach gives the cache back, so that the session has nothing of its model
 * any more (which may then be closed), and only cut, attach and destroy may follow; attach goes on
 * with another model, or the same one. runner: NULL for none. */
void sh_session_detach(sh_session *session);
SH_MUST_USE sh_status sh_session_attach(sh_session *session, const sh_model *model,
                                        uint32_t release_version, const sh_session_runner *runner,
                                        sh_error *err);
/* A new text that begins with the first n tokens of another session's (which nobody changes
 * meanwhile): their cache is copied, and they are not measured. Both have the same model. */
SH_MUST_USE sh_status sh_session_adopt(sh_session *session, const sh_session *other, uint32_t n,
                                       sh_error *err);
/* The mean over the tokens of what the output matrix would see of each, [width]; the text is
 * forgotten, and nothing is measured. n 1 .. n_tokens_max; BOS is the caller's to put. */
SH_MUST_USE sh_status sh_session_embed(sh_session *session, const int32_t *tokens, uint32_t n,
                                       float *out, sh_error *err);
/* What the author typed since. SH_ERR_INVALID: a token outside the vocabulary, nothing is taken.
 * After any other error the session must begin anew. */
SH_MUST_USE sh_status sh_session_type(sh_session *session, const int32_t *tokens, size_t n,
                                      sh_error *err);
/* Proposes the next word, greedily, of at most max_tokens tokens (1 .. SH_WORD_TOKENS_MAX), and
 * closes the measurement of what was typed. SH_ERR_INVALID when there is nothing to go on from. */
SH_MUST_USE sh_status sh_session_complete(sh_session *session, uint32_t max_tokens,
                                          sh_completion *out, sh_error *err);

/* ---- the same, token by token, of any length ---- */
typedef struct {
    uint32_t max_tokens;  /* 1 .. half of n_tokens_max, or all that is left of it */
    bool one_word;        /* ends where the next word begins */
    sh_sampling sampling; /* zeros: greedy; sampler.h */
} sh_proposing;
typedef struct {
    uint32_t n;
    const int32_t *tokens; /* borrowed until the session is used again */
    uint32_t evaluated;    /* as in sh_completion */
    sh_record record;
} sh_proposal;

/* propose, next until *done, end; end may come at any time, and must before anything else is done
 * with the session. After an error of next, too. */
SH_MUST_USE sh_status sh_session_propose(sh_session *session, const sh_proposing *how,
                                         sh_error *err);
/* *token is untouched when *done. */
SH_MUST_USE sh_status sh_session_next(sh_session *session, int32_t *token, bool *done,
                                      sh_error *err);
/* The logits [vocab] that the last token was chosen from; until the session is used again. */
const float *sh_session_logits(const sh_session *session);
/* Closes the measurement. record.stop is SH_STOP_CANCELLED when *done was not reached. */
void sh_session_end(sh_session *session, sh_proposal *out);

/* The text as far as it is remembered, without BOS; borrowed until the session is used again. */
const int32_t *sh_session_text(const sh_session *session, uint32_t *n);
/* Forgets, and wipes from memory, what comes after the first n tokens of that text, and what was
 * measured since the last completion. Touches no model: after it switch and begin, too, may follow
 * when the model is gone. */
void sh_session_cut(sh_session *session, uint32_t n);

#endif
