/*
 * shoal-train as a user would run it, in a folder of the test's own that goes at the end with
 * whatever is in it. There are vocab.gguf, text and broken.gguf in it at the start.
 */
#ifndef SH_TESTS_TRAINER_PROGRAM_RUN_H
#define SH_TESTS_TRAINER_PROGRAM_RUN_H

#include "shared/base/json.h"
#include "tests/trainer/util.h"

extern sh_error err;
extern const char *program; /* its path; main sets it */
extern char dir[];

const char *path_of(const char *name); /* in the folder; good for the next eight calls */
/* Runs the program in a shell with the folder as working directory; returns its exit status and
 * what it printed on stdout. stderr goes to the folder's file "stderr". */
int run(const char *arguments, char *out, size_t bytes);
void must_exit(const char *arguments, int expected); /* and say something on stderr */
json_t *run_json(const char *arguments);             /* the caller's to free */
double number_of(const json_t *j, const char *key);
/* The exit code, text on stderr, and no result.json. */
void expect_error(const char *arguments, int code, const char *text);
int prepare(void **state); /* of the group */
int clean(void **state);

#define FULL                                                                                       \
    "full --vocab vocab.gguf --data text --heldout text --width 32 --layers 2 --heads 4 "          \
    "--kv-heads 2 --ffn 64 --context-length 64 --context 16 --batch 4 --warmup 2 --lr 0.01 "

#endif
