/*
 * The trainer's float network: a Llama-family decoder with its forward and backward pass over a
 * micro-batch of whole sequences. Internal to trainer/.
 *
 * Matrices that read the same input are one group: Q, K, V stacked, gate and up stacked. The
 * weights of a frozen base stay in its file's types; a tile of rows at a time becomes floats, in a
 * scratch that stays in a core's cache (tr_group_rows). Those of a model that is trained whole, and
 * of a base so small that a copy costs little, lie in F32.
 *
 * LoRA stays beside W (with s = alpha / rank, or alpha / sqrt(rank)):
 *
 *     u = x·Aᵀ     y  = x·Wᵀ + u·(sB)ᵀ
 *     du = dy·sB   dx = dy·W + du·A      dA = duᵀ·x     dB = s dyᵀ·u
 *
 * With dropout, A's x is x∘m (m: 0 or 1 / (1 - p)), and dx = dy·W + (du·A)∘m. Quantization-aware,
 * the weights of a product are Q(W + sBA), made with the tile: y = x·Qᵀ, dx = dy·Q, and dA and dB
 * (or dW) as if Q were not there.
 *
 * Memory of a micro-batch: what tr_acts says, of every layer that is kept; the others are run once
 * more in the backward pass from their input, with the same bits (gradient checkpointing: Chen et
 * al. 2016, arXiv:1604.06174).
 * Threads: a tr_net is read-only in tr_forward and tr_backward; a tr_work belongs to one thread.
 */
#ifndef SH_TRAINER_NETWORK_H
#define SH_TRAINER_NETWORK_H

#include "shared/math/bf16.h"
#include "trainer/kernels.h"
#include "trainer/trainer.h"

enum {
    TR_QKV,
    TR_ATTN_OUTPUT,
    TR_GATE_UP,
    TR_DOWN,
    TR_GROUPS,
    TR_HEAD = TR_GROUPS, /* the output matrix, of no layer */
    TR_MATRICES
};
#define TR_PARTS_MAX   3
#define TR_QUERY_BLOCK 64           /* queries of attention done together */
#define TR_TILE_FLOATS (128u << 10) /* dequantized: half of a small second-level cache */
#define TR_COPY_BYTES  (64u << 20)  /* a frozen base of at most this in F32 is copied */

/* Matrices [out_p, in] stacked along their rows. */
typedef struct {
    size_t in, out;
    size_t first, n_parts;            /* parts are SH_ATTN_Q.. from first on */
    size_t part_at[TR_PARTS_MAX + 1]; /* first row of each part; the last is out */
} tr_group;

/* LoRA of one group of one layer; offsets are into the flat vector of LoRA parameters. */
typedef struct {
    size_t rank[TR_PARTS_MAX], at[TR_PARTS_MAX]; /* ranks of the parts, rows of theirs in A */
    /* s in training, and the adapter's own: its B is B·scale / exported */
    float scale[TR_PARTS_MAX], exported[TR_PARTS_MAX];
    size_t total;            /* sum of the ranks; 0: nothing adapted */
    size_t a;                /* A of all parts, [total, in] */
    size_t b[TR_PARTS_MAX];  /* [out_p, rank_p] */
    size_t bt[TR_PARTS_MAX]; /* (sB)ᵀ [rank_p, out_p], in tr_net's b_turned */
} tr_lora;

/* Vectors of a layer. */
enum {
    TR_ATTN_NORM,
    TR_FFN_NORM,
    TR_Q_NORM, /* of a head, all heads share it; qwen3 */
    TR_K_NORM,
    TR_Q_BIAS, /* qwen2 */
    TR_K_BIAS,
    TR_V_BIAS,
    TR_VECTORS
};

/* LoRA dropout. Between batches the loop sets which step comes, and the place of its next batch's
 * first sequence when a step is made of several batches. */
typedef struct {
    float p; /* 0: off, as in evaluation */
    uint64_t seed;
    uint32_t step, first;
} tr_dropout;

/* Where tensors lie in a flat vector of weights or gradients, in floats. */
typedef struct {
    size_t embd, output, output_norm; /* output == embd when tied */
    size_t layers, layer_stride;
    size_t vector[TR_VECTORS], vector_n[TR_VECTORS]; /* within a layer; vector_n 0: not there */
    size_t group[TR_GROUPS];                         /* after the vectors */
    size_t n;
} tr_layout;

typedef struct {
    sh_model_config config;
    tr_group groups[TR_MATRICES];
    tr_layout layout;
    const sh_model *model; /* borrowed; where weights are read when `weights` is NULL */
    float *weights;        /* layout.n */
    size_t tile_floats;    /* TR_TILE_FLOATS */
    bool bf16;             /* products with weights round their operands (math/bf16.h) */
    sh_type quantize;      /* matrices are seen as after quantization to it; SH_TYPE_F32: off */

    tr_lora *lora;     /* [tr_lora_count], last that of TR_HEAD; NULL: no adapter */
    size_t n_lora;     /* floats of the flat LoRA vector */
    size_t rank_total; /* the largest of tr_lora's totals */
    size_t lora_from;  /* the lowest layer that is adapted; n_layers: none is */
    const float *lora_values;
    float *b_turned;
    size_t n_turned;
    bool b_frozen; /* in all steps: B is not given back, it keeps its bits whatever its scale */
    tr_dropout dropout;

    float *rope_cos, *rope_sin; /* [rope_n, head_size / 2] */
    size_t rope_n;
} tr_net;

/* A net of config's shape for sequences of up to `positions` inputs. model NULL: with zero weights
 * of its own. Else the model's, which must outlive it: in place, or a copy in F32 where that takes
 * at most copy_bytes. */
SH_MUST_USE sh_status tr_net_create(const sh_model_config *config, const sh_model *model,
                                    uint64_t copy_bytes, size_t positions, tr_net **out,
                                    sh_error *err);
void tr_net_destroy(tr_net **net);
/* What it allocated: weights of its own, angles, what an adapter needs beside its values. */
uint64_t tr_net_bytes(const tr_net *net);
/* Lengthens the table of angles; only when no thread uses the net. */
SH_MUST_USE sh_status tr_net_reserve_positions(tr_net *net, size_t positions, sh_error *err);

/* Rows [first, first + n) of a group's stacked matrix, [n, in], as products take them: in place, or
 * made in tile, which has room for tr_tile_rows of them. */
const float *tr_group_rows(const tr_net *net, size_t layer, size_t g, size_t first, size_t n,
                           float *tile);
void tr_embedding(const tr_net *net, int32_t token, float *out);
/* A layer's vector; NULL: the model has none. */
const float *tr_vector(const tr_net *net, size_t layer, size_t which);
const float *tr_output_norm(const tr_net *net);
/* Rows of a group that are worked on at once: all of them when they need not be made. */
size_t tr_tile_rows(const tr_net *net, size_t g);
/* Whether they are made, not in place. */
bool tr_makes_tiles(const tr_net *net);

/* The tensors of a vector of tr_layout, in the order of a GGUF file. */
typedef struct {
    char name[SH_GGUF_NAME_MAX]; /* "blk.0.attn_q.weight" */
    size_t at, rows, row;        /* [rows, row] values from `at` on; a norm has one row */
    bool is_vector;              /* norms and biases */
} tr_tensor;
size_t tr_tensor_count(const tr_net *net);
tr_tensor tr_tensor_at(const tr_net *net, size_t i);

/* Which group and part a matrix (SH_ATTN_Q..) is. */
void tr_matrix_group(size_t matrix, size_t *group, size_t *part);

static inline size_t tr_lora_count(const tr_net *net)
{
    return (size_t)net->config.n_layers * TR_GROUPS + 1;
}
/* The group that net->lora[i] is of. */
static inline size_t tr_lora_group(const tr_net *net, size_t i)
{
    return i + 1 == tr_lora_count(net) ? (size_t)TR_HEAD : i % TR_GROUPS;
}
/* The LoRA of an adapter's pair (sh_lora_pair_count), the group that it is of, its part there. */
const tr_lora *tr_pair_lora(const tr_net *net, size_t pair, size_t *group, size_t *part);

/* Lays out the LoRA parameters of an adapter whose shapes were checked, with its own scales. */
SH_MUST_USE sh_status tr_net_attach(tr_net *net, const sh_adapter *adapter, sh_error *err);
/* After it: the scales, dropout and frozen factors of a training. SH_ERR_INVALID: bad options, or
 * an adapter whose own scale is not above zero. */
SH_MUST_USE sh_status tr_net_set_lora(tr_net *net, const sh_adapter *adapter,
                                      const sh_train_options *options, sh_error *err);
/* A group's LoRA, of TR_HEAD that of any layer; NULL: not adapted. */
const tr_lora *tr_lora_of(const tr_net *net, size_t layer, size_t g);
/* The passes take the LoRA values from this flat vector; to be called after each change of it. */
void tr_net_use(tr_net *net, const float *lora);
/* The flat LoRA vector from an adapter's pairs, and back. Where training's scale is the adapter's
 * the bits stay. */
void tr_lora_gather(const tr_net *net, const sh_adapter *adapter, float *lora);
void tr_lora_scatter(const tr_net *net, const float *lora, sh_adapter *adapter);

/* quantize.c: rows of all matrices are whole blocks of type, or SH_ERR_INVALID names one. */
SH_MUST_USE sh_status tr_rows_check(const tr_net *net, sh_type type, sh_error *err);
/* Matrices are seen as after quantization to type from here on; SH_TYPE_F32: as they are. */
SH_MUST_USE sh_status tr_net_quantize(tr_net *net, sh_type type, sh_error *err);
/* Rows [first, first + n) of W in tile become Q(W + sBA). */
void tr_quantize_rows(const tr_net *net, size_t layer, size_t g, size_t first, size_t n,
                      float *tile);
/* x[0, n) become Q(x); n a multiple of the block. */
void tr_quantize_values(sh_type type, float *x, size_t n);

/* What a layer keeps for its backward pass. M rows = sequences * positions. The norms' outputs, the
 * attention's weights and silu(gate) * up are cheap: they are made again. */
typedef struct {
    float *x;            /* [M, width]: input */
    float *qk;           /* [M, q + kv] before the norms of heads; NULL without them */
    float *qkv;          /* [M, q + 2 kv], Q and K turned */
    float *attn_out;     /* [M, q] */
    float *mid;          /* [M, width]: after attention */
    float *gate_up;      /* [M, 2 ffn] */
    float *u[TR_GROUPS]; /* [M, rank_total], of which a group's ranks are used */
    float *r1, *r2;      /* [M]: of the two norms */
} tr_acts;

/* Sizes of a micro-batch's memory. */
typedef struct {
    size_t sequences, positions;
    size_t logit_rows; /* rows whose logits are held at a time */
    size_t kept;       /* layers, the last ones, whose tr_acts are all kept */
    bool backward;
} tr_work_shape;

typedef struct {
    tr_work_shape shape;
    tr_acts *acts; /* [n_layers + 1]; the last has x alone. All the same without `backward` */
    float *final_in, *final_r; /* [M, width]: rows with a target after the last norm; [M] */
    float *logits;             /* [logit_rows, vocab] */
    float *head_u;             /* [logit_rows, rank_total]; NULL: the head is not adapted */
    float *tile;               /* of weights */
    sh_bf16 *a16, *b16;        /* operands of a product with a tile, rounded; NULL without bf16 */
    float *narrow, *wide;      /* [M, the widest in]: inputs of groups; [M, ffn] */
    float *p, *dp;             /* [attention block, T] */
    float *dx;                 /* [M, width] */
    float *dnarrow;            /* [M, the widest in] */
    float *dwide;              /* [M, the widest of q + 2 kv and 2 ffn] */
    float *du;                 /* [M, rank_total] */
    float *turned;             /* [the largest rank, the widest out, with the head's in] */
    uint32_t *rows;            /* [M]: rows with a target */
    uint32_t *begins;          /* [M]: position in its sequence where the row's document begins */
    int32_t *targets;          /* [M] */
    const int32_t **inputs;    /* [sequences] */
    float *dropped;            /* [M, the widest in]: A's input; NULL without dropout */
    uint32_t first; /* place in the step's batch of the micro-batch's first sequence, for dropout */
    size_t n_sequences, n_targets; /* of the micro-batch last given to tr_forward */
    float *block;
} tr_work;

size_t tr_work_bytes(const tr_net *net, const tr_work_shape *shape);
SH_MUST_USE sh_status tr_work_create(const tr_net *net, const tr_work_shape *shape, tr_work **out,
                                     sh_error *err);
void tr_work_destroy(tr_work **work);

/* Runs sequences index[0, n) of data up to the last layer's output. */
void tr_forward(const tr_net *net, tr_work *work, const sh_train_data *data, const uint32_t *index,
                size_t n);

/* Gradient vectors to fill; each may be NULL. Every element is written. */
typedef struct {
    float *weights; /* layout.n */
    float *lora;    /* n_lora */
} tr_grads;

/* A frozen network of the same vocabulary, whose probabilities at `temperature` are learnt with
 * `weight` beside the targets (kernels.h). */
typedef struct {
    const tr_net *net; /* borrowed; NULL: none */
    float weight, temperature;
} tr_teacher;

typedef struct {
    float scale; /* gradients are those of scale * the sum of the loss over the targets */
    tr_teacher teacher;
    tr_work *teacher_work; /* after its tr_forward of the same sequences; as many logit_rows */
} tr_objective;

/* After tr_forward: returns the sums over the targets. */
tr_losses tr_backward(const tr_net *net, tr_work *work, const tr_objective *objective,
                      const tr_grads *grads);

/* attention.c: all heads of sequence s; o [T, q] from qkv, and dqkv from do. */
void tr_attention(const tr_net *net, const tr_work *work, const tr_acts *acts, size_t s);
/* dout [M, q], dqkv [M, q + 2 kv] */
void tr_attention_backward(const tr_net *net, const tr_work *work, const tr_acts *acts,
                           const float *dout, float *dqkv, size_t s);

/* product.c: y [rows, out] = x·Wᵀ, and dx [rows, in] = dy·W, with W in tiles of rows. */
typedef struct {
    size_t layer, g, rows;
    const uint32_t *index; /* [rows]: which rows of the micro-batch; NULL: its first ones */
} tr_place;
void tr_weights_forward(const tr_net *net, tr_work *work, const tr_place *at, const float *x,
                        float *y);
void tr_weights_backward(const tr_net *net, tr_work *work, const tr_place *at, const float *dy,
                         float *dx);

/* dropout.c: y = x∘m on the rows [rows, in] of a group's input; x may be y. */
void tr_drop(const tr_net *net, const tr_work *work, const tr_place *at, const float *x, float *y);

/* group.c: a group of a layer with its LoRA. */
typedef struct {
    tr_place at;
    const float *x; /* [rows, in] */
    float *u;       /* [rows, rank_total] */
    bool add;       /* the gradients of W, A and B are added to what is there */
} tr_product;
/* u = x·Aᵀ, and y [rows, out] = x·Wᵀ + u·(sB)ᵀ unless y is NULL. */
void tr_group_forward(const tr_net *net, tr_work *work, const tr_product *p, float *y);
/* From dy [rows, out]: the gradients of W and of A and B, and dx [rows, in] unless NULL, which may
 * be x. */
void tr_group_backward(const tr_net *net, tr_work *work, const tr_product *p, const float *dy,
                       float *dx, const tr_grads *grads);

#endif
