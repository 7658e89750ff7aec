#include "tests/cli/run.h"

#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void must(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        abort();
    }
}

static char *read_all(FILE *file, size_t *n)
{
    char *text = calloc(1, RUN_OUTPUT_MAX + 1);
    must(text != NULL && fseek(file, 0, SEEK_SET) == 0, "output");
    *n = fread(text, 1, RUN_OUTPUT_MAX, file);
    fclose(file);
    return text;
}

run_result run_program(const char *program, const char *const *words, const char *input,
                       size_t n_input)
{
    /* Files, not pipes: nothing can block, whatever the program writes. */
    FILE *in = tmpfile(), *out = tmpfile(), *err = tmpfile();
    must(in != NULL && out != NULL && err != NULL, "tmpfile");
    must(fwrite(input != NULL ? input : "", 1, n_input, in) == n_input, "input");
    must(fflush(in) == 0 && fseek(in, 0, SEEK_SET) == 0, "input");
    char *argv[RUN_ARGS_MAX + 2] = {(char *)program};
    for (size_t i = 0; words[i] != NULL; i++) {
        must(i < RUN_ARGS_MAX, "too many words");
        argv[i + 1] = (char *)words[i];
    }
    posix_spawn_file_actions_t actions;
    must(posix_spawn_file_actions_init(&actions) == 0, "spawn");
    posix_spawn_file_actions_adddup2(&actions, fileno(in), STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fileno(out), STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, fileno(err), STDERR_FILENO);
    pid_t child;
    int status;
    must(posix_spawn(&child, program, &actions, NULL, argv, environ) == 0, program);
    must(waitpid(child, &status, 0) == child, "waitpid");
    posix_spawn_file_actions_destroy(&actions);
    fclose(in);
    run_result result = {0};
    result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    result.out = read_all(out, &result.n_out);
    result.err = read_all(err, &result.n_err);
    return result;
}

void run_release(run_result *result)
{
    free(result->out);
    free(result->err);
    memset(result, 0, sizeof *result);
}
