#include "tests/trainer/small.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *must(void *p)
{
    SH_ASSERT(p != NULL);
    return p;
}

static float *random_floats(size_t n, float mean, float std, uint64_t seed, uint64_t stream)
{
    sh_rng rng;
    float *x = must(sh_calloc(n, sizeof(*x)));
    sh_rng_init(&rng, seed, stream, 1);
    for (size_t i = 0; i < n; i++)
        x[i] = mean + std * sh_rng_normal(&rng);
    return x;
}

static sh_matrix random_matrix(sh_type type, uint32_t out, uint32_t in, uint64_t seed,
                               uint64_t stream)
{
    float *x = random_floats((size_t)out * in, 0.0f, 0.3f, seed, stream);
    sh_matrix m = {.type = type, .out = out, .in = in, .data = x, .name = "small"};
    if (type == SH_TYPE_F32)
        return m;
    size_t row_bytes = sh_type_row_bytes(type, in);
    SH_ASSERT(row_bytes > 0);
    uint8_t *rows = must(sh_calloc(out, row_bytes));
    for (size_t o = 0; o < out; o++)
        sh_row_quantize(type, x + o * in, rows + o * row_bytes, in);
    free(x);
    m.data = rows;
    return m;
}

sh_model_config small_config(bool tied)
{
    return (sh_model_config){.n_layers = 2,
                             .width = 12,
                             .n_heads = 4,
                             .n_kv_heads = 2,
                             .head_size = 4,
                             .ffn = 20,
                             .vocab = 23,
                             .context = 96,
                             .rope_base = 10000.0f,
                             .norm_eps = 1e-5f,
                             .tied_output = tied};
}

sh_model *small_model(const sh_model_config *c, sh_type type, uint64_t seed)
{
    uint32_t q = c->n_heads * c->head_size, kv = c->n_kv_heads * c->head_size;
    const uint32_t shapes[SH_LAYER_MATRICES][2] = {
        {q, c->width},      {kv, c->width},     {kv, c->width},    {c->width, q},
        {c->ffn, c->width}, {c->ffn, c->width}, {c->width, c->ffn}};
    sh_model *model = must(sh_calloc(1, sizeof(*model)));
    model->config = *c;
    model->rope_magnitude = 1;
    model->layers = must(sh_calloc(c->n_layers, sizeof(*model->layers)));
    model->token_embd = random_matrix(type, c->vocab, c->width, seed, 1);
    model->output =
        c->tied_output ? model->token_embd : random_matrix(type, c->vocab, c->width, seed, 2);
    model->output_norm = random_floats(c->width, 1.0f, 0.2f, seed, 3);
    for (uint32_t l = 0; l < c->n_layers; l++) {
        for (uint32_t i = 0; i < SH_LAYER_MATRICES; i++)
            model->layers[l].m[i] =
                random_matrix(type, shapes[i][0], shapes[i][1], seed, 100 * (l + 1) + i);
        model->layers[l].attn_norm = random_floats(c->width, 1.0f, 0.2f, seed, 100 * (l + 1) + 50);
        model->layers[l].ffn_norm = random_floats(c->width, 1.0f, 0.2f, seed, 100 * (l + 1) + 51);
    }
    return model;
}

void small_model_free(sh_model **model)
{
    sh_model *m = *model;
    for (uint32_t l = 0; l < m->config.n_layers; l++) {
        for (uint32_t i = 0; i < SH_LAYER_MATRICES; i++)
            free((void *)m->layers[l].m[i].data);
        free((void *)m->layers[l].attn_norm);
        free((void *)m->layers[l].ffn_norm);
    }
    if (!m->config.tied_output)
        free((void *)m->output.data);
    free((void *)m->token_embd.data);
    free((void *)m->output_norm);
    free(m->layers);
    free(m);
    *model = NULL;
}

sh_adapter *small_adapter(const sh_model_config *config, const uint32_t *ranks, size_t n_ranks,
                          uint64_t seed)
{
    sh_adapter *adapter = NULL;
    sh_error err = {0};
    uint32_t most = 0;
    for (size_t i = 0; i < n_ranks; i++)
        most = SH_MAX(most, ranks[i]);
    SH_ASSERT(sh_adapter_create(config, most, 2.0f * (float)most, &adapter, &err) == SH_OK);
    for (size_t i = 0; i < (size_t)config->n_layers * SH_LAYER_MATRICES; i++) {
        sh_lora_pair *pair = &adapter->pairs[i];
        free(pair->a);
        free(pair->b);
        pair->a = pair->b = NULL;
        pair->rank = ranks[i % n_ranks];
        if (pair->rank == 0)
            continue;
        pair->a = random_floats((size_t)pair->rank * pair->in, 0.0f, 0.3f, seed, 2 * i);
        pair->b = random_floats((size_t)pair->rank * pair->out, 0.0f, 0.2f, seed, 2 * i + 1);
    }
    return adapter;
}

sh_train_data small_data(const sh_model_config *config, size_t n, uint32_t length, bool masked,
                         uint64_t seed)
{
    int32_t *tokens = must(sh_calloc(n * length, sizeof(*tokens)));
    uint8_t *mask = masked ? must(sh_calloc(n, length)) : NULL;
    sh_rng rng;
    sh_rng_init(&rng, seed, 0, 2);
    for (size_t i = 0; i < n * length; i++) {
        tokens[i] = (int32_t)sh_rng_below(&rng, config->vocab);
        if (masked)
            mask[i] = sh_rng_below(&rng, 2) == 0;
    }
    return (sh_train_data){.tokens = tokens, .mask = mask, .n = n, .length = length};
}

void small_data_free(sh_train_data *data)
{
    free((void *)data->tokens);
    free((void *)data->mask);
    *data = (sh_train_data){0};
}

/* ---- reference ---- */

static double *add_tensor(reference *r, size_t *at, const char *name, size_t n)
{
    double *values = r->block + *at;
    *at += n;
    SH_ASSERT(r->n_tensors < SH_COUNT(r->tensors));
    snprintf(r->tensors[r->n_tensors].name, sizeof(r->tensors[0].name), "%s", name);
    r->tensors[r->n_tensors].values = values;
    r->tensors[r->n_tensors++].n = n;
    return values;
}

static double *add_matrix(reference *r, size_t *at, const char *name, const sh_matrix *m)
{
    double *values = add_tensor(r, at, name, (size_t)m->out * m->in);
    float *row = must(sh_calloc(m->in, sizeof(*row)));
    for (size_t o = 0; o < m->out; o++) {
        sh_row_dequantize(m->type, (const uint8_t *)m->data + o * sh_type_row_bytes(m->type, m->in),
                          row, m->in);
        for (size_t i = 0; i < m->in; i++)
            values[o * m->in + i] = (double)row[i];
    }
    free(row);
    return values;
}

static double *add_norm(reference *r, size_t *at, const char *name, const float *w)
{
    double *values = add_tensor(r, at, name, r->config.width);
    for (size_t i = 0; i < r->config.width; i++)
        values[i] = (double)w[i];
    return values;
}

void reference_init(reference *r, const sh_model *model)
{
    const sh_model_config *c = &model->config;
    size_t at = 0, q = (size_t)c->n_heads * c->head_size;
    char name[64];
    memset(r, 0, sizeof(*r));
    r->config = *c;
    SH_ASSERT(c->n_layers <= SH_COUNT(r->layers));
    r->block = must(sh_calloc(2 * (size_t)c->vocab * c->width + c->width +
                                  c->n_layers * c->width * (4 * q + 3 * (size_t)c->ffn + 2),
                              sizeof(double)));
    r->token_embd = add_matrix(r, &at, "token_embd.weight", &model->token_embd);
    r->output =
        c->tied_output ? r->token_embd : add_matrix(r, &at, "output.weight", &model->output);
    r->output_norm = add_norm(r, &at, "output_norm.weight", model->output_norm);
    for (size_t l = 0; l < c->n_layers; l++) {
        for (size_t m = 0; m < SH_LAYER_MATRICES; m++) {
            snprintf(name, sizeof(name), "blk.%zu.%s.weight", l, sh_layer_matrix_names[m]);
            r->layers[l].m[m] = add_matrix(r, &at, name, &model->layers[l].m[m]);
        }
        snprintf(name, sizeof(name), "blk.%zu.attn_norm.weight", l);
        r->layers[l].attn_norm = add_norm(r, &at, name, model->layers[l].attn_norm);
        snprintf(name, sizeof(name), "blk.%zu.ffn_norm.weight", l);
        r->layers[l].ffn_norm = add_norm(r, &at, name, model->layers[l].ffn_norm);
    }
}

void reference_adapt(reference *r, const sh_adapter *shape, double *const *a, double *const *b)
{
    for (size_t i = 0; i < (size_t)r->config.n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *pair = &shape->pairs[i];
        double *w = r->layers[i / SH_LAYER_MATRICES].m[i % SH_LAYER_MATRICES];
        double scale = a[i] ? (double)shape->alpha / pair->rank : 0;
        for (size_t o = 0; a[i] && o < pair->out; o++)
            for (size_t j = 0; j < pair->in; j++)
                for (size_t k = 0; k < pair->rank; k++)
                    w[o * pair->in + j] +=
                        scale * b[i][o * pair->rank + k] * a[i][k * pair->in + j];
    }
}

static void multiply(const double *w, size_t out, size_t in, const double *x, double *y)
{
    for (size_t o = 0; o < out; o++) {
        y[o] = 0;
        for (size_t i = 0; i < in; i++)
            y[o] += w[o * in + i] * x[i];
    }
}

static void normalize(const double *x, const double *w, double eps, size_t n, double *y)
{
    double s = 0;
    for (size_t i = 0; i < n; i++)
        s += x[i] * x[i];
    for (size_t i = 0; i < n; i++)
        y[i] = x[i] / sqrt(s / (double)n + eps) * w[i];
}

static void turn(const sh_model_config *c, double *x, size_t heads, size_t position)
{
    for (size_t h = 0; h < heads; h++) {
        for (size_t i = 0; i < c->head_size / 2; i++) {
            double *p = x + h * c->head_size + 2 * i, a = p[0], b = p[1];
            double angle =
                (double)position * pow((double)c->rope_base, -2.0 * (double)i / c->head_size);
            p[0] = a * cos(angle) - b * sin(angle);
            p[1] = a * sin(angle) + b * cos(angle);
        }
    }
}

static double softmax_nll(double *z, size_t n, size_t target)
{
    double most = z[0], sum = 0;
    for (size_t i = 1; i < n; i++)
        most = fmax(most, z[i]);
    double of_target = z[target] - most;
    for (size_t i = 0; i < n; i++)
        sum += z[i] = exp(z[i] - most);
    for (size_t i = 0; i < n; i++)
        z[i] /= sum;
    return log(sum) - of_target;
}

enum { MOST = 128 }; /* positions, and any dimension of a reference model */

/* One position of one layer's attention; k and v hold positions 0..t of this layer. */
static void attend(const sh_model_config *c, const double *q, double k[MOST][MOST],
                   double v[MOST][MOST], size_t t, double *out)
{
    double p[MOST];
    for (size_t h = 0; h < c->n_heads; h++) {
        size_t kv = h / (c->n_heads / c->n_kv_heads) * c->head_size;
        for (size_t s = 0; s <= t; s++) {
            p[s] = 0;
            for (size_t i = 0; i < c->head_size; i++)
                p[s] += q[h * c->head_size + i] * k[s][kv + i] / sqrt(c->head_size);
        }
        softmax_nll(p, t + 1, 0);
        for (size_t i = 0; i < c->head_size; i++) {
            out[h * c->head_size + i] = 0;
            for (size_t s = 0; s <= t; s++)
                out[h * c->head_size + i] += p[s] * v[s][kv + i];
        }
    }
}

typedef double cache[8][MOST][MOST]; /* [layer][position][dimension] */

/* Logits after token at position t, given the caches of the positions before. */
static void step(const reference *r, int32_t token, size_t t, cache keys, cache values, double *z)
{
    const sh_model_config *c = &r->config;
    size_t width = c->width, q_size = (size_t)c->n_heads * c->head_size;
    size_t kv_size = (size_t)c->n_kv_heads * c->head_size;
    double x[MOST], n[MOST], q[MOST], o[MOST], y[MOST], g[MOST], u[MOST];
    memcpy(x, r->token_embd + (size_t)token * width, width * sizeof(*x));
    for (size_t l = 0; l < c->n_layers; l++) {
        double *const *m = r->layers[l].m;
        normalize(x, r->layers[l].attn_norm, (double)c->norm_eps, width, n);
        multiply(m[SH_ATTN_Q], q_size, width, n, q);
        multiply(m[SH_ATTN_K], kv_size, width, n, keys[l][t]);
        multiply(m[SH_ATTN_V], kv_size, width, n, values[l][t]);
        turn(c, q, c->n_heads, t);
        turn(c, keys[l][t], c->n_kv_heads, t);
        attend(c, q, keys[l], values[l], t, o);
        multiply(m[SH_ATTN_OUTPUT], width, q_size, o, y);
        for (size_t i = 0; i < width; i++)
            x[i] += y[i];
        normalize(x, r->layers[l].ffn_norm, (double)c->norm_eps, width, n);
        multiply(m[SH_FFN_GATE], c->ffn, width, n, g);
        multiply(m[SH_FFN_UP], c->ffn, width, n, u);
        for (size_t i = 0; i < c->ffn; i++)
            u[i] *= g[i] / (1.0 + exp(-g[i]));
        multiply(m[SH_FFN_DOWN], width, c->ffn, u, y);
        for (size_t i = 0; i < width; i++)
            x[i] += y[i];
    }
    normalize(x, r->output_norm, (double)c->norm_eps, width, n);
    multiply(r->output, c->vocab, width, n, z);
}

double reference_loss(const reference *r, const sh_train_data *data)
{
    cache *keys = must(sh_calloc(2, sizeof(*keys))), *values = keys + 1;
    double z[MOST], loss = 0, n = 0;
    SH_ASSERT(data->length <= MOST && r->config.vocab <= MOST && r->config.ffn <= MOST);
    for (size_t s = 0; s < data->n; s++) {
        const int32_t *tokens = data->tokens + s * data->length;
        for (size_t t = 0; t + 1 < data->length; t++) {
            step(r, tokens[t], t, *keys, *values, z);
            if (data->mask && !data->mask[s * data->length + t + 1])
                continue;
            loss += softmax_nll(z, r->config.vocab, (size_t)tokens[t + 1]);
            n++;
        }
    }
    free(keys);
    return loss / n;
}

void reference_release(reference *r)
{
    free(r->block);
    memset(r, 0, sizeof(*r));
}
