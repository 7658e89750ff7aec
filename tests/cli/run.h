/*
 * Runs a program as a user would: arguments, bytes on standard input; what it wrote to both
 * outputs and its exit code come back. For tests of command lines. Include after cmocka.h.
 */
#ifndef SH_TESTS_CLI_RUN_H
#define SH_TESTS_CLI_RUN_H

#include <stddef.h>

#define RUN_OUTPUT_MAX (1u << 20)
#define RUN_ARGS_MAX   32

typedef struct {
    int exit_code;   /* 128 + signal when killed */
    char *out, *err; /* 0-terminated, owned */
    size_t n_out, n_err;
} run_result;

/* words: the arguments after the program, NULL at the end. input may be NULL (empty). Aborts the
 * test when the program cannot be started. */
run_result run_program(const char *program, const char *const *words, const char *input,
                       size_t n_input);
void run_release(run_result *result);

#endif
