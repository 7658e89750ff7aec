/*
 * What the daemon's files share.
 *   daemon.c        start, the loop, stop
 *   daemon_core.c   steps, group commit, actions, the core made again
 *   daemon_full.c   how long a full store counts as full
 *   daemon_inbox.c  what other threads post to the loop
 *   daemon_jobs.c   installations, smoke tests, evaluations on the worker
 *   daemon_train.c  the training child
 *   daemon_slots.c  model files of the two slots
 *   daemon_store.c  the store's environment; one that is corrupt is set aside
 *   daemon_signals.c  probes of the device, on a thread of their own
 *   daemon_admin.c  commands and erasure
 *   daemon_api.c    the API's backend: ratings, health, metrics
 * All but the inbox, the worker's body and the API's backend runs on the loop's thread.
 */
#ifndef SH_EDGE_DAEMON_INTERNAL_H
#define SH_EDGE_DAEMON_INTERNAL_H

#include <pthread.h>

#include "edge-node/api.h"
#include "edge-node/child.h"
#include "edge-node/daemon.h"
#include "edge-node/learn.h"
#include "edge-node/probe.h"
#include "shared/base/failpoint.h"
#include "shared/net/admin.h"

#define DAEMON_WAITING_MAX         256u   /* inferences that wait for their commit */
#define DAEMON_RATINGS_MAX         64u    /* ratings that wait for theirs */
#define DAEMON_JOBS_MAX            8u     /* jobs that wait for the worker */
#define DAEMON_MESSAGES_MAX        16u    /* messages of the aggregator in one transaction */
#define DAEMON_ROTATE_TRY_MS       60000u /* a refused key is tried before the other one is */
#define DAEMON_FULL_PAUSE_MS       5000u  /* until a full store is tried again; doubles up to: */
#define DAEMON_FULL_PAUSE_MAX_MS   60000u
#define DAEMON_FAILURES_MAX        5u  /* steps that fail one after another before we give up */
#define DAEMON_ID_CLOCK_SHIFT      16  /* 65,536 ids a ms; a next life repeats none */
#define DAEMON_RATING_DISTANCE_MAX 64u /* tokens that an edit distance is made of */

/* ---- what other threads post ---- */
typedef struct {
    sh_record record;
    sh_completion_row row; /* tokens: owned */
} daemon_inference;

typedef struct { /* lives on the thread that waits for it */
    sh_rating rating;
    sh_status status;
    sh_error err;
    bool done;
} daemon_rating;

typedef struct daemon_work daemon_work;
struct daemon_work {
    sh_node_job job;
    uint8_t *chunks;            /* storage of job.blob.chunk_hashes */
    char active[SH_PATH_BYTES]; /* EVALUATE: the parent's file */
    sh_status status;
    sh_error err;
    double nll;
    uint32_t n_slices;
    sh_slice_score slices[SH_EVALUATION_SLICES_MAX];
    daemon_work *next;
};

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t room, answered;
    int event_fd; /* readable when something was posted */
    daemon_inference waiting[DAEMON_WAITING_MAX];
    size_t n_waiting;
    uint64_t first_ms; /* monotonic, when waiting[0] came */
    daemon_rating *ratings[DAEMON_RATINGS_MAX];
    size_t n_ratings;
    daemon_work *done; /* finished jobs */
    bool api_closed;   /* the API's last request has ended */
    bool closed;       /* nothing is taken any more */
    uint64_t lost;     /* inferences that there was no memory for */
} daemon_inbox;

SH_MUST_USE sh_status daemon_inbox_init(daemon_inbox *inbox, sh_error *err);
void daemon_inbox_release(daemon_inbox *inbox);
void daemon_inbox_put(daemon_inbox *inbox, const sh_record *record, const sh_completion_row *row);
SH_MUST_USE sh_status daemon_inbox_rate(daemon_inbox *inbox, daemon_rating *rating, sh_error *err);
void daemon_inbox_put_done(daemon_inbox *inbox, daemon_work *work);
void daemon_inbox_put_api_closed(daemon_inbox *inbox);
void daemon_inbox_wake(daemon_inbox *inbox);  /* the loop has something to look at */
void daemon_inbox_close(daemon_inbox *inbox); /* wakes everybody */
/* The loop's side. take_waiting moves at most `max` inferences out; their tokens are the caller's.
 */
size_t daemon_inbox_take_waiting(daemon_inbox *inbox, daemon_inference *out, size_t max);
size_t daemon_inbox_take_ratings(daemon_inbox *inbox, daemon_rating **out, size_t max);
daemon_work *daemon_inbox_take_done(daemon_inbox *inbox);
void daemon_inbox_answer(daemon_inbox *inbox, daemon_rating *rating, sh_status status,
                         const sh_error *err);
void daemon_inbox_clear_event(daemon_inbox *inbox);
/* Monotonic time at which a flush is due; UINT64_MAX: nothing waits. */
uint64_t daemon_inbox_due(daemon_inbox *inbox, uint64_t commit_ms);

/* ---- the worker ---- */
typedef struct {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    daemon_work *first; /* queue */
    size_t n;
    bool started, busy, stop;
} daemon_worker;

/* ---- a full store; monotonic time ---- */
typedef struct {
    bool is;           /* since it was found full nothing was written */
    uint64_t until_ms; /* it counts as full */
    uint64_t pause_ms; /* the last one */
} daemon_full;

bool daemon_full_counts(const daemon_full *full, uint64_t now_ms);
void daemon_full_found(daemon_full *full, uint64_t now_ms);
/* A plain transaction was committed. True: it is no longer full. */
bool daemon_full_written(daemon_full *full, uint64_t now_ms);

/* ---- probes ---- */
typedef struct {
    pthread_t thread;
    bool started;
    int stop_fd;
    uint32_t interval_ms, timeout_ms;
    sh_probe probes[SH_PROBES]; /* the thread's */
    pthread_mutex_t lock;
    sh_node_signals latest;
    bool asked, fresh; /* there is an answer; the core has not got it */
} daemon_signals;

/* What the loop says to other threads; under stats_lock. */
typedef struct {
    sh_node_status node;
    bool has_node, full, let_in;
    uint64_t store_bytes, refused_full; /* the latter: that the core has not counted yet */
    uint32_t stores_lost;
    uint64_t trainings_ok, trainings_failed, trainings_cancelled;
    uint64_t window_n, rated_n; /* of the last closed window, or of the open one */
    double nll, accept_ratio;
} daemon_stats;

typedef struct {
    uint64_t inferences, rated, accepted;
    double nll;
    uint64_t nll_n;
} daemon_window;

typedef struct {
    const sh_settings *settings;
    sh_store *store; /* NULL: the disk is too full to make one; tried later, and so is the node */
    sh_node *node;   /* NULL: the store was too full to make it again; tried later */
    sh_node_options options;
    sh_hash enrol_token; /* that options.token is, until the aggregator has let us in */
    sh_buf genesis;      /* signed manifest */
    sh_hash genesis_sha256;
    sh_frozen *frozen;
    sh_engine *engine;
    sh_api *api;
    char token[256];
    sh_net *net;
    sh_net_keys keys;
    sh_net_client *client; /* NULL: no aggregator, or sync is off */
    sh_admin *admin;
    int signal_fd;
    sh_failpoints failpoints;
    sh_rng rng;

    /* steps */
    sh_txn *txn;
    sh_node_actions actions; /* of the step that runs */
    sh_node_action *kept;    /* of the open batch, in order */
    size_t n_kept, kept_cap;
    uint64_t base_ms, boot_ms; /* daemon_now() at the start, and the boot clock then */
    uint64_t timer_at_ms;      /* daemon_now(); 0: none */
    int kind;                  /* of txn */
    daemon_full full;
    bool reserve_used_up; /* the core cannot be made again before that */
    bool remake;          /* the core must be made again */
    bool store_corrupt;   /* the store must be set aside before that */
    bool resume_erasure;  /* one may have been interrupted: look when there is a core */
    sh_error corrupt_err;
    uint32_t stores_lost;
    uint64_t refused_full; /* by a full store, and not told to the core yet */
    sh_buf kept_bytes;     /* options.kept_manifest */
    unsigned failures;
    sh_status fatal; /* not SH_OK: the loop ends with it */
    sh_error fatal_err;

    /* the model that is served */
    uint64_t active_version;
    uint32_t active_slot, lost_slots;
    bool serving;

    /* jobs */
    daemon_worker worker;
    sh_child child;
    uint64_t child_job;
    uint32_t child_round;
    bool child_half; /* fail point node.train was passed */

    /* network */
    bool net_up, net_refused;

    /* rotation of the key; see daemon_rotate.c */
    struct {
        sh_net_keys next;
        sh_hash token;
        bool pending, trying, answered;
        uint64_t since_ms;  /* monotonic, of the present link's key */
        uint64_t told_life; /* of the core that was asked to tell the aggregator */
    } rotate;
    uint64_t lives; /* cores made */

    /* erasure */
    struct {
        bool wanted, running, done, has_caller;
        uint64_t user, rows;
        sh_admin_caller caller;
    } erase;

    /* stop */
    bool stopping;
    const char *stop_reason;
    pthread_t closer;
    bool closer_started;
    uint64_t stop_due_ms, started_ms, started_wall_ms;

    daemon_window window, last_window;
    pthread_mutex_t stats_lock;
    daemon_stats stats;
    uint64_t stats_due_ms;
    daemon_inbox inbox;
    daemon_signals signals;
} sh_daemon;

/* ---- daemon.c ---- */
void daemon_stop(sh_daemon *d, const char *reason);
/* Logs and raises SIGKILL where the environment armed the point. */
void daemon_failpoint(sh_daemon *d, const char *name);

/* Dials the aggregator. */
sh_status daemon_connect(sh_daemon *d, const sh_net_keys *keys, sh_error *err);
/* Opens the socket of the folder's commands, under the node's present key, in place of an open one.
 */
sh_status daemon_open_admin(sh_daemon *d, sh_error *err);

/* ---- daemon_core.c ---- */
/* Steady: begins at what the device's clock said, goes on while it sleeps, never jumps. Any thread.
 */
uint64_t daemon_now(const sh_daemon *d);
sh_status daemon_make_core(sh_daemon *d, sh_error *err);
/* One event, one transaction. A failure is logged and the core made again: the event did not
 * happen. */
sh_status daemon_step(sh_daemon *d, const sh_node_event *event, sh_error *err);
void daemon_flush(sh_daemon *d); /* commits what the inbox holds, answers ratings */
void daemon_take_messages(sh_daemon *d);
void daemon_run_timer(sh_daemon *d);
void daemon_settle(sh_daemon *d); /* makes the core again where that is wanted */
void daemon_refresh_stats(sh_daemon *d, bool now);
const char *
daemon_refused(const sh_daemon *d); /* why the aggregator lets us not in; NULL: it does */

/* ---- daemon_slots.c ---- */
void daemon_slot_path(uint32_t slot, char *out, size_t n);
/* Takes away the packed form beside a slot's file, which is being replaced or no longer used. */
void daemon_slot_unpack(const char *path);
/* Serves a slot's model. SH_ERR_CORRUPT: the file is not what its manifest says, nor can it be made
 * so. */
sh_status daemon_activate(sh_daemon *d, uint64_t version, uint32_t slot, sh_error *err);
/* Serves what was served last, or the genesis model, while a full store lets no core be made. */
sh_status daemon_serve_without_core(sh_daemon *d, sh_error *err);
/* What ends the writing of every file here: fsync, rename, fsync of the folder. */
sh_status daemon_file_end(int fd, const char *temporary, const char *path, sh_error *err);
sh_status daemon_copy_file(const char *from, const char *to, sh_error *err);

/* ---- daemon_store.c ---- */
/* SH_ERR_FULL: the disk has no room for a new store. */
sh_status daemon_store_open(sh_daemon *d, sh_error *err);
uint64_t daemon_store_bytes(const sh_daemon *d);
/* The newest release whose signed manifest and whole file lie in models/, newer than the genesis
 * one, into options.kept_manifest and kept_slot; its version, 0: none. */
uint64_t daemon_find_kept(sh_daemon *d);
/* Sets the open one aside for corrupt_err and begins a new one. The worker is idle. */
sh_status daemon_store_replace(sh_daemon *d, sh_error *err);
void daemon_store_forget_aside(void); /* they hold what users wrote */
/* The signed manifest of a slot's file lies beside it, too: what is left when the store's is lost.
 */
void daemon_manifest_path(uint32_t slot, char *out, size_t n);
void daemon_keep_manifest(uint32_t slot, sh_bytes manifest);

/* ---- daemon_signals.c ---- */
sh_status daemon_signals_start(sh_daemon *d, sh_error *err);
void daemon_signals_stop(sh_daemon *d);
void daemon_signals_repeat(sh_daemon *d); /* a new core knows nothing yet */
void daemon_take_signals(sh_daemon *d);

/* ---- daemon_jobs.c ---- */
sh_status daemon_worker_start(sh_daemon *d, sh_error *err);
void daemon_worker_stop(sh_daemon *d); /* waits for the job that runs */
bool daemon_worker_idle(sh_daemon *d);
/* A job that cannot begin ends at once, as every job does: through the inbox. */
void daemon_start_job(sh_daemon *d, const sh_node_job *job);
void daemon_end_jobs(sh_daemon *d);  /* takes finished ones in */
void daemon_drop_jobs(sh_daemon *d); /* forgets finished ones: their core is gone */

/* ---- daemon_train.c ---- */
sh_status daemon_start_training(sh_daemon *d, const sh_node_job *job, sh_error *err);
void daemon_cancel_training(sh_daemon *d);
void daemon_watch_training(sh_daemon *d); /* its output, its end */
void daemon_empty_work(void);

/* ---- daemon_admin.c ---- */
void daemon_take_commands(sh_daemon *d);
void daemon_advance_erasure(sh_daemon *d);
/* An erasure leaves a mark in the folder until the file is rewritten, so that one that was killed
 * in between is brought to its end at the next start. */
sh_status daemon_mark_erasing(sh_error *err);
void daemon_resume_erasure(sh_daemon *d);

/* ---- daemon_rotate.c ---- */
sh_status daemon_rotation_load(sh_daemon *d, sh_error *err); /* one that a kill interrupted */
sh_status daemon_rotation_begin(sh_daemon *d, sh_error *err);
const char *daemon_rotation_state(const sh_daemon *d); /* "no", "asked", "trying" */
void daemon_advance_rotation(sh_daemon *d);

/* ---- daemon_api.c ---- */
sh_status daemon_api_create(sh_daemon *d, sh_error *err);
void daemon_finished(void *arg, const sh_record *record, const sh_completion_row *row);

#endif
