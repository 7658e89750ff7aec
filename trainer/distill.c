/*
 * A teacher beside the student (Hinton et al. 2015, arXiv:1503.02531): what it must have in common
 * with it. The loss is in kernels.c, its place in pass.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "trainer/train.h"

static sh_status mixture_check(const sh_train_options *o, sh_error *err)
{
    if (!(o->distill_weight >= 0 && o->distill_weight <= 1))
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: a weight of distillation of %g is not in [0, 1]",
                       (double)o->distill_weight);
    if (o->temperature != 0 && !(o->temperature >= SH_DISTILL_TEMPERATURE_MIN &&
                                 o->temperature <= SH_DISTILL_TEMPERATURE_MAX))
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: a temperature of %g is not in [%g, %g]",
                       (double)o->temperature, (double)SH_DISTILL_TEMPERATURE_MIN,
                       (double)SH_DISTILL_TEMPERATURE_MAX);
    if (!o->teacher && o->distill_weight > 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "training options: a weight of distillation of %g, but no teacher",
                       (double)o->distill_weight);
    return SH_OK;
}

/* The tokens of a vocabulary's file. */
typedef struct {
    const char **texts;
    uint32_t *lengths;
    size_t n;
} strings;

static void strings_release(strings *s)
{
    free(s->texts);
    free(s->lengths);
}

/* On error the caller releases what there is. */
static sh_status strings_read(const sh_gguf *keys, strings *s, sh_error *err)
{
    static const char key[] = "tokenizer.ggml.tokens";
    SH_TRY(sh_gguf_get_array_count(keys, key, &s->n, err));
    s->texts = sh_calloc(s->n, sizeof(*s->texts));
    s->lengths = sh_calloc(s->n, sizeof(*s->lengths));
    if (!s->texts || !s->lengths)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a vocabulary of %zu tokens", s->n);
    return sh_gguf_get_strings(keys, key, s->texts, s->lengths, s->n, err);
}

static sh_status strings_compare(const sh_gguf *of_teacher, const sh_gguf *of_student,
                                 sh_error *err)
{
    sh_status status = SH_OK;
    strings teacher = {0}, student = {0};
    SH_GOTO(strings_read(of_teacher, &teacher, err));
    SH_GOTO(strings_read(of_student, &student, err));
    if (teacher.n != student.n) {
        status = sh_fail(err, SH_ERR_MISMATCH,
                         "the teacher's vocabulary is another: %zu tokens in %s, %zu in %s",
                         teacher.n, sh_gguf_path(of_teacher), student.n, sh_gguf_path(of_student));
        goto cleanup;
    }
    for (size_t i = 0; i < student.n; i++)
        if (teacher.lengths[i] != student.lengths[i] ||
            memcmp(teacher.texts[i], student.texts[i], student.lengths[i]) != 0) {
            status = sh_fail(err, SH_ERR_MISMATCH,
                             "the teacher's vocabulary is another: token %zu of %s is not that of "
                             "%s",
                             i, sh_gguf_path(of_teacher), sh_gguf_path(of_student));
            goto cleanup;
        }
cleanup:
    strings_release(&teacher);
    strings_release(&student);
    return status;
}

sh_status tr_teacher_open(const sh_train_options *options, const sh_model_config *student,
                          const sh_gguf *keys, const sh_train_data *data, tr_net **net,
                          sh_error *err)
{
    const sh_model *teacher = options->teacher;
    SH_TRY(mixture_check(options, err));
    if (!teacher) {
        *net = NULL;
        return SH_OK;
    }
    if (teacher->config.vocab != student->vocab)
        return sh_fail(err, SH_ERR_MISMATCH,
                       "the teacher's vocabulary is another: %u tokens, the student has %u",
                       teacher->config.vocab, student->vocab);
    if (teacher->gguf && keys)
        SH_TRY(strings_compare(teacher->gguf, keys, err));
    if (data->length - 1 > teacher->config.context)
        return sh_fail(err, SH_ERR_LIMIT,
                       "training data: sequences of %u inputs, but the teacher's context is %u",
                       data->length - 1, teacher->config.context);
    SH_TRY(tr_net_create(&teacher->config, teacher, tr_copy_bytes(options->memory_max),
                         data->length - 1, net, err));
    (*net)->bf16 = options->bf16;
    return SH_OK;
}
