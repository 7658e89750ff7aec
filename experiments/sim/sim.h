/*
 * shoal-sim: a fleet of the shipping node cores and the shipping coordinator core in one process,
 * under virtual time. This header is the simulator's inside; its users are shoal_sim_main.c and the
 * simulation tests.
 *
 * One thread runs the event loop and every core. Work (a user typing a text through the model,
 * training, merging, gating) is a job: its virtual duration is fixed when it starts, it runs on a
 * worker, and the loop waits for it when virtual time reaches its end. So the result does not
 * depend on the number of workers.
 *
 * Where learning happens is an interface (sim_learning): the real one runs the models and the
 * trainer; the cost model makes up bytes and numbers from the seed, for tests of safety.
 */
#ifndef SIM_SIM_H
#define SIM_SIM_H

#include "aggregator/coordinator.h"
#include "aggregator/jobs.h"
#include "edge-node/learn.h"
#include "edge-node/node.h"
#include "experiments/sim/events.h"
#include "experiments/sim/user.h"
#include "shared/base/failpoint.h"
#include "shared/base/file.h"
#include "shared/base/json.h"
#include "shared/base/option.h"
#include "shared/math/pool.h"
#include "shared/sync/sync.h"

#define SIM_NODES_MAX   100000
#define SIM_MODELS_MAX  512
#define SIM_RECORDS_MAX 4096 /* inferences in one text */
#define SIM_PHASE_MS_MAX                                                                           \
    (400ull * 24 * 3600 * 1000) /* virtual time without an end is a failure                        \
                                 */

/* Every key of an experiment, in YAML and as a flag. */
typedef struct {
    int64_t nodes, seed, threads;
    const char *out, *texts, *base, *store, *learning;
    bool json, plain;
    /* users */
    int64_t windows_before, windows_after, words_between, text_ms, text_pause_ms;
    int64_t feedback_tokens;
    /* monitoring */
    int64_t window, reference;
    double average_run_length;
    /* learning */
    int64_t rounds, buffer, rank, batch, context, warmup, steps_max, tokens_min, central_batch;
    double alpha, lr, lr_final, clip, passes, staleness_discount;
    int64_t staleness_max;
    double norm_factor_max, cosine_min, gate_overall_max, gate_slice_max, server_scale;
    int64_t gate_tokens, heldout_tokens;
    int64_t canary_nodes_min, canary_tokens_min, canary_ms_max;
    double canary_share;
    /* presence and network */
    double offline_share, drop, duplicate;
    int64_t offline_ms, delay_ms, bandwidth;
    /* faults: node numbers are -1 for none */
    int64_t crash_training_node, poison_scale_node, poison_sign_node, bad_scale_round;
    int64_t merge_crash; /* merge that the aggregator crashes in, 0: none */
    double bad_scale, crash_rate;
    const char *merge_failpoint;
    bool no_baselines; /* central, local-only */
} sim_options;
extern const sh_command sim_run_command;

typedef struct sim sim;
typedef struct sim_job sim_job;

typedef enum { SIM_JOB_TEXT = 100 /* beside the cores' own kinds */ } sim_job_kind;

/* One job. Inputs are filled on the loop's thread, outputs by the worker. */
struct sim_job {
    sim *sim;
    uint32_t target, life;
    int kind; /* sh_node_job_kind, sh_coord_job_kind (+ SIM_COORD_KIND) or SIM_JOB_TEXT */
    uint64_t id, start_ms, done_ms;
    sh_pool_job *running;
    uint64_t rng_seed;
    /* inputs */
    const sh_model *model;
    sh_snapshot snapshot;
    sh_train_plan plan;
    float poison; /* B is multiplied by this; 1: honest */
    sh_buf bytes; /* INSTALL, EVALUATE: the file */
    uint32_t slot;
    uint64_t version;
    sh_coord_job coord;
    sh_buf *updates; /* MERGE: [coord.n_inputs] encoded adapters */
    sh_merge_input *inputs;
    const sim_text *text;
    uint64_t session;
    bool drifted; /* cost model: the text is of the new kind */
    /* outputs */
    sh_status status;
    sh_error err;
    sh_round_result learned;
    const sh_model *installed;
    double nll;
    sh_slice_score slices[SH_SLICES]; /* EVALUATE */
    uint32_t n_slices;
    sim_typed typed; /* TEXT */
    sh_merge_job_result merged;
    sh_coord_job_result gated;
};
#define SIM_COORD_KIND 50

typedef struct {
    const char *name;
    void (*run)(sim_job *job); /* on a worker */
} sim_learning;
extern const sim_learning sim_learning_real, sim_learning_cost;
#define SIM_COST_TEXT_TOKENS 256
extern const int32_t sim_cost_tokens[SIM_COST_TEXT_TOKENS]; /* the cost model's one text */

typedef struct {
    sh_hash sha256;
    sh_model *model;
} sim_model_row;

/* What happened, in order; part of the summary. */
#define SIM_FAULTS_MAX 256
typedef struct {
    char name[48];
    uint64_t at_ms;
    uint32_t target;
} sim_fault;

typedef struct { /* a node's shell */
    sh_node *core;
    sh_store *store;
    sh_hash key;
    uint32_t life, connection; /* crashes; times that the link came up */
    uint64_t timer_generation;
    bool online, up;  /* link; process */
    bool link_wanted; /* by the presence schedule */
    const sh_model *slots[2];
    uint32_t active_slot;
    float speed; /* training and typing, 1 is the reference device */
    bool typing;
    uint32_t topic;
    uint64_t texts_before, texts_after; /* typed so far */
    sh_rng rng;
    /* measured */
    uint64_t windows, change_window, alarm_window, false_alarms;
    uint32_t alarm_metric;
    double alarm_log_evalue, alarm_effect;
    uint64_t updates_made, updates_not_better, updates_acked, bytes_up;
    uint64_t release_bytes_down, crashes;
    uint64_t releases_taken;             /* bit v: release v was active here (versions under 64) */
    uint64_t active_version, steps_back; /* activations of an older version than before */
    double evidence[SH_METRICS];         /* largest log e-value of a window */
    uint64_t tokens_trained;
} sim_node;

typedef enum {
    SIM_PHASE_BEFORE,
    SIM_PHASE_DRIFT,
    SIM_PHASE_LEARN,
    SIM_PHASE_SETTLE,
    SIM_PHASE_MEASURE,
    SIM_PHASES
} sim_phase;
extern const char *const sim_phase_names[SIM_PHASES];

/* Known bugs of a shell, for the tests to switch on: the audit must find them. Both break the rule
 * that sends wait for the commit. */
typedef enum {
    SIM_CANARY_NONE,
    SIM_CANARY_AGGREGATOR, /* acknowledges what a crash before the commit then takes back */
    SIM_CANARY_NODE,       /* sends what a crash before the commit then takes back */
} sim_canary;

struct sim {
    sim_options options;
    /* A fleet of real processes (experiments/fleet) fills this struct from what it sees of them, so
     * that one measurement, one summary and one display serve both. */
    bool real_processes;
    const char *program;       /* "shoal-sim" */
    const sh_command *command; /* its option table, for the summary */
    const void *command_options;
    json_t *extra, *extra_checks; /* owned: more fields of the summary, more rows of its checks */
    sim_canary canary;
    /* Called after each event, when set: what must hold at any time. Its failure ends the run. */
    sh_status (*probe)(sim *s, void *arg, sh_error *err);
    void *probe_arg;
    const sim_learning *learning;
    sh_pool *pool;
    sim_queue queue;
    uint64_t now_ms, events;
    sim_node *nodes;
    uint32_t n_nodes, laggard; /* the node that a phase was seen to wait for */
    bool calm;                 /* the aggregator has closed: no more random crashes */
    /* aggregator's shell */
    sh_coord *coord;
    sh_store *coord_store;
    uint32_t coord_life;
    uint64_t coord_timer;
    bool coord_up;
    uint64_t merges_started, candidates_seen;
    sh_failpoints failpoints;
    sh_coord_options coord_options;
    sh_node_options node_options;
    sh_buf genesis_manifest, genesis_model;
    sh_hash genesis_sha, genesis_master;
    /* models by content, DIR/objects/<sha256>.gguf; opened once, shared by all nodes */
    char objects[SH_PATH_BYTES];
    sim_model_row models[SIM_MODELS_MAX];
    size_t n_models;
    void *models_mutex;
    sim_texts texts;
    sh_frozen *frozen; /* embedding of the genesis model */
    sh_suite suite;
    sim_phase phase;
    uint64_t phase_at_ms[SIM_PHASES];
    double phase_wall_s[SIM_PHASES], wall_start_s;
    sh_sha256_state hash;
    uint64_t version_seen;
    double gate_loss, candidate_loss; /* of the newest release, of the candidate last gated */
    sim_fault faults[SIM_FAULTS_MAX];
    size_t n_faults;
    sh_rng net_rng;
    /* per window index: sums over nodes, for the timeline */
    struct sim_point {
        double nll;
        uint64_t inferences, accepted, alarms;
    } * timeline;
    size_t n_timeline, timeline_cap;
    void *progress;
};

/* ---- sim.c: life cycle and loop ---- */
SH_MUST_USE sh_status sim_create(const sim_options *options, sim **out, sh_error *err);
/* The part of it that has no cores and no stores: options, workers, tables of nodes. */
SH_MUST_USE sh_status sim_create_empty(const sim_options *options, sim **out, sh_error *err);
/* Whether base and texts are there; then the texts, shuffled by the seed, and the frozen embedding
 * of the genesis model, which s->genesis_sha names. */
SH_MUST_USE sh_status sim_find_inputs(const sim_options *options, sh_error *err);
SH_MUST_USE sh_status sim_load_texts(sim *s, sh_error *err);
void sim_destroy(sim **s);
/* Runs the phases to the end of SETTLE. */
SH_MUST_USE sh_status sim_run(sim *s, sh_error *err);
SH_MUST_USE sh_status sim_push(sim *s, sim_event event, sh_error *err);
void sim_note_fault(sim *s, const char *name, uint32_t target);
void sim_hash_number(sim *s, uint64_t x);
/* Opens (once) the model file of that content. Thread-safe. */
SH_MUST_USE sh_status sim_model_get(sim *s, const sh_hash *sha256, const sh_model **out,
                                    sh_error *err);
/* Starts a job on a worker and queues its end at now + duration. Takes over *job on success. */
SH_MUST_USE sh_status sim_job_start(sim *s, sim_job **job, uint64_t duration_ms, sh_error *err);
sim_job *sim_job_create(sim *s, uint32_t target, int kind);
void sim_job_destroy(sim_job **job);
uint64_t sim_seed(const sim *s, uint64_t stream, uint32_t purpose);
/* faults.crash-rate as it is now: nothing crashes by chance once the aggregator has closed, so that
 * every run comes to rest. */
double sim_crash_rate(const sim *s);
/* The node of a key, n_nodes when none has it. */
uint32_t sim_node_of(const sim *s, const sh_hash *key);

/* ---- fleet.c: the shell of the node cores ---- */
SH_MUST_USE sh_status sim_node_boot(sim *s, uint32_t i, sh_error *err);
SH_MUST_USE sh_status sim_node_crash(sim *s, uint32_t i, const char *name, uint64_t restart_ms,
                                     sh_error *err);
SH_MUST_USE sh_status sim_node_event(sim *s, const sim_event *event, sh_error *err);
SH_MUST_USE sh_status sim_node_link(sim *s, uint32_t i, bool up, sh_error *err);
SH_MUST_USE sh_status sim_node_type(sim *s, uint32_t i, uint64_t at_ms, sh_error *err);

/* ---- center.c: the shell of the coordinator core ---- */
SH_MUST_USE sh_status sim_coord_boot(sim *s, sh_error *err);
SH_MUST_USE sh_status sim_coord_event(sim *s, const sim_event *event, sh_error *err);
SH_MUST_USE sh_status sim_coord_gone(sim *s, uint32_t node, sh_error *err);
SH_MUST_USE sh_status sim_coord_command(sim *s, sh_coord_command command, double real,
                                        sh_error *err);
/* Sends bytes over the simulated link; from or to is the aggregator (n_nodes). Takes over message.
 */
SH_MUST_USE sh_status sim_send(sim *s, uint32_t from, uint32_t to, sh_buf message, sh_error *err);

/* ---- measure.c ---- */
typedef struct {
    double heldout_base, heldout_final, heldout_central, heldout_local;
    double acceptance_before, acceptance_base, acceptance_end;
    double central_passes; /* over the pooled corrections */
    bool done;
} sim_measures;
SH_MUST_USE sh_status sim_measure(sim *s, sim_measures *out, sh_error *err);

/* ---- summary.c ---- */
/* Writes DIR/summary.json; *ok says whether every number holds. run_error: why the run ended early,
 * or NULL. The JSON object is the caller's. */
SH_MUST_USE sh_status sim_summary(sim *s, const sim_measures *measures, const sh_error *run_error,
                                  json_t **out, bool *ok, sh_error *err);

/* The summary of a run that could not begin. */
SH_MUST_USE sh_status sim_summary_unborn(const char *program, const sim_options *options,
                                         const sh_error *why, sh_error *err);

/* ---- table.c ---- */
void sim_print_table(const json_t *summary); /* for people, on stdout */

/* ---- progress.c ---- */
void sim_progress_begin(sim *s);
void sim_progress_tick(sim *s, bool force);
void sim_progress_line(sim *s, const char *format, ...) __attribute__((format(printf, 2, 3)));
void sim_progress_end(sim *s);
double sim_wall_seconds(void);

#endif
