#include "experiments/sim/sim.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/math/blas.h"
#include "shared/math/kernel.h"

#define GENESIS_BYTES_MAX (256u << 20)
#define SPEED_SPREAD      2.0 /* the fastest device is this many times the slowest */

const char *const sim_phase_names[SIM_PHASES] = {"before", "drift", "learn", "settle", "measure"};

uint64_t sim_seed(const sim *s, uint64_t stream, uint32_t purpose)
{
    sh_rng rng;
    sh_rng_init(&rng, (uint64_t)s->options.seed, stream, purpose);
    return sh_rng_u64(&rng);
}

uint32_t sim_node_of(const sim *s, const sh_hash *key)
{
    const uint8_t *b = key->b; /* make_nodes put the index there in clear */
    uint32_t i = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
    if (i < s->n_nodes && sh_hash_equal(&s->nodes[i].key, key))
        return i;
    if (!s->real_processes)
        return s->n_nodes;
    for (i = 0; i < s->n_nodes && !sh_hash_equal(&s->nodes[i].key, key); i++)
        ;
    return i;
}

double sim_crash_rate(const sim *s)
{
    return s->calm ? 0 : s->options.crash_rate;
}

void sim_hash_number(sim *s, uint64_t x)
{
    uint8_t b[8];
    sh_key_put_u64(b, x);
    sh_sha256_update(&s->hash, b, sizeof b);
}

void sim_note_fault(sim *s, const char *name, uint32_t target)
{
    sim_hash_number(s, target);
    if (s->n_faults == SIM_FAULTS_MAX)
        return;
    sim_fault *f = &s->faults[s->n_faults++];
    snprintf(f->name, sizeof f->name, "%s", name);
    f->at_ms = s->now_ms;
    f->target = target;
}

sh_status sim_push(sim *s, sim_event event, sh_error *err)
{
    if (sim_queue_push(&s->queue, event) != SH_OK)
        return sh_fail(err, SH_ERR_LIMIT, "simulation: more than %u events wait", SIM_EVENTS_MAX);
    return SH_OK;
}

/* ---- models by content ---- */

sh_status sim_model_get(sim *s, const sh_hash *sha256, const sh_model **out, sh_error *err)
{
    sh_status status = SH_OK;
    pthread_mutex_lock(s->models_mutex);
    size_t i = 0;
    while (i < s->n_models && !sh_hash_equal(&s->models[i].sha256, sha256))
        i++;
    if (i == s->n_models && i == SIM_MODELS_MAX)
        SH_GOTO(sh_fail(err, SH_ERR_LIMIT, "simulation: more than %d models", SIM_MODELS_MAX));
    if (i == s->n_models) {
        char path[SH_PATH_BYTES];
        SH_GOTO(sh_job_path(path, s->objects, sha256, err));
        SH_GOTO(sh_model_open(path, &s->models[i].model, err));
        s->models[i].sha256 = *sha256;
        s->n_models++;
    }
    *out = s->models[i].model;
cleanup:
    pthread_mutex_unlock(s->models_mutex);
    return status;
}

/* ---- jobs ---- */

sim_job *sim_job_create(sim *s, uint32_t target, int kind)
{
    sim_job *job = sh_calloc(1, sizeof *job);
    if (job) {
        job->sim = s;
        job->target = target;
        job->kind = kind;
        job->life = target == s->n_nodes ? s->coord_life : s->nodes[target].life;
        job->poison = 1;
        sh_buf_init(&job->bytes, GENESIS_BYTES_MAX);
    }
    return job;
}

void sim_job_destroy(sim_job **job)
{
    sim_job *j = *job;
    if (!j)
        return;
    if (j->running)
        sh_pool_wait(j->sim->pool, &j->running);
    sh_snapshot_release(&j->snapshot);
    sh_buf_release(&j->bytes);
    sh_round_result_release(&j->learned);
    for (uint32_t i = 0; j->updates && i < j->coord.n_inputs; i++)
        sh_buf_release(&j->updates[i]);
    free(j->updates);
    free(j->inputs);
    sim_typed_release(&j->typed);
    sh_merge_job_result_release(&j->merged);
    free(j);
    *job = NULL;
}

static void run_job(void *arg)
{
    sim_job *job = arg;
    job->sim->learning->run(job);
    /* Virtual time may be long in coming to the job's end: what only the work needed goes now. */
    sh_snapshot_release(&job->snapshot);
    sh_buf_release(&job->bytes);
}

sh_status sim_job_start(sim *s, sim_job **jobp, uint64_t duration_ms, sh_error *err)
{
    sim_job *job = *jobp;
    job->start_ms = s->now_ms;
    job->done_ms = s->now_ms + SH_MAX(duration_ms, 1);
    job->rng_seed = sim_seed(s, s->queue.next_number, 0x4a4f42);
    job->running = sh_pool_submit(s->pool, run_job, job);
    if (!job->running)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a job");
    SH_TRY(sim_push(s,
                    (sim_event){.at_ms = job->done_ms,
                                .target = job->target,
                                .life = job->life,
                                .kind = SIM_EV_JOB,
                                .job = job},
                    err));
    *jobp = NULL;
    return SH_OK;
}

/* ---- life cycle ---- */

static sh_node_options make_node_options(const sim_options *o, const sh_coord_options *coord)
{
    sh_node_options n = {.release_key = coord->release_pk,
                         .agent = "shoal-sim",
                         .kernel = sh_kernel_level(),
                         .cores = 1,
                         .memory_bytes = 1u << 30,
                         .records_max = 512, /* what no window has yet is far less */
                         .feedback_tokens_max = (uint64_t)o->feedback_tokens,
                         .windows_max = 64,
                         .retry_min_ms = 2000,
                         .retry_max_ms = 600000,
                         .confirm_inferences = 20,
                         .send_only_if_better = true,
                         .evaluate = true};
    n.monitor.window = (uint32_t)o->window;
    n.monitor.reference = (uint32_t)o->reference;
    n.monitor.average_run_length = o->average_run_length;
    static const uint64_t quotas[SH_CLASSES] = {64u << 20, 1u << 20, 4u << 20, 1u << 20};
    memcpy(n.outbox_quota_bytes, quotas, sizeof quotas);
    return n;
}

static sh_coord_options make_coord_options(const sim *s)
{
    const sim_options *o = &s->options;
    sh_coord_options c = {.enrol_any = true,
                          .buffer = (uint32_t)SH_MIN(o->buffer, SH_MAX(1, o->nodes / 2)),
                          .staleness_max = (uint32_t)o->staleness_max,
                          .staleness_discount = (float)o->staleness_discount,
                          .server_scale = (float)o->server_scale,
                          .norm_factor_max = (float)o->norm_factor_max,
                          .cosine_min = (float)o->cosine_min,
                          .gate_overall_max = o->gate_overall_max,
                          .gate_slice_max = o->gate_slice_max,
                          .drifting_min = (uint32_t)((o->nodes * 8 + 9) / 10),
                          .rounds_max = 0,
                          .round_ms_max = 4 * (uint64_t)o->offline_ms,
                          .checkin_ms = 120000,
                          .chunk_budget = 16,
                          .canary_nodes_min = (uint32_t)o->canary_nodes_min,
                          .canary_tokens_min = (uint64_t)o->canary_tokens_min,
                          .canary_share = o->canary_share,
                          .canary_ms_max = (uint64_t)o->canary_ms_max};
    c.train = (sh_train_plan){.rank = (uint32_t)o->rank,
                              .alpha = (float)o->alpha,
                              .lr = (float)o->lr,
                              .lr_final = (float)o->lr_final,
                              .clip = (float)o->clip,
                              .batch = (uint32_t)o->batch,
                              .context = (uint32_t)o->context,
                              .passes_milli = (uint32_t)lround(o->passes * 1000),
                              .steps_max = (uint32_t)o->steps_max,
                              .warmup = (uint32_t)o->warmup,
                              .tokens_min = (uint32_t)o->tokens_min};
    sh_rng rng;
    uint8_t seed[32];
    sh_rng_init(&rng, (uint64_t)o->seed, 0, 0x534947);
    for (size_t i = 0; i < sizeof seed; i++)
        seed[i] = (uint8_t)sh_rng_u32(&rng);
    sh_sign_keypair(seed, &c.release_pk, &c.release_sk);
    return c;
}

/* The full-precision master (F32) and the first release (Q8_0) from the shipped base. */
static sh_status make_genesis(sim *s, sh_error *err)
{
    SH_TRY(sh_job_genesis(s->options.base, SH_TYPE_Q8_0, s->objects, &s->genesis_master,
                          &s->genesis_model, err));
    s->genesis_sha = sh_sha256(s->genesis_model.data, s->genesis_model.len);
    return SH_OK;
}

/* The cost model's first release: bytes of the size of a small model, drawn from the seed. */
static sh_status make_cost_genesis(sim *s, sh_error *err)
{
    sh_rng rng;
    sh_rng_init(&rng, (uint64_t)s->options.seed, 0, 0x47454e);
    for (size_t i = 0; i < 50000; i++) {
        uint32_t x = sh_rng_u32(&rng);
        if (sh_buf_append(&s->genesis_model, &x, sizeof x) != SH_OK)
            return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a model");
    }
    s->genesis_sha = sh_sha256(s->genesis_model.data, s->genesis_model.len);
    s->genesis_master = sh_blake2b(s->genesis_model.data, s->genesis_model.len);
    return SH_OK;
}

static sh_status sign_genesis(sim *s, sh_error *err)
{
    sh_manifest m = {.version = 1, .format = "Q8_0"};
    uint8_t *hashes = NULL;
    SH_TRY(sh_blob_describe(s->genesis_model.data, s->genesis_model.len, &m.model, &hashes, err));
    sh_status status =
        sh_manifest_sign(&m, &s->coord_options.release_sk, &s->genesis_manifest, err);
    free(hashes);
    return status;
}

static sh_status add_slice(sim *s, const char *name, const sim_text_list *list, size_t tokens_max,
                           sh_error *err)
{
    int32_t *tokens = NULL;
    size_t n = 0;
    SH_TRY(sim_texts_join(list, tokens_max, &tokens, &n));
    sh_status status = sh_suite_add(&s->suite, name, tokens, n, err);
    free(tokens);
    return status;
}

/* The operator's gate suite: the old kind of English, and each topic. */
static sh_status make_suite(sim *s, sh_error *err)
{
    size_t budget = (size_t)s->options.gate_tokens;
    SH_TRY(add_slice(s, "before", &s->texts.before[SIM_GATE], 4 * budget, err));
    for (size_t t = 0; t < s->texts.n_topics; t++)
        SH_TRY(add_slice(s, s->texts.names[t], &s->texts.topic[t][SIM_GATE], budget, err));
    return SH_OK;
}

static sh_status open_store(sim *s, const char *name, const char *const *tables, size_t n_tables,
                            sh_store **out, sh_error *err)
{
    sh_store_options o = {.tables = tables, .n_tables = n_tables, .no_sync = true};
    if (strcmp(s->options.store, "memory") == 0)
        return sh_store_open_memory(&o, out, err);
    char dir[SH_PATH_BYTES];
    SH_TRY(sh_path_join(dir, sizeof dir, s->options.out, name, err));
    SH_TRY(sh_dir_make(dir, err));
    return sh_store_open_lmdb(dir, &o, out, err);
}

static sh_status make_nodes(sim *s, sh_error *err)
{
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        sim_node *n = &s->nodes[i];
        char name[64];
        snprintf(name, sizeof name, "nodes/node-%05u", i);
        SH_TRY(open_store(s, name, sh_node_tables, SH_NODE_TABLES, &n->store, err));
        sh_rng_init(&n->rng, (uint64_t)s->options.seed, i, 0x4e4f4445);
        /* The index in clear makes the way back from a key a look-up. */
        for (size_t b = 4; b < sizeof n->key.b; b++)
            n->key.b[b] = (uint8_t)sh_rng_u32(&n->rng);
        for (size_t b = 0; b < 4; b++)
            n->key.b[b] = (uint8_t)(i >> (24 - 8 * b));
        n->speed = (float)(0.7 + sh_rng_unit(&n->rng) * 0.7 * (SPEED_SPREAD - 1));
        n->topic = s->texts.n_topics ? i % (uint32_t)s->texts.n_topics : 0;
    }
    return open_store(s, "aggregator", sh_coord_tables, SH_COORD_TABLES, &s->coord_store, err);
}

static sh_status make_folders(sim *s, sh_error *err)
{
    static const char *const parts[] = {"nodes", "aggregator"};
    char path[SH_PATH_BYTES];
    for (size_t i = 0; i < SH_COUNT(parts); i++) {
        SH_TRY(sh_path_join(path, sizeof path, s->options.out, parts[i], err));
        if (sh_file_exists(path))
            return sh_fail(err, SH_ERR_EXISTS,
                           "%s: there is a run in it already; give another --out or remove it",
                           path);
    }
    SH_TRY(sh_path_join(s->objects, sizeof s->objects, s->options.out, "objects", err));
    return sh_dir_make(s->objects, err);
}

sh_status sim_find_inputs(const sim_options *o, sh_error *err)
{
    if (!sh_file_exists(o->base))
        return sh_fail(err, SH_ERR_NOT_FOUND, "%s: not there; --base should name a GGUF model",
                       o->base);
    return sim_texts_find(o->texts, err);
}

/* People do not type a book from its first page on: each list is in an order of the seed's. */
static void shuffle_texts(const sim *s, sim_text_list *list, uint64_t stream)
{
    sh_rng rng;
    sh_rng_init(&rng, (uint64_t)s->options.seed, stream, 0x54455854);
    for (size_t i = list->n; i > 1; i--) {
        size_t k = (size_t)sh_rng_below(&rng, i);
        sim_text text = list->texts[i - 1];
        list->texts[i - 1] = list->texts[k];
        list->texts[k] = text;
    }
}

sh_status sim_load_texts(sim *s, sh_error *err)
{
    const sh_model *model = NULL;
    SH_TRY(sim_model_get(s, &s->genesis_sha, &model, err));
    SH_TRY(sh_frozen_create(model, &s->frozen, err));
    SH_TRY(sim_texts_load(s->options.texts, model->tokenizer, &s->texts, err));
    shuffle_texts(s, &s->texts.before[SIM_TRAFFIC], 0);
    for (size_t t = 0; t < s->texts.n_topics; t++)
        shuffle_texts(s, &s->texts.topic[t][SIM_TRAFFIC], t + 1);
    return SH_OK;
}

static sh_status load_real(sim *s, sh_error *err)
{
    SH_TRY(make_genesis(s, err));
    SH_TRY(sim_load_texts(s, err));
    return make_suite(s, err);
}

static sh_status arm_faults(sim *s, sh_error *err)
{
    const sim_options *o = &s->options;
    if (o->merge_crash > 0)
        SH_TRY(sh_failpoint_arm(&s->failpoints, o->merge_failpoint, (uint32_t)o->merge_crash - 1,
                                err));
    if (o->crash_training_node >= 0)
        SH_TRY(sh_failpoint_arm(&s->failpoints, "node.train", 0, err));
    return SH_OK;
}

/* What a result's bits may depend on goes into its hash. */
static void begin_hash(sim *s)
{
    sh_sha256_init(&s->hash);
    sh_sha256_update(&s->hash, sh_kernel_level(), strlen(sh_kernel_level()));
    sh_sha256_update(&s->hash, sh_blas_core(), strlen(sh_blas_core()));
    sim_hash_number(s, (uint64_t)s->options.seed);
    sim_hash_number(s, s->n_nodes);
    sh_sha256_update(&s->hash, s->genesis_sha.b, sizeof s->genesis_sha.b);
}

sh_status sim_create_empty(const sim_options *options, sim **out, sh_error *err)
{
    sim *s = sh_calloc(1, sizeof *s);
    if (!s)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory");
    sh_status status = SH_OK;
    s->options = *options;
    s->n_nodes = (uint32_t)options->nodes;
    bool real = strcmp(options->learning, "real") == 0;
    s->learning = real ? &sim_learning_real : &sim_learning_cost;
    sh_buf_init(&s->genesis_manifest, SH_WIRE_MESSAGE_MAX);
    sh_buf_init(&s->genesis_model, GENESIS_BYTES_MAX);
    s->wall_start_s = sim_wall_seconds();
    s->models_mutex = sh_calloc(1, sizeof(pthread_mutex_t));
    s->nodes = sh_calloc(s->n_nodes, sizeof *s->nodes);
    if (!s->models_mutex || !s->nodes)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for %u nodes", s->n_nodes));
    pthread_mutex_init(s->models_mutex, NULL);
    if (!real && strcmp(options->learning, "cost") != 0)
        SH_GOTO(sh_fail(err, SH_ERR_USAGE, "learning: \"%s\" is neither real nor cost",
                        options->learning));
    if (strcmp(options->store, "memory") != 0 && strcmp(options->store, "lmdb") != 0)
        SH_GOTO(
            sh_fail(err, SH_ERR_USAGE, "store: \"%s\" is neither lmdb nor memory", options->store));
    sh_blas_init();
    SH_GOTO(sh_pool_create((unsigned)options->threads, &s->pool, err));
    s->coord_options = make_coord_options(s);
    s->node_options = make_node_options(options, &s->coord_options);
    s->program = "shoal-sim";
    s->command = &sim_run_command;
    s->command_options = &s->options;
    *out = s;
    s = NULL;
cleanup:
    sim_destroy(&s);
    return status;
}

sh_status sim_create(const sim_options *options, sim **out, sh_error *err)
{
    sim *s = NULL;
    SH_TRY(sim_create_empty(options, &s, err));
    bool real = s->learning == &sim_learning_real;
    sh_status status = SH_OK;
    if (real)
        SH_GOTO(sim_find_inputs(options, err)); /* before anything is written */
    if (real || strcmp(options->store, "lmdb") == 0)
        SH_GOTO(make_folders(s, err));
    if (real)
        SH_GOTO(load_real(s, err));
    else
        SH_GOTO(make_cost_genesis(s, err));
    SH_GOTO(sign_genesis(s, err));
    SH_GOTO(make_nodes(s, err));
    SH_GOTO(arm_faults(s, err));
    sh_rng_init(&s->net_rng, (uint64_t)options->seed, 0, 0x4e4554);
    begin_hash(s);
    *out = s;
    s = NULL;
cleanup:
    sim_destroy(&s);
    return status;
}

void sim_destroy(sim **sp)
{
    sim *s = *sp;
    if (!s)
        return;
    for (sim_event e; sim_queue_pop(&s->queue, &e);) {
        sim_job *job = e.job;
        sim_job_destroy(&job);
        sh_buf_release(&e.message);
    }
    sim_queue_release(&s->queue);
    for (uint32_t i = 0; s->nodes && i < s->n_nodes; i++) {
        sh_node_destroy(&s->nodes[i].core);
        sh_store_close(&s->nodes[i].store);
    }
    sh_coord_destroy(&s->coord);
    sh_store_close(&s->coord_store);
    sh_pool_destroy(&s->pool);
    sh_frozen_destroy(&s->frozen);
    for (size_t i = 0; i < s->n_models; i++)
        sh_model_close(&s->models[i].model);
    sh_suite_release(&s->suite);
    sim_texts_release(&s->texts);
    sh_buf_release(&s->genesis_manifest);
    sh_buf_release(&s->genesis_model);
    if (s->models_mutex)
        pthread_mutex_destroy(s->models_mutex);
    free(s->models_mutex);
    json_decref(s->extra);
    json_decref(s->extra_checks);
    free(s->timeline);
    free(s->nodes);
    free(s);
    *sp = NULL;
}

/* ---- phases: they end on counts, never on time ---- */

static bool has_windows(const sim *s, const sim_node *n)
{
    return n->windows >= (uint64_t)s->options.windows_before && !n->typing;
}

/* All that the node owed has arrived, and it runs the newest release and is sure of it. */
static bool is_settled(const sim *s, const sim_node *n)
{
    if (!n->up || n->typing)
        return false;
    sh_node_status status = sh_node_get_status(n->core);
    uint64_t newest = sh_coord_get_status(s->coord).version;
    return status.confirmed_version == newest && status.active_version == newest &&
           !status.outbox_items && !status.training_round;
}

/* Asked after every event: looks first at the node that was not ready the last time, and goes on
 * from there, so that a phase costs about one look at each node. */
static bool all_nodes(sim *s, bool (*ready)(const sim *s, const sim_node *n))
{
    for (uint32_t k = 0; k < s->n_nodes; k++) {
        uint32_t i = (uint32_t)(((uint64_t)s->laggard + k) % s->n_nodes);
        if (!ready(s, &s->nodes[i])) {
            s->laggard = i;
            return false;
        }
    }
    return true;
}

static sh_status enter_phase(sim *s, sim_phase phase, sh_error *err)
{
    s->phase_wall_s[s->phase] = sim_wall_seconds() - s->wall_start_s;
    s->phase = phase;
    s->phase_at_ms[phase] = s->now_ms;
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        sim_node *n = &s->nodes[i];
        if (phase == SIM_PHASE_DRIFT) {
            n->change_window = n->windows;
            SH_TRY(sim_node_type(s, i, s->now_ms + 1, err));
        } else if (phase == SIM_PHASE_SETTLE && !n->online && n->up) {
            SH_TRY(sim_node_link(s, i, true, err));
        }
    }
    return SH_OK;
}

static sh_status check_phase(sim *s, sh_error *err)
{
    if (!s->coord_up)
        return SH_OK;
    sh_coord_status c = sh_coord_get_status(s->coord);
    bool next = false;
    if (s->phase == SIM_PHASE_SETTLE && !c.closing) /* again, if it crashed before the commit */
        return sim_coord_command(s, SH_COMMAND_CLOSE, 0, err);
    s->calm = c.closed;
    switch (s->phase) {
    case SIM_PHASE_BEFORE:
        next = all_nodes(s, has_windows);
        break;
    case SIM_PHASE_DRIFT:
        next = c.rounds_begun;
        break;
    case SIM_PHASE_LEARN:
        next = c.version >= (uint64_t)s->options.rounds + 1;
        break;
    case SIM_PHASE_SETTLE:
        next = c.closed && !c.merging && !c.gating && all_nodes(s, is_settled);
        break;
    default:
        break;
    }
    return next ? enter_phase(s, s->phase + 1, err) : SH_OK;
}

static sh_status dispatch(sim *s, const sim_event *e, sh_error *err)
{
    sim_hash_number(s, e->at_ms);
    sim_hash_number(s, (uint64_t)e->kind << 32 | e->target);
    sim_hash_number(s, e->message.len);
    return e->target == s->n_nodes ? sim_coord_event(s, e, err) : sim_node_event(s, e, err);
}

sh_status sim_run(sim *s, sh_error *err)
{
    SH_TRY(sim_coord_boot(s, err));
    for (uint32_t i = 0; i < s->n_nodes; i++)
        SH_TRY(sim_node_boot(s, i, err));
    while (s->phase < SIM_PHASE_MEASURE) {
        sim_event e;
        if (!sim_queue_pop(&s->queue, &e))
            return sh_fail(err, SH_ERR_CORRUPT, "simulation: nothing left to happen in phase %s",
                           sim_phase_names[s->phase]);
        SH_ASSERT(e.at_ms >= s->now_ms);
        s->now_ms = e.at_ms;
        s->events++;
        if (s->now_ms - s->phase_at_ms[s->phase] > SIM_PHASE_MS_MAX)
            return sh_fail(err, SH_ERR_LIMIT, "simulation: phase %s does not end",
                           sim_phase_names[s->phase]);
        sh_status status = dispatch(s, &e, err);
        sh_buf_release(&e.message);
        SH_TRY(status);
        SH_TRY(check_phase(s, err));
        if (s->probe)
            SH_TRY(s->probe(s, s->probe_arg, err));
        sim_progress_tick(s, false);
    }
    if (strcmp(s->options.store, "lmdb") == 0) {
        for (uint32_t i = 0; i < s->n_nodes; i++)
            SH_TRY(sh_store_sync(s->nodes[i].store, err));
        SH_TRY(sh_store_sync(s->coord_store, err));
    }
    return SH_OK;
}
