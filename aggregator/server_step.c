/* Transactions around the core's steps, and what follows a commit. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/server_internal.h"
#include "shared/base/clock.h"
#include "shared/base/log.h"

#define QUEUED_MAX        (SERVER_GROUP_STEPS * SH_COORD_ACTIONS_MAX)
#define BOOT_PAUSE_MS     1000u
#define BOOT_PAUSE_MAX_MS 60000u
#define FETCH_BYTES       (64u << 10) /* of a group, from which on others are read meanwhile */
#define GONE_DEPTH        4           /* peers found gone while others are told so */
#define HOLD_MS           60000u
#define HOLD_MAX_MS       3600000u

static void fall(sh_server *s, const sh_error *err);

void server_failpoint(sh_server *s, const char *name)
{
    if (!sh_failpoint_hit(&s->failpoints, name))
        return;
    sh_log(SH_LOG_WARN, "failpoint", "name=%s", name);
    raise(SIGKILL);
}

/* ---- actions ---- */

static void log_note(const sh_coord_action *a)
{
    char node[SH_HASH_HEX_BYTES];
    unsigned long long number = a->number;
    sh_hex(a->node.b, sizeof a->node.b, node);
    switch (a->note) {
    case SH_CNOTE_ENROLLED:
        sh_log(SH_LOG_INFO, "enrolled", "node=%s nodes=%llu", node, number);
        break;
    case SH_CNOTE_UPDATE_IN:
        sh_log(SH_LOG_INFO, "update_in", "node=%.16s buffered=%llu", node, number);
        break;
    case SH_CNOTE_MERGE_STARTED:
        sh_log(SH_LOG_INFO, "merge_started", "candidate=%llu", number);
        break;
    case SH_CNOTE_GATE_STARTED:
        sh_log(SH_LOG_INFO, "gate_started", "candidate=%llu", number);
        break;
    case SH_CNOTE_CANARY_STARTED:
        sh_log(SH_LOG_INFO, "canary_started", "candidate=%llu", number);
        break;
    case SH_CNOTE_INCONCLUSIVE:
        sh_log(SH_LOG_WARN, "inconclusive", "candidate=%llu", number);
        break;
    case SH_CNOTE_EVALUATION_IN:
        sh_log(SH_LOG_INFO, "evaluation_in", "node=%.16s candidate=%llu", node, number);
        break;
    case SH_CNOTE_RELEASED:
        sh_log(SH_LOG_INFO, "released", "version=%llu", number);
        break;
    case SH_CNOTE_CANDIDATE_REFUSED:
        sh_log(SH_LOG_WARN, "candidate_refused", "candidate=%llu", number);
        break;
    case SH_CNOTE_UPDATE_REFUSED:
        sh_log(SH_LOG_WARN, "update_refused", "node=%.16s reason=%s", node,
               sh_reason_name((sh_reason)number));
        break;
    case SH_CNOTE_ROUNDS_BEGIN:
        sh_log(SH_LOG_INFO, "rounds_begin", "drifting=%llu", number);
        break;
    case SH_CNOTE_CLOSED:
        sh_log(SH_LOG_INFO, "closed", "version=%llu", number);
        break;
    case SH_CNOTE_JOB_FAILED:
        sh_log(SH_LOG_ERROR, "job_failed", "code=%s", sh_status_name((sh_status)number));
        break;
    case SH_CNOTE_BAD_MESSAGE:
        sh_log(SH_LOG_WARN, "bad_message", "node=%.16s code=%s", node,
               sh_status_name((sh_status)number));
        break;
    case SH_CNOTE_ROLLED_BACK:
        sh_log(SH_LOG_WARN, "rolled_back", "version=%llu", number);
        break;
    case SH_CNOTE_COMMAND_REFUSED:
        sh_log(SH_LOG_WARN, "command_refused", "command=%llu", number);
        break;
    case SH_CNOTE_RESTORED:
        sh_log(SH_LOG_WARN, "restored", "version_above=%llu", number);
        break;
    case SH_CNOTE_DRIFTING:
        sh_log(SH_LOG_INFO, "drifting", "node=%.16s nodes=%llu", node, number);
        break;
    case SH_CNOTE_RELAYED:
        sh_log(SH_LOG_INFO, "relayed", "seq=%llu", number);
        break;
    case SH_CNOTE_RELAY_ACKED:
        sh_log(SH_LOG_INFO, "relay_acked", "seq=%llu", number);
        break;
    case SH_CNOTE_TAKEN:
        sh_log(SH_LOG_INFO, "taken", "version=%llu", number);
        break;
    case SH_CNOTE_PARENT_RENEWED:
        sh_log(SH_LOG_WARN, "parent_renewed", "reason=copy");
        break;
    case SH_CNOTE_PARENT_REFUSED:
        sh_log(SH_LOG_WARN, "parent_refused", "reason=key");
        break;
    case SH_CNOTE_MANIFEST_LOST:
        sh_log(SH_LOG_WARN, "manifest_lost", "fetched=again");
        break;
    case SH_CNOTE_ROTATED:
        sh_log(SH_LOG_INFO, "rotated", "node=%.16s rotations=%llu", node, number);
        break;
    case SH_CNOTE_LIMITED:
        sh_log(SH_LOG_WARN, "limited", "node=%.16s disconnected=%llu", node, number);
        break;
    case SH_CNOTE_CLONED:
        sh_log(SH_LOG_WARN, "cloned", "node=%.16s clones=%llu", node, number);
        break;
    }
}

static void set_key(sh_server *s, const sh_coord_action *a)
{
    sh_error err = {0};
    if (server_keys_set(&s->allowed, &a->node, a->access, &err) != SH_OK)
        sh_log(SH_LOG_ERROR, "key_not_set", "error=\"%s\"", err.text);
    if (a->access != SH_KEY_ALLOWED)
        sh_net_server_drop(s->nodes, &a->node);
}

/* Unknown keys may come while there are tokens, and none of them to stay without a word. */
static void set_guests(sh_server *s)
{
    sh_coord_status now = sh_coord_get_status(s->coord);
    server_keys_open(&s->allowed, now.tokens > 0 ? now.tokens_until_ms : 0);
    sh_net_server_set_silence(s->nodes, now.tokens > 0 ? SERVER_GUEST_SILENCE_MS : 0);
}

static void take_note(sh_server *s, const sh_coord_action *a)
{
    log_note(a);
    if (a->note == SH_CNOTE_COMMAND_REFUSED)
        s->command_refused = true;
    if (a->note == SH_CNOTE_RELEASED || a->note == SH_CNOTE_CANDIDATE_REFUSED ||
        a->note == SH_CNOTE_ROLLED_BACK)
        s->prune_due = true;
}

static void start_job(sh_server *s, sh_coord_action *a)
{
    sh_error err = {0};
    server_task_kind kind = a->job.kind == SH_COORD_MERGE   ? TASK_MERGE
                            : a->job.kind == SH_COORD_STACK ? TASK_STACK
                                                            : TASK_GATE;
    server_task *task = server_task_create(kind);
    sh_status status = SH_ERR_NO_MEMORY;
    if (task != NULL) {
        task->job = a->job;
        task->inputs = a->job.inputs;
        task->job.inputs = task->inputs;
        a->job.inputs = NULL;
        status = server_worker_submit(&s->worker, &task, &err);
        server_task_destroy(&task);
    }
    if (status == SH_OK)
        return;
    (void)sh_fail(&err, status, "a job could not be started: %s", sh_status_name(status));
    fall(s, &err); /* the next boot starts it again */
}

/* What could not be sent is asked for again by the node. */
static bool send_message(sh_server *s, const sh_coord_action *a)
{
    sh_error err = {0};
    sh_status status =
        sh_net_server_send(s->nodes, &a->node, a->message.data, a->message.len, &err);
    s->counters.messages_out += status == SH_OK;
    s->counters.messages_dropped += status != SH_OK;
    if (status != SH_OK && status != SH_ERR_NOT_FOUND && status != SH_ERR_LIMIT)
        sh_log(SH_LOG_WARN, "send_failed", "error=\"%s\"", err.text);
    return status != SH_ERR_NOT_FOUND;
}

/* Takes the queue over; peers that are gone are told to the core in a transaction of their own. */
static void carry_out(sh_server *s, int depth)
{
    sh_coord_action *actions = s->queued;
    size_t n = s->n_queued;
    sh_hash gone[SERVER_GROUP_STEPS];
    size_t n_gone = 0;
    s->queued = NULL;
    s->n_queued = s->queued_cap = 0;
    for (size_t i = 0; i < n; i++) {
        sh_coord_action *a = &actions[i];
        bool known = n_gone > 0 && sh_hash_equal(&gone[n_gone - 1], &a->node);
        switch (a->kind) {
        case SH_COORD_SEND:
            if (!send_message(s, a) && !known && n_gone < SH_COUNT(gone))
                gone[n_gone++] = a->node;
            break;
        case SH_COORD_SET_TIMER:
            s->timer_ms = SH_MAX(a->at_ms, (uint64_t)1);
            break;
        case SH_COORD_START_JOB:
            start_job(s, a);
            break;
        case SH_COORD_SEND_UP:
            server_parent_send(s, a);
            break;
        case SH_COORD_NOTE:
            take_note(s, a);
            break;
        case SH_COORD_KEY:
            set_key(s, a);
            break;
        case SH_COORD_DROP_OTHERS: /* done with the step: drop_others */
            break;
        case SH_COORD_DROP:
            sh_net_server_drop(s->nodes, &a->node);
            s->counters.peers_dropped++;
            break;
        }
    }
    for (size_t i = 0; i < n; i++) {
        sh_buf_release(&actions[i].message);
        free(actions[i].job.inputs);
    }
    free(actions);
    s->counters.peers_gone += n_gone;
    for (size_t i = 0; i < n_gone && s->coord != NULL && depth < GONE_DEPTH; i++) {
        sh_coord_event e = {.kind = SH_COORD_GONE, .node = gone[i]};
        if (!server_step(s, &e))
            return;
    }
    if (n_gone > 0 && s->txn != NULL)
        (void)server_commit(s, NULL);
}

static void drop_queue(sh_server *s)
{
    for (size_t i = 0; i < s->n_queued; i++) {
        sh_buf_release(&s->queued[i].message);
        free(s->queued[i].job.inputs);
    }
    free(s->queued);
    s->queued = NULL;
    s->n_queued = s->queued_cap = 0;
}

/* The group's answers to a key: they are for those who asked before, not for who has come since. */
static void unqueue_sends(sh_server *s, const sh_hash *key)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n_queued; i++) {
        sh_coord_action *a = &s->queued[i];
        if (a->kind == SH_COORD_SEND && sh_hash_equal(&a->node, key))
            sh_buf_release(&a->message);
        else
            s->queued[n++] = *a;
    }
    s->n_queued = n;
}

/* What those connections sent and was not stepped yet may not follow in the same group. */
static void drop_others(sh_server *s, const sh_coord_actions *actions)
{
    for (size_t i = 0; i < actions->n; i++) {
        const sh_coord_action *a = &actions->items[i];
        if (a->kind != SH_COORD_DROP_OTHERS)
            continue;
        sh_net_server_drop_others(s->nodes, &a->node, a->connection);
        unqueue_sends(s, &a->node);
    }
}

/* A WANT that cannot be sent is tried again after the commit, which finds its peer gone. */
static void send_early(sh_server *s, sh_coord_actions *actions)
{
    size_t n = 0;
    for (size_t i = 0; i < actions->n; i++) {
        sh_coord_action *a = &actions->items[i];
        if (a->kind == SH_COORD_SEND && a->early &&
            sh_net_server_send(s->nodes, &a->node, a->message.data, a->message.len, NULL) ==
                SH_OK) {
            s->counters.messages_out++;
            sh_buf_release(&a->message);
        } else {
            actions->items[n++] = *a;
        }
    }
    actions->n = n;
}

static sh_status queue_actions(sh_server *s, sh_coord_actions *actions, sh_error *err)
{
    if (sh_array_reserve((void **)&s->queued, &s->queued_cap, s->n_queued + actions->n,
                         sizeof *s->queued, QUEUED_MAX) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, "server: no memory for %zu actions", actions->n);
    for (size_t i = 0; i < actions->n; i++)
        s->group_out += actions->items[i].message.len;
    if (actions->n > 0)
        memcpy(s->queued + s->n_queued, actions->items, actions->n * sizeof *s->queued);
    s->n_queued += actions->n;
    actions->n = 0; /* their memory moved */
    return SH_OK;
}

/* ---- transactions ---- */

static void end_group(sh_server *s)
{
    s->group_steps = s->group_in = s->group_out = 0;
}

/* The group is taken back; the core is made again after a pause, which grows while it fails. */
static void fall(sh_server *s, const sh_error *err)
{
    sh_txn_abort(&s->txn);
    drop_queue(s);
    end_group(s);
    sh_coord_destroy(&s->coord);
    s->counters.failed_steps++;
    s->timer_ms = 0;
    s->boot_pause_ms = SH_MIN(SH_MAX(2 * s->boot_pause_ms, BOOT_PAUSE_MS), BOOT_PAUSE_MAX_MS);
    s->boot_at_ms = sh_clock_mono_ms() + s->boot_pause_ms;
    if (err->code == SH_ERR_FULL) {
        /* Nodes wait for the job whose end makes room: each message would only fell the core again,
         * and the job with it. */
        s->hold_ms = SH_MIN(SH_MAX(2 * s->hold_ms, HOLD_MS), HOLD_MAX_MS);
        s->hold_until_ms = sh_clock_mono_ms() + s->hold_ms;
    }
    sh_log(SH_LOG_ERROR, "step_failed", "code=%s retry_ms=%llu error=\"%s\"",
           sh_status_name(err->code), (unsigned long long)s->boot_pause_ms, err->text);
}

sh_status server_boot(sh_server *s, sh_error *err)
{
    static sh_coord_actions actions;
    sh_rng rng;
    uint64_t seed;
    sh_status status = SH_OK;
    sh_random_bytes(&seed, sizeof seed);
    sh_rng_init(&rng, seed, s->life++, 0x434f4f52);
    end_group(s);
    SH_GOTO(sh_txn_begin(s->store, SH_TXN_RESERVE, &s->txn, err));
    SH_GOTO(sh_coord_create(&s->options, NULL, sh_clock_wall_ms(), &rng, s->txn, &actions,
                            &s->coord, err));
    SH_GOTO(server_keys_load(&s->allowed, s->txn, err));
    SH_GOTO(queue_actions(s, &actions, err));
    SH_GOTO(sh_txn_commit(&s->txn, err));
    s->parent_told = false; /* the core begins with its link down */
    s->views.stale_tables = true;
    set_guests(s);
    carry_out(s, 0);
cleanup:
    sh_coord_actions_clear(&actions);
    sh_txn_abort(&s->txn);
    if (status != SH_OK) {
        drop_queue(s);
        sh_coord_destroy(&s->coord);
    }
    return status;
}

bool server_step(sh_server *s, sh_coord_event *event)
{
    static sh_coord_actions actions;
    sh_error err = {0};
    sh_status status = SH_OK;
    event->now_ms = sh_clock_wall_ms();
    if (s->txn == NULL) {
        /* What nodes send may not take the room of decisions. */
        int kind = event->kind == SH_COORD_MESSAGE ? SH_TXN_WRITE : SH_TXN_RESERVE;
        SH_GOTO(sh_txn_begin(s->store, kind, &s->txn, &err));
        s->group_since_ms = sh_clock_mono_ms();
        s->group_evaluating = sh_coord_get_status(s->coord).evaluating;
    }
    SH_GOTO(sh_coord_step(s->coord, event, s->txn, &actions, &err));
    drop_others(s, &actions);
    send_early(s, &actions);
    SH_GOTO(queue_actions(s, &actions, &err));
    s->group_steps++;
    s->group_in += event->message.n;
    return true;
cleanup:
    sh_coord_actions_clear(&actions);
    err.code = status;
    fall(s, &err);
    return false;
}

bool server_group_full(const sh_server *s)
{
    size_t in = server_fetch_ahead(s->fetch) > 0 ? SERVER_GROUP_AHEAD_BYTES : SERVER_GROUP_IN_BYTES;
    return s->group_steps >= SERVER_GROUP_STEPS || s->group_in >= in ||
           s->group_out >= SERVER_GROUP_OUT_BYTES ||
           sh_clock_mono_ms() - s->group_since_ms >= SERVER_GROUP_MS;
}

bool server_commit(sh_server *s, const server_task_kind *stage)
{
    sh_error err = {0};
    if (s->txn == NULL)
        return s->coord != NULL;
    if (stage != NULL)
        server_failpoint(s, *stage == TASK_MERGE   ? "merge.before_commit"
                            : *stage == TASK_STACK ? "stack.before_commit"
                                                   : "gate.before_commit");
    if (s->group_evaluating && !sh_coord_get_status(s->coord).evaluating)
        server_failpoint(s, "canary.before_commit");
    server_failpoint(s, "aggregator.before_commit");
    bool fetch = s->group_in >= FETCH_BYTES;
    if (fetch)
        server_fetch_begin(s->fetch);
    sh_status status = sh_txn_commit(&s->txn, &err);
    if (fetch)
        server_fetch_end(s->fetch);
    if (status != SH_OK) {
        err.code = status;
        fall(s, &err);
        return false;
    }
    if (stage != NULL)
        server_failpoint(s, *stage == TASK_MERGE   ? "merge.after_commit"
                            : *stage == TASK_STACK ? "stack.after_commit"
                                                   : "gate.after_commit");
    server_failpoint(s, "aggregator.after_commit");
    end_group(s);
    s->boot_pause_ms = 0;
    if (stage != NULL)
        s->hold_ms = s->hold_until_ms = 0;
    s->counters.commits++;
    s->views.stale_tables = true;
    set_guests(s);
    static int depth; /* of peers that are found gone: the loop's thread only */
    depth++;
    carry_out(s, depth);
    depth--;
    return s->coord != NULL;
}

bool server_step_alone(sh_server *s, sh_coord_event *event, const server_task_kind *stage)
{
    return server_step(s, event) && server_commit(s, stage);
}
