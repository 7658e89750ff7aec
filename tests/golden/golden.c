/* Cases and checks of the golden tests: see golden.h. */
#include "tests/golden/golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/hash.h"

#define EXIT_SKIP      77
#define FILES_MAX      64 /* that one case names */
#define FAILURES_SHOWN 20

struct golden {
    const char *kind;
    char dir[SH_PATH_BYTES];
    char files[FILES_MAX][SH_PATH_BYTES];
    size_t n_files;
    size_t checks, failures, skips; /* of the case */
};

__attribute__((format(printf, 3, 0))) static void print_line(const golden *g, const char *what,
                                                             const char *format, va_list args)
{
    char text[1024];
    vsnprintf(text, sizeof text, format, args);
    printf("golden %s: %s%s\n", g->kind, what, text);
    fflush(stdout);
}

void golden_skip(golden *g, const char *format, ...)
{
    va_list args;
    g->skips++;
    va_start(args, format);
    print_line(g, "SKIP: ", format, args);
    va_end(args);
}

void golden_note(golden *g, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_line(g, "", format, args);
    va_end(args);
}

/* ---- checks ---- */

bool golden_check(golden *g, bool ok, const char *format, ...)
{
    g->checks++;
    if (ok)
        return true;
    g->failures++;
    if (g->failures <= FAILURES_SHOWN) {
        va_list args;
        va_start(args, format);
        print_line(g, "FAILED: ", format, args);
        va_end(args);
    }
    return false;
}

bool golden_close(golden *g, const char *what, const float *ours, const float *theirs, size_t n,
                  double absolute, double relative)
{
    size_t worst = 0;
    double worst_share = 0, worst_difference = 0;
    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)ours[i] - (double)theirs[i]);
        double share = difference / (absolute + relative * fabs((double)theirs[i]));
        if (ours[i] == theirs[i])
            share = 0;
        else if (!(share >= 0)) /* NaN */
            share = INFINITY;
        if (share > worst_share) {
            worst_share = share;
            worst = i;
        }
        worst_difference = difference > worst_difference ? difference : worst_difference;
    }
    if (n > 0 && worst_share <= 1)
        golden_note(g, "%s: %zu values, largest difference %.3g", what, n, worst_difference);
    return golden_check(g, n > 0 && worst_share <= 1,
                        "%s: value %zu of %zu is %.9g, expected %.9g within %.3g + %.3g of it",
                        what, worst, n, n > 0 ? (double)ours[worst] : 0,
                        n > 0 ? (double)theirs[worst] : 0, absolute, relative);
}

bool golden_close_f64(golden *g, const char *what, double ours, double theirs, double absolute,
                      double relative)
{
    return golden_check(g, fabs(ours - theirs) <= absolute + relative * fabs(theirs),
                        "%s is %.12g, expected %.12g within %.3g + %.3g of it", what, ours, theirs,
                        absolute, relative);
}

bool golden_close_norm(golden *g, const char *what, const float *ours, const float *theirs,
                       size_t n, double relative)
{
    double distance = 0, length = 0;
    for (size_t i = 0; i < n; i++) {
        double difference = (double)ours[i] - (double)theirs[i];
        distance += difference * difference;
        length += (double)theirs[i] * (double)theirs[i];
    }
    distance = sqrt(distance);
    length = sqrt(length);
    return golden_check(g, n > 0 && distance <= relative * length,
                        "%s: distance %.6g to values of length %.6g, at most %.3g of it allowed",
                        what, distance, length, relative);
}

bool golden_equal_i32(golden *g, const char *what, const int32_t *ours, const int32_t *theirs,
                      size_t n)
{
    size_t i = 0;
    while (i < n && ours[i] == theirs[i])
        i++;
    return golden_check(g, i == n, "%s: value %zu of %zu is %d, expected %d", what, i, n,
                        i < n ? ours[i] : 0, i < n ? theirs[i] : 0);
}

/* ---- cases ---- */

sh_status golden_file(golden *g, const json_t *c, const char *key, const char **path, sh_error *err)
{
    const char *name = json_string_value(json_object_get(c, key));
    if (name == NULL)
        return sh_fail(err, SH_ERR_NOT_FOUND, "the case names no '%s'", key);
    if (g->n_files == FILES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "a case of more than %d files", FILES_MAX);
    char *file = g->files[g->n_files];
    SH_TRY(sh_path_join(file, SH_PATH_BYTES, g->dir, name, err));
    if (!sh_file_exists(file))
        return sh_fail(err, SH_ERR_NOT_FOUND, "'%s' is not there", file);
    g->n_files++;
    *path = file;
    return SH_OK;
}

/* What the case is, for the lines that follow: its files in short. */
static void announce(const golden *g, const json_t *c, size_t i)
{
    char *text = json_dumps(c, JSON_COMPACT);
    printf("golden %s: case %zu %s\n", g->kind, i, text == NULL ? "" : text);
    free(text);
}

typedef struct {
    size_t run, skipped, failed;
} tally;

static void run_case(golden *g, const json_t *c, size_t i,
                     sh_status (*run)(golden *g, const json_t *c, sh_error *err), tally *total)
{
    sh_error err = {0};
    g->n_files = g->checks = g->failures = g->skips = 0;
    announce(g, c, i);
    sh_status status = run(g, c, &err);
    if (status == SH_ERR_NOT_FOUND || status == SH_ERR_UNSUPPORTED) {
        golden_skip(g, "%s", err.text);
    } else if (status != SH_OK) {
        golden_check(g, false, "%s: %s", sh_status_name(status), err.text);
    } else if (g->checks == 0 && g->skips == 0) {
        golden_check(g, false, "the case ran without checking anything");
    }
    total->failed += g->failures > 0;
    total->run += g->checks > 0;
    total->skipped += g->skips > 0;
    printf("golden %s: case %zu: %zu checks, %zu failed, %zu skips\n", g->kind, i, g->checks,
           g->failures, g->skips);
}

static sh_status load_index(golden *g, json_t **index, sh_error *err)
{
    const char *dir = getenv("SHOAL_GOLDEN_DIR");
    char path[SH_PATH_BYTES];
    if (dir == NULL || dir[0] == '\0')
        dir = SHOAL_SOURCE_DIR "/../shared/data";
    SH_TRY(sh_path_join(g->dir, sizeof g->dir, dir, "", err));
    SH_TRY(sh_path_join(path, sizeof path, dir, "index.json", err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "'%s' is not there; set SHOAL_GOLDEN_DIR to a folder of golden files", path);
    return sh_json_load(path, index, err);
}

int golden_main(const char *kind, sh_status (*run)(golden *g, const json_t *c, sh_error *err))
{
    static golden g;
    sh_error err = {0};
    json_t *index = NULL;
    tally total = {0};
    g.kind = kind;
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = load_index(&g, &index, &err);
    if (status == SH_ERR_NOT_FOUND) {
        golden_skip(&g, "%s", err.text);
        return EXIT_SKIP;
    }
    const json_t *cases = json_object_get(index, "cases"), *c;
    size_t i;
    if (status == SH_OK && !json_is_array(cases))
        status = sh_fail(&err, SH_ERR_INVALID, "index.json has no list 'cases'");
    if (status != SH_OK) {
        golden_check(&g, false, "%s", err.text);
        json_decref(index);
        return 1;
    }
    json_array_foreach(cases, i, c)
    {
        const char *name = json_string_value(json_object_get(c, "kind"));
        if (name != NULL && strcmp(name, kind) == 0)
            run_case(&g, c, i, run, &total);
    }
    json_decref(index);
    printf("golden %s: %zu cases run, %zu failed, %zu with skips\n", kind, total.run, total.failed,
           total.skipped);
    if (total.failed > 0)
        return 1;
    if (total.run == 0) {
        golden_skip(&g, "no case of this kind ran");
        return EXIT_SKIP;
    }
    return 0;
}
