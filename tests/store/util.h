/* What the store's tests share: folders, values that can be made again, processes. */
#ifndef TESTS_STORE_UTIL_H
#define TESTS_STORE_UTIL_H

#include <sys/types.h>

#include "shared/store/store.h"

typedef struct {
    char path[64];
} temp_dir;

temp_dir temp_dir_make(void); /* under TMPDIR or /tmp */
void temp_dir_remove(const temp_dir *dir);
/* The path of a name in it; a static buffer of a few paths. */
const char *temp_path(const temp_dir *dir, const char *name);

/* The n bytes that `seed` stands for. */
void value_fill(uint64_t seed, void *bytes, size_t n);
bool value_is(uint64_t seed, size_t n, sh_slice value);

/* Ends the process with the text of err when status is not SH_OK; `what` names the place. */
void must(sh_status status, const sh_error *err, const char *what);

/* This program again, as another process: posix_spawn with the arguments, at most 4, after which
 * NULL. *in and *out, when not NULL, become pipes to its standard input and from its output. */
pid_t spawn_self(const char *const args[], int *in, int *out);
int wait_exit(pid_t pid); /* exit status; -signal when it was killed */

#endif
