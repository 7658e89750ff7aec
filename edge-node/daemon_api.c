/*
 * What the API asks of the daemon, from HTTP threads: ratings go to the loop and wait for their
 * commit; health and metrics are read from what the loop last said of itself.
 */
#include <stdlib.h>
#include <string.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

void daemon_finished(void *arg, const sh_record *record, const sh_completion_row *row)
{
    sh_daemon *d = arg;
    daemon_inbox_put(&d->inbox, record, row);
}

/* The author's words as tokens of the active model. */
static sh_status tokenize(sh_daemon *d, const sh_api_feedback *feedback, int32_t **tokens,
                          size_t *n, sh_error *err)
{
    uint64_t version;
    const sh_model *model = sh_engine_use_model(d->engine, &version);
    if (!model)
        return sh_fail(err, SH_ERR_CANCELLED, "no model is active yet");
    sh_status status = sh_tokenize(model->tokenizer, feedback->text, feedback->text_bytes,
                                   SH_TOKENIZE_CONTINUE, tokens, n, err);
    sh_engine_release_model(d->engine, model);
    if (status == SH_OK && *n > SH_NODE_FEEDBACK_ROW_MAX)
        status = sh_fail(err, SH_ERR_LIMIT, "text: %zu tokens, at most %u are taken", *n,
                         SH_NODE_FEEDBACK_ROW_MAX);
    return status;
}

static sh_status take_feedback(void *arg, const sh_api_feedback *feedback, sh_error *err)
{
    sh_daemon *d = arg;
    int32_t *tokens = NULL;
    size_t n = 0;
    sh_status status = SH_OK;
    if (feedback->text)
        SH_GOTO(tokenize(d, feedback, &tokens, &n, err));
    daemon_rating rating = {
        .rating = {.id = feedback->id, .kind = feedback->kind, .n = (uint32_t)n, .tokens = tokens}};
    status = daemon_inbox_rate(&d->inbox, &rating, err);
cleanup:
    free(tokens);
    return status;
}

static daemon_stats read_stats(sh_daemon *d)
{
    pthread_mutex_lock(&d->stats_lock);
    daemon_stats s = d->stats;
    pthread_mutex_unlock(&d->stats_lock);
    return s;
}

static bool is_healthy(void *arg, char *text, size_t text_bytes)
{
    daemon_stats s = read_stats(arg);
    if (!s.full && s.has_node)
        return true;
    snprintf(text, text_bytes, "%s",
             s.full ? "the store is full: inferences are answered but not recorded, feedback is "
                      "refused; make room on the disk or raise store.bytes-max"
                    : "the node is starting");
    return false;
}

static void labelled(sh_buf *out, const char *name, const char *label, const char *value, double x)
{
    sh_metric_sample(out, name, &(sh_metric_label){label, value}, 1, x);
}

static void quality_metrics(const daemon_stats *s, sh_buf *out)
{
    if (s->window_n)
        sh_metric_one(out, "shoal_quality_token_nll", "gauge",
                      "Mean negative log-likelihood of typed tokens in the last window, nats.",
                      s->nll);
    if (s->rated_n)
        sh_metric_one(out, "shoal_quality_accept_ratio", "gauge",
                      "Share of rated completions in the last window that were accepted.",
                      s->accept_ratio);
    sh_metric_family(out, "shoal_drift_log_evalue", "gauge",
                     "Natural logarithm of each drift detector's e-value.");
    for (int m = 0; m < SH_METRICS; m++)
        labelled(out, "shoal_drift_log_evalue", "metric", sh_metric_name((sh_metric)m),
                 s->node.log_evalue[m]);
    sh_metric_one(out, "shoal_windows_total", "counter", "Windows of statistics closed.",
                  (double)s->node.windows);
    sh_metric_one(out, "shoal_drift_alarm", "gauge", "1 while a drift alarm stands.",
                  s->node.drifting ? 1 : 0);
    sh_metric_one(out, "shoal_alarms_total", "counter", "Drift alarms.", (double)s->node.alarms);
}

static void sync_metrics(const daemon_stats *s, sh_buf *out)
{
    static const char *const classes[SH_CLASSES] = {"update", "alarm", "window", "record"};
    sh_metric_one(out, "shoal_spool_bytes", "gauge", "Bytes owed to the aggregator.",
                  (double)s->node.outbox_bytes);
    sh_metric_one(out, "shoal_spool_items", "gauge", "Items owed to the aggregator.",
                  (double)s->node.outbox_items);
    sh_metric_family(out, "shoal_spool_dropped_total", "counter",
                     "Items given up: by class when its quota was passed, and inferences and "
                     "feedback when the store was full.");
    for (int c = 0; c < SH_CLASSES; c++) {
        char reason[32];
        snprintf(reason, sizeof reason, "%s-quota", classes[c]);
        labelled(out, "shoal_spool_dropped_total", "reason", reason, (double)s->node.dropped[c]);
    }
    labelled(out, "shoal_spool_dropped_total", "reason", "store-full",
             (double)(s->node.refused_full + s->refused_full));
    sh_metric_one(out, "shoal_stores_lost_total", "counter",
                  "Stores that were corrupt, set aside and begun anew.", (double)s->stores_lost);
    sh_metric_one(out, "shoal_sync_link_up", "gauge",
                  "1 while the aggregator is connected and lets the node in.", s->let_in);
    sh_metric_one(out, "shoal_sync_last_success_timestamp_seconds", "gauge",
                  "When the last plan came from the aggregator; 0: never.",
                  (double)s->node.last_sync_ms / 1000);
}

static void device_metrics(const daemon_stats *s, sh_buf *out)
{
    static const char *const policies[SH_POLICIES] = {"feedback", "windows", "download", "train"};
    static const char *const conditions[] = {"store-full", "metered", "battery", "busy",
                                             "hot",        "hours",   "budget",  "clock"};
    static const char *const bytes = "shoal_sync_bytes";
    sh_metric_family(out, "shoal_policy_holds", "gauge",
                     "1 while the policy lets its work be done.");
    for (int i = 0; i < SH_POLICIES; i++)
        labelled(out, "shoal_policy_holds", "policy", policies[i], s->node.holds[i]);
    sh_metric_family(out, "shoal_condition", "gauge", "1 while the device is in this condition.");
    for (size_t i = 0; i < SH_COUNT(conditions); i++)
        labelled(out, "shoal_condition", "condition", conditions[i], s->node.conditions >> i & 1);
    sh_metric_family(out, bytes, "gauge", "Bytes of messages in this day and month.");
    labelled(out, bytes, "period", "up-day", (double)s->node.bytes_up_day);
    labelled(out, bytes, "period", "down-day", (double)s->node.bytes_down_day);
    labelled(out, bytes, "period", "up-month", (double)s->node.bytes_up_month);
    labelled(out, bytes, "period", "down-month", (double)s->node.bytes_down_month);
    sh_metric_one(out, "shoal_clock_trusted", "gauge",
                  "1 when the aggregator's signed time was seen since the start.",
                  s->node.clock_trusted);
}

static void metrics(void *arg, sh_buf *out)
{
    sh_daemon *d = arg;
    daemon_stats s = read_stats(d);
    quality_metrics(&s, out);
    sync_metrics(&s, out);
    device_metrics(&s, out);
    sh_metric_one(out, "shoal_store_bytes", "gauge", "Bytes that the store takes.",
                  (double)s.store_bytes);
    sh_metric_one(out, "shoal_store_full", "gauge", "1 while the store takes no more.", s.full);
    sh_metric_family(out, "shoal_training_runs_total", "counter", "Trainings that ended.");
    labelled(out, "shoal_training_runs_total", "result", "ok", (double)s.trainings_ok);
    labelled(out, "shoal_training_runs_total", "result", "failed", (double)s.trainings_failed);
    labelled(out, "shoal_training_runs_total", "result", "cancelled",
             (double)s.trainings_cancelled);
    sh_metric_one(out, "process_start_time_seconds", "gauge", "When the process started.",
                  (double)d->started_wall_ms / 1000);
}

sh_status daemon_api_create(sh_daemon *d, sh_error *err)
{
    const sh_node_settings_values *v = &d->settings->v;
    sh_api_options o = {
        .engine = d->engine,
        .backend = {.arg = d, .feedback = take_feedback, .metrics = metrics, .healthy = is_healthy},
        .model_name = v->http_model_name,
        .address = v->http_address,
        .port = (uint16_t)v->http_port,
        .token = d->token[0] ? d->token : NULL,
        .connections_max = (uint32_t)v->http_connections_max};
    return sh_api_create(&o, &d->api, err);
}
