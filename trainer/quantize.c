/*
 * Weights as they will be after quantization, for quantization-aware training: the straight-through
 * estimator of Bengio et al. 2013 (arXiv:1308.3432).
 */
#include "shared/math/quant.h"
#include "trainer/kernels.h"
#include "trainer/network.h"

#define CHUNK_BLOCKS 64
#define BLOCK_VALUES SH_Q8_0_VALUES
#define ROW_SCALED   SH_LORA_RANK_MAX /* floats of sB at a time, at least a row of it */
_Static_assert(SH_Q8_0_VALUES == SH_Q4_0_VALUES, "both types have blocks of one size");

sh_status tr_rows_check(const tr_net *net, sh_type type, sh_error *err)
{
    for (size_t i = 0; i < tr_tensor_count(net); i++) {
        const tr_tensor t = tr_tensor_at(net, i);
        if (!t.is_vector && sh_type_row_bytes(type, t.row) == 0)
            return sh_fail(err, SH_ERR_INVALID, "%s: rows of %zu values do not fit %s", t.name,
                           t.row, sh_type_get((uint32_t)type)->name);
    }
    return SH_OK;
}

sh_status tr_net_quantize(tr_net *net, sh_type type, sh_error *err)
{
    if (type != SH_TYPE_F32 && type != SH_TYPE_Q8_0 && type != SH_TYPE_Q4_0) {
        const sh_type_info *info = sh_type_get((uint32_t)type);
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: weights can be seen as Q8_0 or Q4_0, not as %s",
                       info ? info->name : "an unknown type");
    }
    SH_TRY(tr_rows_check(net, type, err));
    net->quantize = type;
    return SH_OK;
}

void tr_quantize_values(sh_type type, float *x, size_t n)
{
    sh_block_q8_0 blocks[CHUNK_BLOCKS]; /* the larger of the types' */
    for (size_t at = 0; at < n; at += CHUNK_BLOCKS * BLOCK_VALUES) {
        const size_t count = SH_MIN(n - at, (size_t)CHUNK_BLOCKS * BLOCK_VALUES);
        sh_row_quantize(type, x + at, blocks, count);
        sh_row_dequantize(type, blocks, x + at, count);
    }
}

/* rows [n, in] of a part += sBA of its rows from `first` on. */
static void add_lora(const tr_net *net, const tr_lora *lora, size_t part, size_t first,
                     const tr_skinny *s, float *rows)
{
    float scaled[ROW_SCALED];
    const float *a = net->lora_values + lora->a + lora->at[part] * s->n;
    const float *b = net->lora_values + lora->b[part] + first * s->rank;
    const size_t step = ROW_SCALED / s->rank;
    for (size_t at = 0; at < s->rows; at += step) {
        tr_skinny some = *s;
        some.rows = SH_MIN(step, s->rows - at);
        for (size_t i = 0; i < some.rows * s->rank; i++)
            scaled[i] = lora->scale[part] * b[at * s->rank + i];
        tr_rank_add(&some, rows + at * s->n, scaled, a);
    }
}

void tr_quantize_rows(const tr_net *net, size_t layer, size_t g, size_t first, size_t n,
                      float *tile)
{
    const tr_group *group = &net->groups[g];
    const tr_lora *lora = tr_lora_of(net, layer, g);
    for (size_t part = 0; lora && part < group->n_parts; part++) {
        const size_t from = SH_MAX(first, group->part_at[part]);
        const size_t end = SH_MIN(first + n, group->part_at[part + 1]), rank = lora->rank[part];
        if (from < end && rank > 0)
            add_lora(net, lora, part, from - group->part_at[part],
                     &(tr_skinny){end - from, group->in, group->in, rank, rank},
                     tile + (from - first) * group->in);
    }
    tr_quantize_values(net->quantize, tile, n * group->in);
}
