/*
 * What the server's files share.
 *   server.c         create, the loop, destroy
 *   server_step.c    transactions around the core's steps; actions after them
 *   server_fetch.c   reads and hashes messages while the loop waits for the disk
 *   server_worker.c  merge, gate, backup and clearing of objects, on a thread of its own
 *   server_parent.c  a relay's connection to its parent
 *   server_keys.c    which keys may connect
 *   server_admin.c   operators' commands
 *   server_view.c    the snapshot that HTTP handlers read, and its metrics
 *   server_page.c    the status page
 */
#ifndef SH_AGGREGATOR_SERVER_INTERNAL_H
#define SH_AGGREGATOR_SERVER_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "aggregator/folder.h"
#include "aggregator/jobs.h"
#include "aggregator/server.h"
#include "shared/base/failpoint.h"
#include "shared/base/file.h"
#include "shared/http/http.h"
#include "shared/http/metrics.h"
#include "shared/net/admin.h"

/* ---- server_keys.c ---- */
/* While enrolment tokens are outstanding, keys that nobody knows may connect to send ENROL: so many
 * of them in SERVER_GUEST_MS, those that were enrolled not counted. One that says nothing for
 * SERVER_GUEST_SILENCE_MS is shut. */
#define SERVER_GUESTS_MAX       256u
#define SERVER_GUEST_MS         30000u
#define SERVER_GUEST_SILENCE_MS 10000u
#define SERVER_KEYS_MAX         (4 * SH_COORD_NODES_MAX)
typedef struct {
    sh_hash key;
    uint64_t at_ms; /* monotonic */
} server_guest;
typedef struct {
    pthread_mutex_t lock;
    bool any;
    sh_hash *enrolled, *revoked; /* sorted; revoked: replaced ones, too */
    size_t n_enrolled, n_revoked, enrolled_cap, revoked_cap;
    uint64_t open_until_ms; /* wall clock; before it unknown keys may come as guests; 0: no */
    server_guest guests[SERVER_GUESTS_MAX];
    size_t n_guests;
} server_keys;
sh_status server_keys_init(server_keys *keys, bool any, sh_error *err);
void server_keys_release(server_keys *keys);
sh_status server_keys_set(server_keys *keys, const sh_hash *key, sh_key_access access,
                          sh_error *err);
bool server_keys_allow(void *keys, const sh_hash *key); /* any thread: sh_net's ZAP handler */
/* In place of what was there. */
sh_status server_keys_load(server_keys *keys, sh_txn *txn, sh_error *err);
/* Tokens are outstanding until then (wall clock; 0: none are). */
void server_keys_open(server_keys *keys, uint64_t until_ms);

/* ---- server_worker.c ---- */
typedef enum {
    TASK_MERGE,
    TASK_GATE,
    TASK_STACK,
    TASK_BACKUP,
    TASK_PRUNE,
    TASK_KINDS
} server_task_kind;
const char *server_task_name(server_task_kind kind);

typedef struct server_task {
    struct server_task *next;
    server_task_kind kind;
    sh_coord_job job;       /* MERGE, STACK, GATE; inputs are below */
    sh_merge_input *inputs; /* [job.n_inputs] */
    sh_merge_job_result merged;
    sh_coord_job_result gated;
    char dir[SH_PATH_BYTES]; /* BACKUP: an absolute path */
    sh_admin_caller caller;  /* BACKUP: who gets the answer */
    uint64_t version;        /* BACKUP: of the copy */
    sh_folder_keep keep;     /* PRUNE */
    uint64_t removed;
    sh_status status;
    sh_error err;
    uint64_t took_ms;
} server_task;

typedef struct {
    sh_store *store;
    sh_pool *pool;
    uint64_t gate_tokens;
    int event_fd; /* readable when a task is done */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    server_task *waiting, *done; /* in order */
    server_task_kind running;
    bool busy, stopping, ended, started;
    size_t n_waiting;
} server_worker;
sh_status server_worker_start(server_worker *worker, sh_store *store,
                              const sh_aggregator_settings *settings, sh_error *err);
/* False: the task that runs did not end in time. Waiting ones are dropped. */
bool server_worker_stop(server_worker *worker, uint64_t wait_ms);
/* Takes *task over. A merge or gate replaces those that wait: the core knows only the newest. */
sh_status server_worker_submit(server_worker *worker, server_task **task, sh_error *err);
server_task *server_worker_take(server_worker *worker); /* the oldest that is done, or NULL */
bool server_worker_has(server_worker *worker, server_task_kind kind); /* waits or runs */
bool server_worker_busy(server_worker *worker);
server_task *server_task_create(server_task_kind kind);
void server_task_destroy(server_task **task);

/* ---- server_fetch.c ---- */
typedef struct server_fetch server_fetch;
sh_status server_fetch_create(sh_net_server *nodes, server_fetch **out, sh_error *err);
void server_fetch_destroy(server_fetch **fetch); /* before its socket */
/* From begin to end the nodes' socket is not the loop's. */
void server_fetch_begin(server_fetch *fetch);
void server_fetch_end(server_fetch *fetch);
/* The next message: what was read meanwhile, then what the socket has. checked: see
 * sh_coord_event. */
sh_status server_fetch_next(server_fetch *fetch, sh_net_event *event, bool *checked, sh_error *err);
size_t server_fetch_ahead(const server_fetch *fetch); /* messages that were read and wait */

/* ---- server_view.c ---- */
#define VIEW_RELEASES_MAX 40u
#define VIEW_NODES_MAX    200u
#define VIEW_STALE_FACTOR 10u /* a node that missed so many check-ins is stale */

typedef struct {
    sh_hash key;
    char name[SH_NODE_NAME_MAX + 1];
    bool revoked, drifting, stale;
    uint64_t last_ms, version, inferences, dropped;
} view_node;

typedef struct {
    uint64_t messages_in, messages_out, messages_dropped, peers_gone, peers_dropped, commits,
        failed_steps;
    sh_histogram task_seconds[TASK_KINDS];
    uint64_t tasks_failed[TASK_KINDS];
} server_counters;

typedef struct {
    uint64_t at_ms, started_ms, tables_ms; /* tables_ms: when rows were last read */
    bool up;                               /* the core is there */
    const char *upstream;                  /* the settings' */
    sh_coord_status coord;
    server_counters counters;
    uint64_t connections, handshakes_refused, store_bytes, store_bytes_max;
    bool busy;
    uint64_t enrolled, revoked, reporting, stale, drifting;
    sh_release_row releases[VIEW_RELEASES_MAX]; /* newest first; merged is NULL */
    size_t n_releases;
    view_node nodes[VIEW_NODES_MAX];
    size_t n_nodes;
} server_view;

typedef struct {
    pthread_mutex_t lock;
    server_view shown; /* under lock */
    server_view next;  /* the loop's */
    uint64_t tables_due_ms;
    bool stale_tables; /* a step changed something since they were read */
} server_views;

struct sh_server {
    sh_aggregator_settings settings;
    sh_coord_options options;
    sh_failpoints failpoints;
    sh_store *store;
    sh_coord *coord; /* NULL: waits for boot_at_ms */
    uint64_t boot_at_ms, boot_pause_ms;
    uint64_t hold_until_ms, hold_ms; /* the store is full: messages are left waiting */
    uint64_t life;
    sh_net *net;
    sh_net_keys keys, admin_keys;
    sh_net_server *nodes;
    sh_net_client *parent; /* NULL: this is no relay */
    sh_net_keys parent_keys;
    bool parent_up, parent_told, parent_refused; /* told: what the core knows of `up` */
    server_fetch *fetch;
    sh_admin *admin;
    sh_http *http;
    server_keys allowed;
    server_worker worker;
    server_views views;
    server_counters counters;
    int signal_fd;
    uint64_t timer_ms; /* wall clock; 0: none */
    uint64_t started_ms;
    bool stop, prune_due;
    const char *stop_reason;
    /* the group under way */
    sh_txn *txn;
    sh_coord_action *queued; /* actions that wait for the commit; their memory is owned */
    size_t n_queued, queued_cap, group_steps;
    size_t group_in, group_out;
    uint64_t group_since_ms;
    bool group_evaluating; /* before the group */
    bool command_refused;  /* the last command's note */
};

/* ---- server_step.c ---- */
sh_status server_boot(sh_server *s, sh_error *err);
/* Steps the core within the group, which begins with it. False: the group was taken back, and the
 * core is down until its next boot. */
bool server_step(sh_server *s, sh_coord_event *event);
/* Commits the group and carries its actions out. stage: the job whose end is in it. */
bool server_commit(sh_server *s, const server_task_kind *stage);
bool server_step_alone(sh_server *s, sh_coord_event *event, const server_task_kind *stage);
bool server_group_full(const sh_server *s);
void server_failpoint(sh_server *s, const char *name); /* may not return */

/* ---- server_parent.c ---- */
sh_status server_parent_open(sh_server *s, sh_error *err);
sh_status server_parent_serve(sh_server *s, sh_error *err);
void server_parent_send(sh_server *s, const sh_coord_action *a);

/* ---- server_admin.c ---- */
#define SERVER_ENROL_BATCH_MAX 1000u /* nodes of a list that are enrolled in one transaction */
sh_status server_serve_admin(sh_server *s, sh_error *err);
void server_answer_backup(sh_server *s, const server_task *task);

/* ---- server_view.c, server_page.c ---- */
sh_status server_views_init(server_views *views, sh_error *err);
void server_views_release(server_views *views);
void server_view_refresh(sh_server *s);
void server_handle_metrics(void *arg, const sh_http_request *request, sh_http_reply *reply);
void server_handle_health(void *arg, const sh_http_request *request, sh_http_reply *reply);
void server_handle_page(void *arg, const sh_http_request *request, sh_http_reply *reply);
/* A copy of the snapshot, malloc'ed. */
server_view *server_view_copy(sh_server *s);

#endif
