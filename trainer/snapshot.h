/*
 * A snapshot of a node's feedback, and a round's training on it: what the simulator runs as a
 * library and `shoal-train round` as a child process of a node, which never opens the node's store.
 *
 * Whole sessions (texts) are held out, chosen by the hash of their number, so that no piece of a
 * held-out text is trained on.
 * The file of a snapshot is described at the head of snapshot.c: magic, version, checksum.
 * Threads: a snapshot is immutable once made; trainings may run beside others.
 */
#ifndef SH_TRAINER_SNAPSHOT_H
#define SH_TRAINER_SNAPSHOT_H

#include "trainer/trainer.h"

#define SH_SNAPSHOT_TOKENS_MAX     (64u << 20)
#define SH_SNAPSHOT_HELDOUT_ONE_IN 8 /* sessions */

/* mask: bits of a token. */
enum { SH_TOKEN_TARGET = 1, SH_TOKEN_ACCEPTED = 2 /* of a target: else it was corrected */ };

typedef struct {
    int32_t *tokens;    /* [n_tokens], sessions one after another */
    uint8_t *mask;      /* [n_tokens], SH_TOKEN_ bits */
    uint32_t *starts;   /* [n_sessions], index of a session's first token */
    uint64_t *sessions; /* [n_sessions] */
    size_t n_tokens, n_sessions, tokens_cap, sessions_cap, mask_cap, starts_cap;
} sh_snapshot;
/* Appends a piece; of the same session as the last piece: its text goes on. */
SH_MUST_USE sh_status sh_snapshot_add(sh_snapshot *snapshot, uint64_t session,
                                      const int32_t *tokens, size_t n, uint8_t mask);
void sh_snapshot_release(sh_snapshot *snapshot);
size_t sh_snapshot_targets(const sh_snapshot *snapshot);

/* Of a session's number alone, so that a node counts what it can train on as its training will. */
static inline bool sh_snapshot_is_heldout(uint64_t session)
{
    uint64_t h = session * 0x9e3779b97f4a7c15ull;
    return (h >> 32) % SH_SNAPSHOT_HELDOUT_ONE_IN == 0;
}

/* Mode 0600, written whole or not at all. */
SH_MUST_USE sh_status sh_snapshot_save(const sh_snapshot *snapshot, const char *path,
                                       sh_error *err);
bool sh_snapshot_is_file(const char *path); /* by the magic; false when it cannot be read */
SH_MUST_USE sh_status sh_snapshot_load(const char *path, sh_snapshot *out, sh_error *err);

typedef struct {
    uint64_t a_seed, shuffle_seed;
    uint32_t rank;
    float alpha, lr, lr_final, clip;
    uint32_t batch, context, passes_milli, steps_max, warmup;
    uint32_t tokens_min;
    unsigned threads;
    uint64_t memory_max; /* as in sh_train_options */
    bool heldout;        /* hold sessions out and report their loss; else train on everything */
    bool (*progress)(void *arg, uint32_t step, uint32_t steps, double loss); /* may be NULL */
    void *progress_arg;
} sh_round_options;

typedef struct {
    sh_buf update; /* encoded adapter, GGUF; the caller's */
    uint64_t samples, tokens_seen;
    double heldout_before, heldout_after;
    uint32_t steps;
} sh_round_result;
void sh_round_result_release(sh_round_result *result);

/* SH_ERR_LIMIT: fewer target tokens than tokens_min. An update is made whether it is better or not.
 */
SH_MUST_USE sh_status sh_round_train(const sh_model *base, const sh_snapshot *snapshot,
                                     const sh_round_options *options, sh_round_result *out,
                                     sh_error *err);

#endif
