/*
 * The inference benchmark: models of random weights, measured with `shoal model bench` and, where
 * the user names one, llama.cpp's llama-bench, which take turns on the same files.
 */
#ifndef BENCH_BENCH_H
#define BENCH_BENCH_H

#include "shared/base/buf.h"
#include "shared/base/json.h"

#define BENCH_ROUNDS_MAX 32

typedef struct {
    const char *shape, *type;
    int prefill, decode; /* tokens */
    bool lora;           /* decode with a rank-16 adapter on all matrices, beside without */
    double prefill_goal, decode_goal; /* times llama.cpp's rate; 0: none set */
    double bandwidth_goal;            /* share of the read bandwidth that decode is to reach; 0 */
} bench_case;

/* Medians over the rounds, of one case with one number of threads. */
typedef struct {
    const bench_case *what;
    int threads;
    double prefill, decode, decode_base; /* tokens/s; decode_base: without the adapter */
    double peer_prefill, peer_decode;    /* 0: not measured */
    /* Ours over the peer's of a round; with the adapter over without; of what memory gave then. */
    double prefill_ratio, decode_ratio, lora_ratio, read_share;
    double weight_bytes, rss_bytes, load_s;
    double first_token_s, first_token_in_place_s;
} bench_row;

typedef struct {
    int threads;
    double read_bytes_per_s, int8_ops_per_s, f32_flops; /* medians over the rounds of all rows */
} bench_ceiling;

typedef struct {
    const char *dir, *llama_bench; /* NULL: no peer */
    char shoal[4096];
    int rounds;
    bench_row rows[64];
    size_t n_rows;
    bench_ceiling ceilings[8];
    size_t n_ceilings;
    char kernel[32], machine[128];
} bench_run;

double bench_median(double *values, size_t n); /* sorts them */
/* results.json's document. */
json_t *bench_results(const bench_run *run);
/* The tables in Markdown, appended. */
SH_MUST_USE sh_status bench_tables(const bench_run *run, sh_buf *out);

#endif
