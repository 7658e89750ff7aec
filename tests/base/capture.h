/*
 * Takes what a call writes to standard error into a file, for tests of the log and of error
 * reports. One capture at a time; the test is the only thread that opens and closes it.
 */
#ifndef TESTS_BASE_CAPTURE_H
#define TESTS_BASE_CAPTURE_H

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct {
    int kept; /* the real standard error */
    FILE *file;
} capture;

static inline capture capture_begin(void)
{
    capture c = {.file = tmpfile()};
    fflush(stderr);
    c.kept = dup(STDERR_FILENO);
    if (!c.file || c.kept < 0 || dup2(fileno(c.file), STDERR_FILENO) < 0)
        abort();
    return c;
}

/* Puts standard error back; text gets at most bytes - 1 of what was written. */
static inline size_t capture_end(capture *c, char *text, size_t bytes)
{
    fflush(stderr);
    dup2(c->kept, STDERR_FILENO);
    close(c->kept);
    rewind(c->file);
    size_t n = fread(text, 1, bytes - 1, c->file);
    text[n] = 0;
    fclose(c->file);
    return n;
}

#endif
