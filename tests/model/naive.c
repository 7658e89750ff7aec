#include "tests/model/naive.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double *numbers(size_t n)
{
    double *p = calloc(n, sizeof *p);
    if (p == NULL)
        abort();
    return p;
}

static void weights_row(const sh_matrix *m, uint32_t row, float *out)
{
    const size_t bytes = sh_type_row_bytes(m->type, m->in);
    sh_row_dequantize(m->type, (const uint8_t *)m->data + row * bytes, out, m->in);
}

static void multiply(const sh_matrix *m, const sh_lora_pair *pair, float alpha, const double *x,
                     double *y)
{
    float *row = calloc(m->in, sizeof *row);
    if (row == NULL)
        abort();
    for (uint32_t o = 0; o < m->out; o++) {
        weights_row(m, o, row);
        y[o] = 0;
        for (uint32_t i = 0; i < m->in; i++)
            y[o] += (double)row[i] * x[i];
        for (uint32_t r = 0; pair != NULL && pair->a != NULL && r < pair->rank; r++) {
            double t = 0;
            for (uint32_t i = 0; i < m->in; i++)
                t += (double)pair->a[r * m->in + i] * x[i];
            y[o] += (double)alpha / pair->rank * pair->b[o * pair->rank + r] * t;
        }
    }
    free(row);
}

static void normalize(const double *x, const float *weight, uint32_t n, double eps, double *y)
{
    double squares = 0;
    for (uint32_t i = 0; i < n; i++)
        squares += x[i] * x[i];
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] / sqrt(squares / n + eps) * weight[i];
}

/* Each head's norm (qwen3; NULL: none), then the rotation. Frequencies of scaled models are the
 * model's own: what is judged here is their use. */
static void turn(const sh_model *model, double *x, uint32_t heads, const float *norm,
                 uint32_t position)
{
    const sh_model_config *c = &model->config;
    const uint32_t size = c->head_size;
    const bool plain = c->rope_scaling == SH_ROPE_PLAIN && !model->rope_factors;
    for (uint32_t h = 0; h < heads; h++) {
        double *head = x + h * size;
        if (norm != NULL)
            normalize(head, norm, size, c->norm_eps, head);
        for (uint32_t j = 0; j < size / 2; j++) {
            const double angle =
                position * (plain ? pow(c->rope_base, -2.0 * j / size) : model->rope_frequency[j]);
            double *first = head + (c->rope_halves ? j : 2 * j);
            double *second = c->rope_halves ? first + size / 2 : first + 1;
            const double a = *first * model->rope_magnitude, b = *second * model->rope_magnitude;
            *first = a * cos(angle) - b * sin(angle);
            *second = a * sin(angle) + b * cos(angle);
        }
    }
}

static void add_bias(const float *bias, double *y, uint32_t n)
{
    for (uint32_t i = 0; bias != NULL && i < n; i++)
        y[i] += bias[i];
}

/* out[size] of one head at one position: keys and values are rows of kv_width. */
static void attend(const double *q, const double *k, const double *v, uint32_t position,
                   uint32_t kv_width, uint32_t size, double *out)
{
    double *p = numbers(position + 1), sum = 0;
    for (uint32_t s = 0; s <= position; s++) {
        for (uint32_t d = 0; d < size; d++)
            p[s] += q[d] * k[s * kv_width + d] / sqrt(size);
        p[s] = exp(p[s]);
        sum += p[s];
    }
    memset(out, 0, size * sizeof *out);
    for (uint32_t s = 0; s <= position; s++)
        for (uint32_t d = 0; d < size; d++)
            out[d] += p[s] / sum * v[s * kv_width + d];
    free(p);
}

static void layer_forward(const sh_model *model, const sh_adapter *adapter, uint32_t l, double *x,
                          uint32_t n)
{
    const sh_model_config *c = &model->config;
    const sh_layer *layer = &model->layers[l];
    const sh_lora_pair *pairs = adapter != NULL ? &adapter->pairs[l * SH_LAYER_MATRICES] : NULL;
    const float alpha = adapter != NULL ? adapter->alpha : 0;
    const uint32_t kv = c->n_kv_heads * c->head_size, qw = c->n_heads * c->head_size;
    double *norm = numbers(c->width), *q = numbers(qw), *k = numbers((size_t)n * kv);
    double *v = numbers((size_t)n * kv), *att = numbers(qw), *y = numbers(c->width);
    double *gate = numbers(c->ffn), *up = numbers(c->ffn);
#define PRODUCT(which, from, to)                                                                   \
    multiply(&layer->m[which], pairs != NULL ? &pairs[which] : NULL, alpha, from, to)
    for (uint32_t t = 0; t < n; t++) {
        double *row = x + (size_t)t * c->width;
        normalize(row, layer->attn_norm, c->width, c->norm_eps, norm);
        PRODUCT(SH_ATTN_Q, norm, q);
        PRODUCT(SH_ATTN_K, norm, k + t * kv);
        PRODUCT(SH_ATTN_V, norm, v + t * kv);
        add_bias(layer->bias[SH_ATTN_Q], q, qw);
        add_bias(layer->bias[SH_ATTN_K], k + t * kv, kv);
        add_bias(layer->bias[SH_ATTN_V], v + t * kv, kv);
        turn(model, q, c->n_heads, layer->q_norm, t);
        turn(model, k + t * kv, c->n_kv_heads, layer->k_norm, t);
        for (uint32_t h = 0; h < c->n_heads; h++) {
            const uint32_t shared = h / (c->n_heads / c->n_kv_heads) * c->head_size;
            attend(q + h * c->head_size, k + shared, v + shared, t, kv, c->head_size,
                   att + h * c->head_size);
        }
        PRODUCT(SH_ATTN_OUTPUT, att, y);
        for (uint32_t i = 0; i < c->width; i++)
            row[i] += y[i];
        normalize(row, layer->ffn_norm, c->width, c->norm_eps, norm);
        PRODUCT(SH_FFN_GATE, norm, gate);
        PRODUCT(SH_FFN_UP, norm, up);
        for (uint32_t i = 0; i < c->ffn; i++)
            gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
        PRODUCT(SH_FFN_DOWN, gate, y);
        for (uint32_t i = 0; i < c->width; i++)
            row[i] += y[i];
    }
#undef PRODUCT
    double *all[] = {norm, q, k, v, att, y, gate, up};
    for (size_t i = 0; i < SH_COUNT(all); i++)
        free(all[i]);
}

void naive_forward(const sh_model *model, const sh_adapter *adapter, const int32_t *tokens,
                   uint32_t n, double *logits)
{
    const sh_model_config *c = &model->config;
    double *x = numbers((size_t)n * c->width), *norm = numbers(c->width);
    float *row = calloc(c->width, sizeof *row);
    if (row == NULL)
        abort();
    for (uint32_t t = 0; t < n; t++) {
        weights_row(&model->token_embd, (uint32_t)tokens[t], row);
        for (uint32_t i = 0; i < c->width; i++)
            x[(size_t)t * c->width + i] = row[i];
    }
    for (uint32_t l = 0; l < c->n_layers; l++)
        layer_forward(model, adapter, l, x, n);
    for (uint32_t t = 0; t < n; t++) {
        normalize(x + (size_t)t * c->width, model->output_norm, c->width, c->norm_eps, norm);
        multiply(&model->output,
                 adapter != NULL ? &adapter->pairs[sh_lora_output_pair(c->n_layers)] : NULL,
                 adapter != NULL ? adapter->alpha : 0, norm, logits + (size_t)t * c->vocab);
    }
    free(x);
    free(norm);
    free(row);
}
