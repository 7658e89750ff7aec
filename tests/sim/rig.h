/*
 * Runs of the simulator with the cost model, inside the test's process, and the audit of their
 * stores. Include after cmocka.h.
 */
#ifndef SH_TESTS_SIM_RIG_H
#define SH_TESTS_SIM_RIG_H

#include "experiments/audit/audit.h"
#include "experiments/sim/sim.h"

#define RIG_WORDS_MAX 64

/* Asserts SH_OK, printing the error's text otherwise. */
#define OK(call)                                                                                   \
    do {                                                                                           \
        sh_error ok_err_ = {0};                                                                    \
        sh_error *err = &ok_err_;                                                                  \
        sh_status ok_status_ = (call);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s (%s)", #call, sh_status_name(ok_status_), err->text);                 \
    } while (0)

typedef struct {
    const char *words[RIG_WORDS_MAX]; /* of the command line, without "shoal-sim run" */
    size_t n_words;
    char numbers[8][24];
    size_t n_numbers;
    sim_options options;
    sh_args args;
    sim *sim;
} rig;

/* A command line for a small fleet whose learning is made up, then more words, NULL at the end. */
void rig_init(rig *r, const char *const *words);
void rig_add(rig *r, const char *key, const char *value); /* borrowed */
void rig_add_number(rig *r, const char *key, uint64_t value);
void rig_create(rig *r); /* parses the words and makes the simulation */
void rig_release(rig *r);
/* What to type to see the same run again. */
void rig_print_command(const rig *r);

/* The audit of the stores as they are now; the first finding's text goes to finding. */
sh_status rig_audit(const sim *s, sh_audit_result *out, char *finding, size_t finding_bytes,
                    sh_error *err);

#endif
