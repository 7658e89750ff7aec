/*
 * `shoal-train round`: what a node's training job is as a process of its own. It reads a snapshot
 * and a model, writes the update and a result, and never sees the node's store; killed at any
 * moment it costs only its own progress.
 */
#ifndef SH_TRAINER_ROUND_MAIN_H
#define SH_TRAINER_ROUND_MAIN_H

#include <signal.h>

#include "shared/base/option.h"

extern const sh_command sh_round_command;
extern volatile sig_atomic_t sh_train_interrupted; /* SIGINT or SIGTERM came */

/* argv[0] is "round", argv[-1] the program: it may start itself again. */
SH_MUST_USE sh_status sh_round_main(int argc, char **argv, sh_error *err);

#endif
