/*
 * The commands of shoal-train, each in a file of its own. argv[0] is the command's name, argv[-1]
 * the program. SH_ERR_USAGE is the command line's fault.
 */
#ifndef SH_TRAINER_COMMANDS_H
#define SH_TRAINER_COMMANDS_H

#include "shared/base/option.h"

extern const sh_command sh_lora_command, sh_full_command, sh_distill_command,
    sh_tokenizer_train_command, sh_eval_command, sh_round_command;

SH_MUST_USE sh_status sh_lora_main(int argc, char **argv, sh_error *err);
SH_MUST_USE sh_status sh_full_main(int argc, char **argv, sh_error *err);
SH_MUST_USE sh_status sh_distill_main(int argc, char **argv, sh_error *err);
SH_MUST_USE sh_status sh_tokenizer_train_main(int argc, char **argv, sh_error *err);
SH_MUST_USE sh_status sh_eval_main(int argc, char **argv, sh_error *err);
/* What a node's training job is as a process of its own. It reads a snapshot and a model, writes
 * the update and a result, and never sees the node's store; killed at any moment it costs only its
 * own progress. It may start itself again. */
SH_MUST_USE sh_status sh_round_main(int argc, char **argv, sh_error *err);

#endif
