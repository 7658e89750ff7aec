/*
 * Settings of fleets that learn without end and quickly, and what is checked of a node's store when
 * they have stopped. Include after cmocka.h.
 */
#ifndef SH_TESTS_E2E_FLEETS_H
#define SH_TESTS_E2E_FLEETS_H

#include "tests/e2e/harness.h"

/* Flags of an aggregator: little training of a tiny model, whose losses the gate does not mind. */
#define FLEETS_SMALL_LEARNING                                                                      \
    "--gate.overall-max", "10", "--gate.slice-max", "100", "--learn.alpha", "4", "--learn.batch",  \
        "1", "--learn.context", "32", "--learn.passes", "2", "--learn.rank", "2",                  \
        "--learn.steps-max", "30", "--learn.tokens-min", "32", "--merge.cosine-min", "-1"

/* Rounds begin at once and again, two updates make a merge, and the gate lets pass what was
 * measured: the model is random. Feedback is never dropped. */
extern const char *const fleets_eager_aggregator[], *const fleets_eager_node[];

/* Such a fleet of two nodes, started, with a user each that types without end. */
#define FLEETS_NODES 2
typedef struct {
    e2e_fleet fleet;
    e2e_user users[FLEETS_NODES];
} fleets_scene;
fleets_scene *fleets_scene_make(const char *bin, uint64_t seed);
void fleets_scene_release(fleets_scene *s); /* takes a stopped or a running one */

/* The stopped node has the feedback of all that was answered, and nothing but what was asked:
 * acknowledged <= pieces <= acknowledged + doubtful. */
void fleets_check_feedback(e2e_fleet *f, unsigned node, uint64_t acknowledged, uint64_t doubtful);

#endif
