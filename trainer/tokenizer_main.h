/*
 * `shoal-train tokenizer`: a vocabulary from text files, for a model that is trained from nothing.
 */
#ifndef SH_TRAINER_TOKENIZER_MAIN_H
#define SH_TRAINER_TOKENIZER_MAIN_H

#include "shared/base/option.h"

extern const sh_command sh_tokenizer_train_command;

SH_MUST_USE sh_status sh_tokenizer_train_main(int argc, char **argv, sh_error *err);

#endif
