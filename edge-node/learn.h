/*
 * What the jobs of a node that learn do: its feedback as a snapshot, a plan as a training on it
 * (trainer/snapshot.h), and a candidate's score on the part of it that was never trained on.
 *
 * A snapshot is a copy: the store may change while the job runs.
 * Threads: a snapshot is immutable once read; sh_learn_run and sh_learn_evaluate may run beside
 * others.
 */
#ifndef SH_EDGE_LEARN_H
#define SH_EDGE_LEARN_H

#include "shared/model/model.h"
#include "shared/store/store.h"
#include "shared/wire/wire.h"
#include "trainer/snapshot.h"

/* Appends the feedback rows of a node's store; call on a zeroed snapshot, or again to pool. */
SH_MUST_USE sh_status sh_snapshot_read(sh_txn *txn, sh_snapshot *snapshot, sh_error *err);

typedef struct {
    sh_train_plan plan;
    uint64_t shuffle_seed;
    unsigned threads;
    bool heldout; /* hold sessions out and report their loss; else train on everything */
    /* Called after each step; false cancels (SH_ERR_CANCELLED). May be NULL. */
    bool (*progress)(void *arg, uint32_t step, uint32_t steps, double loss);
    void *progress_arg;
} sh_learn_options;

/* sh_round_train of a plan: the result is released with sh_round_result_release. Whether an update
 * is sent is the core's decision. */
SH_MUST_USE sh_status sh_learn_run(const sh_model *base, const sh_snapshot *snapshot,
                                   const sh_learn_options *options, sh_round_result *out,
                                   sh_error *err);

/* The words of `shoal-train round` that stand for the same options ("--rank=8", ...), so that the
 * program makes the same bytes as sh_learn_run: an argv's tail, ended by NULL. progress is left
 * out. */
#define SH_LEARN_WORDS_MAX 16
typedef struct {
    char words[SH_LEARN_WORDS_MAX][48];
    size_t n;
} sh_learn_words;
void sh_learn_make_words(const sh_learn_options *options, sh_learn_words *out);

/* Scores two models on the held-out sessions' targets, as they run for users (quantized, session
 * by session in windows of `context` tokens): sums of nats and counts of a slice each, in
 * slices[0, *n), which has room for SH_SLICES. A slice without a token is left out; *n is 0 when
 * nothing is held out. SH_ERR_MISMATCH when the vocabularies differ. */
SH_MUST_USE sh_status sh_learn_evaluate(const sh_model *parent, const sh_model *candidate,
                                        const sh_snapshot *snapshot, uint32_t context,
                                        sh_slice_score *slices, uint32_t *n, sh_error *err);

#endif
