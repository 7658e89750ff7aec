/*
 * The trainer's float network: a Llama-family decoder with its forward and backward pass over a
 * micro-batch of whole sequences. Internal to trainer/.
 *
 * Matrices that read the same input are one GEMM: Q, K, V stacked, gate and up stacked. With LoRA
 * the effective matrix W + scale * B·A is formed once a step, bordered so that the low-rank
 * products come out of the same GEMMs, since products with a side of 8 or 16 run at a third of
 * the speed:
 *
 *            in        border
 *     out  [ W + sBA |  sB  ]     y | u  = x · [first `in` columns]ᵀ    u = x·Aᵀ
 *     border [  A    |  -   ]     dx | du = dy · [first `out` rows]     du = dy·sB
 *
 * and then dA = duᵀ·x, dB = s dyᵀ·u. sB is block diagonal over the stacked matrices.
 *
 * Memory: all weights in F32, twice with LoRA. Right for models of up to some hundred million
 * parameters; tr_net_dequantize is the one place to change for a tile at a time.
 * Threads: a tr_net is read-only in tr_forward and tr_backward; a tr_work belongs to one thread.
 */
#ifndef SH_TRAINER_NETWORK_H
#define SH_TRAINER_NETWORK_H

#include "trainer/trainer.h"

enum { TR_QKV, TR_ATTN_OUTPUT, TR_GATE_UP, TR_DOWN, TR_GROUPS };
#define TR_PARTS_MAX   3
#define TR_QUERY_BLOCK 64 /* queries of attention done together */

/* Matrices [out_p, in] stacked along their rows. */
typedef struct {
    size_t in, out;
    size_t first, n_parts;            /* parts are SH_ATTN_Q.. from first on */
    size_t part_at[TR_PARTS_MAX + 1]; /* first row of each part; the last is out */
} tr_group;

/* LoRA of one group of one layer; offsets are into the flat vector of LoRA parameters. */
typedef struct {
    size_t rank[TR_PARTS_MAX], at[TR_PARTS_MAX]; /* ranks of the parts, rows of theirs in A */
    float scale[TR_PARTS_MAX];
    size_t total;           /* sum of the ranks; 0: nothing adapted */
    size_t a;               /* A of all parts, [total, in] */
    size_t b[TR_PARTS_MAX]; /* [out_p, rank_p] */
} tr_lora;

/* Where tensors lie in a flat vector of weights or gradients, in floats. */
typedef struct {
    size_t embd, output, output_norm; /* output == embd when tied */
    size_t layers, layer_stride;
    size_t attn_norm, ffn_norm, group[TR_GROUPS]; /* within a layer */
    size_t n;
} tr_layout;

typedef struct {
    sh_model_config config;
    tr_group groups[TR_GROUPS];
    tr_layout layout;
    float *weights; /* layout.n */

    tr_lora *lora;            /* [n_layers * TR_GROUPS]; NULL: no adapter */
    size_t n_lora;            /* floats of the flat LoRA vector */
    size_t border[TR_GROUPS]; /* columns and rows beside W in effective; multiple of 8 */
    float *effective;         /* NULL: weights are used as they are */
    size_t effective_at[TR_GROUPS], effective_stride; /* offsets in a layer, floats a layer */

    float *rope_cos, *rope_sin; /* [rope_n, head_size / 2] */
    size_t rope_n;
} tr_net;

/* A net of config's shape with zero weights, for sequences of up to `positions` inputs. */
SH_MUST_USE sh_status tr_net_create(const sh_model_config *config, size_t positions, tr_net **out,
                                    sh_error *err);
void tr_net_destroy(tr_net **net);
/* SH_ERR_UNSUPPORTED unless the network computes what the model does. */
SH_MUST_USE sh_status tr_model_check(const sh_model *model, sh_error *err);
/* weights from a model of the same shape. */
void tr_net_dequantize(tr_net *net, const sh_model *model);
/* Lengthens the table of angles; only when no thread uses the net. */
SH_MUST_USE sh_status tr_net_reserve_positions(tr_net *net, size_t positions, sh_error *err);

/* The tensors of a vector of tr_layout, in the order of a GGUF file. */
typedef struct {
    char name[SH_GGUF_NAME_MAX]; /* "blk.0.attn_q.weight" */
    size_t at, rows, row;        /* [rows, row] values from `at` on; a norm has one row */
    bool is_norm;
} tr_tensor;
size_t tr_tensor_count(const tr_net *net);
tr_tensor tr_tensor_at(const tr_net *net, size_t i);

/* Where the matrix SH_ATTN_Q.. of a layer begins in a vector of tr_layout. */
size_t tr_matrix_at(const tr_net *net, size_t layer, size_t matrix);
/* Which group and part a matrix (SH_ATTN_Q..) is. */
void tr_matrix_group(size_t matrix, size_t *group, size_t *part);

/* Lays out the LoRA parameters of an adapter whose shapes were checked. trainable: make room for
 * the border of the gradients; otherwise only for W + scale * B·A. */
SH_MUST_USE sh_status tr_net_attach(tr_net *net, const sh_adapter *adapter, bool trainable,
                                    sh_error *err);
/* effective from weights and the flat LoRA vector. */
void tr_net_fold(tr_net *net, const float *lora);
/* The flat LoRA vector from an adapter's pairs, and back. */
void tr_lora_gather(const tr_net *net, const sh_adapter *adapter, float *lora);
void tr_lora_scatter(const tr_net *net, const float *lora, sh_adapter *adapter);

/* What a layer keeps for its backward pass. M rows = sequences * positions. */
typedef struct {
    float *x;        /* [M, width + border of down]: input; the border is u of the layer before */
    float *attn_in;  /* [M, width]: after the norm */
    float *qkv;      /* [M, q + 2 kv + border], Q and K turned */
    float *p;        /* [sequences, heads, T, T]: attention, rows of causal length */
    float *attn_out; /* [M, q] */
    float *mid;      /* [M, width + border]: after attention */
    float *ffn_in;   /* [M, width] */
    float *gate_up;  /* [M, 2 ffn + border] */
    float *h;        /* [M, ffn] */
    float *r1, *r2;  /* [M]: of the two norms */
} tr_acts;

typedef struct {
    size_t sequences_max, positions, logit_rows; /* capacity; rows of logits at a time */
    tr_acts *acts; /* [n_layers + 1]; the last has x alone. All the same without `backward` */
    float *final_in, *final_r; /* [M, width]: rows with a target after the last norm; [M] */
    float *logits;             /* [logit_rows, vocab] */
    uint32_t *rows;            /* [M]: rows with a target */
    int32_t *targets;          /* [M] */
    float *dx;                 /* [M, width] */
    float *dnarrow;            /* [M, the widest in + border] */
    float *dwide;              /* [M, the widest of q + 2 kv and 2 ffn] */
    float *dp;                 /* [attention block, T] */
    size_t ld_x, ld_mid, ld_qkv, ld_gate_up, ld_narrow;
    size_t n_sequences, n_targets; /* of the micro-batch last given to tr_forward */
    const int32_t **inputs;        /* [sequences_max] */
    float *block;
} tr_work;

SH_MUST_USE sh_status tr_work_create(const tr_net *net, size_t sequences_max, size_t positions,
                                     bool backward, tr_work **out, sh_error *err);
void tr_work_destroy(tr_work **work);

/* Runs sequences index[0, n) of data up to the last layer's output. */
void tr_forward(const tr_net *net, tr_work *work, const sh_train_data *data, const uint32_t *index,
                size_t n);

/* Gradient vectors to fill; each may be NULL. Every element is written. */
typedef struct {
    float *weights; /* layout.n */
    float *lora;    /* n_lora */
} tr_grads;

/* After tr_forward: returns the sum of -ln p over the targets. With grads, these are those of
 * scale * sum. */
double tr_backward(const tr_net *net, tr_work *work, float scale, const tr_grads *grads);

/* attention.c: all heads of sequence s; o [T, q] and p from qkv, and dqkv from do. */
void tr_attention(const tr_net *net, const tr_work *work, const tr_acts *acts, size_t s);
typedef struct {
    const float *dout; /* [M, q] with leading dimension ld_out */
    size_t ld_out;
    float *dqkv; /* [M, q + 2 kv], dense */
} tr_attention_grads;
void tr_attention_backward(const tr_net *net, const tr_work *work, const tr_acts *acts,
                           const tr_attention_grads *grads, size_t s);

#endif
