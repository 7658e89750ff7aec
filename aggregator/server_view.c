/*
 * The snapshot. Counters are copied at every refresh; rows of the store are read again only when a
 * commit changed something, and at most a twentieth of the loop's time goes into it.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregator/server_internal.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

#define REFRESH_MS    250u
#define TABLES_MS     1000u
#define TABLES_FACTOR 20u

sh_status server_views_init(server_views *views, sh_error *err)
{
    if (pthread_mutex_init(&views->lock, NULL) != 0)
        return sh_fail(err, SH_ERR_NO_MEMORY, "server: no memory for a lock");
    return SH_OK;
}

void server_views_release(server_views *views)
{
    pthread_mutex_destroy(&views->lock);
}

static sh_status take_release(void *arg, const sh_release_row *row)
{
    server_view *v = arg;
    if (v->n_releases == VIEW_RELEASES_MAX)
        v->n_releases--;
    memmove(v->releases + 1, v->releases, v->n_releases * sizeof *v->releases);
    v->releases[0] = *row;
    v->releases[0].merged = NULL; /* valid during the call only */
    v->n_releases++;
    return SH_OK;
}

typedef struct {
    server_view *view;
    uint64_t now_ms, stale_ms;
} counting;

static sh_status take_node(void *arg, const sh_node_row *row)
{
    counting *c = arg;
    server_view *v = c->view;
    bool stale = row->last_ms + c->stale_ms < c->now_ms;
    v->revoked += row->revoked;
    if (!row->revoked) {
        v->enrolled++;
        v->stale += stale;
        v->reporting += !stale;
        v->drifting += row->checkin.drifting;
    }
    if (v->n_nodes == VIEW_NODES_MAX)
        return SH_OK;
    view_node *n = &v->nodes[v->n_nodes++];
    *n = (view_node){.key = row->key,
                     .revoked = row->revoked,
                     .drifting = row->checkin.drifting,
                     .stale = stale,
                     .last_ms = row->last_ms,
                     .version = row->checkin.active_version,
                     .inferences = row->checkin.inferences};
    memcpy(n->name, row->name, sizeof n->name);
    for (int i = 0; i < SH_CLASSES; i++)
        n->dropped += row->checkin.dropped[i];
    return SH_OK;
}

static void read_tables(sh_server *s)
{
    server_view *v = &s->views.next;
    sh_error err = {0};
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    uint64_t since = sh_clock_mono_ms();
    counting c = {.view = v,
                  .now_ms = sh_clock_wall_ms(),
                  .stale_ms = VIEW_STALE_FACTOR * s->options.checkin_ms};
    v->n_releases = v->n_nodes = 0;
    v->enrolled = v->revoked = v->reporting = v->stale = v->drifting = 0;
    SH_GOTO(sh_txn_begin(s->store, SH_TXN_READ, &txn, &err));
    SH_GOTO(sh_coord_each_candidate(txn, take_release, v, &err));
    SH_GOTO(sh_coord_each_node(txn, take_node, &c, &err));
    v->tables_ms = c.now_ms;
    s->views.stale_tables = false;
cleanup:
    sh_txn_abort(&txn);
    uint64_t now = sh_clock_mono_ms();
    s->views.tables_due_ms = now + SH_MAX(TABLES_FACTOR * (now - since), (uint64_t)TABLES_MS);
    if (status != SH_OK)
        sh_log(SH_LOG_WARN, "view_failed", "error=\"%s\"", err.text);
}

void server_view_refresh(sh_server *s)
{
    server_view *v = &s->views.next;
    uint64_t wall = sh_clock_wall_ms(), mono = sh_clock_mono_ms();
    if (v->at_ms != 0 && wall >= v->at_ms && wall - v->at_ms < REFRESH_MS)
        return;
    /* Nodes grow stale by time alone, too. */
    bool aged = wall - v->tables_ms > s->options.checkin_ms;
    if ((s->views.stale_tables || aged) && mono >= s->views.tables_due_ms)
        read_tables(s);
    v->at_ms = wall;
    v->started_ms = s->started_ms;
    v->upstream = s->settings.upstream;
    v->up = s->coord != NULL && sh_clock_mono_ms() >= s->hold_until_ms;
    if (s->coord != NULL)
        v->coord = sh_coord_get_status(s->coord);
    v->counters = s->counters;
    v->connections = sh_net_server_connections(s->nodes);
    v->handshakes_refused = sh_net_server_refused(s->nodes);
    v->store_bytes = sh_store_bytes_used(s->store);
    v->store_bytes_max = (uint64_t)s->settings.store_bytes_max;
    v->busy = server_worker_busy(&s->worker);
    pthread_mutex_lock(&s->views.lock);
    s->views.shown = *v;
    pthread_mutex_unlock(&s->views.lock);
}

server_view *server_view_copy(sh_server *s)
{
    server_view *copy = sh_calloc(1, sizeof *copy);
    if (copy == NULL)
        return NULL;
    pthread_mutex_lock(&s->views.lock);
    *copy = s->views.shown;
    pthread_mutex_unlock(&s->views.lock);
    return copy;
}

/* ---- metrics ---- */

static void put_updates(const server_view *v, sh_buf *out)
{
    static const char name[] = "shoal_aggregator_updates_total";
    sh_metric_family(out, name, "counter", "Updates of nodes that were decided.");
    sh_metric_label merged[] = {{"verdict", "merged"}, {"reason", "none"}};
    sh_metric_sample(out, name, merged, 2, (double)v->coord.updates_merged);
    for (int i = SH_REASON_NONE + 1; i < SH_REASONS; i++) {
        sh_metric_label refused[] = {{"verdict", "refused"},
                                     {"reason", sh_reason_name((sh_reason)i)}};
        sh_metric_sample(out, name, refused, 2, (double)v->coord.updates_refused[i]);
    }
}

static void put_nodes(const server_view *v, sh_buf *out)
{
    static const char name[] = "shoal_aggregator_nodes";
    const struct {
        const char *state;
        uint64_t n;
    } states[] = {{"enrolled", v->enrolled},
                  {"reporting", v->reporting},
                  {"stale", v->stale},
                  {"drifting", v->drifting},
                  {"revoked", v->revoked}};
    sh_metric_family(out, name, "gauge", "Nodes by state; all but revoked are enrolled, too.");
    for (size_t i = 0; i < SH_COUNT(states); i++) {
        sh_metric_label label = {"state", states[i].state};
        sh_metric_sample(out, name, &label, 1, (double)states[i].n);
    }
}

static void put_messages(const server_view *v, sh_buf *out)
{
    static const char name[] = "shoal_aggregator_messages_total";
    const struct {
        const char *direction;
        uint64_t n;
    } all[] = {{"in", v->counters.messages_in},
               {"out", v->counters.messages_out},
               {"dropped", v->counters.messages_dropped}};
    sh_metric_family(out, name, "counter",
                     "Messages from nodes, to nodes, and to nodes that were gone or full.");
    for (size_t i = 0; i < SH_COUNT(all); i++) {
        sh_metric_label label = {"direction", all[i].direction};
        sh_metric_sample(out, name, &label, 1, (double)all[i].n);
    }
}

static void put_tasks(const server_view *v, sh_buf *out)
{
    static const char failed[] = "shoal_aggregator_jobs_failed_total";
    char name[64];
    sh_metric_family(out, failed, "counter", "Merges, gates, backups, prunings that failed.");
    for (int i = 0; i < TASK_KINDS; i++) {
        sh_metric_label label = {"job", server_task_name((server_task_kind)i)};
        sh_metric_sample(out, failed, &label, 1, (double)v->counters.tasks_failed[i]);
    }
    for (int i = 0; i < TASK_PRUNE; i++) {
        snprintf(name, sizeof name, "shoal_aggregator_%s_seconds",
                 server_task_name((server_task_kind)i));
        sh_metric_histogram(out, name, "How long it took.", &v->counters.task_seconds[i]);
    }
}

static void put_all(const server_view *v, sh_buf *out)
{
    const sh_coord_status *c = &v->coord;
    const struct {
        const char *name, *type, *help;
        double value;
    } ones[] = {
        {"shoal_aggregator_up", "gauge",
         "1: messages are taken in; 0: the store is full or broken.", v->up},
        {"shoal_aggregator_release_version", "gauge", "Current release.", (double)c->version},
        {"shoal_aggregator_releases_total", "counter", "Releases published, rollbacks included.",
         (double)c->releases},
        {"shoal_aggregator_candidates_refused_total", "counter", "Candidates that were refused.",
         (double)c->candidates_refused},
        {"shoal_aggregator_round", "gauge", "Round; 0: rounds have not begun.", c->round},
        {"shoal_aggregator_buffered", "gauge", "Updates that wait for a decision.", c->buffered},
        {"shoal_aggregator_drifting", "gauge", "Enrolled nodes whose last check-in says drift.",
         c->drifting},
        {"shoal_aggregator_paused", "gauge", "1 while paused.", c->paused},
        {"shoal_aggregator_evaluations", "gauge", "Nodes that have scored the candidate.",
         c->evaluations},
        {"shoal_aggregator_connections", "gauge", "Connections of nodes.", (double)v->connections},
        {"shoal_aggregator_uploads", "gauge", "Updates whose chunks are on their way up.",
         c->waiting},
        {"shoal_aggregator_asked_bytes", "gauge", "Of them, asked for and not yet come.",
         (double)c->asked_bytes},
        {"shoal_aggregator_told_later", "gauge",
         "Messages answered with \"later\" since the core was made.", (double)c->told_later},
        {"shoal_aggregator_return_seconds", "gauge",
         "After which nodes are told to check in again.", (double)c->return_ms / 1000},
        {"shoal_aggregator_handshakes_refused_total", "counter", "Keys that were not let in.",
         (double)v->handshakes_refused},
        {"shoal_aggregator_bad_messages_total", "counter", "Messages that broke the protocol.",
         (double)c->bad_messages},
        {"shoal_aggregator_peers_dropped_total", "counter",
         "Connections that were ended: not enrolled, or over their limit and deaf.",
         (double)v->counters.peers_dropped},
        {"shoal_aggregator_messages_limited_total", "counter",
         "Messages over their node's limit, which were not read.", (double)c->limited},
        {"shoal_aggregator_enrolment_tokens", "gauge", "Enrolment tokens that are outstanding.",
         c->tokens},
        {"shoal_aggregator_tokens_refused_total", "counter", "Wrong enrolment tokens that came.",
         (double)c->tokens_refused},
        {"shoal_aggregator_rotations_total", "counter", "Keys of nodes that were replaced.",
         (double)c->rotations},
        {"shoal_aggregator_clones_total", "counter",
         "Second senders of an epoch (copied or restored node stores) that got a new one.",
         (double)c->clones},
        {"shoal_aggregator_commits_total", "counter", "Transactions that were committed.",
         (double)v->counters.commits},
        {"shoal_aggregator_failed_steps_total", "counter", "Transactions that were taken back.",
         (double)v->counters.failed_steps},
        {"shoal_aggregator_jobs_running", "gauge", "1 while a merge, gate or backup runs.",
         v->busy},
        {"shoal_aggregator_store_bytes", "gauge", "Of the store, in use.", (double)v->store_bytes},
        {"shoal_aggregator_store_limit_bytes", "gauge", "store.bytes-max.",
         (double)v->store_bytes_max},
        {"process_start_time_seconds", "gauge", "Since 1970.", (double)v->started_ms / 1000},
    };
    for (size_t i = 0; i < SH_COUNT(ones); i++)
        sh_metric_one(out, ones[i].name, ones[i].type, ones[i].help, ones[i].value);
    if (c->relay) {
        sh_metric_one(out, "shoal_aggregator_parent_up", "gauge",
                      "1: the parent of this relay has let it in.", c->parent_welcome);
        sh_metric_one(out, "shoal_aggregator_relayed_total", "counter",
                      "Updates made for the parent.", (double)c->relayed);
        sh_metric_one(out, "shoal_aggregator_relay_owed", "gauge",
                      "Of these, not yet acknowledged.", (double)c->relay_owed);
    }
    put_nodes(v, out);
    put_updates(v, out);
    put_messages(v, out);
    put_tasks(v, out);
}

void server_handle_metrics(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    (void)request;
    server_view *view = server_view_copy(arg);
    if (view == NULL) {
        sh_http_fail(reply, 503, "overloaded_error", NULL, NULL, "no memory");
        return;
    }
    put_all(view, &reply->body);
    reply->content_type = SH_METRICS_TYPE;
    free(view);
}

void server_handle_health(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    (void)request;
    sh_server *s = arg;
    pthread_mutex_lock(&s->views.lock);
    bool up = s->views.shown.up;
    pthread_mutex_unlock(&s->views.lock);
    if (!up) {
        sh_http_fail(reply, 503, "server_error", NULL, NULL,
                     "messages are not taken in: the store is full or broken (see the log)");
        return;
    }
    json_t *value = json_object();
    sh_json_set(value, "status", json_string("ok"));
    sh_http_json(reply, 200, value);
}
