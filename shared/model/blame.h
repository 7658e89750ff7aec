/* One spelling of errors about a file, internal to model: its name comes first, once. */
#ifndef SH_MODEL_BLAME_H
#define SH_MODEL_BLAME_H

#include <string.h>

#include "shared/model/gguf.h"

/* Puts the file's name before the text unless it is there (gguf.h's errors have it). */
static inline void sh_blame_file(const sh_gguf *gguf, sh_error *err)
{
    const char *path = sh_gguf_path(gguf);
    if (err != NULL && strncmp(err->text, path, strlen(path)) != 0)
        sh_fail_in(err, "%s", path);
}

#endif
