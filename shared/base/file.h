/*
 * Files: whole reads, atomic writes, read-only maps, folders. All paths are UTF-8 byte strings.
 */
#ifndef SH_BASE_FILE_H
#define SH_BASE_FILE_H

#include "shared/base/status.h"

#define SH_PATH_BYTES 4096

/* Reads a whole file of at most max_bytes (SH_ERR_LIMIT beyond). *out is malloc'ed, has a 0 byte
 * after its n bytes, and is the caller's to free. path "-" reads standard input. */
SH_MUST_USE sh_status sh_file_read(const char *path, size_t max_bytes, uint8_t **out, size_t *n,
                                   sh_error *err);
/* Writes to a temporary file beside path, fsyncs, renames, fsyncs the folder: a reader sees the
 * old bytes or the new ones. What is no regular file (a device, a pipe) is refused, not replaced.
 */
SH_MUST_USE sh_status sh_file_write_atomic(const char *path, const void *bytes, size_t n,
                                           sh_error *err);
/* The same with mode 0600, from the first byte on: for keys and what users wrote. */
SH_MUST_USE sh_status sh_file_write_private(const char *path, const void *bytes, size_t n,
                                            sh_error *err);
/* The same piece by piece, for what would be too much in memory: nothing is at path before
 * sh_file_writer_commit. The writer is the caller's, zeroed; commit and abandon end it, both take
 * an ended one. Writes are buffered by the caller. */
typedef struct {
    char path[SH_PATH_BYTES], temp[SH_PATH_BYTES];
    int fd; /* meaningful while open */
    bool open;
} sh_file_writer;
SH_MUST_USE sh_status sh_file_writer_open(const char *path, sh_file_writer *out, sh_error *err);
/* With mode 0600. */
SH_MUST_USE sh_status sh_file_writer_open_private(const char *path, sh_file_writer *out,
                                                  sh_error *err);
SH_MUST_USE sh_status sh_file_writer_append(sh_file_writer *w, const void *bytes, size_t n,
                                            sh_error *err);
SH_MUST_USE sh_status sh_file_writer_commit(sh_file_writer *w, sh_error *err);
void sh_file_writer_abandon(sh_file_writer *w);
/* Removes the temporary files beside path that processes left which were killed while they wrote
 * it. This process must not be writing it. */
void sh_file_remove_leftovers(const char *path);
typedef struct {
    const uint8_t *data;
    size_t bytes;
} sh_map;
SH_MUST_USE sh_status sh_map_open(const char *path, sh_map *out, sh_error *err);
void sh_map_release(sh_map *map); /* takes a zeroed map */

SH_MUST_USE sh_status sh_dir_make(const char *path, sh_error *err); /* with parents; exists is ok */
bool sh_file_exists(const char *path);
/* Joins with one '/', into out of out_bytes; SH_ERR_LIMIT when too long. */
SH_MUST_USE sh_status sh_path_join(char *out, size_t out_bytes, const char *dir, const char *name,
                                   sh_error *err);

#endif
