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

sh_model_config small_config_of(sh_arch arch)
{
    sh_model_config c = small_config(true);
    c.arch = arch;
    c.rope_halves = true;
    c.rope_scaling = SH_ROPE_YARN;
    return c;
}

/* What an architecture has beside the matrices. */
static void add_vectors(sh_model *model, uint64_t seed)
{
    const sh_model_config *c = &model->config;
    for (uint32_t l = 0; l < c->n_layers; l++) {
        sh_layer *layer = &model->layers[l];
        for (uint32_t p = SH_ATTN_Q; c->arch == SH_ARCH_QWEN2 && p <= SH_ATTN_V; p++)
            layer->bias[p] =
                random_floats(layer->m[p].out, 0.0f, 0.3f, seed, 100 * (l + 1) + 60 + p);
        if (c->arch == SH_ARCH_QWEN3) {
            layer->q_norm = random_floats(c->head_size, 1.0f, 0.2f, seed, 100 * (l + 1) + 70);
            layer->k_norm = random_floats(c->head_size, 1.0f, 0.2f, seed, 100 * (l + 1) + 71);
        }
    }
    if (c->rope_scaling == SH_ROPE_PLAIN)
        return;
    model->rope_magnitude = 1.25f;
    model->rope_frequency = must(sh_calloc(c->head_size / 2, sizeof(double)));
    for (uint32_t i = 0; i < c->head_size / 2; i++)
        model->rope_frequency[i] = 0.7 / (1 + i);
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
    add_vectors(model, seed);
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
        for (uint32_t i = 0; i < SH_LAYER_MATRICES; i++)
            free((void *)m->layers[l].bias[i]);
        free((void *)m->layers[l].q_norm);
        free((void *)m->layers[l].k_norm);
    }
    free(m->rope_frequency);
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

bool same_adapter(const sh_adapter *x, const sh_adapter *y)
{
    for (size_t i = 0; i < sh_lora_pair_count(x->n_layers); i++) {
        const sh_lora_pair *p = &x->pairs[i], *q = &y->pairs[i];
        if (p->a && (memcmp(p->a, q->a, (size_t)p->rank * p->in * sizeof(float)) != 0 ||
                     memcmp(p->b, q->b, (size_t)p->rank * p->out * sizeof(float)) != 0))
            return false;
    }
    return true;
}

/* Of all of an adapter's factors. */
static sh_hash hash_of(const sh_adapter *adapter)
{
    sh_sha256_state hash;
    sh_sha256_init(&hash);
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        const sh_lora_pair *p = &adapter->pairs[i];
        if (!p->a)
            continue;
        sh_sha256_update(&hash, p->a, (size_t)p->rank * p->in * sizeof(float));
        sh_sha256_update(&hash, p->b, (size_t)p->rank * p->out * sizeof(float));
    }
    return sh_sha256_final(&hash);
}

size_t small_train_without_memory(const sh_model *base, sh_adapter *adapter,
                                  const sh_train_data *data, const sh_train_options *options)
{
    const sh_hash before = hash_of(adapter);
    sh_train_result result;
    sh_error err = {0};
    for (size_t n = 1;; n++) {
        SH_ASSERT(n < 1000);
        (void)sh_alloc_fail_after(n);
        const sh_status status = sh_lora_train(base, adapter, data, options, &result, &err);
        (void)sh_alloc_fail_after(0);
        if (status == SH_OK)
            return n;
        const sh_hash now = hash_of(adapter);
        SH_ASSERT(status == SH_ERR_NO_MEMORY && sh_hash_equal(&now, &before));
    }
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

static double *add_vector(reference *r, size_t *at, const char *name, const float *w, size_t n)
{
    if (!w)
        return NULL;
    double *values = add_tensor(r, at, name, n);
    for (size_t i = 0; i < n; i++)
        values[i] = (double)w[i];
    return values;
}

static double *add_layer_vector(reference *r, size_t *at, size_t layer, const char *name,
                                const float *w, size_t n)
{
    char whole[64];
    snprintf(whole, sizeof(whole), "blk.%zu.%.40s", layer, name);
    return add_vector(r, at, whole, w, n);
}

static void add_layer(reference *r, size_t *at, const sh_model *model, size_t l)
{
    const sh_layer *from = &model->layers[l];
    const size_t width = r->config.width, head = r->config.head_size;
    char name[64];
    for (size_t m = 0; m < SH_LAYER_MATRICES; m++) {
        snprintf(name, sizeof(name), "blk.%zu.%s.weight", l, sh_layer_matrix_names[m]);
        r->layers[l].m[m] = add_matrix(r, at, name, &from->m[m]);
    }
    r->layers[l].attn_norm = add_layer_vector(r, at, l, "attn_norm.weight", from->attn_norm, width);
    r->layers[l].ffn_norm = add_layer_vector(r, at, l, "ffn_norm.weight", from->ffn_norm, width);
    r->layers[l].head_norm[0] =
        add_layer_vector(r, at, l, "attn_q_norm.weight", from->q_norm, head);
    r->layers[l].head_norm[1] =
        add_layer_vector(r, at, l, "attn_k_norm.weight", from->k_norm, head);
    for (size_t p = 0; p < 3; p++) {
        snprintf(name, sizeof(name), "%s.bias", sh_layer_matrix_names[SH_ATTN_Q + p]);
        r->layers[l].bias[p] =
            add_layer_vector(r, at, l, name, from->bias[SH_ATTN_Q + p], from->m[SH_ATTN_Q + p].out);
    }
}

void reference_init(reference *r, const sh_model *model)
{
    const sh_model_config *c = &model->config;
    size_t at = 0, q = (size_t)c->n_heads * c->head_size;
    memset(r, 0, sizeof(*r));
    r->config = *c;
    r->magnitude = (double)model->rope_magnitude;
    for (size_t i = 0; i < c->head_size / 2; i++)
        r->frequency[i] = model->rope_frequency
                              ? model->rope_frequency[i]
                              : pow((double)c->rope_base, -2.0 * (double)i / c->head_size);
    SH_ASSERT(c->n_layers <= SH_COUNT(r->layers) && c->head_size / 2 <= SH_COUNT(r->frequency));
    r->block = must(sh_calloc(
        2 * (size_t)c->vocab * c->width + c->width +
            c->n_layers * (c->width * (4 * q + 3 * (size_t)c->ffn + 2) + 3 * q + 2 * c->head_size),
        sizeof(double)));
    r->token_embd = add_matrix(r, &at, "token_embd.weight", &model->token_embd);
    r->output =
        c->tied_output ? r->token_embd : add_matrix(r, &at, "output.weight", &model->output);
    r->output_norm = add_vector(r, &at, "output_norm.weight", model->output_norm, c->width);
    for (size_t l = 0; l < c->n_layers; l++)
        add_layer(r, &at, model, l);
}

void reference_adapt(reference *r, const reference_lora *lora)
{
    if (lora->mask) {
        r->beside = lora;
        return;
    }
    for (size_t i = 0; i < (size_t)r->config.n_layers * SH_LAYER_MATRICES; i++) {
        const sh_lora_pair *pair = &lora->shape->pairs[i];
        double *w = r->layers[i / SH_LAYER_MATRICES].m[i % SH_LAYER_MATRICES];
        for (size_t o = 0; lora->a[i] && o < pair->out; o++)
            for (size_t j = 0; j < pair->in; j++)
                for (size_t k = 0; k < pair->rank; k++)
                    w[o * pair->in + j] += lora->scales[i] * lora->b[i][o * pair->rank + k] *
                                           lora->a[i][k * pair->in + j];
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

/* The norm of each head where the model has one, then RoPE. */
static void turn(const reference *r, double *x, size_t heads, const double *norm, size_t position)
{
    const size_t size = r->config.head_size, half = size / 2;
    for (size_t h = 0; h < heads; h++, x += size) {
        double before[128];
        SH_ASSERT(size <= SH_COUNT(before));
        memcpy(before, x, size * sizeof(*x));
        if (norm)
            normalize(before, norm, (double)r->config.norm_eps, size, x);
        for (size_t i = 0; i < half; i++) {
            const size_t first = r->config.rope_halves ? i : 2 * i;
            const size_t second = r->config.rope_halves ? half + i : 2 * i + 1;
            const double a = x[first], b = x[second], angle = (double)position * r->frequency[i];
            x[first] = r->magnitude * (a * cos(angle) - b * sin(angle));
            x[second] = r->magnitude * (a * sin(angle) + b * cos(angle));
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

/* Positions, and any dimension of a reference model but its vocabulary. */
enum { MOST = 128, VOCAB_MOST = 320 };

/* One position of one layer's attention; k and v hold positions 0..t of this layer, of which those
 * from `begin` on are seen. */
static void attend(const sh_model_config *c, const double *q, double k[MOST][MOST],
                   double v[MOST][MOST], size_t begin, size_t t, double *out)
{
    double p[MOST];
    for (size_t h = 0; h < c->n_heads; h++) {
        size_t kv = h / (c->n_heads / c->n_kv_heads) * c->head_size;
        for (size_t s = begin; s <= t; s++) {
            p[s] = 0;
            for (size_t i = 0; i < c->head_size; i++)
                p[s] += q[h * c->head_size + i] * k[s][kv + i] / sqrt(c->head_size);
        }
        softmax_nll(p + begin, t + 1 - begin, 0);
        for (size_t i = 0; i < c->head_size; i++) {
            out[h * c->head_size + i] = 0;
            for (size_t s = begin; s <= t; s++)
                out[h * c->head_size + i] += p[s] * v[s][kv + i];
        }
    }
}

/* One token: of a sequence, the first position that it sees, its own. */
typedef struct {
    size_t sequence, begin, t;
} place;

/* y = W x of a matrix (layer * SH_LAYER_MATRICES + SH_ATTN_Q..) and the adapter beside it. */
static void project(const reference *r, const place *at, size_t pair, const double *x, double *y)
{
    const sh_model_config *c = &r->config;
    const size_t q = (size_t)c->n_heads * c->head_size, kv = (size_t)c->n_kv_heads * c->head_size;
    const size_t shapes[SH_LAYER_MATRICES][2] = {
        {q, c->width},      {kv, c->width},     {kv, c->width},    {c->width, q},
        {c->ffn, c->width}, {c->ffn, c->width}, {c->width, c->ffn}};
    const size_t *shape = shapes[pair % SH_LAYER_MATRICES];
    const reference_lora *l = r->beside;
    multiply(r->layers[pair / SH_LAYER_MATRICES].m[pair % SH_LAYER_MATRICES], shape[0], shape[1], x,
             y);
    if (!l || !l->a[pair])
        return;
    const float *mask = l->mask(l->mask_arg, pair, at->sequence, at->t);
    const size_t rank = l->shape->pairs[pair].rank;
    double dropped[MOST], u[MOST], change[MOST];
    for (size_t i = 0; i < shape[1]; i++)
        dropped[i] = x[i] * (double)mask[i];
    multiply(l->a[pair], rank, shape[1], dropped, u);
    multiply(l->b[pair], shape[0], rank, u, change);
    for (size_t o = 0; o < shape[0]; o++)
        y[o] += l->scales[pair] * change[o];
}

typedef double cache[8][MOST][MOST]; /* [layer][position][dimension] */

/* Logits after a token, given the caches of the positions before. */
static void step(const reference *r, int32_t token, const place *at, cache keys, cache values,
                 double *z)
{
    const sh_model_config *c = &r->config;
    const size_t t = at->t;
    size_t width = c->width, q_size = (size_t)c->n_heads * c->head_size;
    size_t kv_size = (size_t)c->n_kv_heads * c->head_size;
    double x[MOST], n[MOST], q[MOST], o[MOST], y[MOST], g[MOST], u[MOST];
    memcpy(x, r->token_embd + (size_t)token * width, width * sizeof(*x));
    for (size_t l = 0; l < c->n_layers; l++) {
        const size_t m = l * SH_LAYER_MATRICES;
        normalize(x, r->layers[l].attn_norm, (double)c->norm_eps, width, n);
        project(r, at, m + SH_ATTN_Q, n, q);
        project(r, at, m + SH_ATTN_K, n, keys[l][t]);
        project(r, at, m + SH_ATTN_V, n, values[l][t]);
        double *const rows[] = {q, keys[l][t], values[l][t]};
        const size_t sizes[] = {q_size, kv_size, kv_size};
        for (size_t p = 0; p < 3; p++)
            for (size_t i = 0; r->layers[l].bias[p] && i < sizes[p]; i++)
                rows[p][i] += r->layers[l].bias[p][i];
        turn(r, q, c->n_heads, r->layers[l].head_norm[0], t);
        turn(r, keys[l][t], c->n_kv_heads, r->layers[l].head_norm[1], t);
        attend(c, q, keys[l], values[l], at->begin, t, o);
        project(r, at, m + SH_ATTN_OUTPUT, o, y);
        for (size_t i = 0; i < width; i++)
            x[i] += y[i];
        normalize(x, r->layers[l].ffn_norm, (double)c->norm_eps, width, n);
        project(r, at, m + SH_FFN_GATE, n, g);
        project(r, at, m + SH_FFN_UP, n, u);
        for (size_t i = 0; i < c->ffn; i++)
            u[i] *= g[i] / (1.0 + exp(-g[i]));
        project(r, at, m + SH_FFN_DOWN, u, y);
        for (size_t i = 0; i < width; i++)
            x[i] += y[i];
    }
    normalize(x, r->output_norm, (double)c->norm_eps, width, n);
    multiply(r->output, c->vocab, width, n, z);
}

/* w T^2 KL of one position, whose logits are z and the teacher's v. */
static double softened_kl(const reference_mixture *mixture, const double *z, const double *v,
                          size_t n)
{
    const double t = mixture->temperature;
    double p[VOCAB_MOST], q[VOCAB_MOST], kl = 0;
    for (size_t i = 0; i < n; i++) {
        q[i] = z[i] / t;
        p[i] = v[i] / t;
    }
    softmax_nll(q, n, 0);
    softmax_nll(p, n, 0);
    for (size_t i = 0; i < n; i++)
        kl += p[i] * log(p[i] / q[i]);
    return mixture->weight * t * t * kl;
}

double reference_mixed_loss(const reference *r, const reference_mixture *mixture,
                            const sh_train_data *data)
{
    const reference *teacher = mixture->teacher;
    cache *keys = must(sh_calloc(teacher ? 4 : 2, sizeof(*keys)));
    double z[VOCAB_MOST], v[VOCAB_MOST], loss = 0, n = 0;
    SH_ASSERT(data->length <= MOST && r->config.vocab <= VOCAB_MOST && r->config.ffn <= MOST);
    for (size_t s = 0; s < data->n; s++) {
        const int32_t *tokens = data->tokens + s * data->length;
        size_t begin = 0;
        for (size_t t = 0; t + 1 < data->length; t++) {
            const uint8_t *mask = data->mask ? data->mask + s * data->length + t : NULL;
            if (mask && mask[0] & SH_TRAIN_BEGINS)
                begin = t;
            const place at = {s, begin, t};
            step(r, tokens[t], &at, keys[0], keys[1], z);
            if (teacher)
                step(teacher, tokens[t], &at, keys[2], keys[3], v);
            if (mask && !(mask[1] & SH_TRAIN_TARGET))
                continue;
            if (teacher)
                loss += softened_kl(mixture, z, v, r->config.vocab);
            loss += (teacher ? 1 - mixture->weight : 1) *
                    softmax_nll(z, r->config.vocab, (size_t)tokens[t + 1]);
            n++;
        }
    }
    free(keys);
    return loss / n;
}

double reference_loss(const reference *r, const sh_train_data *data)
{
    return reference_mixed_loss(r, &(reference_mixture){0}, data);
}

void reference_release(reference *r)
{
    free(r->block);
    memset(r, 0, sizeof(*r));
}
