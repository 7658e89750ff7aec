/*
 * Real processes for the end-to-end tests: a process with its log, a fleet of one aggregator and a
 * few nodes in a folder as shoal-audit reads it (aggregator/, nodes/node-N/), and users that ask
 * and give feedback over HTTP. The two rigs (aggregator_rig.h, node_rig.h), in which the test plays
 * the other side, start their processes with it too. Include after cmocka.h.
 *
 * Whatever was started dies with the test, also when the test is killed (PR_SET_PDEATHSIG), so
 * start from the main thread. Nothing sleeps to wait for something: a wait polls for what it waits
 * for, at most E2E_WAIT_MS.
 */
#ifndef SH_TESTS_E2E_HARNESS_H
#define SH_TESTS_E2E_HARNESS_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "shared/base/clock.h"
#include "shared/base/hash.h"
#include "shared/base/json.h"
#include "tests/cli/run.h"
#include "tests/store/util.h"

#define E2E_WAIT_MS    180000 /* generous: sanitizers on a machine that others use */
#define E2E_WORDS_MAX  64
#define E2E_NODES_MAX  8
#define E2E_RELAYS_MAX 4

/* Fails the test when the call does not return SH_OK; `err` is its error. */
#ifndef OK
#define OK(call)                                                                                   \
    do {                                                                                           \
        sh_error ok_err_ = {0};                                                                    \
        sh_error *err = &ok_err_;                                                                  \
        sh_status ok_status_ = (call);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s (%s)", #call, sh_status_name(ok_status_), err->text);                 \
    } while (0)
#endif

/* Waits until the condition holds; when it does not in time, shows the fleet's logs and fails with
 * `what`. */
#define E2E_UNTIL(condition, what)                                                                 \
    for (uint64_t end_ = sh_clock_mono_ms() + E2E_WAIT_MS; !(condition); e2e_pause())              \
        if (sh_clock_mono_ms() > end_)                                                             \
    e2e_too_late(what)

void e2e_pause(void); /* between two looks */
void e2e_too_late(const char *what);

/* ---- a process ---- */

typedef struct {
    pid_t pid;     /* 0: none runs, or its end was taken */
    char log[128]; /* path of its standard error, begun anew at each start */
} e2e_process;

/* words[0] is the program; NULL at the end. failpoints: SHOAL_FAILPOINTS, NULL: none. */
void e2e_start(e2e_process *p, const char *const *words, const char *failpoints);
bool e2e_runs(e2e_process *p);
char *e2e_log(const e2e_process *p);                     /* malloc'ed */
bool e2e_logged(const e2e_process *p, const char *text); /* now */
/* Waits for the text; false: the process ended without it. Fails, and shows the log, when neither
 * happens. */
bool e2e_saw(e2e_process *p, const char *text);
/* The value of "KEY=" in the first line that has `event`; false: no such line. */
bool e2e_value(const e2e_process *p, const char *event, const char *key, char *out, size_t n);
int e2e_wait(e2e_process *p); /* its end: exit code, or 128 + signal */
int e2e_end(e2e_process *p, int signal_number);
/* It meets the armed fail point and dies of SIGKILL. */
void e2e_expect_death(e2e_process *p, const char *failpoint);
/* A TCP port that nobody listens on, below those that the kernel gives to clients: so it stays free
 * while the process that has it is down. */
unsigned e2e_free_port(void);

/* ---- a fleet ---- */

typedef struct {
    e2e_process process;
    char name[24], dir[112], key[SH_HASH_HEX_BYTES];
    unsigned port; /* of HTTP */
    /* set before e2e_fleet_make, where it is to be otherwise */
    unsigned dial;            /* port that node.yaml names; 0: the aggregator's */
    const char *const *words; /* more flags of this node */
} e2e_node;

typedef struct {
    e2e_process process;
    char name[24], dir[112], key[SH_HASH_HEX_BYTES];
    unsigned port; /* for all its starts */
} e2e_relay;

typedef struct {
    const char *bin; /* folder of the programs */
    temp_dir root;
    uint32_t layers; /* of the base model, 0: tiny.h's; more of them make it larger */
    e2e_process aggregator;
    char aggregator_dir[112];
    unsigned port; /* of the aggregator, for all its starts */
    e2e_node nodes[E2E_NODES_MAX];
    unsigned n_nodes;
    const char *const *aggregator_words; /* more flags of every start, NULL at the end */
    const char *const *node_words;
    /* Relays between the aggregator and the nodes, in relays/relay-R; node i is relay i %
     * n_relays's. 0: the nodes are the aggregator's. */
    e2e_relay relays[E2E_RELAYS_MAX];
    unsigned n_relays;
    bool chain; /* each relay is the one's before it, and the nodes are the last one's */
    const char *const *relay_words;
} e2e_fleet;

/* A base model, gate texts, the aggregator's folder and n nodes'; nothing runs. Zero the fleet but
 * for what is to be otherwise: bin (needed), layers, words. */
void e2e_fleet_make(e2e_fleet *f, unsigned n_nodes);
/* Kills what runs and removes all. For the teardown, also after a failure. */
void e2e_fleet_release(e2e_fleet *f);
const char *e2e_program(const e2e_fleet *f, const char *name); /* a static buffer of a few */
void e2e_aggregator_start(e2e_fleet *f, const char *failpoints);
/* Waits for event=ready; false: it ended before. */
bool e2e_aggregator_ready(e2e_fleet *f);
void e2e_relay_start(e2e_fleet *f, unsigned r, const char *failpoints);
void e2e_node_start(e2e_fleet *f, unsigned i, const char *failpoints);
bool e2e_node_ready(e2e_fleet *f, unsigned i);
/* Starts all and waits until they are ready; the nodes are enrolled. */
void e2e_fleet_start(e2e_fleet *f);
/* SIGTERM to all that run: each must exit with 0. */
void e2e_fleet_stop(e2e_fleet *f);
void e2e_enrol(e2e_fleet *f, unsigned i);
/* `shoal aggregator WORDS --json`; the reply, or NULL and the exit code. */
json_t *e2e_tool(e2e_fleet *f, const char *const *words, int *code);
json_t *e2e_relay_status(e2e_fleet *f, unsigned r); /* NULL: it does not answer */
void e2e_command(e2e_fleet *f, const char *word, const char *argument); /* must succeed */
json_t *e2e_node_status(e2e_fleet *f, unsigned i);               /* NULL: it does not answer */
int64_t e2e_node_int(e2e_fleet *f, unsigned i, const char *key); /* of its status; -1: none */
uint64_t e2e_newest_release(e2e_fleet *f);                       /* 0: the core is down, for now */
/* `close`, then waits until every node has confirmed the last release and owes nothing. The users
 * must go on asking. Returns the last version. */
uint64_t e2e_settle(e2e_fleet *f);
/* shoal-audit over the stopped fleet: nothing lost, twice or wrong. Returns its document. */
json_t *e2e_audit(e2e_fleet *f);
int64_t e2e_int(const json_t *object, const char *key); /* -1: not there, or no integer */

/* ---- users ---- */

typedef struct {
    const char *const *words; /* that the prompts are made of */
    size_t n_words;
    const char *text; /* what the author writes instead of the proposal */
} e2e_topic;

/* One user of one node: a thread that asks, mostly in streams, checks the reply and gives feedback.
 * The counts may be read at any time. */
typedef struct {
    /* set before the start */
    char name[24];
    uint64_t seed;
    unsigned pause_ms; /* between two requests */
    unsigned max_tokens;
    _Atomic(const e2e_topic *) topic;
    atomic_uint port; /* 0: the node is down, so it rests */
    /* what happened */
    atomic_ullong asked, whole, broken, acknowledged, doubtful, forgotten, bad;
    char first_bad[400]; /* reply of the first bad one; read after the stop */
    pthread_t thread;
    atomic_bool stop, runs;
} e2e_user;
/*   whole         a reply was whole, of one release from its first event to its last
 *   broken        the connection ended, or was refused, before that
 *   acknowledged  feedback that was answered with 200
 *   doubtful      feedback that was sent, and its answer did not come
 *   forgotten     feedback for a completion that the node does not know any more: right only after
 *                 a kill, within the loss window
 *   bad           any other status, or a reply that is wrong in itself */
void e2e_user_start(e2e_user *u);
void e2e_user_stop(e2e_user *u);

extern const e2e_topic e2e_before, e2e_after; /* two that differ in everything that is measured */
/* Another text at every call, so that there is something to learn: what a fleet has learnt whole
 * makes no update that is better. From the main thread. */
const e2e_topic *e2e_news(void);

#endif
