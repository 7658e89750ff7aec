/*
 * What a training job does: the node's feedback as packed sequences, a LoRA on the model that the
 * node serves, and the encoded update with the node's own held-out loss before and after.
 *
 * A snapshot is a copy: the store may change while the job runs. Whole sessions (texts) are held
 * out, chosen by the hash of their number, so that no piece of a held-out text is trained on.
 * Threads: a snapshot is immutable once read; sh_learn_run may run beside others.
 */
#ifndef SH_EDGE_LEARN_H
#define SH_EDGE_LEARN_H

#include "shared/model/model.h"
#include "shared/store/store.h"
#include "shared/wire/wire.h"
#include "trainer/trainer.h"

#define SH_SNAPSHOT_TOKENS_MAX  (64u << 20)
#define SH_LEARN_HELDOUT_ONE_IN 8 /* sessions */

typedef struct {
    int32_t *tokens;    /* [n_tokens], sessions one after another */
    uint8_t *mask;      /* [n_tokens], 1: a target */
    uint32_t *starts;   /* [n_sessions], index of a session's first token */
    uint64_t *sessions; /* [n_sessions] */
    size_t n_tokens, n_sessions, tokens_cap, sessions_cap, mask_cap, starts_cap;
} sh_snapshot;

/* Appends the feedback rows of a node's store; call on a zeroed snapshot, or again to pool. */
SH_MUST_USE sh_status sh_snapshot_read(sh_txn *txn, sh_snapshot *snapshot, sh_error *err);
void sh_snapshot_release(sh_snapshot *snapshot);
size_t sh_snapshot_targets(const sh_snapshot *snapshot);

typedef struct {
    sh_buf update; /* encoded adapter, GGUF; the caller's */
    uint64_t samples, tokens_seen;
    double heldout_before, heldout_after;
    uint32_t steps;
} sh_learn_result;
void sh_learn_result_release(sh_learn_result *result);

typedef struct {
    sh_train_plan plan;
    uint64_t shuffle_seed;
    unsigned threads;
    bool heldout; /* hold sessions out and report their loss; else train on everything */
    /* Called after each step; false cancels (SH_ERR_CANCELLED). May be NULL. */
    bool (*progress)(void *arg, uint32_t step, double loss);
    void *progress_arg;
} sh_learn_options;

/* SH_ERR_LIMIT: fewer target tokens than plan.tokens_min. An update is made whether it is better or
 * not: whether it is sent is the core's decision. */
SH_MUST_USE sh_status sh_learn_run(const sh_model *base, const sh_snapshot *snapshot,
                                   const sh_learn_options *options, sh_learn_result *out,
                                   sh_error *err);

#endif
