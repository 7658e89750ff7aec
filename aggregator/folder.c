#include "aggregator/folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "aggregator/folder_internal.h"
#include "aggregator/jobs.h"
#include "shared/base/file.h"

#define COPY_BYTES    (1u << 20)
#define DEPTH_MAX     4
#define OBJECT_ENDING ".gguf"

/* ---- whole folders ---- */

static sh_status is_dir(const char *dir, bool *is, sh_error *err)
{
    struct stat st;
    if (stat(dir, &st) != 0) {
        if (errno != ENOENT)
            return sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno));
        *is = false;
        return SH_OK;
    }
    if (!S_ISDIR(st.st_mode))
        return sh_fail(err, SH_ERR_EXISTS, "%s is no folder; name another one", dir);
    *is = true;
    return SH_OK;
}

sh_status folder_begin(const char *dir, const char *what, sh_error *err)
{
    bool there = false;
    char path[SH_PATH_BYTES];
    SH_TRY(is_dir(dir, &there, err));
    if (there) {
        DIR *d = opendir(dir);
        if (d == NULL)
            return sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno));
        bool empty = true;
        for (struct dirent *e; empty && (e = readdir(d)) != NULL;)
            empty = strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0;
        closedir(d);
        if (!empty)
            return sh_fail(err, SH_ERR_EXISTS, "%s is not empty: %s needs a new folder", dir, what);
    }
    SH_TRY(sh_dir_make(dir, err));
    SH_TRY(sh_path_join(path, sizeof path, dir, FOLDER_UNFINISHED, err));
    return sh_file_write_atomic(path, what, strlen(what), err);
}

sh_status folder_end(const char *dir, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof path, dir, FOLDER_UNFINISHED, err));
    if (unlink(path) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", path, strerror(errno));
    return SH_OK;
}

sh_status sh_folder_check(const char *dir, sh_error *err)
{
    char path[SH_PATH_BYTES];
    bool there = false;
    SH_TRY(is_dir(dir, &there, err));
    if (!there)
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s is not there; shoal-aggregator init --dir %s --base MODEL.gguf makes it",
                       dir, dir);
    SH_TRY(sh_path_join(path, sizeof path, dir, FOLDER_UNFINISHED, err));
    if (sh_file_exists(path))
        return sh_fail(err, SH_ERR_INVALID,
                       "%s was not finished by init or restore; remove it and run that again", dir);
    SH_TRY(sh_path_join(path, sizeof path, dir, SH_FOLDER_KEY, err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s is no aggregator's folder (it has no %s); shoal-aggregator init makes "
                       "one",
                       dir, SH_FOLDER_KEY);
    return SH_OK;
}

sh_status sh_folder_read_public(const char *path, sh_hash *out, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(path, FOLDER_KEY_BYTES, &text, &n, err));
    while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\r'))
        text[--n] = '\0';
    sh_status status = sh_hash_parse((const char *)text, out, err);
    free(text);
    return status == SH_OK ? SH_OK : sh_fail_in(err, "%s", path);
}

sh_status sh_folder_release_key(sh_sign_public_key *pk, sh_sign_secret_key *sk, sh_error *err)
{
    struct stat st;
    uint8_t *text = NULL;
    size_t n = 0;
    sh_hash seed;
    if (stat(SH_FOLDER_RELEASE, &st) == 0 && (st.st_mode & 077) != 0)
        return sh_fail(err, SH_ERR_AUTH, "%s: others may read it; chmod 600 %s", SH_FOLDER_RELEASE,
                       SH_FOLDER_RELEASE);
    SH_TRY(sh_file_read(SH_FOLDER_RELEASE, FOLDER_KEY_BYTES, &text, &n, err));
    while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\r'))
        text[--n] = '\0';
    sh_status status = sh_hash_parse((const char *)text, &seed, NULL);
    if (status != SH_OK)
        status = sh_fail(err, SH_ERR_INVALID, "%s: it must hold 64 hexadecimal digits",
                         SH_FOLDER_RELEASE);
    else
        sh_sign_keypair(seed.b, pk, sk);
    explicit_bzero(&seed, sizeof seed);
    explicit_bzero(text, n);
    free(text);
    return status;
}

sh_status sh_folder_open_store(const char *path, uint64_t bytes_max, sh_store **out, sh_error *err)
{
    /* An eighth is for job ends and commands: what nodes send cannot keep a decision from being
     * written. */
    sh_store_options options = {.tables = sh_coord_tables,
                                .n_tables = SH_COORD_TABLES,
                                .bytes_max = bytes_max,
                                .reserve_bytes = bytes_max / 8};
    return sh_store_open_lmdb(path, &options, out, err);
}

/* ---- files ---- */

sh_status folder_copy(const char *from, const char *to, sh_hash *sha256, uint64_t *bytes,
                      sh_error *err)
{
    sh_sha256_state state;
    uint64_t total = 0;
    sh_status status = SH_OK;
    uint8_t *block = sh_calloc(1, COPY_BYTES);
    int in = open(from, O_RDONLY | O_CLOEXEC);
    int out = in < 0 ? -1 : open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    sh_sha256_init(&state);
    if (block == NULL)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "%s: no memory to copy it", from));
    if (in < 0 || out < 0)
        SH_GOTO(sh_fail(err, SH_ERR_IO, "%s: %s", in < 0 ? from : to, strerror(errno)));
    for (;;) {
        ssize_t n = read(in, block, COPY_BYTES);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            SH_GOTO(sh_fail(err, SH_ERR_IO, "%s: %s", from, strerror(errno)));
        if (n == 0)
            break;
        for (ssize_t k = 0, w; k < n; k += w) {
            w = write(out, block + k, (size_t)(n - k));
            if (w < 0 && errno != EINTR)
                SH_GOTO(sh_fail(err, errno == ENOSPC ? SH_ERR_FULL : SH_ERR_IO, "%s: %s", to,
                                strerror(errno)));
            w = SH_MAX(w, 0);
        }
        sh_sha256_update(&state, block, (size_t)n);
        total += (uint64_t)n;
    }
    if (fsync(out) != 0)
        SH_GOTO(sh_fail(err, SH_ERR_IO, "%s: %s", to, strerror(errno)));
    *sha256 = sh_sha256_final(&state);
    *bytes = total;
cleanup:
    if (in >= 0)
        close(in);
    if (out >= 0)
        close(out);
    free(block);
    return status;
}

static int visible(const struct dirent *e)
{
    return strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
}

static int by_bytes(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static sh_status each_below(const char *root, const char *below, int depth, folder_fn fn, void *arg,
                            sh_error *err)
{
    char path[SH_PATH_BYTES], name[SH_PATH_BYTES];
    struct dirent **entries = NULL;
    struct stat st;
    SH_TRY(sh_path_join(path, sizeof path, root, below, err));
    int n = scandir(path, &entries, visible, by_bytes);
    if (n < 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", path, strerror(errno));
    sh_status status = SH_OK;
    for (int i = 0; i < n && status == SH_OK; i++) {
        const char *entry = entries[i]->d_name;
        if (below[0] != '\0')
            status = sh_path_join(name, sizeof name, below, entry, err);
        else
            snprintf(name, sizeof name, "%s", entry);
        if (status == SH_OK)
            status = sh_path_join(path, sizeof path, root, name, err);
        if (status != SH_OK || lstat(path, &st) != 0)
            continue; /* what went away meanwhile */
        if (S_ISDIR(st.st_mode) && depth < DEPTH_MAX)
            status = each_below(root, name, depth + 1, fn, arg, err);
        else if (S_ISREG(st.st_mode))
            status = fn(arg, name, err);
    }
    for (int i = 0; i < n; i++)
        free(entries[i]);
    free(entries);
    return status;
}

sh_status folder_each(const char *root, folder_fn fn, void *arg, sh_error *err)
{
    return each_below(root, "", 0, fn, arg, err);
}

/* ---- objects that must stay ---- */

typedef struct {
    uint64_t newest, releases;
    sh_folder_keep *keep;
    size_t cap;
    bool collect;
} keeping;

static sh_status add_file(keeping *k, const sh_hash *file)
{
    SH_TRY(sh_array_reserve((void **)&k->keep->files, &k->cap, k->keep->n + 1,
                            sizeof *k->keep->files, 1u << 20));
    k->keep->files[k->keep->n++] = *file;
    return SH_OK;
}

static sh_status keep_row(void *arg, const sh_release_row *row)
{
    keeping *k = arg;
    if (row->version == 0)
        return SH_OK;
    if (!k->collect) {
        k->newest++;
        return SH_OK;
    }
    /* Rows come in the order of the candidates, which is that of the versions. */
    if (row->version != 1 && k->newest-- > k->releases)
        return SH_OK;
    SH_TRY(add_file(k, &row->sha256));
    return add_file(k, &row->new_master);
}

static int by_hash(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(sh_hash));
}

sh_status sh_folder_keep_read(sh_txn *txn, uint64_t releases, sh_folder_keep *out, sh_error *err)
{
    sh_folder_keep keep = {0};
    keeping k = {.releases = releases, .keep = &keep};
    sh_status status = SH_OK;
    SH_GOTO(sh_coord_each_candidate(txn, keep_row, &k, err));
    k.newest -= k.newest > 0; /* the genesis is kept apart */
    k.collect = true;
    SH_GOTO(sh_coord_each_candidate(txn, keep_row, &k, err));
    if (keep.n > 0)
        qsort(keep.files, keep.n, sizeof *keep.files, by_hash);
    *out = keep;
cleanup:
    if (status != SH_OK)
        sh_folder_keep_release(&keep);
    return status;
}

void sh_folder_keep_release(sh_folder_keep *keep)
{
    free(keep->files);
    *keep = (sh_folder_keep){0};
}

typedef struct {
    const sh_folder_keep *keep;
    uint64_t n;
} pruning;

/* Whatever is not named by a hash is not ours to delete, but for what a killed write left. */
static sh_status prune_file(void *arg, const char *path, sh_error *err)
{
    pruning *p = arg;
    char hex[SH_HASH_HEX_BYTES], full[SH_PATH_BYTES];
    sh_hash name;
    if (strlen(path) < sizeof hex + strlen(OBJECT_ENDING) - 1)
        return SH_OK;
    memcpy(hex, path, sizeof hex - 1);
    hex[sizeof hex - 1] = '\0';
    if (sh_hash_parse(hex, &name, NULL) != SH_OK)
        return SH_OK;
    bool kept =
        p->keep->n > 0 && bsearch(&name, p->keep->files, p->keep->n, sizeof name, by_hash) != NULL;
    if (kept && strcmp(path + sizeof hex - 1, OBJECT_ENDING) == 0)
        return SH_OK;
    SH_TRY(sh_path_join(full, sizeof full, SH_FOLDER_OBJECTS, path, err));
    if (unlink(full) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", full, strerror(errno));
    p->n++;
    return SH_OK;
}

sh_status sh_folder_prune(const sh_folder_keep *keep, uint64_t *n, sh_error *err)
{
    pruning p = {.keep = keep};
    SH_TRY(folder_each(SH_FOLDER_OBJECTS, prune_file, &p, err));
    *n = p.n;
    return SH_OK;
}
