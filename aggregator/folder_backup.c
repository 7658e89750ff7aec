/* Backup and restore. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "aggregator/folder_internal.h"
#include "aggregator/jobs.h"
#include "shared/base/file.h"
#include "shared/base/json.h"

#define BACKUP_FORMAT   1
#define BACKUP_RELEASES 8u

/* Files whose loss a backup must not have; objects and the store are apart. */
static const char *const single[] = {SH_FOLDER_KEY,    SH_FOLDER_ADMIN,  SH_FOLDER_RELEASE,
                                     SH_FOLDER_CONFIG, SH_FOLDER_UP_KEY, SH_FOLDER_UP_PUB};

static sh_status join(char *out, const char *dir, const char *name, sh_error *err)
{
    return sh_path_join(out, SH_PATH_BYTES, dir, name, err);
}

typedef struct {
    const char *from, *to;
} copying;

static sh_status copy_file(void *arg, const char *path, sh_error *err)
{
    const copying *c = arg;
    char source[SH_PATH_BYTES], target[SH_PATH_BYTES];
    uint64_t bytes;
    sh_hash sha256;
    SH_TRY(join(source, c->from, path, err));
    SH_TRY(join(target, c->to, path, err));
    return folder_copy(source, target, &sha256, &bytes, err);
}

static sh_status copy_folder(const char *name, const char *to, sh_error *err)
{
    char target[SH_PATH_BYTES];
    SH_TRY(join(target, to, name, err));
    SH_TRY(sh_dir_make(target, err));
    return folder_each(name, copy_file, &(copying){.from = name, .to = target}, err);
}

typedef struct {
    uint64_t version;
} newest;

static sh_status take_version(void *arg, const sh_release_row *row)
{
    newest *n = arg;
    n->version = SH_MAX(n->version, row->version);
    return SH_OK;
}

/* Marks the copy of the store, and finds out which objects it needs: not those of the store that
 * goes on. */
static sh_status mark(const char *path, uint64_t now_ms, uint64_t *version, sh_folder_keep *keep,
                      sh_error *err)
{
    sh_store *store = NULL;
    sh_txn *txn = NULL;
    newest n = {0};
    sh_status status = SH_OK;
    SH_TRY(sh_folder_open_store(path, 0, &store, err));
    SH_GOTO(sh_txn_begin(store, SH_TXN_RESERVE, &txn, err));
    SH_GOTO(sh_coord_mark_backup(txn, now_ms, err));
    SH_GOTO(sh_coord_each_candidate(txn, take_version, &n, err));
    SH_GOTO(sh_folder_keep_read(txn, BACKUP_RELEASES, keep, err));
    SH_GOTO(sh_txn_commit(&txn, err));
    *version = n.version;
cleanup:
    sh_txn_abort(&txn);
    sh_store_close(&store);
    return status;
}

/* Models and masters of releases. Older ones may be gone already (objects.kept); the current
 * release's may not. */
static sh_status copy_objects(const sh_folder_keep *keep, const char *to, sh_error *err)
{
    char source[SH_PATH_BYTES], target[SH_PATH_BYTES], dir[SH_PATH_BYTES];
    uint64_t bytes;
    sh_hash sha256;
    SH_TRY(join(dir, to, SH_FOLDER_OBJECTS, err));
    SH_TRY(sh_dir_make(dir, err));
    for (size_t i = 0; i < keep->n; i++) {
        if (i > 0 && sh_hash_equal(&keep->files[i], &keep->files[i - 1]))
            continue;
        SH_TRY(sh_job_path(source, SH_FOLDER_OBJECTS, &keep->files[i], err));
        SH_TRY(sh_job_path(target, dir, &keep->files[i], err));
        if (!sh_file_exists(source))
            continue;
        SH_TRY(folder_copy(source, target, &sha256, &bytes, err));
        if (!sh_hash_equal(&sha256, &keep->files[i]))
            return sh_fail(err, SH_ERR_CORRUPT,
                           "%s does not have the SHA-256 that is its name; restore it first",
                           source);
    }
    return SH_OK;
}

/* ---- the list of files ---- */

typedef struct {
    const char *root;
    json_t *files;
} listing;

static sh_status list_file(void *arg, const char *path, sh_error *err)
{
    const listing *l = arg;
    char full[SH_PATH_BYTES], hex[SH_HASH_HEX_BYTES];
    sh_hash sha256;
    uint64_t bytes;
    if (strcmp(path, FOLDER_UNFINISHED) == 0)
        return SH_OK;
    SH_TRY(join(full, l->root, path, err));
    SH_TRY(sh_sha256_file(full, &sha256, &bytes, err));
    sh_hex(sha256.b, sizeof sha256.b, hex);
    json_t *file = json_object();
    sh_json_set(file, "path", json_string(path));
    sh_json_set(file, "bytes", json_integer((json_int_t)bytes));
    sh_json_set(file, "sha256", json_string(hex));
    json_array_append_new(l->files, file);
    return SH_OK;
}

static sh_status write_list(const char *to, uint64_t now_ms, uint64_t version, sh_error *err)
{
    char path[SH_PATH_BYTES];
    json_t *list = json_object();
    listing l = {.root = to, .files = json_array()};
    sh_json_set(list, "format", json_integer(BACKUP_FORMAT));
    sh_json_set(list, "made_ms", json_integer((json_int_t)now_ms));
    sh_json_set(list, "release", json_integer((json_int_t)version));
    sh_json_set(list, "files", l.files);
    sh_status status = SH_OK;
    SH_GOTO(folder_each(to, list_file, &l, err));
    if (json_array_size(l.files) > SH_BACKUP_FILES_MAX)
        SH_GOTO(sh_fail(err, SH_ERR_LIMIT, "backup: more than %u files", SH_BACKUP_FILES_MAX));
    SH_GOTO(join(path, to, FOLDER_BACKUP, err));
    status = sh_json_save(path, list, err);
cleanup:
    json_decref(list);
    return status;
}

/* Lock files belong to a process, not to a backup. */
static sh_status drop_locks(const char *store, sh_error *err)
{
    static const char *const names[] = {"writer.lock", "readers.lock", "lock.mdb"};
    char path[SH_PATH_BYTES];
    for (size_t i = 0; i < SH_COUNT(names); i++) {
        SH_TRY(join(path, store, names[i], err));
        if (unlink(path) != 0 && errno != ENOENT)
            return sh_fail(err, SH_ERR_IO, "%s: %s", path, strerror(errno));
    }
    return SH_OK;
}

sh_status sh_folder_backup(sh_store *store, const char *to, uint64_t now_ms, uint64_t *version,
                           sh_error *err)
{
    char copy[SH_PATH_BYTES], target[SH_PATH_BYTES];
    sh_folder_keep keep = {0};
    uint64_t bytes, has = 0;
    sh_hash sha256;
    sh_status status = SH_OK;
    SH_GOTO(folder_begin(to, "backup", err));
    SH_GOTO(join(copy, to, SH_FOLDER_STORE, err));
    SH_GOTO(sh_store_backup(store, copy, err));
    SH_GOTO(mark(copy, now_ms, &has, &keep, err));
    SH_GOTO(drop_locks(copy, err));
    SH_GOTO(copy_objects(&keep, to, err));
    for (size_t i = 0; i < SH_COUNT(single); i++) {
        if (!sh_file_exists(single[i]))
            continue; /* settings may lie elsewhere */
        SH_GOTO(join(target, to, single[i], err));
        SH_GOTO(folder_copy(single[i], target, &sha256, &bytes, err));
    }
    SH_GOTO(copy_folder(SH_FOLDER_SUITES, to, err));
    SH_GOTO(copy_folder(SH_FOLDER_BUNDLE, to, err));
    SH_GOTO(write_list(to, now_ms, has, err));
    SH_GOTO(folder_end(to, err));
    *version = has;
cleanup:
    sh_folder_keep_release(&keep);
    return status;
}

/* ---- restore ---- */

/* A path of a list that stays below the folder. */
static bool is_below(const char *path)
{
    if (path[0] == '\0' || path[0] == '/')
        return false;
    for (const char *p = path; p != NULL; p = strchr(p, '/')) {
        p += *p == '/';
        size_t n = strcspn(p, "/");
        if (n == 0 || (n == 1 && p[0] == '.') || (n == 2 && p[0] == '.' && p[1] == '.'))
            return false;
    }
    return true;
}

static sh_status restore_file(const json_t *file, const char *from, const char *dir, sh_error *err)
{
    char source[SH_PATH_BYTES], target[SH_PATH_BYTES];
    const char *path = json_string_value(json_object_get(file, "path"));
    const char *hex = json_string_value(json_object_get(file, "sha256"));
    sh_hash want, have;
    uint64_t bytes;
    if (path == NULL || hex == NULL || !is_below(path) || sh_hash_parse(hex, &want, NULL) != SH_OK)
        return sh_fail(err, SH_ERR_INVALID, "%s/%s: its list of files is not readable", from,
                       FOLDER_BACKUP);
    SH_TRY(join(source, from, path, err));
    SH_TRY(join(target, dir, path, err));
    char *slash = strrchr(target, '/');
    *slash = '\0';
    SH_TRY(sh_dir_make(target, err));
    *slash = '/';
    SH_TRY(folder_copy(source, target, &have, &bytes, err));
    if (!sh_hash_equal(&want, &have))
        return sh_fail(err, SH_ERR_CORRUPT,
                       "%s does not have the SHA-256 of %s: the backup is damaged; take another "
                       "one",
                       source, FOLDER_BACKUP);
    return SH_OK;
}

sh_status sh_folder_restore(const char *from, const char *dir, sh_error *err)
{
    char path[SH_PATH_BYTES];
    json_t *list = NULL;
    const json_t *file;
    size_t i;
    SH_TRY(join(path, from, FOLDER_BACKUP, err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s is not there: --from must name a folder that `shoal aggregator backup` "
                       "finished",
                       path);
    SH_TRY(sh_json_load(path, &list, err));
    sh_status status = SH_OK;
    const json_t *files = json_object_get(list, "files");
    if (json_integer_value(json_object_get(list, "format")) != BACKUP_FORMAT)
        SH_GOTO(sh_fail(err, SH_ERR_UNSUPPORTED,
                        "%s: another format than %d; restore with the version that made it", path,
                        BACKUP_FORMAT));
    if (!json_is_array(files) || json_array_size(files) == 0)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID, "%s: its list of files is not readable", path));
    SH_GOTO(folder_begin(dir, "restore", err));
    if (chmod(dir, 0700) != 0)
        SH_GOTO(sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno)));
    json_array_foreach(files, i, file) SH_GOTO(restore_file(file, from, dir, err));
    SH_GOTO(folder_end(dir, err));
cleanup:
    json_decref(list);
    return status;
}
