#include "tests/trainer/material.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/trainer/util.h"

sh_error err;

material material_make(void)
{
    material m = {.config = small_config(true)};
    m.model = small_model(&m.config, SH_TYPE_F32, 51);
    m.data = small_data(&m.config, SEQUENCES, LENGTH, true, 52);
    m.heldout = small_data(&m.config, HELDOUT, LENGTH + 4, true, 53);
    m.adapter = small_adapter(&m.config, (const uint32_t[]){3, 5, 0, 2}, 4, 54);
    return m;
}

void material_release(material *m)
{
    sh_adapter_destroy(&m->adapter);
    small_data_free(&m->data);
    small_data_free(&m->heldout);
    small_model_free(&m->model);
}

sh_train_options options_of(uint32_t batch, uint32_t steps)
{
    return (sh_train_options){.lr = 0.01f,
                              .batch = batch,
                              .steps = steps,
                              .warmup = 2,
                              .lr_final = 0.1f,
                              .shuffle_seed = 5,
                              .clip = 1.0f};
}

void outcome_release(outcome *o)
{
    free(o->params);
    *o = (outcome){0};
}

sh_status train(const material *m, bool full, const sh_train_options *options, outcome *out)
{
    tr_net *net = NULL;
    float *lora = NULL;
    must_be_ok(tr_net_create(&m->config, m->model, UINT64_MAX, m->data.length - 1, &net, &err));
    if (!full) {
        must_be_ok(tr_net_attach(net, m->adapter, &err));
        lora = sh_alloc_aligned(net->n_lora * sizeof(*lora));
        assert_non_null(lora);
        tr_lora_gather(net, m->adapter, lora);
    }
    const tr_trainee t = {.net = net,
                          .params = full ? net->weights : lora,
                          .mode = full ? TR_GRAD_FULL : TR_GRAD_LORA};
    *out = (outcome){.n = full ? net->layout.n : net->n_lora};
    const sh_status status = tr_train(&t, &m->data, options, &out->result, &err);
    out->params = sh_calloc(out->n, sizeof(*out->params));
    assert_non_null(out->params);
    memcpy(out->params, t.params, out->n * sizeof(*out->params));
    free(lora);
    tr_net_destroy(&net);
    return status;
}

double distance(const outcome *x, const outcome *y)
{
    double norm = 0, difference = 0;
    assert_int_equal(x->n, y->n);
    for (size_t i = 0; i < x->n; i++) {
        const double a = (double)x->params[i], b = (double)y->params[i];
        norm += a * a;
        difference += (a - b) * (a - b);
    }
    return sqrt(difference / norm);
}

bool note_step(void *arg, const sh_train_progress *p)
{
    diary *d = arg;
    assert_true(d->n < STEPS_MOST);
    d->steps[d->n++] = *p;
    return p->step != d->cancel_at;
}

sh_train_options constant_options(uint32_t steps)
{
    sh_train_options o = options_of(3, steps);
    o.schedule = SH_SCHEDULE_CONSTANT;
    o.warmup = 0;
    o.lr = 0.03f;
    return o;
}

void must_be_same(const outcome *x, const outcome *y)
{
    assert_int_equal(x->n, y->n);
    if (memcmp(x->params, y->params, x->n * sizeof(float)) != 0)
        fail_msg("the parameters differ, by %g of their norm", distance(x, y));
}

void fewer_tokens(sh_train_data *data)
{
    int32_t *tokens = (int32_t *)(uintptr_t)data->tokens;
    for (size_t i = 0; i < data->n * data->length; i++)
        tokens[i] %= 7;
}
