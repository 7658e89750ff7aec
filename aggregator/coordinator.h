/*
 * The coordinator core: a state machine that enrols nodes, plans rounds, takes in updates, has them
 * merged and gated, and publishes releases. It does no I/O; the contract with the shell is the node
 * core's (edge-node/node.h): one step, one write transaction; actions after its commit, but for
 * messages that are `early`; each job ends in one JOB_DONE, and jobs that a crash forgot are
 * started again by create.
 *
 * Rounds are buffered and asynchronous: when `buffer` complete updates are in (and no merge runs),
 * they are merged into the full-precision master as one exact sum, the result is quantized and the
 * bytes are gated. A refused candidate leaves master and release as they were; a buffer that was
 * merged with another server scale than 1 is merged again (at the configured scale, then at 1),
 * otherwise its updates are refused with reason "gate".
 *
 * A relay (options.relay) is an aggregator to its nodes and a node to its parent: it judges and
 * stacks its nodes' updates, of one base at a time, into one that goes up with its parts named, and
 * passes releases, plans and the signed time down as they came. It has no release key, no gate and
 * no candidates. Its upward side is shared/sync/link.h. docs/decisions/0021 says what it decides.
 */
#ifndef SH_AGGREGATOR_COORDINATOR_H
#define SH_AGGREGATOR_COORDINATOR_H

#include "shared/base/rng.h"
#include "shared/store/store.h"
#include "shared/wire/wire.h"

#define SH_COORD_ACTIONS_MAX    256
#define SH_COORD_NODES_MAX      100000u
#define SH_COORD_BUFFER_MAX     1024u /* updates a merge */
#define SH_COORD_STACK_RANK_MAX 4096u /* of what a relay sends as one: an adapter's most */
#define SH_NODE_NAME_MAX        63

enum {
    SH_COORD_T_META,    /* "state" */
    SH_COORD_T_NODE,    /* first key -> enrolled node: who it is, last check-in */
    SH_COORD_T_INBOX,   /* (node, epoch, class) -> high-water mark and bitmap; see shared/sync */
    SH_COORD_T_UPDATE,  /* (node, epoch, seq) -> sh_update_row */
    SH_COORD_T_ALARM,   /* (node, epoch, seq) -> alarm payload */
    SH_COORD_T_WINDOW,  /* (node, epoch, seq) -> window payload */
    SH_COORD_T_CHUNK,   /* BLAKE2b -> bytes */
    SH_COORD_T_RELEASE, /* version -> signed manifest and gate row; candidates that were refused too
                         */
    SH_COORD_T_AUDIT,   /* seq -> decision, hash-chained */
    SH_COORD_T_EVALUATION, /* (candidate, node, epoch, seq) -> sh_evaluation payload */
    SH_COORD_T_EPOCH,      /* (node, epoch) -> lease of its one sender, when it was seen */
    SH_COORD_T_ACCESS,     /* enrolment tokens by hash; further keys of nodes -> first key */
    SH_COORD_T_PART,       /* as INBOX: nodes' updates that came as parts of relays' updates */
    SH_COORD_T_OUTBOX,     /* of a relay: what it owes its parent; see shared/sync */
    SH_COORD_TABLES,
    SH_COORD_TABLES_REPORT = SH_COORD_T_EPOCH /* what reports read: the tables before this, which
                                                 stores of schema 2 have, too */
};
extern const char *const sh_coord_tables[SH_COORD_TABLES];

typedef struct {
    sh_sign_public_key release_pk;
    sh_sign_secret_key release_sk;
    bool enrol_any;           /* accept any authenticated key (simulation) */
    uint32_t buffer;          /* updates that make a round */
    uint32_t staleness_max;   /* releases that an update's base may be behind */
    float staleness_discount; /* weight factor a release behind, in (0, 1] */
    float server_scale;       /* of the merged delta; 1 is the plain average */
    float norm_factor_max;    /* refuse a ΔW whose norm is over this times the round's median */
    float cosine_min; /* refuse a ΔW whose cosine to the mean of the others is below this */
    double gate_overall_max, gate_slice_max; /* allowed loss increase, nats: overall, any slice */
    sh_train_plan train;   /* hyperparameters of the plans; round, base, seed are filled in */
    uint32_t drifting_min; /* nodes that must report drift before rounds begin */
    uint32_t rounds_max;   /* 0: no end */
    uint64_t round_ms_max; /* a round that brought no merge for this long begins anew, so that nodes
                              train again; its updates stay in the buffer. 0: never */
    uint64_t checkin_ms;   /* when nodes come back, with jitter */
    uint64_t chunk_budget; /* chunks a node gets a message: flow control */
    /* Sequences of one (node, epoch) whose alarms and windows are kept; 0: 1024. */
    uint32_t node_items_max;
    /* Admission: what is over a limit is answered with ERROR limit and the time to come back at,
     * each node another one; see docs/protocol.md. */
    uint32_t checkins_per_s;     /* enrolments and check-ins that are taken in; 0: no limit */
    uint32_t items_per_s;        /* items; 0: no limit */
    uint64_t served_bytes_per_s; /* of chunks of releases; 0: no limit */
    uint64_t asked_bytes_max;    /* of updates' chunks that nodes were asked for and that have not
                                    come yet; 0: 64 MiB */
    double load_share; /* of checkins_per_s, in (0, 1]: nodes are told to come back ever later, so
                          that their check-ins stay below it; 0: 0.5 */
    /* Federated evaluation, after the operator's suites have passed a candidate: the same limits
     * (gate_overall_max, gate_slice_max) over the sums that canary nodes send. Fewer nodes or
     * tokens than the minimum when the time is up is inconclusive: no release, and the updates wait
     * for the next merge. */
    uint32_t canary_nodes_min; /* 0: the suites alone decide */
    uint64_t canary_tokens_min;
    double canary_share;    /* of the nodes, chosen by their keys, in (0, 1] */
    uint64_t canary_ms_max; /* to wait for their answers */
    bool relay;             /* release_sk is not used */
    uint64_t relay_wait_ms; /* an update waits at most so long for others to go up with */
    uint64_t relay_retry_min_ms, relay_retry_max_ms; /* of messages to the parent */
    const char *agent;                               /* what a relay says of itself; borrowed */
    /* What one node may send; 0: no limit. A node that is over it is told to wait, and disconnected
     * when it goes on regardless. */
    double limit_messages_s, limit_bytes_s; /* a second, on average */
    double limit_burst_s;                   /* so many seconds' worth may come at once */
} sh_coord_options;

typedef enum {
    SH_VERDICT_PENDING,
    SH_VERDICT_MERGED,
    SH_VERDICT_REFUSED,
    SH_VERDICT_RELAYED /* went up as a part of this relay's update number `version` */
} sh_verdict;
typedef enum {
    SH_REASON_NONE,
    SH_REASON_NORM,
    SH_REASON_DIRECTION,
    SH_REASON_STALE,
    SH_REASON_BASE,
    SH_REASON_BAD_BLOB,
    SH_REASON_NOT_FINITE,
    SH_REASON_GATE,
    SH_REASON_CLOSED,
    SH_REASON_REVOKED, /* its node's key was revoked before the merge */
    SH_REASON_TWICE,   /* it, or a part of it, was counted by another way already */
    SH_REASON_RELAY,   /* it has parts, and its sender is not enrolled as a relay */
    SH_REASONS
} sh_reason;
const char *sh_reason_name(sh_reason reason); /* "norm", "direction", ... */

typedef struct {
    sh_hash node;
    uint64_t epoch, seq;
} sh_update_id;

/* ---- jobs ---- */
typedef enum { SH_COORD_MERGE = 1, SH_COORD_GATE, SH_COORD_STACK } sh_coord_job_kind;

typedef struct {
    sh_update_id id;
    sh_hash sha256;
    double weight;       /* samples x staleness discount, not normalized */
    bool relayed;        /* it is an average of nodes' updates already */
    double norm, cosine; /* filled by the job */
    sh_reason reason;    /* filled by the job: NONE is merged */
} sh_merge_input;

/* MERGE: read the blobs from the store (SH_COORD_T_CHUNK by the rows' metadata), judge each, sum
 * the good ones exactly, add scale times the sum to the master, write the new master and the
 * quantized candidate beside the old ones (content-addressed files: running it twice is harmless).
 * STACK (of a relay): read and judge as MERGE does, and bring the sum as one adapter of stacked
 * factors. parent_model is a file with the updates' shapes. SH_ERR_LIMIT: too large for one; the
 * coordinator tries with fewer.
 * GATE: losses of parent, candidate and adapter form on the operator's suites. */
typedef struct {
    uint64_t id;
    sh_coord_job_kind kind;
    uint64_t candidate; /* serial number of the candidate */
    uint64_t parent_version;
    sh_hash parent_model, master; /* files by SHA-256 */
    float server_scale, norm_factor_max, cosine_min;
    sh_merge_input *inputs; /* owned by the action */
    uint32_t n_inputs;
    sh_hash candidate_model; /* GATE */
} sh_coord_job;

#define SH_GATE_SLICES_MAX 64
typedef struct {
    uint64_t id;
    sh_status status;
    const char *text;
    /* MERGE; STACK, whose candidate is the stacked adapter */
    const sh_merge_input *inputs; /* the job's, with verdicts */
    uint32_t n_inputs;
    sh_hash new_master;
    sh_blob candidate;        /* SHA-256 and length; chunk_hashes may be NULL */
    sh_bytes candidate_bytes; /* the quantized file, borrowed during the step: put as chunks */
    const char *format;
    uint32_t adapter_rank;
    double adapter_discarded; /* energy share */
    /* GATE */
    sh_hash suite;
    double loss_parent, loss_candidate,
        loss_adapter_form; /* Q(W), Q(W+ΔW), Q(W)+ΔW; nats a token */
    uint32_t n_slices;
    double slice_parent[SH_GATE_SLICES_MAX], slice_candidate[SH_GATE_SLICES_MAX];
} sh_coord_job_result;

/* ---- events and actions ---- */
typedef enum {
    SH_COORD_TIMER,
    SH_COORD_MESSAGE, /* from an authenticated key */
    SH_COORD_GONE,    /* a peer's connection ended: its transfers stop */
    SH_COORD_JOB_DONE,
    SH_COORD_COMMAND,
    /* of a relay's connection to its parent */
    SH_COORD_PARENT_UP,
    SH_COORD_PARENT_DOWN,
    SH_COORD_PARENT_MESSAGE,
} sh_coord_event_kind;
typedef enum { /* operator commands */
               SH_COMMAND_PAUSE = 1,
               SH_COMMAND_RESUME,
               SH_COMMAND_ROLLBACK /* number: version; message: its model's bytes, needed only when
                                      the store does not hold its chunks any more */
               ,
               SH_COMMAND_SERVER_SCALE /* real: until a candidate made with it is refused */,
               SH_COMMAND_ENROL /* node */,
               SH_COMMAND_REVOKE /* node, by any of its keys */,
               SH_COMMAND_CLOSE /* no more training; merge what is in, then only acknowledge */,
               SH_COMMAND_TOKEN_ADD /* node: BLAKE2b-256 of an enrolment token; number: how many
                                       nodes it enrols; until_ms; name */
               ,
               SH_COMMAND_TOKEN_REMOVE /* node: as above */,
               SH_COMMAND_RELAY /* node; number 1: its updates may have parts, 0: not any more */
} sh_coord_command;

typedef struct {
    sh_coord_event_kind kind;
    uint64_t now_ms;
    sh_hash node;        /* MESSAGE, GONE; ENROL, REVOKE */
    uint32_t connection; /* MESSAGE: which of the node's it came by; the shell's numbers */
    sh_bytes message;
    bool checked; /* MESSAGE: the shell has decoded it, with SH_CHECK_NAME, and it was good */
    sh_coord_job_result result;
    sh_coord_command command;
    uint64_t number;
    double real;
    uint64_t until_ms; /* TOKEN_ADD: when it expires */
    const char *name;  /* ENROL, TOKEN_ADD: what operators call it, at most SH_NODE_NAME_MAX bytes;
                          may be NULL */
} sh_coord_event;

typedef enum {
    SH_COORD_SEND = 1,
    SH_COORD_SET_TIMER,
    SH_COORD_START_JOB,
    SH_COORD_NOTE,
    SH_COORD_KEY,  /* `node`, a key, is what `access` says from now on */
    SH_COORD_DROP, /* after what was sent to it, end the connections of `node`, which may connect
                     again if it may at all */
    SH_COORD_DROP_OTHERS, /* at once, before the next event: end the connections of `node` but
                             `connection`, and take nothing more from them. At worst, when the step
                             is taken back, they are made again for nothing */
    SH_COORD_SEND_UP      /* message to the parent */
} sh_coord_action_kind;
typedef enum {
    SH_CNOTE_ENROLLED = 1,
    SH_CNOTE_UPDATE_IN,
    SH_CNOTE_MERGE_STARTED,
    SH_CNOTE_GATE_STARTED,
    SH_CNOTE_RELEASED,
    SH_CNOTE_CANDIDATE_REFUSED,
    SH_CNOTE_UPDATE_REFUSED,
    SH_CNOTE_ROUNDS_BEGIN,
    SH_CNOTE_CLOSED,
    SH_CNOTE_JOB_FAILED,
    SH_CNOTE_BAD_MESSAGE,
    SH_CNOTE_ROLLED_BACK,
    SH_CNOTE_COMMAND_REFUSED, /* number: the command; nothing was changed */
    SH_CNOTE_CANARY_STARTED,  /* number: candidate */
    SH_CNOTE_INCONCLUSIVE,    /* number: candidate */
    SH_CNOTE_EVALUATION_IN,   /* number: candidate */
    SH_CNOTE_RESTORED,        /* number: the version that the next release is above */
    SH_CNOTE_DRIFTING,        /* a node's check-in began to report drift; number: how many now */
    SH_CNOTE_CLONED,          /* two senders have one epoch, this one is told to take a new one;
                                 number: how often that was */
    SH_CNOTE_RELAYED,         /* number: sequence of the update that waits to go up */
    SH_CNOTE_RELAY_ACKED,     /* number: sequence of the update that the parent has */
    SH_CNOTE_TAKEN,           /* number: version of the parent's release that nodes get now */
    SH_CNOTE_PARENT_REFUSED,  /* the parent does not know this relay's key */
    SH_CNOTE_PARENT_RENEWED,  /* another copy of this relay's store sends to it: a new epoch */
    SH_CNOTE_MANIFEST_LOST,   /* a relay's, of the release that came: damaged, and fetched again */
    SH_CNOTE_ROTATED,         /* number: how often this node */
    SH_CNOTE_LIMITED,         /* disconnected, because it went on over its limit; number: how often
                                 that was */
} sh_coord_note;

typedef enum {
    SH_KEY_UNKNOWN, /* nobody's */
    SH_KEY_ALLOWED, /* may connect */
    SH_KEY_SHUT     /* may not, and is not heard any more where it is connected */
} sh_key_access;

typedef struct {
    sh_coord_action_kind kind;
    sh_hash node;
    sh_buf message;
    uint64_t at_ms;
    sh_coord_job job;
    sh_coord_note note;
    uint64_t number;
    sh_key_access access; /* KEY */
    uint32_t connection;  /* DROP_OTHERS */
    bool early;           /* SEND: it promises nothing, and may go before the commit */
} sh_coord_action;
typedef struct {
    sh_coord_action items[SH_COORD_ACTIONS_MAX];
    size_t n;
} sh_coord_actions;
void sh_coord_actions_clear(sh_coord_actions *actions);

/* Marks a copy of a store as a backup, in a write transaction on the copy: whoever opens it next
 * goes on with a new epoch, and with versions above every one that could have been issued since
 * (above the time of the restore in seconds since 1970), so that no version is ever issued twice.
 */
SH_MUST_USE sh_status sh_coord_mark_backup(sh_txn *txn, uint64_t now_ms, sh_error *err);

typedef struct sh_coord sh_coord;
/* The genesis release: its model file is in the shell's blob folder, its chunks are put into the
 * store by the first create. master is the SHA-256 of the full-precision file. */
typedef struct {
    sh_bytes model; /* bytes of the quantized GGUF */
    const char *format;
    sh_hash master;
    sh_bytes manifest; /* of a relay: as its parent signed it; format and master are not used */
} sh_genesis;
SH_MUST_USE sh_status sh_coord_create(const sh_coord_options *options, const sh_genesis *genesis,
                                      uint64_t now_ms, const sh_rng *rng, sh_txn *txn,
                                      sh_coord_actions *actions, sh_coord **out, sh_error *err);
void sh_coord_destroy(sh_coord **coord);
SH_MUST_USE sh_status sh_coord_step(sh_coord *coord, const sh_coord_event *event, sh_txn *txn,
                                    sh_coord_actions *actions, sh_error *err);

typedef struct {
    uint64_t version;  /* current release */
    uint64_t releases; /* published after the genesis, rollbacks included */
    uint64_t candidates_refused, candidates_inconclusive, enrolled;
    uint32_t round;    /* 0: rounds have not begun */
    uint32_t buffered; /* complete updates that wait for a decision, those being merged included */
    uint64_t updates_in; /* update items accounted for: merged + refused + buffered */
    uint64_t updates_merged, updates_refused[SH_REASONS];
    bool merging, gating, evaluating, rounds_begun, paused;
    uint64_t candidate;   /* being merged, gated or evaluated; 0: none */
    uint32_t evaluations; /* nodes that have answered for it */
    uint64_t epoch;       /* random, of this store; a restored backup gets a new one */
    bool closing, closed; /* CLOSE was given; and nothing waits for a decision any more */
    uint32_t drifting;    /* enrolled nodes whose last check-in reported drift */
    float server_scale;
    uint64_t bad_messages;
    uint64_t clones;  /* ENROLs of a second sender of an epoch: a copied or restored node store */
    uint32_t waiting; /* updates whose chunks are on their way up */
    uint64_t asked_bytes; /* of them, asked for and not yet come */
    uint64_t chunk_names; /* that the store's chunks and those on their way have */
    uint64_t told_later;  /* answers "later" in this life */
    uint64_t return_ms;   /* what a plan says now, before jitter */
    uint64_t parts;       /* nodes' updates that the buffered ones stand for */
    uint32_t relays;
    bool relay;
    /* of a relay */
    bool parent_up, parent_welcome;
    uint64_t parent_epoch, relayed, relay_owed; /* updates made for the parent; not acknowledged */
    uint64_t taking;                            /* version that is being fetched; 0: none */
    uint64_t rotations, token_enrolments, tokens_refused;
    uint32_t tokens;                /* that enrol unknown keys: those may connect, to send ENROL */
    uint64_t tokens_until_ms;       /* the last of them expires */
    uint64_t commands_refused;      /* since the start */
    uint64_t limited, disconnected; /* messages over a node's limit, not read; nodes that went on
                                       regardless; since the start */
} sh_coord_status;
sh_coord_status sh_coord_get_status(const sh_coord *coord);

/* ---- rows that reports and the audit read ---- */
typedef struct {
    sh_update_id id;
    sh_update_meta meta; /* chunk_hashes borrowed from the transaction */
    sh_verdict verdict;
    sh_reason reason;
    uint64_t candidate; /* of the last merge that used it, 0: none */
    uint64_t version;   /* of the release that it went into, 0: none */
    double norm, cosine;
} sh_update_row;
SH_MUST_USE sh_status sh_coord_each_update(sh_txn *txn,
                                           sh_status (*fn)(void *arg, const sh_update_row *row),
                                           void *arg, sh_error *err);
/* Appends the update's bytes (its chunks, checked against its SHA-256) to out, for a merge job.
 * SH_ERR_NOT_FOUND, SH_ERR_CORRUPT: hand the job empty bytes, its verdict is then "bad-blob". */
SH_MUST_USE sh_status sh_coord_read_update(sh_txn *txn, const sh_update_id *id, sh_buf *out,
                                           sh_error *err);

/* A candidate that was decided: genesis is candidate 0, version 1; rollbacks have numbers, too. */
typedef struct {
    uint64_t candidate, version; /* version 0: refused by the gate */
    uint64_t parent;
    uint64_t at_ms;
    sh_hash sha256, new_master, suite;
    uint64_t bytes;
    char format[16];
    double loss_parent, loss_candidate, loss_adapter_form;
    double worst_slice; /* largest increase of a slice's loss */
    uint32_t updates, adapter_rank;
    double adapter_discarded;
    float server_scale;
    char verdict[64];      /* "released", "refused: loss 3.2 over parent's 2.9 + 0.0" */
    uint32_t canary_nodes; /* nodes that scored it */
    uint64_t canary_tokens;
    double canary_parent, canary_candidate; /* nats a token */
    uint32_t n_merged;
    sh_update_id *merged; /* [n_merged], valid during the call */
} sh_release_row;
SH_MUST_USE sh_status sh_coord_each_candidate(sh_txn *txn,
                                              sh_status (*fn)(void *arg, const sh_release_row *row),
                                              void *arg, sh_error *err);

typedef struct {
    sh_hash key;
    bool revoked;
    uint64_t enrolled_ms, last_ms; /* last_ms: of the last check-in, 0: none */
    sh_msg_checkin checkin;        /* the last one */
    uint32_t n_epochs, n_clones;   /* stores that it has had; times that a copy of one came */
    sh_hash current_key;           /* that it connects with: `key`, or what it rotated to */
    sh_hash next_key;              /* that it has asked to rotate to; zero: none */
    uint32_t n_rotations;
    char agent[64], kernel[64], device_class[SH_WIRE_CLASS_MAX + 1];
    uint32_t cores, slots;
    uint64_t memory_bytes, disk_bytes;
    char name[SH_NODE_NAME_MAX + 1];
} sh_node_row;
SH_MUST_USE sh_status sh_coord_each_node(sh_txn *txn,
                                         sh_status (*fn)(void *arg, const sh_node_row *row),
                                         void *arg, sh_error *err);
/* Every key that an enrolled node has, had or is about to have, and whether it may connect. */
SH_MUST_USE sh_status sh_coord_each_key(sh_txn *txn,
                                        sh_status (*fn)(void *arg, const sh_hash *key,
                                                        bool allowed),
                                        void *arg, sh_error *err);

typedef struct {
    sh_hash hash; /* BLAKE2b-256 of the token, which is kept nowhere */
    uint64_t made_ms, expires_ms;
    uint32_t uses, uses_left;
    char name[SH_NODE_NAME_MAX + 1];
} sh_token_row;
SH_MUST_USE sh_status sh_coord_each_token(sh_txn *txn,
                                          sh_status (*fn)(void *arg, const sh_token_row *row),
                                          void *arg, sh_error *err);
/* SH_COORD_T_ALARM or SH_COORD_T_WINDOW; payload as the node sent it (sh_alarm, encoded window). */
SH_MUST_USE sh_status sh_coord_each_item(sh_txn *txn, unsigned table,
                                         sh_status (*fn)(void *arg, const sh_update_id *id,
                                                         sh_bytes payload),
                                         void *arg, sh_error *err);
/* The audit log in order; checks the chain as it goes (SH_ERR_CORRUPT names the broken entry). fn
 * may be NULL. */
SH_MUST_USE sh_status sh_coord_each_audit(sh_txn *txn,
                                          sh_status (*fn)(void *arg, uint64_t seq, uint64_t at_ms,
                                                          const char *text),
                                          void *arg, sh_error *err);
/* The signed manifest of a release (in the store's memory). SH_ERR_NOT_FOUND. */
SH_MUST_USE sh_status sh_coord_get_manifest(sh_txn *txn, uint64_t version, sh_bytes *manifest,
                                            sh_error *err);

#endif
