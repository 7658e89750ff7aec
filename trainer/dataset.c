#include "trainer/dataset_internal.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "shared/base/file.h"
#include "shared/base/hash.h"
#include "trainer/snapshot.h"

#define PURPOSE_SPLIT 0x73706c74u /* names this use of the generator */

/* ---- documents ---- */

sh_status tr_dataset_put(sh_dataset *d, const int32_t *tokens, size_t n, uint8_t mask)
{
    const size_t need = d->n_tokens + n, max = SH_DATASET_TOKENS_MAX;
    if (n == 0)
        return SH_OK;
    SH_TRY(sh_array_reserve((void **)&d->tokens, &d->tokens_cap, need, sizeof *d->tokens, max));
    SH_TRY(sh_array_reserve((void **)&d->mask, &d->mask_cap, need, 1, max));
    memcpy(d->tokens + d->n_tokens, tokens, n * sizeof *tokens);
    memset(d->mask + d->n_tokens, mask, n);
    d->n_tokens = need;
    return SH_OK;
}

sh_status tr_dataset_put_text(tr_reader *r, const char *text, size_t bytes, unsigned flags,
                              uint8_t mask, sh_error *err)
{
    int32_t *tokens = NULL;
    size_t n = 0;
    SH_TRY(sh_tokenize(r->options->tokenizer, text, bytes, flags, &tokens, &n, err));
    const sh_status status = tr_dataset_put(r->dataset, tokens, n, mask);
    free(tokens);
    return status;
}

sh_status tr_dataset_put_eos(tr_reader *r)
{
    const int32_t eos = sh_tokenizer_eos(r->options->tokenizer);
    return eos >= 0 ? tr_dataset_put(r->dataset, &eos, 1, SH_TRAIN_TARGET) : SH_OK;
}

sh_status tr_dataset_close(sh_dataset *d, tr_document document, bool *kept)
{
    const size_t n = d->n_tokens - d->open_at;
    bool any = false;
    for (size_t i = 1; i < n && !any; i++)
        any = d->mask[d->open_at + i] != 0;
    if (kept)
        *kept = any;
    if (!any) {
        d->n_tokens = d->open_at;
        d->left_off++;
        return SH_OK;
    }
    SH_TRY(sh_array_reserve((void **)&d->documents, &d->documents_cap, d->n_documents + 1,
                            sizeof *d->documents, SH_DATASET_DOCUMENTS_MAX));
    d->mask[d->open_at] = 0;
    document.at = d->open_at;
    document.n = (uint32_t)n;
    document.file = (uint32_t)d->n_files - 1;
    d->documents[d->n_documents++] = document;
    d->open_at = d->n_tokens;
    return SH_OK;
}

sh_status tr_dataset_full(sh_status status, const char *place, sh_error *err)
{
    if (err && err->text[0] != '\0')
        return status;
    if (status == SH_ERR_LIMIT)
        return sh_fail(err, status,
                       "%s: the dataset has more than %u tokens or %u documents: give less of it",
                       place, SH_DATASET_TOKENS_MAX, SH_DATASET_DOCUMENTS_MAX);
    return sh_fail(err, status, "%s: no memory for the dataset", place);
}

/* ---- files ---- */

static sh_status add_file(sh_dataset *d, const char *name, sh_error *err)
{
    sh_status status = sh_array_reserve((void **)&d->files, &d->files_cap, d->n_files + 1,
                                        sizeof *d->files, SH_DATASET_FILES_MAX);
    char *copy = status == SH_OK ? strdup(name) : NULL;
    if (!copy)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for the names of files");
    d->files[d->n_files++] = copy;
    return SH_OK;
}

static bool ends_with(const char *name, const char *end)
{
    const size_t n = strlen(name), m = strlen(end);
    return n > m && strcmp(name + n - m, end) == 0;
}

static bool is_lines(const char *name)
{
    return ends_with(name, ".jsonl") || ends_with(name, ".ndjson");
}

static sh_status read_text(tr_reader *r, const char *path, sh_error *err)
{
    const bool eos = r->options->eos == SH_DATASET_EOS_TEXTS;
    const char *name = strcmp(path, "-") == 0 ? "standard input" : path;
    uint8_t *bytes = NULL;
    size_t n = 0;
    SH_TRY(add_file(r->dataset, name, err));
    SH_TRY(sh_file_read(path, SH_DATASET_TEXT_BYTES_MAX, &bytes, &n, err));
    sh_status status = SH_OK;
    const uint8_t *zero = memchr(bytes, 0, n);
    if (zero)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID,
                        "%s: byte %zu is 0: this is no text; texts, *.jsonl, *.ndjson and a node's "
                        "snapshots are read",
                        name, (size_t)(zero - bytes)));
    SH_GOTO(tr_dataset_put_text(r, (const char *)bytes, n, SH_TOKENIZE_BOS, SH_TRAIN_TARGET, err));
    if (eos)
        SH_GOTO(tr_dataset_put_eos(r));
    SH_GOTO(tr_dataset_close(r->dataset, (tr_document){.kind = TR_PLAIN_TEXT}, NULL));
cleanup:
    free(bytes);
    return status == SH_OK ? SH_OK : tr_dataset_full(status, name, err);
}

static sh_status read_lines(tr_reader *r, const char *path, sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    SH_TRY(add_file(r->dataset, path, err));
    SH_TRY(sh_file_read(path, SH_DATASET_FILE_BYTES_MAX, &bytes, &n, err));
    const sh_status status = tr_dataset_read_lines(r, (const char *)bytes, n, err);
    free(bytes);
    return status;
}

static sh_status put_session(tr_reader *r, const sh_snapshot *s, size_t i)
{
    sh_dataset *d = r->dataset;
    const size_t at = s->starts[i];
    const size_t n = (i + 1 < s->n_sessions ? s->starts[i + 1] : s->n_tokens) - at;
    SH_TRY(tr_dataset_put(d, s->tokens + at, n, 0));
    for (size_t k = 0; k < n; k++)
        d->mask[d->open_at + k] = s->mask[at + k] & SH_TOKEN_TARGET ? SH_TRAIN_TARGET : 0;
    return tr_dataset_close(d, (tr_document){.kind = TR_SESSION, .session = s->sessions[i]}, NULL);
}

static sh_status read_snapshot(tr_reader *r, const char *path, sh_error *err)
{
    const uint32_t vocab = sh_tokenizer_size(r->options->tokenizer);
    sh_snapshot s = {0};
    SH_TRY(add_file(r->dataset, path, err));
    SH_TRY(sh_snapshot_load(path, &s, err));
    sh_status status = SH_OK;
    for (size_t i = 0; i < s.n_tokens; i++)
        if (s.tokens[i] < 0 || (uint32_t)s.tokens[i] >= vocab)
            SH_GOTO(sh_fail(err, SH_ERR_MISMATCH,
                            "%s: token %d is outside the model's vocabulary of %u: the snapshot "
                            "was made with another model",
                            path, s.tokens[i], vocab));
    r->dataset->snapshot = true;
    for (size_t i = 0; i < s.n_sessions; i++)
        SH_GOTO(put_session(r, &s, i));
cleanup:
    sh_snapshot_release(&s);
    return status == SH_OK ? SH_OK : tr_dataset_full(status, path, err);
}

/* ---- folders ---- */

typedef struct {
    char **paths;
    size_t n, cap;
} path_list;

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static sh_status list_entry(const char *folder, const char *name, path_list *list, sh_error *err)
{
    char path[SH_PATH_BYTES];
    struct stat info;
    if (name[0] == '.' || (!ends_with(name, ".txt") && !is_lines(name)))
        return SH_OK;
    SH_TRY(sh_path_join(path, sizeof path, folder, name, err));
    if (stat(path, &info) != 0 || !S_ISREG(info.st_mode))
        return SH_OK;
    sh_status status = sh_array_reserve((void **)&list->paths, &list->cap, list->n + 1,
                                        sizeof *list->paths, SH_DATASET_FILES_MAX);
    if (status == SH_ERR_LIMIT)
        return sh_fail(err, status, "%s: more than %d files: put them together", folder,
                       SH_DATASET_FILES_MAX);
    char *copy = status == SH_OK ? strdup(path) : NULL;
    if (!copy)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for the names of files");
    list->paths[list->n++] = copy;
    return SH_OK;
}

static sh_status read_folder(tr_reader *r, const char *folder, sh_error *err)
{
    sh_status status = SH_OK;
    path_list list = {0};
    DIR *dir = opendir(folder);
    if (!dir)
        return sh_fail(err, SH_ERR_IO, "cannot read the folder '%s'", folder);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
        SH_GOTO(list_entry(folder, entry->d_name, &list, err));
    if (list.n == 0)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID, "%s: no *.txt, *.jsonl or *.ndjson file in the folder",
                        folder));
    qsort(list.paths, list.n, sizeof *list.paths, by_name);
    for (size_t i = 0; i < list.n; i++)
        SH_GOTO(is_lines(list.paths[i]) ? read_lines(r, list.paths[i], err)
                                        : read_text(r, list.paths[i], err));
cleanup:
    closedir(dir);
    for (size_t i = 0; i < list.n; i++)
        free(list.paths[i]);
    free(list.paths);
    return status;
}

/* ---- the whole ---- */

static sh_status read_path(tr_reader *r, const char *path, sh_error *err)
{
    struct stat info;
    if (strcmp(path, "-") == 0 || stat(path, &info) != 0)
        return read_text(r, path, err); /* which says what is wrong */
    if (S_ISDIR(info.st_mode))
        return read_folder(r, path, err);
    if (S_ISREG(info.st_mode) && sh_snapshot_is_file(path))
        return read_snapshot(r, path, err);
    return is_lines(path) ? read_lines(r, path, err) : read_text(r, path, err);
}

sh_status sh_dataset_open(const char *path, const sh_dataset_options *options, sh_dataset **out,
                          sh_error *err)
{
    sh_status status = SH_OK;
    sh_error local = {0};
    sh_dataset *d = sh_calloc(1, sizeof *d);
    char *name = strdup(path);
    if (!d || !name) {
        free(d);
        free(name);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a dataset");
    }
    d->name = name;
    d->pad = SH_MAX(sh_tokenizer_eos(options->tokenizer), 0);
    tr_reader reader = {options, d};
    SH_GOTO(read_path(&reader, path, &local));
    if (d->n_documents == 0)
        SH_GOTO(sh_fail(&local, SH_ERR_INVALID,
                        "%s: the dataset is empty: no document in it has a token to learn", path));
    d->one_text = d->n_files == 1 && d->n_documents == 1 && d->documents[0].kind == TR_PLAIN_TEXT;
    *out = d;
    d = NULL;
cleanup:
    if (status != SH_OK && err)
        *err = local;
    sh_dataset_destroy(&d);
    return status;
}

void sh_dataset_destroy(sh_dataset **dataset)
{
    sh_dataset *d = *dataset;
    if (!d)
        return;
    for (size_t i = 0; !d->view && i < d->n_files; i++)
        free(d->files[i]);
    if (!d->view) {
        free(d->files);
        free(d->name);
        free(d->tokens);
        free(d->mask);
    }
    free(d->documents);
    free(d);
    *dataset = NULL;
}

sh_dataset_counts sh_dataset_count(const sh_dataset *d)
{
    sh_dataset_counts c = {
        .files = d->n_files, .documents = d->n_documents, .left_off = d->left_off};
    for (size_t i = 0; i < d->n_documents; i++) {
        const tr_document *document = &d->documents[i];
        c.samples += tr_is_sample(document);
        c.conversations += document->kind == TR_CHAT;
        c.tokens += document->n;
        for (size_t k = 0; k < document->n; k++)
            c.targets += d->mask[document->at + k];
    }
    return c;
}

/* ---- the held-out part ---- */

/* Uniform in [0, 1), the same for the same tokens. */
static double place_of(const sh_dataset *d, const tr_document *document, uint64_t seed)
{
    const sh_hash hash = sh_blake2b(d->tokens + document->at, document->n * sizeof *d->tokens);
    uint64_t stream = 0;
    for (size_t i = 0; i < 8; i++)
        stream = stream << 8 | hash.b[i];
    sh_rng rng;
    sh_rng_init(&rng, seed, stream, PURPOSE_SPLIT);
    return sh_rng_unit(&rng);
}

static sh_status choose_sessions(const sh_dataset *d, bool *heldout, sh_error *err)
{
    size_t n = 0;
    for (size_t i = 0; i < d->n_documents; i++)
        n += heldout[i] = sh_snapshot_is_heldout(d->documents[i].session);
    if (n == 0 || n == d->n_documents)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: of the %zu sessions %s is held out by its number: give --heldout FILE",
                       d->name, d->n_documents, n == 0 ? "none" : "every one");
    return SH_OK;
}

/* The documents whose place is below the share; if that leaves one side empty, the one that is
 * next to it (and its copies) goes there. */
static sh_status choose_documents(const sh_dataset *d, double share, uint64_t seed, bool *heldout,
                                  sh_error *err)
{
    double lowest = 1, highest = 0, below = share;
    if (!(share > 0 && share < 1))
        return sh_fail(err, SH_ERR_USAGE, "a held-out share of %g: it must be above 0 and below 1",
                       share);
    double *places = sh_calloc(d->n_documents, sizeof *places);
    if (!places)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu documents", d->n_documents);
    for (size_t i = 0; i < d->n_documents; i++) {
        places[i] = place_of(d, &d->documents[i], seed);
        lowest = SH_MIN(lowest, places[i]);
        highest = SH_MAX(highest, places[i]);
    }
    if (lowest >= below)
        below = nextafter(lowest, 2);
    else if (highest < below)
        below = highest;
    for (size_t i = 0; i < d->n_documents; i++)
        heldout[i] = places[i] < below;
    free(places);
    if (lowest < highest)
        return SH_OK;
    if (d->n_documents > 1)
        return sh_fail(err, SH_ERR_INVALID,
                       "%s: %zu copies of one document cannot be split: give --heldout FILE",
                       d->name, d->n_documents);
    return sh_fail(err, SH_ERR_INVALID, "%s: one document cannot be split: give --heldout FILE",
                   d->name);
}

static sh_status make_view(const sh_dataset *d, const bool *heldout, bool which, sh_dataset **out,
                           sh_error *err)
{
    sh_dataset *v = sh_calloc(1, sizeof *v);
    tr_document *documents = sh_calloc(d->n_documents, sizeof *documents);
    if (!v || !documents) {
        free(v);
        free(documents);
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu documents", d->n_documents);
    }
    *v = *d;
    v->view = true;
    v->one_text = false;
    v->left_off = 0;
    v->documents = documents;
    v->n_documents = 0;
    for (size_t i = 0; i < d->n_documents; i++)
        if (heldout[i] == which)
            documents[v->n_documents++] = d->documents[i];
    *out = v;
    return SH_OK;
}

sh_status sh_dataset_split(const sh_dataset *d, double share, uint64_t seed, sh_dataset **train,
                           sh_dataset **heldout, sh_error *err)
{
    sh_status status = SH_OK;
    sh_dataset *rest = NULL, *held = NULL;
    bool *is_held = sh_calloc(d->n_documents, sizeof *is_held);
    if (!is_held)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu documents", d->n_documents);
    SH_GOTO(d->snapshot ? choose_sessions(d, is_held, err)
                        : choose_documents(d, share, seed, is_held, err));
    SH_GOTO(make_view(d, is_held, false, &rest, err));
    SH_GOTO(make_view(d, is_held, true, &held, err));
    *train = rest;
    *heldout = held;
    rest = held = NULL;
cleanup:
    sh_dataset_destroy(&rest);
    sh_dataset_destroy(&held);
    free(is_held);
    return status;
}
