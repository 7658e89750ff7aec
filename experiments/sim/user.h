/*
 * One simulated user typing one text: the model completes a word now and then, the user takes it or
 * goes on with what the author really wrote.
 */
#ifndef SIM_USER_H
#define SIM_USER_H

#include "edge-node/service.h"
#include "experiments/sim/texts.h"
#include "shared/base/rng.h"

typedef struct {
    const sh_model *model;
    const sh_frozen *frozen;
    const sim_text *text;
    uint32_t release_version;
    uint32_t words_between; /* mean number of words from one completion to the next */
    uint64_t seed, start_ms, duration_ms;
    double us_per_token; /* virtual cost of one token on this device */
} sim_typing;

typedef struct {
    sh_record *records; /* [n], owned */
    sim_row *rows;      /* [n], owned: the author's tokens from one completion to the next */
    size_t n, accepted;
    uint32_t opening; /* tokens before the first completion */
} sim_typed;
void sim_typed_release(sim_typed *typed);

SH_MUST_USE sh_status sim_type_text(const sim_typing *typing, sim_typed *out, sh_error *err);

#endif
