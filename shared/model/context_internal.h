/*
 * Contexts, adapters as the kernels use them, and passes over a model, as context.c, lora.c,
 * runner.c and forward.c see them; and what tests of the forward pass may see beside model.h.
 * Internal to model and its tests.
 */
#ifndef SH_MODEL_CONTEXT_INTERNAL_H
#define SH_MODEL_CONTEXT_INTERNAL_H

#include "shared/model/model.h"
#include "shared/model/transform.h"

#define SH_PASS_ROWS_DEFAULT 128
#define SH_PASS_ROWS_MAX     4096

typedef enum {
    SH_STAGE_EMBEDDING,       /* layer 0 */
    SH_STAGE_AFTER_ATTENTION, /* the residual stream after a layer's attention */
    SH_STAGE_LAYER_OUTPUT,    /* and after its feed-forward part */
    SH_STAGE_FINAL_NORM,      /* what the output matrix sees; layer n_layers */
} sh_stage;

/* x is [n, width], rows of consecutive positions of which the last is the batch's last. Called for
 * passes of this context alone whose logits are all wanted. */
typedef void (*sh_trace_fn)(void *arg, sh_stage stage, uint32_t layer, const float *x, uint32_t n);
void sh_context_trace(sh_context *context, sh_trace_fn fn, void *arg);

/* ---- memory ---- */

/* Two passes over the same list of reservations: the first (block NULL) adds up, the second hands
 * out. Each reservation begins at a multiple of 64 bytes. */
typedef struct {
    uint8_t *block;
    size_t used;
} sh_carver;
void *sh_carve(sh_carver *c, size_t bytes);
/* Bytes that this machine has; SIZE_MAX where it does not say. */
size_t sh_physical_memory(void);

/* ---- adapters (lora.c) ---- */

/* The four inputs that a layer's matrices read. */
enum { SH_INPUT_ATTN, SH_INPUT_ATT, SH_INPUT_FFN, SH_INPUT_GATE, SH_LAYER_INPUTS };

/* Of one input: the A of all matrices that read it, of all adapters, side by side. What halves
 * cannot hold, be they values or scales, is kept apart: t = scales * (x·Aᵀ), powers of two. */
typedef struct {
    sh_lora_a a;         /* rank 0: no matrix is adapted */
    const float *scales; /* [a.rank]; NULL: all 1 */
} sh_lora_input;
typedef struct {
    sh_lora_b b;   /* rank 0: this matrix is not adapted */
    uint32_t from; /* its first rank in its input's t */
} sh_lora_output;
typedef struct {
    uint32_t rank_max; /* floats of the largest t */
    void *block;
    sh_lora_input *inputs;   /* [n_layers * SH_LAYER_INPUTS + 1], last that of the output matrix */
    sh_lora_output *outputs; /* [sh_lora_pair_count] */
} sh_lora;

/* SH_ERR_MISMATCH when an adapter does not fit the model. */
SH_MUST_USE sh_status sh_lora_create(const sh_model *model, const sh_adapter *const *adapters,
                                     const float *scales, size_t n, sh_lora **out, sh_error *err);
void sh_lora_destroy(sh_lora **lora);

/* ---- contexts ---- */

struct sh_context {
    const sh_model *model;
    const sh_transform *ops;
    sh_runner *runner;
    bool owns_runner, halves, in_run;
    uint32_t n_max, length;
    uint32_t n_angles; /* positions whose angles are filled in */
    size_t tile_bytes, head_bytes;
    void *block;    /* cache and angles */
    uint8_t *cache; /* [n_layers, n_kv_heads] of head_bytes */
    float *angles;  /* [n_max, head_size / 2]{cos, sin} */
    sh_lora *lora;  /* NULL: none */
    sh_trace_fn trace;
    void *trace_arg;
};
sh_head_cache sh_context_head(const sh_context *context, uint32_t layer, uint32_t head);
/* Angles of the positions below n are there after it. */
void sh_context_fill_angles(sh_context *context, uint32_t n);

/* ---- passes (runner.c makes them, forward.c runs them) ---- */

/* Rows of consecutive positions of one context, side by side in a pass. */
typedef struct {
    sh_context *context;
    const int32_t *tokens;
    uint32_t row, n, position;
    float *logits, *hidden; /* of the first row; NULL: not wanted */
} sh_segment;
/* A part of a segment that is attended as one piece of work. */
typedef struct {
    uint32_t segment, first, n; /* rows of the segment */
} sh_unit;

/* A member's own scratch. */
typedef struct {
    float *norm;        /* [SH_FEW_ROWS, widest input] */
    sh_x_block *blocks; /* of it */
    float *t;           /* [SH_FEW_ROWS, t_rank] */
    float *columns;     /* [rows_max, SH_COLUMNS] */
    float *attend, *head;
    void *product;
} sh_member_scratch;

/* So few rows are prepared by every member for itself, which is cheaper than to wait. */
#define SH_FEW_ROWS 4
/* Columns of `up`, and of logits that are not side by side, made at once. */
#define SH_COLUMNS 256

struct sh_runner {
    const sh_model *model;
    const sh_transform *ops;
    sh_team *team;
    uint32_t rows_max, in_max;
    void *block;
    float *x, *norm, *q, *k, *v, *att, *gate;
    sh_x_block *blocks;
    sh_segment *segments; /* [rows_max] */
    sh_unit *units;       /* [rows_max] */
    uint32_t *row_segment;
    sh_member_scratch *members;
    void *t_block; /* of all t; made when an adapter first needs it */
    float *t;      /* [rows_max, t_rank] */
    uint32_t t_rank;
};

/* The rows of a pass: those with logits, then those of which only the hidden state is wanted, then
 * those that end after the last layer's keys and values. */
typedef struct {
    sh_runner *runner;
    uint32_t n_rows, n_out, n_logits;
    uint32_t n_segments, n_segments_logits;
    uint32_t n_units, n_units_out;
    sh_context *traced; /* NULL: nobody looks */
} sh_pass;
/* Every member of the team calls it. */
void sh_pass_run(const sh_pass *pass, const sh_member *me);

/* Room for t of this rank in every row. */
SH_MUST_USE sh_status sh_runner_reserve_t(sh_runner *runner, uint32_t rank, sh_error *err);
size_t sh_runner_bytes(const sh_model *model, const sh_runner_options *options);

#endif
