/*
 * The file of a checkpoint, all numbers little-endian:
 *
 *     0        8 bytes    magic "SHTRCKPT"
 *     8        u32        version, 1
 *     12       u32        number of options
 *     16       5 x 32     SHA-256 of: the data, the held-out data, the shapes, what the caller
 *                         names (the base), the parameters at the start
 *     176      u64 each   the options of option_names: integers, or the bits of a float64
 *     ...      u64 each   the numbers of tr_state, in the order of state_numbers: the same
 *     ...      f32 each   parameters
 *     ...      u32 each   order of the data
 *     ...      ...        first moments, then second ones (AdamW): f32 each, or the codes (u8 each)
 *                         and after them the blocks' scales (f32 each)
 *     ...      f32 each   parameters of the best measurement; where patience is above 0 and there
 *                         was a measurement
 *     the end  32 bytes   SHA-256 of everything before
 *
 * The start of a proximal term is not in it: it is what the training begins with, whose hash is.
 * Random numbers come from counters that the step and the pass give. The file holds a model that
 * was made from what users wrote: it is for its owner only.
 */
#include "trainer/checkpoint.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/failpoint.h"
#include "shared/base/file.h"
#include "shared/base/hash.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "vectors are written as they lie");

#define VERSION     1
#define MAGIC       "SHTRCKPT"
#define CHECK_BYTES sizeof(sh_hash)

/* ---- what a checkpoint belongs to ---- */

/* Every option that changes the result: a new one needs a row here, a value in option_values and
 * another VERSION. */
static const struct {
    const char *name;
    bool is_real;
} option_names[] = {
    {"lr", true},
    {"beta1", true},
    {"beta2", true},
    {"eps", true},
    {"weight_decay", true},
    {"clip", true},
    {"lr_final", true},
    {"momentum", true},
    {"proximal", true},
    {"dropout", true},
    {"distill_weight", true},
    {"temperature", true},
    {"batch", false},
    {"steps", false},
    {"warmup", false},
    {"schedule", false},
    {"optimizer", false},
    {"freeze", false},
    {"shuffle_seed", false},
    {"bf16", false},
    {"accumulate", false},
    {"state_8bit", false},
    {"heldout_every", false},
    {"patience", false},
    {"alternate", false},
    {"dropout_seed", false},
    {"quantize_aware", false},
};
#define OPTIONS SH_COUNT(option_names)

static uint64_t bits_of(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static double real_of(uint64_t bits)
{
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void option_values(const sh_train_options *o, uint64_t out[OPTIONS])
{
    const double reals[] = {(double)o->lr,       (double)o->beta1,          (double)o->beta2,
                            (double)o->eps,      (double)o->weight_decay,   (double)o->clip,
                            (double)o->lr_final, (double)o->momentum,       (double)o->proximal,
                            (double)o->dropout,  (double)o->distill_weight, (double)o->temperature};
    const uint64_t integers[] = {o->batch,        o->steps,         o->warmup,
                                 o->schedule,     o->optimizer,     o->freeze,
                                 o->shuffle_seed, o->bf16,          SH_MAX(o->accumulate, 1u),
                                 o->state_8bit,   o->heldout_every, o->patience,
                                 o->alternate,    o->dropout_seed,  o->quantize_aware};
    _Static_assert(SH_COUNT(reals) + SH_COUNT(integers) == OPTIONS, "an option without a name");
    for (size_t i = 0; i < SH_COUNT(reals); i++)
        out[i] = bits_of(reals[i]);
    memcpy(out + SH_COUNT(reals), integers, sizeof integers);
}

static void add_number(sh_sha256_state *s, uint64_t x)
{
    sh_sha256_update(s, &x, sizeof x);
}

/* Of every field. */
static sh_hash hash_of_data(const sh_train_data *data)
{
    sh_sha256_state s;
    sh_sha256_init(&s);
    if (data) {
        const size_t n = data->n * data->length;
        add_number(&s, data->n);
        add_number(&s, data->length);
        add_number(&s, data->mask != NULL);
        sh_sha256_update(&s, data->tokens, n * sizeof(*data->tokens));
        if (data->mask)
            sh_sha256_update(&s, data->mask, n);
    }
    return sh_sha256_final(&s);
}

static size_t n_params(const tr_checkpoint *c)
{
    const tr_net *net = c->trainee->net;
    return c->trainee->mode == TR_GRAD_FULL ? net->layout.n : net->n_lora;
}

static sh_hash hash_of_shapes(const tr_checkpoint *c)
{
    const tr_net *net = c->trainee->net;
    const sh_model_config *m = &net->config;
    const uint64_t numbers[] = {c->trainee->mode,
                                n_params(c),
                                m->arch,
                                m->n_layers,
                                m->width,
                                m->n_heads,
                                m->n_kv_heads,
                                m->head_size,
                                m->ffn,
                                m->vocab,
                                m->tied_output,
                                m->rope_scaling,
                                m->rope_halves,
                                bits_of((double)m->rope_base),
                                bits_of((double)m->norm_eps)};
    sh_sha256_state s;
    sh_sha256_init(&s);
    sh_sha256_update(&s, numbers, sizeof numbers);
    for (size_t i = 0; net->lora && i < tr_lora_count(net); i++) {
        for (size_t p = 0; p < TR_PARTS_MAX; p++) {
            add_number(&s, net->lora[i].rank[p]);
            add_number(&s, bits_of((double)net->lora[i].scale[p]));
        }
    }
    return sh_sha256_final(&s);
}

enum { OF_DATA, OF_HELDOUT, OF_SHAPES, OF_BASE, OF_START, IDENTITIES };
static const char *const identity_names[IDENTITIES] = {
    "the training data", "the held-out data", "the shape of the model or the adapter",
    "the base model or what else was named", "what the training begins with"};
_Static_assert(SH_COUNT(((tr_checkpoint *)0)->identity) == IDENTITIES,
               "an identity without a name");

void tr_checkpoint_identify(tr_checkpoint *c)
{
    const sh_train_checkpoint *o = c->options->checkpoint;
    sh_file_remove_leftovers(o->path);
    c->identity[OF_DATA] = hash_of_data(c->data);
    c->identity[OF_HELDOUT] = hash_of_data(c->options->heldout);
    c->identity[OF_SHAPES] = hash_of_shapes(c);
    c->identity[OF_BASE] = o->identity;
    c->identity[OF_START] = sh_sha256(c->trainee->params, n_params(c) * sizeof(float));
}

/* ---- bytes ---- */

typedef struct {
    size_t at, bytes; /* in tr_state */
} number;
#define NUMBER(field)                                                                              \
    {                                                                                              \
        offsetof(tr_state, field), sizeof(((tr_state *)0)->field)                                  \
    }
static const number state_numbers[] = {
    NUMBER(step),          NUMBER(updates[0]),
    NUMBER(updates[1]),    NUMBER(pass),
    NUMBER(order_at),      NUMBER(micro_sequences),
    NUMBER(logit_rows),    NUMBER(tokens_seen),
    NUMBER(seconds),       NUMBER(loss_first),
    NUMBER(loss_last),     NUMBER(cross_entropy_last),
    NUMBER(kl_last),       NUMBER(heldout_best),
    NUMBER(heldout_last),  NUMBER(heldout_best_step),
    NUMBER(heldout_since),
};
#define NUMBERS SH_COUNT(state_numbers)

typedef struct {
    char magic[8];
    uint32_t version, n_options;
    sh_hash identity[IDENTITIES];
    uint64_t options[OPTIONS], numbers[NUMBERS];
} head;
_Static_assert(sizeof(head) == 16 + IDENTITIES * 32 + (OPTIONS + NUMBERS) * 8, "no gaps");

static head head_of(const tr_checkpoint *c, const tr_state *state)
{
    head h = {.version = VERSION, .n_options = OPTIONS};
    memcpy(h.magic, MAGIC, sizeof h.magic);
    memcpy(h.identity, c->identity, sizeof h.identity);
    option_values(c->options, h.options);
    for (size_t i = 0; i < NUMBERS; i++) {
        const char *at = (const char *)state + state_numbers[i].at;
        memcpy(&h.numbers[i], at, state_numbers[i].bytes);
    }
    return h;
}

static tr_state state_of(const head *h)
{
    tr_state state = {0};
    for (size_t i = 0; i < NUMBERS; i++)
        memcpy((char *)&state + state_numbers[i].at, &h->numbers[i], state_numbers[i].bytes);
    return state;
}

/* The vectors, in the order of the file. */
static size_t areas_of(const tr_checkpoint *c, const tr_state *state, tr_area out[TR_AREAS_MAX])
{
    const size_t params = n_params(c) * sizeof(float);
    size_t n = 0;
    out[n++] = (tr_area){c->trainee->params, params};
    out[n++] = (tr_area){c->order, c->data->n * sizeof(*c->order)};
    for (size_t i = 0; i < c->n_moments; i++)
        out[n++] = c->moments[i];
    if (c->best && state->heldout_best_step > 0)
        out[n++] = (tr_area){c->best, params};
    SH_ASSERT(n <= TR_AREAS_MAX);
    return n;
}

/* ---- writing ---- */

typedef struct {
    sh_file_writer file;
    sh_sha256_state hash;
} writer;

static sh_status put(writer *w, const void *bytes, size_t n, sh_error *err)
{
    sh_sha256_update(&w->hash, bytes, n);
    return sh_file_writer_append(&w->file, bytes, n, err);
}

/* As the crash that was asked for: what was written stays where it is. */
static sh_status crash(writer *w, sh_error *err)
{
    if (w->file.open)
        close(w->file.fd);
    w->file.open = false;
    return sh_fail(err, SH_ERR_CRASHED, "'%s': a fail point", w->file.path);
}

static sh_status write_all(const tr_checkpoint *c, const tr_state *state, writer *w, sh_error *err)
{
    sh_failpoints *failpoints = c->options->checkpoint->failpoints;
    const head h = head_of(c, state);
    tr_area areas[TR_AREAS_MAX];
    const size_t n = areas_of(c, state, areas);
    SH_TRY(put(w, &h, sizeof h, err));
    for (size_t i = 0; i < n; i++) {
        SH_TRY(put(w, areas[i].bytes, areas[i].n, err));
        if (i == 0 && sh_failpoint_hit(failpoints, "train.checkpoint.half"))
            return crash(w, err);
    }
    const sh_hash check = sh_sha256_final(&w->hash);
    SH_TRY(sh_file_writer_append(&w->file, check.b, sizeof check.b, err));
    if (sh_failpoint_hit(failpoints, "train.checkpoint.before_rename"))
        return crash(w, err);
    SH_TRY(sh_file_writer_commit(&w->file, err));
    if (sh_failpoint_hit(failpoints, "train.checkpoint.after_rename"))
        return crash(w, err);
    return SH_OK;
}

sh_status tr_checkpoint_save(const tr_checkpoint *c, const tr_state *state, sh_error *err)
{
    writer w = {0};
    sh_sha256_init(&w.hash);
    sh_status status = sh_file_writer_open_private(c->options->checkpoint->path, &w.file, err);
    if (status == SH_OK)
        status = write_all(c, state, &w, err);
    sh_file_writer_abandon(&w.file);
    if (status != SH_OK && status != SH_ERR_CRASHED)
        (void)sh_fail_in(err, "training stopped after step %u: checkpoint", state->step);
    return status;
}

/* ---- reading ---- */

static sh_status differs(const char *path, const char *what, sh_error *err)
{
    return sh_fail(
        err, SH_ERR_MISMATCH,
        "'%s' is a checkpoint of another training: %s is not the same; name another file "
        "or delete it",
        path, what);
}

static sh_status compare_options(const tr_checkpoint *c, const head *h, const char *path,
                                 sh_error *err)
{
    uint64_t ours[OPTIONS];
    option_values(c->options, ours);
    for (size_t i = 0; i < OPTIONS; i++) {
        char what[128];
        if (ours[i] == h->options[i])
            continue;
        if (option_names[i].is_real)
            snprintf(what, sizeof what, "the option %s (%.9g there, %.9g here)",
                     option_names[i].name, real_of(h->options[i]), real_of(ours[i]));
        else
            snprintf(what, sizeof what, "the option %s (%llu there, %llu here)",
                     option_names[i].name, (unsigned long long)h->options[i],
                     (unsigned long long)ours[i]);
        return differs(path, what, err);
    }
    return SH_OK;
}

/* Magic, version and checksum; then that it is this training's. */
static sh_status check_file(const tr_checkpoint *c, const sh_map *map, head *h, sh_error *err)
{
    const char *path = c->options->checkpoint->path;
    if (map->bytes < 8 || memcmp(map->data, MAGIC, 8) != 0)
        return sh_fail(err, SH_ERR_INVALID,
                       "'%s' is not a checkpoint of a training; name another file or delete it",
                       path);
    if (map->bytes >= 16) {
        memcpy(h, map->data, 16);
        if (h->version != VERSION || h->n_options != OPTIONS)
            return sh_fail(err, SH_ERR_UNSUPPORTED,
                           "'%s': version %u of a checkpoint (of %u options) is unknown; this "
                           "program reads %d (of %zu)",
                           path, h->version, h->n_options, VERSION, OPTIONS);
    }
    const size_t n = map->bytes - SH_MIN(map->bytes, CHECK_BYTES);
    const sh_hash check = sh_sha256(map->data, n);
    if (n < sizeof *h || memcmp(map->data + n, check.b, CHECK_BYTES) != 0)
        return sh_fail(err, SH_ERR_CORRUPT,
                       "'%s' is damaged or cut short: its checksum does not hold; delete it to "
                       "begin from the start",
                       path);
    memcpy(h, map->data, sizeof *h);
    for (size_t i = 0; i < IDENTITIES; i++)
        if (i != OF_START && !sh_hash_equal(&h->identity[i], &c->identity[i]))
            return differs(path, identity_names[i], err);
    SH_TRY(compare_options(c, h, path, err));
    if (!sh_hash_equal(&h->identity[OF_START], &c->identity[OF_START]))
        return differs(path, identity_names[OF_START], err);
    return SH_OK;
}

/* What a checksum cannot say of a file that was made to do harm. */
static bool is_sound(const tr_checkpoint *c, const tr_state *s, const uint8_t *order)
{
    bool sound = s->step > 0 && s->step <= c->options->steps && s->order_at <= c->data->n &&
                 s->heldout_best_step <= s->step && s->micro_sequences > 0 && s->logit_rows > 0 &&
                 s->updates[0] <= s->step && s->updates[1] <= s->step &&
                 s->updates[0] + s->updates[1] == s->step && isfinite(s->seconds);
    for (size_t i = 0; sound && i < c->data->n; i++) {
        uint32_t index;
        memcpy(&index, order + i * sizeof index, sizeof index);
        sound = index < c->data->n;
    }
    return sound;
}

sh_status tr_checkpoint_load(const tr_checkpoint *c, tr_state *state, bool *found, sh_error *err)
{
    const char *path = c->options->checkpoint->path;
    sh_map map = {0};
    head h;
    tr_area areas[TR_AREAS_MAX];
    sh_status status = sh_map_open(path, &map, err);
    *found = status == SH_OK;
    if (status == SH_ERR_NOT_FOUND)
        return SH_OK;
    SH_TRY(status);
    SH_GOTO(check_file(c, &map, &h, err));
    const tr_state s = state_of(&h);
    const size_t n = areas_of(c, &s, areas);
    size_t bytes = sizeof h + CHECK_BYTES, at = sizeof h;
    for (size_t i = 0; i < n; i++)
        bytes += areas[i].n;
    if (map.bytes != bytes || !is_sound(c, &s, map.data + sizeof h + areas[0].n)) {
        status = sh_fail(err, SH_ERR_CORRUPT,
                         "'%s': its numbers cannot be those of a training; delete it to begin from "
                         "the start",
                         path);
        goto cleanup;
    }
    for (size_t i = 0; i < n; i++) {
        memcpy(areas[i].bytes, map.data + at, areas[i].n);
        at += areas[i].n;
    }
    *state = s;
cleanup:
    sh_map_release(&map);
    return status;
}
