/*
 * The core between its store and the rest of the daemon. A batch is one write transaction with one
 * step or several; what the steps ask for is kept until its commit.
 *
 * When a step or a commit fails, the transaction is aborted and the core made again from the store:
 * the same path as after a crash.
 *
 * A store that was full counts as full for a pause, which doubles with each try that finds it so
 * again. Until it is over nothing is begun that adds rows: timers wait, inferences are dropped and
 * counted, ratings are refused. The core is made again at once, with the store's reserve, and small
 * messages are taken in with the reserve, too: acknowledgements make room. Where the reserve itself
 * is used up, the core is made again after the pause; so is the store where there is none yet.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon_internal.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

#define KEPT_MAX            (DAEMON_WAITING_MAX * SH_NODE_ACTIONS_MAX * 2)
#define REMAKE_MAX          4u /* in a row: each of the two slots may turn out to be lost */
#define STATS_EVERY_MS      1000u
#define RESERVE_MESSAGE_MAX 4096u /* bytes; what is longer brings chunks */

uint64_t daemon_now(const sh_daemon *d)
{
    return d->base_ms + (sh_clock_boot_ms() - d->boot_ms);
}

/* ---- actions ---- */

static void log_window(sh_daemon *d, uint64_t index)
{
    sh_node_status s = sh_node_get_status(d->node);
    sh_log(SH_LOG_INFO, "window", "index=%llu release=%llu", (unsigned long long)index,
           (unsigned long long)s.active_version);
    d->last_window = d->window;
    d->window = (daemon_window){0};
}

static void log_alarm(sh_daemon *d, uint64_t metric)
{
    sh_node_status s = sh_node_get_status(d->node);
    double e = metric < SH_METRICS ? s.log_evalue[metric] : 0;
    sh_log(SH_LOG_WARN, "alarm", "metric=%s window=%llu log_evalue=%.3f",
           sh_metric_name((sh_metric)metric), (unsigned long long)s.windows, e);
}

/* The aggregator has let us in: it knows our key from now on. */
static void forget_token(sh_daemon *d)
{
    if (d->options.token.n == 0)
        return;
    d->options.token = (sh_bytes){0};
    explicit_bzero(&d->enrol_token, sizeof d->enrol_token);
    if (unlink(SH_NODE_FILE_TOKEN) != 0)
        sh_log(SH_LOG_WARN, "token_not_removed", "file=%s error=\"%s\"", SH_NODE_FILE_TOKEN,
               strerror(errno));
}

/* A link on which the aggregator refuses everything is up for the network only. */
const char *daemon_refused(const sh_daemon *d)
{
    if (d->net_up)
        return d->node ? sh_node_rejected(d->node) : NULL;
    return d->net_refused ? "the aggregator does not know this key, or it was revoked there" : NULL;
}

static void take_note(sh_daemon *d, sh_node_note note, uint64_t number)
{
    unsigned long long n = number;
    switch (note) {
    case SH_NOTE_ALARM:
        log_alarm(d, number);
        break;
    case SH_NOTE_WINDOW:
        log_window(d, number);
        break;
    case SH_NOTE_UPDATE_MADE:
        sh_log(SH_LOG_INFO, "update_made", "round=%llu", n);
        break;
    case SH_NOTE_UPDATE_NOT_BETTER:
        sh_log(SH_LOG_INFO, "update_not_better", "round=%llu", n);
        break;
    case SH_NOTE_UPDATE_ACKED:
        sh_log(SH_LOG_INFO, "update_acked", "seq=%llu", n);
        break;
    case SH_NOTE_RELEASE_ACTIVE:
        sh_log(SH_LOG_INFO, "release_active", "version=%llu slot=%u", n,
               sh_node_get_status(d->node).active_slot);
        break;
    case SH_NOTE_RELEASE_CONFIRMED:
        sh_log(SH_LOG_INFO, "release_confirmed", "version=%llu", n);
        break;
    case SH_NOTE_RELEASE_REFUSED:
        sh_log(SH_LOG_WARN, "release_refused", "version=%llu", n);
        break;
    case SH_NOTE_DROPPED:
        sh_log(SH_LOG_WARN, "dropped", "number=%llu", n);
        break;
    case SH_NOTE_TRAIN_STARTED:
        sh_log(SH_LOG_INFO, "train_started", "round=%llu", n);
        break;
    case SH_NOTE_JOB_FAILED:
        sh_log(SH_LOG_WARN, "job_failed", "status=%s", sh_status_name((sh_status)number));
        break;
    case SH_NOTE_CHECKED_IN:
        forget_token(d);
        sh_log(SH_LOG_INFO, "checked_in", "number=%llu", n);
        break;
    case SH_NOTE_EVALUATED:
        sh_log(SH_LOG_INFO, "evaluated", "candidate=%llu", n);
        break;
    case SH_NOTE_ERASED:
        sh_log(SH_LOG_INFO, "erased", "rows=%llu", n);
        d->erase.done = true;
        if (!d->erase.wanted) /* or it is of a life before: its rewriting was not done */
            d->erase.running = true;
        d->erase.rows = number;
        break;
    case SH_NOTE_TRAIN_STOPPED:
        sh_log(SH_LOG_INFO, "train_stopped", "round=%llu reason=policy", n);
        break;
    case SH_NOTE_CLOCK_SET:
        sh_log(SH_LOG_WARN, "clock", "off_seconds=%llu set_by=aggregator", n);
        break;
    case SH_NOTE_BUDGET:
        sh_log(SH_LOG_WARN, "budget", "state=used_up direction=%s", number == 0 ? "up" : "down");
        break;
    case SH_NOTE_REJECTED:
        sh_log(SH_LOG_WARN, "link", "state=refused reason=%s text=\"%s\"",
               d->options.token.n > 0 ? "key-or-token" : "key", daemon_refused(d));
        d->net_refused = true;
        break;
    case SH_NOTE_MANIFEST_LOST:
        sh_log(SH_LOG_ERROR, "manifest_lost", "version=%llu state=on-its-way", n);
        break;
    case SH_NOTE_RENEWED:
        sh_log(SH_LOG_WARN, "store_copied", "renewals=%llu", n);
        break;
    }
}

static void send_message(sh_daemon *d, const sh_buf *message)
{
    sh_error err = {0};
    if (!d->client)
        return;
    sh_status status = sh_net_client_send(d->client, message->data, message->len, &err);
    if (status != SH_OK && status != SH_ERR_LIMIT) /* the core sends it again in both cases */
        sh_log(SH_LOG_WARN, "send_failed", "status=%s", sh_status_name(status));
}

static void activate(sh_daemon *d, uint64_t version, uint32_t slot)
{
    sh_error err = {0};
    if (d->serving && d->active_version == version && d->active_slot == slot)
        return;
    if (d->serving) /* at the start there is nothing to swap */
        daemon_failpoint(d, "node.activate");
    sh_status status = daemon_activate(d, version, slot, &err);
    if (status == SH_OK)
        return;
    sh_log(SH_LOG_ERROR, "slot_lost", "slot=%u version=%llu error=\"%s\"", slot,
           (unsigned long long)version, err.text);
    if (d->lost_slots & 1u << slot || status != SH_ERR_CORRUPT) {
        d->fatal = status; /* nothing is left to run */
        d->fatal_err = err;
        return;
    }
    d->lost_slots |= 1u << slot;
    d->remake = true;
}

static void carry_out(sh_daemon *d, sh_node_action *actions, size_t n)
{
    for (size_t i = 0; i < n && d->fatal == SH_OK; i++) {
        sh_node_action *a = &actions[i];
        switch (a->kind) {
        case SH_NODE_SEND:
            send_message(d, &a->message);
            break;
        case SH_NODE_SET_TIMER:
            d->timer_at_ms = SH_MAX(a->at_ms, 1);
            break;
        case SH_NODE_START_JOB:
            daemon_start_job(d, &a->job);
            break;
        case SH_NODE_CANCEL_JOB: /* of others the result comes, and is of an id that is unknown */
            if (a->job.id == d->child_job)
                daemon_cancel_training(d);
            break;
        case SH_NODE_ACTIVATE:
            activate(d, a->version, a->slot);
            break;
        case SH_NODE_SWITCH_KEY:
            d->rotate.answered = d->rotate.pending && !d->rotate.trying &&
                                 sh_hash_equal(&a->key, &d->rotate.next.public_key);
            break;
        case SH_NODE_NOTE:
            take_note(d, a->note, a->number);
            break;
        }
    }
}

static void clear_kept(sh_daemon *d)
{
    for (size_t i = 0; i < d->n_kept; i++) {
        sh_buf_release(&d->kept[i].message);
        sh_buf_release(&d->kept[i].job_chunks);
    }
    d->n_kept = 0;
}

/* The step's actions go behind those of the batch. */
static sh_status keep(sh_daemon *d, sh_error *err)
{
    size_t n = d->actions.n;
    if (sh_array_reserve((void **)&d->kept, &d->kept_cap, d->n_kept + n, sizeof *d->kept,
                         KEPT_MAX) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, "node: no memory for %zu actions", n);
    memcpy(d->kept + d->n_kept, d->actions.items, n * sizeof *d->kept);
    memset(d->actions.items, 0, n * sizeof *d->kept);
    d->n_kept += n;
    d->actions.n = 0;
    return SH_OK;
}

/* ---- a full store ---- */

static bool counts_as_full(const sh_daemon *d)
{
    return daemon_full_counts(&d->full, sh_clock_mono_ms());
}

static void found_full(sh_daemon *d, const sh_error *err)
{
    bool first = !d->full.is;
    uint64_t now = sh_clock_mono_ms();
    daemon_full_found(&d->full, now);
    if (first)
        sh_log(SH_LOG_ERROR, "store", "state=full error=\"%s\"", err->text);
    sh_log(SH_LOG_DEBUG, "store_pause", "ms=%llu at_ms=%llu", (unsigned long long)d->full.pause_ms,
           (unsigned long long)now);
}

/* ---- the core ---- */

static sh_status link_step(sh_daemon *d, sh_error *err);

sh_status daemon_make_core(sh_daemon *d, sh_error *err)
{
    sh_status status = SH_OK;
    d->remake = false;
    sh_node_destroy(&d->node);
    daemon_cancel_training(d); /* the core no longer knows it */
    d->timer_at_ms = 0;
    (void)sh_rng_u64(&d->rng); /* the new life draws other numbers */
    d->options.lost_slots = d->lost_slots;
    SH_GOTO(sh_txn_begin(d->store, SH_TXN_RESERVE, &d->txn, err));
    SH_GOTO(sh_node_create(&d->options, (sh_bytes){d->genesis.data, d->genesis.len}, daemon_now(d),
                           &d->rng, d->txn, &d->actions, &d->node, err));
    SH_GOTO(sh_txn_commit(&d->txn, err));
    d->reserve_used_up = false;
    d->lost_slots = 0;
    d->lives++;
    sh_log(SH_LOG_DEBUG, "core", "life=%llu", (unsigned long long)d->lives);
    SH_GOTO(keep(d, err));
    carry_out(d, d->kept, d->n_kept);
    clear_kept(d);
    daemon_signals_repeat(d);
    status = link_step(d, err);
    return status == SH_ERR_FULL ? SH_OK : status; /* remake says it */
cleanup:
    sh_txn_abort(&d->txn);
    sh_node_destroy(&d->node);
    sh_node_actions_clear(&d->actions);
    return status;
}

static sh_status settle_once(sh_daemon *d, sh_error *err)
{
    if (d->store_corrupt)
        SH_TRY(daemon_store_replace(d, err));
    else if (!d->store)
        SH_TRY(daemon_store_open(d, err));
    SH_TRY(daemon_make_core(d, err));
    if (d->node && d->resume_erasure) {
        d->resume_erasure = false;
        daemon_resume_erasure(d);
    }
    return SH_OK;
}

void daemon_settle(sh_daemon *d)
{
    for (unsigned i = 0; d->remake && d->fatal == SH_OK; i++) {
        sh_error err = {0};
        bool fresh = d->store_corrupt; /* a store that was just made is not set aside, too */
        if (fresh && !daemon_worker_idle(d))
            return; /* it reads the store; its end wakes the loop */
        if (!fresh && d->reserve_used_up && counts_as_full(d))
            return;
        sh_status status = settle_once(d, &err);
        if (status == SH_ERR_FULL) {
            if (!counts_as_full(d))
                found_full(d, &err);
            d->reserve_used_up = d->remake = true;
            return;
        }
        if (status == SH_ERR_CORRUPT && !fresh && d->fatal == SH_OK) {
            d->store_corrupt = d->remake = true;
            d->corrupt_err = err;
            continue;
        }
        if (status != SH_OK || (d->remake && i + 1 == REMAKE_MAX)) {
            d->fatal = status != SH_OK ? status : SH_ERR_CORRUPT;
            if (status != SH_OK)
                d->fatal_err = err;
            else
                sh_fail(&d->fatal_err, d->fatal, "no model file is what its manifest says");
        }
    }
}

/* ---- batches ---- */

static sh_status batch_begin(sh_daemon *d, int kind, sh_error *err)
{
    daemon_settle(d);
    if (!d->node)
        return sh_fail(err, SH_ERR_FULL, "the node's store is full");
    d->kind = kind;
    return sh_txn_begin(d->store, kind, &d->txn, err);
}

static sh_status batch_step(sh_daemon *d, const sh_node_event *event, sh_error *err)
{
    sh_node_event e = *event;
    e.now_ms = daemon_now(d);
    e.wall_ms = sh_clock_wall_ms();
    SH_TRY(sh_node_step(d->node, &e, d->txn, &d->actions, err));
    return keep(d, err);
}

/* points: the fail points are here. Signals have none: they come at any time and leave nothing. */
static sh_status batch_commit(sh_daemon *d, bool points, sh_error *err)
{
    if (points)
        daemon_failpoint(d, "node.before_commit");
    SH_TRY(sh_txn_commit(&d->txn, err));
    if (points)
        daemon_failpoint(d, "node.after_commit");
    d->failures = 0;
    if (d->kind == SH_TXN_WRITE && daemon_full_written(&d->full, sh_clock_mono_ms()))
        sh_log(SH_LOG_INFO, "store", "state=writable");
    /* Carrying out may step again (a job that ends at once does not: it comes by the inbox). */
    carry_out(d, d->kept, d->n_kept);
    clear_kept(d);
    return SH_OK;
}

static void batch_fail(sh_daemon *d, sh_status status, const sh_error *err)
{
    sh_txn_abort(&d->txn);
    sh_node_actions_clear(&d->actions);
    clear_kept(d);
    d->remake = true;
    if (status == SH_ERR_CORRUPT && !d->store_corrupt) {
        d->store_corrupt = true;
        d->corrupt_err = *err;
        sh_node_destroy(&d->node);
        return;
    }
    if (status == SH_ERR_FULL) {
        if (d->node) { /* or there was none to begin with */
            found_full(d, err);
            d->reserve_used_up = d->kind == SH_TXN_RESERVE;
        }
        sh_node_destroy(&d->node);
        return;
    }
    sh_log(SH_LOG_ERROR, "step_failed", "status=%s error=\"%s\"", sh_status_name(status),
           err->text);
    if (++d->failures >= DAEMON_FAILURES_MAX) {
        d->fatal = status;
        d->fatal_err = *err;
    }
}

static sh_status step_as(sh_daemon *d, const sh_node_event *event, int kind, sh_error *err)
{
    sh_status status = SH_OK;
    SH_GOTO(batch_begin(d, kind, err));
    SH_GOTO(batch_step(d, event, err));
    SH_GOTO(batch_commit(d, event->kind != SH_NODE_SIGNALS, err));
    return SH_OK;
cleanup:
    batch_fail(d, status, err);
    return status;
}

static sh_status link_step(sh_daemon *d, sh_error *err)
{
    sh_node_event e = {.kind = SH_NODE_LINK_UP};
    int kind = counts_as_full(d) ? SH_TXN_RESERVE : SH_TXN_WRITE;
    return d->net_up && d->node && !d->remake ? step_as(d, &e, kind, err) : SH_OK;
}

/* What is taken in with the reserve while the store counts as full. */
static bool may_reserve(const sh_node_event *event)
{
    switch (event->kind) {
    case SH_NODE_LINK_UP:
    case SH_NODE_LINK_DOWN:
        return true;
    case SH_NODE_MESSAGE:
        return event->message.n <= RESERVE_MESSAGE_MAX;
    default:
        return false;
    }
}

sh_status daemon_step(sh_daemon *d, const sh_node_event *event, sh_error *err)
{
    sh_error local = {0};
    sh_error *e = err ? err : &local;
    /* An installation's end makes room, too: its chunks go. It begins with the reserve: a core that
     * is made again gives the job another number, and would have it done again for ever. */
    bool ends_job = event->kind == SH_NODE_JOB_DONE && event->result.update.n == 0;
    /* An erasure goes on by timers. */
    bool erases = event->kind == SH_NODE_ERASE ||
                  (event->kind == SH_NODE_TIMER && d->erase.running && !d->erase.done);
    if (erases)
        d->full.until_ms = SH_MIN(d->full.until_ms, sh_clock_mono_ms()); /* it makes room */
    if (counts_as_full(d) && may_reserve(event))
        return step_as(d, event, SH_TXN_RESERVE, e);
    if (counts_as_full(d) && event->kind == SH_NODE_MESSAGE) /* the peer sends it again */
        return sh_fail(e, SH_ERR_FULL, "the node's store is full");
    sh_status status = step_as(d, event, erases || ends_job ? SH_TXN_RESERVE : SH_TXN_WRITE, e);
    if (status == SH_ERR_FULL && may_reserve(event) && d->fatal == SH_OK)
        status = step_as(d, event, SH_TXN_RESERVE, e);
    return status;
}

/* ---- inferences and ratings ---- */

static uint32_t distance(const int32_t *a, uint32_t n_a, const int32_t *b, uint32_t n_b)
{
    uint32_t row[DAEMON_RATING_DISTANCE_MAX + 1];
    n_a = SH_MIN(n_a, DAEMON_RATING_DISTANCE_MAX);
    n_b = SH_MIN(n_b, n_a); /* the author goes on where the proposal ends: that is no edit */
    for (uint32_t j = 0; j <= n_b; j++)
        row[j] = j;
    for (uint32_t i = 1; i <= n_a; i++) {
        uint32_t diagonal = row[0];
        row[0] = i;
        for (uint32_t j = 1; j <= n_b; j++) {
            uint32_t above = row[j], change = diagonal + (a[i - 1] != b[j - 1]);
            row[j] = SH_MIN(change, SH_MIN(above, row[j - 1]) + 1);
            diagonal = above;
        }
    }
    return row[n_b];
}

/* An error is the store's; a refusal goes into rating->status. */
static sh_status rate(sh_daemon *d, daemon_rating *rating, sh_error *err)
{
    sh_completion_row row;
    sh_buf copy;
    sh_node_event e = {.kind = SH_NODE_RATING, .rating = rating->rating};
    sh_buf_init(&copy, SH_NODE_COMPLETION_TOKENS_MAX * sizeof(int32_t));
    sh_status status = sh_node_get_completion(d->txn, rating->rating.id, &copy, &row, err);
    rating->status = SH_OK;
    if (status == SH_ERR_NOT_FOUND) {
        rating->status =
            sh_fail(&rating->err, SH_ERR_NOT_FOUND, "no completion of this id is kept any more");
        status = SH_OK;
    } else if (status == SH_OK && row.rated == (uint8_t)rating->rating.kind) {
        /* said again: nothing changes */
    } else if (status == SH_OK && row.rated != SH_FEEDBACK_NONE) {
        rating->status =
            sh_fail(&rating->err, SH_ERR_EXISTS, "this completion was rated otherwise");
    } else if (status == SH_OK) {
        uint32_t edits = rating->rating.n ? distance(row.tokens + row.n_context, row.n,
                                                     rating->rating.tokens, rating->rating.n)
                                          : 0;
        e.rating.edit_distance = (uint16_t)(rating->rating.kind == SH_FEEDBACK_ACCEPT ? 0 : edits);
        status = batch_step(d, &e, err);
        d->window.rated++;
        d->window.accepted += rating->rating.kind == SH_FEEDBACK_ACCEPT;
    }
    sh_buf_release(&copy);
    return status;
}

static void count_inference(sh_daemon *d, const sh_record *record)
{
    d->window.inferences++;
    if (record->prompt_nll > 0) { /* neither none nor NaN */
        d->window.nll += record->prompt_nll;
        d->window.nll_n++;
    }
}

typedef struct {
    const daemon_inference *inferences;
    size_t n;
    daemon_rating *const *ratings;
    size_t n_ratings;
} post;

static sh_status commit_post(sh_daemon *d, const post *p, sh_error *err)
{
    sh_status status = SH_OK;
    SH_GOTO(batch_begin(d, SH_TXN_WRITE, err));
    for (size_t i = 0; i < p->n; i++) {
        sh_node_event e = {.kind = SH_NODE_INFERENCE,
                           .record = p->inferences[i].record,
                           .completion = p->inferences[i].row};
        SH_GOTO(batch_step(d, &e, err));
        count_inference(d, &p->inferences[i].record);
    }
    for (size_t i = 0; i < p->n_ratings; i++)
        SH_GOTO(rate(d, p->ratings[i], err));
    SH_GOTO(batch_commit(d, true, err));
    return SH_OK;
cleanup:
    batch_fail(d, status, err);
    return status;
}

/* Commits it; what fails together is tried one by one, so that one bad item takes none with it. */
static void commit_or_drop(sh_daemon *d, const post *p)
{
    sh_error err = {0};
    sh_status status;
    if (counts_as_full(d))
        status = sh_fail(&err, SH_ERR_FULL, "the node's store is full");
    else
        status = commit_post(d, p, &err);
    if (status != SH_OK && status != SH_ERR_FULL && p->n + p->n_ratings > 1 && d->fatal == SH_OK) {
        for (size_t i = 0; i < p->n; i++)
            commit_or_drop(d, &(post){.inferences = p->inferences + i, .n = 1});
        for (size_t i = 0; i < p->n_ratings; i++)
            commit_or_drop(d, &(post){.ratings = p->ratings + i, .n_ratings = 1});
        return;
    }
    if (status != SH_OK) {
        d->refused_full += p->n + p->n_ratings;
    }
    for (size_t i = 0; i < p->n_ratings; i++) {
        daemon_rating *r = p->ratings[i];
        if (status == SH_OK)
            daemon_inbox_answer(&d->inbox, r, r->status, &r->err);
        else
            daemon_inbox_answer(&d->inbox, r, status, &err);
    }
}

void daemon_flush(sh_daemon *d)
{
    static daemon_inference inferences[DAEMON_WAITING_MAX]; /* one loop; large */
    static daemon_rating *ratings[DAEMON_RATINGS_MAX];
    /* Ratings first: what they rate was posted before. */
    size_t n_ratings = daemon_inbox_take_ratings(&d->inbox, ratings, DAEMON_RATINGS_MAX);
    size_t n = daemon_inbox_take_waiting(&d->inbox, inferences, DAEMON_WAITING_MAX);
    if (n + n_ratings == 0)
        return;
    commit_or_drop(d, &(post){inferences, n, ratings, n_ratings});
    for (size_t i = 0; i < n; i++)
        free((void *)inferences[i].row.tokens);
}

/* ---- messages ---- */

static sh_status commit_messages(sh_daemon *d, const sh_buf *messages, size_t n, sh_error *err)
{
    sh_status status = SH_OK;
    SH_GOTO(batch_begin(d, SH_TXN_WRITE, err));
    for (size_t i = 0; i < n; i++) {
        sh_node_event e = {.kind = SH_NODE_MESSAGE, .message = {messages[i].data, messages[i].len}};
        SH_GOTO(batch_step(d, &e, err));
    }
    SH_GOTO(batch_commit(d, true, err));
    return SH_OK;
cleanup:
    batch_fail(d, status, err);
    return status;
}

static void end_messages(sh_daemon *d, sh_buf *messages, size_t n)
{
    sh_error err = {0};
    if (n && (counts_as_full(d) || commit_messages(d, messages, n, &err) == SH_ERR_FULL))
        for (size_t i = 0; i < n && d->fatal == SH_OK; i++) {
            sh_node_event e = {.kind = SH_NODE_MESSAGE,
                               .message = {messages[i].data, messages[i].len}};
            (void)daemon_step(d, &e, &err);
        }
    for (size_t i = 0; i < n; i++)
        sh_buf_release(&messages[i]);
}

static void link_changed(sh_daemon *d, sh_net_event_kind kind)
{
    sh_node_event e = {.kind = kind == SH_NET_UP ? SH_NODE_LINK_UP : SH_NODE_LINK_DOWN};
    bool up = kind == SH_NET_UP, refused = kind == SH_NET_REFUSED;
    if (!refused || !d->net_refused)
        sh_log(refused ? SH_LOG_WARN : SH_LOG_INFO, "link", "state=%s",
               up        ? "up"
               : refused ? "refused"
                         : "down");
    d->net_refused = refused;
    if (up == d->net_up)
        return;
    d->net_up = up;
    (void)daemon_step(d, &e, NULL);
}

void daemon_take_messages(sh_daemon *d)
{
    sh_buf messages[DAEMON_MESSAGES_MAX];
    sh_error err = {0};
    size_t n = 0;
    while (n < DAEMON_MESSAGES_MAX && d->fatal == SH_OK) {
        sh_net_event event;
        sh_status status = sh_net_client_next(d->client, &event, &err);
        if (status != SH_OK) {
            sh_log(SH_LOG_WARN, "net", "error=\"%s\"", err.text);
            break;
        }
        if (event.kind == SH_NET_NONE)
            break;
        if (event.kind != SH_NET_MESSAGE) {
            end_messages(d, messages, n);
            n = 0;
            link_changed(d, event.kind);
            continue;
        }
        sh_buf_init(&messages[n], SH_WIRE_MESSAGE_MAX);
        if (sh_buf_append(&messages[n], event.data, event.n) == SH_OK)
            n++;
        else
            sh_buf_release(&messages[n]); /* the peer sends it again */
    }
    end_messages(d, messages, n);
}

void daemon_run_timer(sh_daemon *d)
{
    sh_node_event e = {.kind = SH_NODE_TIMER};
    bool erases = d->erase.running && !d->erase.done;
    if (d->timer_at_ms == 0 || !d->node || daemon_now(d) < d->timer_at_ms ||
        (counts_as_full(d) && !erases))
        return;
    d->timer_at_ms = 0;
    (void)daemon_step(d, &e, NULL);
}

void daemon_refresh_stats(sh_daemon *d, bool now)
{
    uint64_t ms = sh_clock_mono_ms();
    bool bytes = now || ms >= d->stats_due_ms;
    uint64_t used = bytes ? daemon_store_bytes(d) : 0;
    if (bytes)
        d->stats_due_ms = ms + STATS_EVERY_MS;
    const daemon_window *w = d->last_window.inferences ? &d->last_window : &d->window;
    pthread_mutex_lock(&d->stats_lock);
    daemon_stats *s = &d->stats;
    s->has_node = d->node != NULL;
    if (d->node)
        s->node = sh_node_get_status(d->node);
    s->full = d->full.is;
    s->let_in = d->net_up && !daemon_refused(d);
    s->refused_full = d->refused_full;
    s->stores_lost = d->stores_lost;
    if (bytes)
        s->store_bytes = used;
    s->window_n = w->nll_n;
    s->rated_n = w->rated;
    s->nll = w->nll_n ? w->nll / (double)w->nll_n : 0;
    s->accept_ratio = w->rated ? (double)w->accepted / (double)w->rated : 0;
    pthread_mutex_unlock(&d->stats_lock);
}
