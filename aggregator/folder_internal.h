/* What the files of aggregator/folder*.c share. */
#ifndef SH_AGGREGATOR_FOLDER_INTERNAL_H
#define SH_AGGREGATOR_FOLDER_INTERNAL_H

#include "aggregator/folder.h"

#define FOLDER_UNFINISHED "unfinished"
#define FOLDER_BACKUP     "backup.json"
#define FOLDER_KEY_BYTES  4096

/* Makes dir and the mark "unfinished" in it. SH_ERR_EXISTS: something lies in it. */
sh_status folder_begin(const char *dir, const char *what, sh_error *err);
sh_status folder_end(const char *dir, sh_error *err); /* removes the mark */
/* Streams a file to another place, in order: bytes, fsync. *sha256 and *bytes of what was written.
 */
sh_status folder_copy(const char *from, const char *to, sh_hash *sha256, uint64_t *bytes,
                      sh_error *err);
/* fn for every file below root, by paths relative to it in the order of their names; folders are
 * entered to a depth of 4. */
typedef sh_status (*folder_fn)(void *arg, const char *path, sh_error *err);
sh_status folder_each(const char *root, folder_fn fn, void *arg, sh_error *err);

#endif
