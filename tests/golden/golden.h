/*
 * The harness of the golden tests: results of independent implementations (PyTorch, llama.cpp) that
 * ours is held against.
 *
 * A golden test is one program, tests/golden/golden_<kind>.c, that runs every case of its kind in
 * index.json of the folder SHOAL_GOLDEN_DIR (default: shared/data beside the source folder), so
 * that another folder of the same form is checked without a change of code. What is absent or not
 * supported is skipped aloud; exit status 77 when nothing ran, 1 when a check failed.
 *
 *     static sh_status run(golden *g, const json_t *c, sh_error *err)
 *     {
 *         safetensors file = {0};
 *         sh_status status = SH_OK;
 *         const char *path;
 *         SH_TRY(golden_file(g, c, "file", &path, err)); // SH_ERR_NOT_FOUND: a skip, aloud
 *         SH_TRY(safetensors_open(path, &file, err));
 *         const safetensor *x;
 *         SH_GOTO(safetensors_need(&file, "seq1.logits", SAFE_F32, &x, err));
 *         golden_close(g, "logits", ours, x->data, x->n, 1e-4, 1e-4);
 *     cleanup:
 *         safetensors_release(&file);
 *         return status;
 *     }
 *     int main(void) { return golden_main("forward", run); }
 *
 * What run returns: SH_OK; SH_ERR_NOT_FOUND or SH_ERR_UNSUPPORTED, a skip that says err's text;
 * anything else fails the test. Checks that fail are printed with both values and counted.
 */
#ifndef SH_TESTS_GOLDEN_H
#define SH_TESTS_GOLDEN_H

#include "shared/base/file.h"
#include "shared/base/json.h"

typedef struct golden golden;

/* ---- cases ---- */

/* Runs `run` on each case of the kind; returns main's exit status. */
int golden_main(const char *kind, sh_status (*run)(golden *g, const json_t *c, sh_error *err));
/* Path of the file that c[key] names. It lives as long as the case runs. SH_ERR_NOT_FOUND when the
 * key or the file is absent. Works on the objects inside a case, too ("models": {"Q8_0": …}). */
SH_MUST_USE sh_status golden_file(golden *g, const json_t *c, const char *key, const char **path,
                                  sh_error *err);
/* Says that a part of a case is skipped, and why. */
void golden_skip(golden *g, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Says what was measured (a mean, a largest difference). */
void golden_note(golden *g, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- checks: count, and print what failed; true when good ---- */

bool golden_check(golden *g, bool ok, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* |ours - theirs| <= absolute + relative * |theirs| for every value; prints the worst. */
bool golden_close(golden *g, const char *what, const float *ours, const float *theirs, size_t n,
                  double absolute, double relative);
bool golden_close_f64(golden *g, const char *what, double ours, double theirs, double absolute,
                      double relative);
/* Euclidean distance at most `relative` of theirs' length: for gradients, whose single values may
 * be near zero. */
bool golden_close_norm(golden *g, const char *what, const float *ours, const float *theirs,
                       size_t n, double relative);
bool golden_equal_i32(golden *g, const char *what, const int32_t *ours, const int32_t *theirs,
                      size_t n);

/* ---- safetensors: little-endian u64 header length, JSON header, raw data ---- */

#define SAFETENSORS_HEADER_MAX (16u << 20)
#define SAFETENSORS_MAX        65536
#define SAFETENSORS_DIMS_MAX   4

typedef enum {
    SAFE_F32,
    SAFE_F64,
    SAFE_F16,
    SAFE_I32,
    SAFE_I64,
    SAFE_U8,
    SAFE_U32
} safetensors_type;

typedef struct {
    const char *name;
    safetensors_type type;
    uint32_t n_dims;                    /* 0: a scalar */
    size_t shape[SAFETENSORS_DIMS_MAX]; /* row-major; unused are 1 */
    size_t n;                           /* values */
    const void *data;                   /* in the map, aligned to the width of a value */
} safetensor;

/* Zeroed is valid; tensors are sorted by name. */
typedef struct {
    sh_map map;
    json_t *header;
    safetensor *tensors;
    size_t n;
} safetensors;

/* SH_ERR_INVALID for anything out of bounds. */
SH_MUST_USE sh_status safetensors_open(const char *path, safetensors *out, sh_error *err);
void safetensors_release(safetensors *file);
const safetensor *safetensors_find(const safetensors *file, const char *name); /* or NULL */
/* SH_ERR_INVALID when absent or of another type: a golden file that is not what it says fails. */
SH_MUST_USE sh_status safetensors_need(const safetensors *file, const char *name,
                                       safetensors_type type, const safetensor **out,
                                       sh_error *err);
/* The first value of a tensor of F32, F64, I32, I64 or U32 as a double, for scalars. */
SH_MUST_USE sh_status safetensors_scalar(const safetensors *file, const char *name, double *out,
                                         sh_error *err);

#endif
