/* Suites, and the gate's evaluation of parent, candidate and adapter form on them. */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/job_internal.h"
#include "shared/base/file.h"

/* ---- suites ---- */

/* The hash is chained: SHA-256 of (hash before, name with its 0 byte, count, tokens). */
static sh_hash suite_hash(const sh_hash *before, const sh_suite_slice *slice)
{
    sh_sha256_state state;
    sh_sha256_init(&state);
    sh_sha256_update(&state, before->b, sizeof before->b);
    sh_sha256_update(&state, slice->name, strlen(slice->name) + 1);
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)((uint64_t)slice->n >> (8 * i));
    sh_sha256_update(&state, bytes, 8);
    for (size_t t = 0; t < slice->n; t++) {
        uint32_t token = (uint32_t)slice->tokens[t];
        for (int i = 0; i < 4; i++)
            bytes[i] = (uint8_t)(token >> (8 * i));
        sh_sha256_update(&state, bytes, 4);
    }
    return sh_sha256_final(&state);
}

sh_status sh_suite_add(sh_suite *suite, const char *name, const int32_t *tokens, size_t n,
                       sh_error *err)
{
    if (suite->n >= SH_GATE_SLICES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "suite: more than %d slices", SH_GATE_SLICES_MAX);
    if (n < 2)
        return sh_fail(err, SH_ERR_INVALID, "suite: slice '%s' has %zu tokens, it needs 2", name,
                       n);
    sh_suite_slice *slice = &suite->slices[suite->n];
    int32_t *copy = sh_calloc(n, sizeof *copy);
    if (copy == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "suite: no memory for slice '%s'", name);
    memcpy(copy, tokens, n * sizeof *copy);
    (void)snprintf(slice->name, sizeof slice->name, "%s", name);
    slice->tokens = copy;
    slice->n = n;
    suite->sha256 = suite_hash(&suite->sha256, slice);
    suite->n++;
    return SH_OK;
}

void sh_suite_release(sh_suite *suite)
{
    for (uint32_t i = 0; i < suite->n; i++)
        free(suite->slices[i].tokens);
    *suite = (sh_suite){0};
}

static int is_text(const struct dirent *entry)
{
    size_t n = strlen(entry->d_name);
    return n > 4 && strcmp(entry->d_name + n - 4, ".txt") == 0;
}

static int by_bytes(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name); /* not alphasort: it follows the locale */
}

static sh_status load_slice(sh_suite *suite, const char *dir, const char *file,
                            const sh_tokenizer *tokenizer, sh_error *err)
{
    char path[SH_PATH_BYTES], name[SH_SUITE_NAME_MAX];
    uint8_t *text = NULL;
    int32_t *tokens = NULL;
    size_t bytes = 0, n = 0;
    sh_status status = SH_OK;
    SH_GOTO(sh_path_join(path, sizeof path, dir, file, err));
    SH_GOTO(sh_file_read(path, JOB_TEXT_MAX, &text, &bytes, err));
    SH_GOTO(sh_tokenize(tokenizer, (const char *)text, bytes, SH_TOKENIZE_BOS, &tokens, &n, err));
    (void)snprintf(name, sizeof name, "%.*s", (int)(strlen(file) - 4), file);
    status = sh_suite_add(suite, name, tokens, n, err);
cleanup:
    free(text);
    free(tokens);
    return status;
}

sh_status sh_suite_load(const char *dir, const sh_tokenizer *tokenizer, sh_suite *out,
                        sh_error *err)
{
    struct dirent **entries = NULL;
    int n = scandir(dir, &entries, is_text, by_bytes);
    if (n < 0)
        return sh_fail(err, errno == ENOENT ? SH_ERR_NOT_FOUND : SH_ERR_IO, "suite %s: %s", dir,
                       strerror(errno));
    sh_suite suite = {0};
    sh_status status = SH_OK;
    for (int i = 0; i < n && status == SH_OK; i++)
        status = load_slice(&suite, dir, entries[i]->d_name, tokenizer, err);
    for (int i = 0; i < n; i++)
        free(entries[i]);
    free(entries);
    if (status == SH_OK && suite.n == 0)
        status = sh_fail(err, SH_ERR_NOT_FOUND, "suite %s: there is no *.txt file in it", dir);
    if (status != SH_OK)
        sh_suite_release(&suite);
    else
        *out = suite;
    return status;
}

/* ---- gate ---- */

enum { PARENT, CANDIDATE, ADAPTER_FORM, FORMS };

typedef struct {
    const sh_gate_job *options;
    const sh_model *models[FORMS];
    const sh_adapter *adapter;
    uint32_t chunk;
    sh_loss losses[FORMS][SH_GATE_SLICES_MAX];
    sh_error errors[FORMS][SH_GATE_SLICES_MAX];
} gate_work;

static void score(void *arg, size_t i)
{
    gate_work *work = arg;
    size_t form = i % FORMS, s = i / FORMS;
    const sh_suite_slice *slice = &work->options->suite->slices[s];
    sh_error *err = &work->errors[form][s];
    err->code =
        sh_model_loss(work->models[form], form == ADAPTER_FORM ? work->adapter : NULL,
                      slice->tokens, slice->n, work->chunk, false, &work->losses[form][s], err);
}

static sh_status open_model(const char *dir, const sh_hash *sha256, sh_model **out, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_job_path(path, dir, sha256, err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND, "gate: %s is not there", path);
    return sh_model_open(path, out, err);
}

static sh_status open_adapter(const char *dir, const sh_hash *sha256, const sh_model *parent,
                              sh_adapter **out, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_job_adapter_path(path, dir, sha256, err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND, "gate: %s is not there", path);
    return sh_adapter_open(path, &parent->config, out, err);
}

/* Sums in the order of forms and slices, whichever thread made them. */
static sh_status collect(const gate_work *work, sh_coord_job_result *out, sh_error *err)
{
    const sh_suite *suite = work->options->suite;
    double means[FORMS], slices[FORMS][SH_GATE_SLICES_MAX];
    for (size_t form = 0; form < FORMS; form++) {
        double sum = 0;
        uint64_t scored = 0;
        for (uint32_t s = 0; s < suite->n; s++) {
            const sh_error *e = &work->errors[form][s];
            if (e->code != SH_OK)
                return sh_fail(err, e->code, "gate, slice '%s': %s", suite->slices[s].name,
                               e->text);
            const sh_loss *loss = &work->losses[form][s];
            slices[form][s] = loss->nll_sum / (double)loss->n_scored;
            sum += loss->nll_sum;
            scored += loss->n_scored;
        }
        means[form] = sum / (double)scored;
    }
    out->suite = suite->sha256;
    out->loss_parent = means[PARENT];
    out->loss_candidate = means[CANDIDATE];
    out->loss_adapter_form = means[ADAPTER_FORM];
    out->n_slices = suite->n;
    memcpy(out->slice_parent, slices[PARENT], suite->n * sizeof(double));
    memcpy(out->slice_candidate, slices[CANDIDATE], suite->n * sizeof(double));
    return SH_OK;
}

sh_status sh_job_gate(const sh_gate_job *o, sh_coord_job_result *out, sh_error *err)
{
    if (o->suite->n == 0)
        return sh_fail(err, SH_ERR_INVALID, "gate: the suite is empty");
    sh_model *parent = NULL, *candidate = NULL;
    sh_adapter *adapter = NULL;
    gate_work *work = sh_calloc(1, sizeof *work);
    sh_status status = SH_OK;
    if (work == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "gate: no memory");
    SH_GOTO(open_model(o->dir, &o->job->parent_model, &parent, err));
    SH_GOTO(open_model(o->dir, &o->job->candidate_model, &candidate, err));
    SH_GOTO(open_adapter(o->dir, &o->job->candidate_model, parent, &adapter, err));
    work->options = o;
    work->models[PARENT] = work->models[ADAPTER_FORM] = parent;
    work->models[CANDIDATE] = candidate;
    work->adapter = adapter;
    work->chunk = SH_MIN(o->chunk > 0 ? o->chunk : JOB_CHUNK, parent->config.context);
    if (o->pool != NULL)
        sh_pool_for(o->pool, score, work, (size_t)FORMS * o->suite->n);
    else
        for (size_t i = 0; i < (size_t)FORMS * o->suite->n; i++)
            score(work, i);
    status = collect(work, out, err);
cleanup:
    free(work);
    sh_adapter_destroy(&adapter);
    sh_model_close(&candidate);
    sh_model_close(&parent);
    return status;
}
