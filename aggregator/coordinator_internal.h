/*
 * What the coordinator's files share: its state, the codecs of its rows, and who does what.
 *   coordinator.c         create, step, actions, status
 *   coordinator_state.c   META rows: state, the candidate in progress, updates on their way up
 *   coordinator_codec.c   bytes of rows
 *   coordinator_rows.c    UPDATE, RELEASE, AUDIT rows and the readers of them
 *   coordinator_node.c    NODE and EPOCH rows: who is who, and which sender an epoch belongs to
 *   coordinator_inbox.c   messages of nodes
 *   coordinator_admit.c   how much is taken in at a time; "later"
 *   coordinator_blob.c    chunks up and down
 *   coordinator_chunks.c  which chunks are alive
 *   coordinator_access.c  ENROL, tokens, further keys of a node, revocation: who may speak
 *   coordinator_limit.c   how much a node may send
 *   coordinator_round.c   buffer, merge, gate, what becomes of a candidate
 *   coordinator_canary.c  federated evaluation
 *   coordinator_parts.c   updates that stand for several: relays below
 *   coordinator_relay.c   a relay's upward side: plans and releases down, stacked updates up
 *   coordinator_release.c genesis, publishing, rollback, a restored backup
 *   coordinator_command.c operator commands
 *
 * Everything persisted is written in the step's transaction; memory holds copies of it only, so
 * that create after a crash makes the same coordinator.
 */
#ifndef SH_AGGREGATOR_COORDINATOR_INTERNAL_H
#define SH_AGGREGATOR_COORDINATOR_INTERNAL_H

#include "aggregator/coordinator.h"
#include "shared/sync/sync.h"

#define COORD_NOTES_MAX         128   /* notes a step; the rest of the actions is for the others */
#define COORD_WAITING_MAX       1024u /* updates whose chunks are on their way up */
#define COORD_WAITING_NODE_MAX  4u    /* of one node */
#define COORD_BARRED_PLACES     1024u /* connections told to renew that are remembered */
#define COORD_EPOCHS_MAX        256u  /* stores that one node may have had */
#define COORD_WAITING_BYTES_MAX (64u << 20) /* of their items, in memory */
#define COORD_ASKED_BYTES       (64u << 20) /* default of asked_bytes_max */
#define COORD_ASKED_MS          60000u /* a node that sends nothing for so long loses its place */
#define COORD_CHUNKS_MAX        (1u << 20) /* names that are held; see coord_chunks_have_room */
#define COORD_LATER_PLACES      8192u      /* nodes told to come later that are remembered */
#define COORD_LATER_MIN_MS      100u       /* what they are told, at least and at most */
#define COORD_LATER_MAX_MS      600000u
#define COORD_RELEASES_KEPT     2u    /* releases whose chunks the store holds */
#define COORD_NODE_ITEMS_MAX    1024u /* alarms, windows kept of one (node, epoch) */
#define COORD_WINDOW_BYTES_MAX  8192u
#define COORD_WEIGHT_FACTOR_MAX 4u /* samples, tokens: at most this times the median's count */
#define COORD_UPDATE_BYTES_MIN  (1u << 20) /* an update may have this size or */
#define COORD_UPDATE_FACTOR_MAX 4u         /* this times the model's, whichever is more */
#define COORD_OWED_MAX          8u         /* updates that a relay owes before it makes no more */
#define COORD_SAMPLES_MAX       (UINT64_C(1) << 40)
#define COORD_RETRY_MIN_MS      5000u /* of a failed job, doubled each time */
#define COORD_RETRY_MAX_MS      300000u
#define COORD_ID_BYTES          48u /* node, epoch, seq */
#define COORD_ROW_BYTES_MAX     (1u << 20)
#define COORD_AUDIT_TEXT_MAX    256u
#define COORD_SCHEMA            3u      /* of the store; 1 had no row that says so */
#define COORD_EPOCH_SEEN_MS     600000u /* how exactly it is kept when an epoch was last seen */

/* Access: tokens at a time, keys and tokens kept, rotations of a node; a rotation's token; of how
 * many ENROLs of unknown keys without a good token, in how long, over all who try, the store is
 * told. */
#define COORD_TOKENS_MAX       1024u
#define COORD_ACCESS_MAX       200000u
#define COORD_ROTATIONS_MAX    1000u
#define COORD_ROTATE_TOKEN_MIN 16u
#define COORD_STRANGERS_MAX    100u
#define COORD_STRANGERS_MS     60000u
#define COORD_TOO_MANY_STORES  "this key has had too many stores: use a new one"

/* Limits of a node: the table, 32,768 keys in 2.6 MB; the least that a full bucket holds: the
 * messages of a check-in with its chunks, two times what one WANT asks for; at how many full
 * buckets over the limit a node is disconnected; how long a node that was told is not told again.
 */
#define COORD_LIMIT_SETS         4096u
#define COORD_LIMIT_WAYS         8u
#define COORD_LIMIT_MESSAGES_MIN 100u
#define COORD_LIMIT_BYTES_MIN    (2u * SH_WIRE_WANT_MAX * SH_CHUNK_BYTES)
#define COORD_LIMIT_DROP_FACTOR  2.0
#define COORD_LIMIT_TOLD_MS      60000u

#define COORD_TIME_MS 60000u /* a signed time is not older than this when it is sent */

/* Federated evaluation: answers to a candidate, tokens of one, loss a token that it counts with
 * (e^50 is past any vocabulary). */
#define COORD_EVALUATIONS_MAX       1024u
#define COORD_EVALUATION_TOKENS_MAX (UINT64_C(1) << 32)
#define COORD_LOSS_MAX              50.0

/* What a node says that it runs: how far ahead of the clock it may be, after a restore; how often
 * the current release is published again above it, and with which margin. */
#define COORD_VERSION_AHEAD_MAX (UINT64_C(1) << 20)
#define COORD_LIFTS_MAX         8u
#define COORD_LIFT_MARGIN       1024u

typedef enum { PHASE_IDLE, PHASE_MERGING, PHASE_GATING, PHASE_EVALUATING } coord_phase;

typedef struct { /* META "candidate": what is being merged, gated or evaluated */
    uint64_t number, parent_version;
    float scale;
    sh_merge_input *inputs; /* owned */
    uint32_t n_inputs;
    sh_hash new_master, sha256; /* after the merge */
    uint64_t bytes;
    char format[16];
    uint32_t rank;
    double discarded;
    uint8_t *chunks; /* [n_chunks * 32] of the candidate's bytes in the store; owned */
    uint32_t n_chunks;
    /* after the gate, while nodes evaluate it */
    sh_hash suite;
    double loss_parent, loss_candidate, loss_adapter_form, worst_slice;
    uint64_t until_ms; /* when what nodes have said must do */
} coord_candidate;

/* An update whose chunks are not all here; META "w" + id -> item payload. */
typedef struct coord_waiting {
    sh_update_id id;
    uint8_t *payload; /* owned */
    size_t payload_n;
    sh_update_meta meta;              /* chunk_hashes in payload */
    uint32_t scanned, asked_end;      /* chunks before `scanned` are here; see ask() */
    uint16_t asked[SH_WIRE_WANT_MAX]; /* chunks asked for and not yet come, by index */
    uint32_t n_asked;
    uint64_t asked_bytes;                 /* of the whole question, until its last chunk has come */
    uint64_t active_ms;                   /* its node's last sign */
    struct coord_waiting *before, *after; /* in its line */
} coord_waiting;
typedef struct { /* by their last sign: the first has been silent for longest */
    coord_waiting *first, *last;
} coord_line;

/* Of how many lists name a chunk; see coordinator_chunks.c. */
typedef struct {
    struct coord_chunk *places; /* [cap], a power of two; NULL at first */
    size_t n, cap;
    uint64_t seed;
} coord_chunks;

/* What is taken in a second of one kind, and when the next of those that were told to come later
 * may come. */
typedef struct {
    double tokens;
    uint64_t at_ms; /* of tokens; 0: never used */
    double slot_ms; /* the last slot given */
} coord_rate;
enum { COORD_RATE_CHECKIN, COORD_RATE_ITEM, COORD_RATE_SERVED, COORD_RATE_UPLOAD, COORD_RATES };
typedef struct {
    coord_rate rates[COORD_RATES];
    struct coord_later *later; /* [COORD_LATER_PLACES] by key; NULL: nobody was told yet */
    uint64_t told;             /* "later", in this life */
    /* Nodes that checked in: in this period and in the one before. */
    uint64_t period_ms, seen, seen_before;
} coord_admission;

typedef struct {
    uint64_t version;
    sh_manifest manifest; /* chunk_hashes in bytes */
    sh_hash master;
    uint8_t *bytes; /* the signed manifest; owned */
    size_t n;
} coord_release;

typedef struct { /* META "state" */
    uint64_t seed;
    uint64_t epoch;             /* random; a restored backup gets a new one */
    uint64_t version, previous; /* releases kept; 0: none */
    uint64_t version_floor;     /* the next version is above it */
    uint64_t next_candidate, next_job;
    uint32_t round;
    uint32_t round_base;  /* rounds that a restore skipped */
    uint64_t round_at_ms; /* when it began */
    bool held;            /* an evaluation was inconclusive: no merge of the same updates at once */
    uint64_t held_until_ms; /* 0: until another update comes */
    bool restored;          /* once a backup */
    uint32_t restores;      /* how often */
    uint32_t lifts;         /* see COORD_LIFTS_MAX */
    bool rounds_begun, paused, closing, closed;
    float server_scale;
    coord_phase phase;
    uint64_t releases, candidates_refused, candidates_inconclusive, bad_messages;
    uint64_t updates_in, updates_merged, updates_refused[SH_REASONS];
    uint64_t audit_seq;
    sh_hash audit_head;
    uint64_t clones, rotations, token_enrolments, tokens_refused;
} coord_state;

typedef struct coord_relay coord_relay; /* coordinator_relay.c */
typedef struct coord_bucket coord_bucket;

typedef struct { /* a connection that was told to renew, until it enrols with another epoch */
    sh_hash key;
    uint32_t connection;
    bool used;
} coord_barred;

struct sh_coord {
    sh_coord_options options;
    sh_rng rng;
    coord_state state;
    bool dirty; /* state must be written in this step */
    coord_candidate candidate;
    coord_release kept[COORD_RELEASES_KEPT]; /* [0] is the current release */
    sh_update_id *pending;                   /* sorted; complete, undecided */
    size_t n_pending, pending_cap;
    coord_waiting **waiting; /* sorted by id; each is owned */
    size_t n_waiting, waiting_cap;
    uint64_t waiting_bytes;  /* of payloads */
    coord_line asking, idle; /* the waiting that were asked for chunks; the others */
    uint64_t asked_bytes;    /* of those asking */
    coord_chunks chunks;
    coord_admission admission;
    uint64_t enrolled;
    uint64_t parts; /* nodes' updates that the pending ones stand for */
    uint32_t drifting;
    uint32_t relays;        /* keys enrolled as such */
    coord_relay *relay;     /* NULL: it is none */
    uint32_t n_evaluations; /* answers to the candidate */
    uint64_t job_id;        /* running; 0: none */
    uint64_t retry_at_ms;
    uint32_t retries;
    uint32_t n_tokens;
    uint64_t tokens_until_ms;
    uint32_t strangers; /* ENROLs of them since strangers_since_ms */
    uint64_t strangers_since_ms;
    coord_barred barred[COORD_BARRED_PLACES]; /* by connection */
    coord_bucket *buckets;                    /* NULL: no limits */
    uint64_t limited, disconnected, commands_refused;
    uint8_t time_stamp[SH_WIRE_TIME_MAX]; /* signed time_ms; time_n 0: none yet */
    size_t time_n;
    uint64_t time_ms;
};

typedef enum { /* of a key, see coordinator_access.c */
               COORD_KEY_FIRST,
               COORD_KEY_PENDING,
               COORD_KEY_CURRENT,
               COORD_KEY_RETIRED
} coord_key_state;

/* What a step works with. */
typedef struct {
    sh_coord *c;
    sh_txn *txn;
    sh_coord_actions *actions;
    uint64_t now_ms;
    uint32_t version; /* of the protocol, that answers are written in; 0: ours */
    size_t notes;
    /* MESSAGE, GONE: the key that it came from, the node that this key belongs to, and how. What is
     * sent to `node` goes to `from`. */
    sh_hash from, node;
    uint32_t connection; /* MESSAGE */
    coord_key_state key_state;
    sh_hash rotation; /* of a pending key: its token's hash */
    sh_error *err;
} coord_step;

/* ---- coordinator_codec.c: bytes of rows, little-endian, bounds-checked; `bad` is sticky ---- */
typedef struct {
    const uint8_t *p, *end;
    bool bad;
} coord_reader;
typedef struct {
    sh_buf buf; /* released by the owner */
    bool bad;
} coord_writer;
void coord_writer_init(coord_writer *w);
void coord_put_uint(coord_writer *w, uint64_t x, unsigned bytes);
void coord_put_f64(coord_writer *w, double x);
void coord_put_bytes(coord_writer *w, const void *bytes, size_t n);
void coord_put_hash(coord_writer *w, const sh_hash *h);
void coord_put_text(coord_writer *w, const char *text); /* length byte, bytes */
coord_reader coord_reader_of(sh_slice value);
uint64_t coord_get_uint(coord_reader *r, unsigned bytes);
double coord_get_f64(coord_reader *r);
void coord_get_bytes(coord_reader *r, void *out, size_t n);
sh_hash coord_get_hash(coord_reader *r);
void coord_get_text(coord_reader *r, char *out, size_t out_bytes);

/* ---- coordinator.c ---- */
void coord_note(coord_step *s, sh_coord_note note, const sh_hash *node, uint64_t number);
sh_status coord_send(coord_step *s, const sh_hash *node, const sh_msg *msg);
sh_status coord_send_error(coord_step *s, const sh_hash *node, sh_status code, const char *text);
void coord_send_up(coord_step *s, sh_buf *message); /* takes the bytes over */
/* Says when to come back; coord_send_error says the time between check-ins. */
sh_status coord_send_retry(coord_step *s, const sh_hash *node, sh_status code, const char *text,
                           uint64_t retry_after_ms);
void coord_set_key(coord_step *s, const sh_hash *key, sh_key_access access);
void coord_drop_peer(coord_step *s, const sh_hash *key);
void coord_drop_others(coord_step *s); /* connections of the message's key but its own */
sh_status coord_set_timer(coord_step *s, uint64_t at_ms);
sh_status coord_start_job(coord_step *s); /* of the phase, merging or gating */

/* ---- coordinator_state.c ---- */
sh_status coord_state_load(sh_coord *c, sh_txn *txn, bool *found, sh_error *err);
sh_status coord_state_save(sh_coord *c, sh_txn *txn, sh_error *err);
/* Of the store; 0: it is empty, or of version 1, which has no such row. SH_ERR_UNSUPPORTED: newer
 * than this program. */
sh_status coord_schema_get(sh_txn *txn, uint32_t *schema, sh_error *err);
sh_status coord_schema_put(sh_txn *txn, sh_error *err);
/* Takes away the mark that sh_coord_mark_backup made; *made_ms when, 0: there was none. */
sh_status coord_backup_mark_take(sh_txn *txn, uint64_t *made_ms, sh_error *err);
sh_status coord_candidate_save(coord_step *s);
sh_status coord_candidate_drop(coord_step *s);
sh_status coord_waiting_load(sh_coord *c, sh_txn *txn, uint64_t now_ms, sh_error *err);
sh_status coord_waiting_save(coord_step *s, const coord_waiting *w);
sh_status coord_waiting_delete(coord_step *s, const sh_update_id *id);
void coord_candidate_release(coord_candidate *candidate);

/* ---- coordinator_rows.c ---- */
void coord_id_put(uint8_t out[COORD_ID_BYTES], const sh_update_id *id);
bool coord_id_get(sh_slice key, sh_update_id *id);
int coord_id_compare(const void *a, const void *b);

/* meta_bytes: the encoded sh_update_meta, empty when it was not readable. */
sh_status coord_update_put(sh_txn *txn, const sh_update_row *row, sh_bytes meta_bytes,
                           sh_error *err);
sh_status coord_update_get(sh_txn *txn, const sh_update_id *id, sh_update_row *row, sh_error *err);
/* Changes verdict, reason, candidate, version, norm and cosine of a row that is there. */
sh_status coord_update_set(sh_txn *txn, const sh_update_row *row, sh_error *err);

sh_status coord_candidate_row_put(sh_txn *txn, const sh_release_row *row, sh_error *err);
/* row->merged is malloc'ed (free it) or NULL. */
sh_status coord_candidate_row_get(sh_txn *txn, uint64_t candidate, sh_release_row *row,
                                  sh_error *err);
sh_status coord_manifest_put(sh_txn *txn, uint64_t version, uint64_t candidate, sh_bytes manifest,
                             sh_error *err);
/* SH_ERR_NOT_FOUND without text. */
sh_status coord_manifest_get(sh_txn *txn, uint64_t version, uint64_t *candidate, sh_slice *manifest,
                             sh_error *err);
/* How many releases were published after `version`, counted up to max. */
sh_status coord_releases_since(sh_txn *txn, uint64_t version, uint64_t max, uint64_t *n,
                               sh_error *err);
/* Calls fn(arg, id, payload) for each answer to the candidate. */
sh_status coord_each_evaluation(sh_txn *txn, uint64_t candidate,
                                sh_status (*fn)(void *arg, const sh_update_id *id,
                                                sh_bytes payload),
                                void *arg, sh_error *err);
sh_status coord_evaluation_put(sh_txn *txn, uint64_t candidate, const sh_update_id *id,
                               sh_bytes payload, sh_error *err);
sh_status coord_evaluation_delete(sh_txn *txn, uint64_t candidate, const sh_update_id *id,
                                  sh_error *err);
/* Whether the node has answered, with whichever of its stores. */
sh_status coord_evaluation_has(sh_txn *txn, uint64_t candidate, const sh_hash *node, bool *has,
                               sh_error *err);
sh_status coord_audit(coord_step *s, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Calls fn(arg, key, value) for each row of a table; SH_OK at the end. */
sh_status coord_each_row(sh_txn *txn, unsigned table,
                         sh_status (*fn)(void *arg, sh_slice key, sh_slice value), void *arg,
                         sh_error *err);
/* Puts what was written and releases the writer; SH_ERR_NO_MEMORY when that had none. */
sh_status coord_row_put(sh_txn *txn, unsigned table, sh_slice key, coord_writer *w, sh_error *err);
sh_status coord_row_corrupt(sh_error *err, unsigned table);

/* ---- coordinator_node.c ---- */
/* SH_ERR_NOT_FOUND without text. */
sh_status coord_node_get(sh_txn *txn, const sh_hash *key, sh_node_row *row, sh_error *err);
sh_status coord_node_put(sh_txn *txn, const sh_node_row *row, sh_error *err);
/* The node has this epoch from now on. *known false: it has had too many. Changes row->n_epochs
 * (*changed), which the caller puts. */
sh_status coord_epoch_see(coord_step *s, sh_node_row *row, uint64_t epoch, bool *known,
                          bool *changed);
/* Whether an ENROL comes from the one sender of its epoch, which coord_epoch_see has seen; else the
 * welcome says renew, and what the two senders had in common, partly in `parted`. Changes
 * row->n_clones. */
sh_status coord_epoch_claim(coord_step *s, sh_node_row *row, const sh_msg_enrol *enrol,
                            sh_msg_welcome *welcome, uint8_t parted[SH_WIRE_START_BYTES]);
/* Names the lease of the start that sends in the epoch now; 0: none is known. */
sh_status coord_epoch_lease(coord_step *s, const sh_hash *node, uint64_t epoch, uint64_t *lease);
/* NODE rows of schema 1 and 2 held their epochs themselves. */
sh_status coord_epochs_migrate(coord_step *s);

/* ---- coordinator_inbox.c ---- */
sh_status coord_on_message(coord_step *s, const sh_hash *node, sh_bytes message, bool checked);
/* Counts and notes what a peer did wrong, and tells it. */
sh_status coord_bad_message(coord_step *s, const sh_hash *node, sh_status code, const char *text);
/* Marks the item as committed with this step; *ack: the message that says so to the sender that the
 * item named. */
sh_status coord_mark(coord_step *s, const sh_hash *node, const sh_msg_item *item, sh_msg *ack);

/* ---- coordinator_access.c ---- */
sh_status coord_tokens_load(sh_coord *c, sh_txn *txn, sh_error *err);
/* Fills the step's from, node, key_state and rotation. */
sh_status coord_sender_find(coord_step *s, const sh_hash *key);
sh_status coord_on_enrol(coord_step *s, const sh_msg *msg);
/* Whether the message's connection was told to renew and has not enrolled since: what it had sent
 * meanwhile is of an epoch that is another's. It comes again, as the new epoch's. */
bool coord_is_barred(const coord_step *s);
/* Whether the sender may send anything else than ENROL; it is told when not. */
sh_status coord_may_speak(coord_step *s, sh_node_row *node, bool *may);
/* Ends the connection of a sender that is not enrolled, unless any may enrol. */
sh_status coord_drop_stranger(coord_step *s);
sh_status coord_on_rotate(coord_step *s, sh_node_row *node, const sh_msg_rotate *rotate);
bool coord_good_name(const char *name);
/* Operators' commands; *done false: nothing was changed. */
sh_status coord_enrol_key(coord_step *s, const sh_hash *key, const char *name, bool *done);
sh_status coord_revoke_key(coord_step *s, const sh_hash *key, bool *done);
sh_status coord_token_add(coord_step *s, const sh_coord_event *event, bool *done);
sh_status coord_token_remove(coord_step *s, const sh_hash *hash, bool *done);

/* ---- coordinator_limit.c ---- */
sh_status coord_limit_check(const sh_coord_options *options, sh_error *err);
sh_status coord_limit_init(sh_coord *c, sh_error *err);
/* *pass false: the message is over its sender's limit and is not to be read. */
sh_status coord_limit_pass(coord_step *s, const sh_hash *key, size_t bytes, bool *pass);

/* ---- coordinator_blob.c ---- */
/* Takes, refuses or waits for the chunks of an update item that is new. */
sh_status coord_on_update(coord_step *s, const sh_update_id *id, sh_bytes payload);
sh_status coord_on_chunk(coord_step *s, const sh_hash *node, const sh_msg_chunk *chunk);
sh_status coord_on_want(coord_step *s, const sh_hash *node, const sh_hash_list *want);
void coord_on_gone(sh_coord *c, const sh_hash *node);
/* Forgets the waiting updates of a node whose sequences lie in the range. */
sh_status coord_waiting_forget(coord_step *s, const sh_hash *node, uint64_t epoch, uint64_t first,
                               uint64_t last);
/* Refuses the waiting updates of node (NULL: all); acknowledged when they come again. */
sh_status coord_waiting_refuse(coord_step *s, const sh_hash *node, sh_reason reason);
/* A list of the waiting, made from a row that create read. */
sh_status coord_waiting_restore(sh_coord *c, const sh_update_id *id, sh_slice payload,
                                uint64_t now_ms, sh_error *err);
void coord_waiting_release(sh_coord *c);

/* ---- coordinator_chunks.c ---- */
/* Who keeps a list of n chunks (32-byte names) holds them, and drops them when it is gone: each
 * name as often as it held it. What nobody holds any more is deleted. */
sh_status coord_chunks_hold(sh_coord *c, const uint8_t *names, size_t n, sh_error *err);
sh_status coord_chunks_drop(coord_step *s, const uint8_t *names, size_t n);
/* Deletes what nobody holds: once all holders are loaded, where a list of names was lost. */
sh_status coord_chunks_sweep(coord_step *s);
/* Whether an update of n chunks may be held; those that are held already are not told apart. */
bool coord_chunks_have_room(const sh_coord *c, uint32_t n);
void coord_chunks_release(coord_chunks *chunks);
/* Puts a candidate's bytes as chunks and notes their names; deletes those of the one before. */
sh_status coord_candidate_put_chunks(coord_step *s, sh_bytes bytes, const sh_hash *sha256);
sh_status coord_candidate_drop_chunks(coord_step *s);

/* ---- coordinator_admit.c ---- */
/* Whether the message is taken in now. False: it was answered with "later", or its sender was told
 * so before and is not due yet. */
sh_status coord_admit(coord_step *s, const sh_hash *node, const sh_msg *msg, bool *admitted);
/* Tells a node to come back in its slot among those of the same rate, `after_ms` from now at the
 * earliest. */
sh_status coord_later(coord_step *s, const sh_hash *node, unsigned rate, uint64_t after_ms,
                      const char *text);
/* A node checked in, whose last check-in was at last_ms (0: none). */
void coord_admit_seen(coord_step *s, uint64_t last_ms);
void coord_admit_load(sh_coord *c, uint64_t last_ms, uint64_t now_ms);
/* When nodes come back, before jitter: checkin_ms, or what keeps their check-ins below load_share
 * of checkins_per_s. */
uint64_t coord_admit_return_ms(const sh_coord *c);
void coord_admit_release(coord_admission *admission);

/* ---- coordinator_round.c ---- */
sh_status coord_base_reason(coord_step *s, const sh_update_meta *meta, sh_reason *reason);
/* A row for a whole update that goes into the buffer; for one that is refused as it comes. */
sh_status coord_take(coord_step *s, const sh_update_id *id, sh_bytes meta_bytes);
sh_status coord_refuse(coord_step *s, const sh_update_id *id, sh_bytes meta_bytes,
                       sh_reason reason);
sh_status coord_advance(coord_step *s); /* starts a merge if one is due */
sh_status coord_begin_merge(coord_step *s, const sh_update_id *ids, size_t n);
sh_status coord_on_job(coord_step *s, const sh_coord_job_result *result);
/* Takes the job's verdicts over; false when they are not of this job's inputs. */
bool coord_take_verdicts(coord_candidate *candidate, const sh_coord_job_result *result,
                         uint32_t *good);
/* A job that fails (a full disk, no memory) is started again, ever later: its inputs stay. */
sh_status coord_job_failed(coord_step *s, sh_status why, const char *text);
/* All inputs get their verdict; what the job let pass is merged into `version`, or refused by the
 * gate when that is 0. At a relay it went into its update number `version`. */
sh_status coord_decide_inputs(coord_step *s, uint64_t version);
/* The candidate is decided: the next round begins, and what came in meanwhile may be due. */
sh_status coord_end_round(coord_step *s);
/* The ends of a candidate that the gate let pass; row: coord_candidate_row, with what nodes said.
 */
sh_status coord_candidate_row(coord_step *s, sh_release_row *row); /* row->merged: free it */
sh_status coord_accept(coord_step *s, sh_release_row *row);
sh_status coord_reject(coord_step *s, sh_release_row *row);
sh_status coord_leave_open(coord_step *s, sh_release_row *row);
sh_status coord_begin_rounds(coord_step *s);
void coord_renew_round(coord_step *s); /* when it is past round_ms_max */
/* Drops the candidate in progress; its inputs stay in the buffer. */
sh_status coord_abandon(coord_step *s);
/* Refuses the buffered updates of a node whose key was revoked. */
sh_status coord_refuse_node(coord_step *s, const sh_hash *node, sh_reason reason);

/* What rows of the node that has this key are filed under (coordinator_access.c). */
sh_status coord_first_key(sh_txn *txn, const sh_hash *key, sh_hash *first, sh_error *err);

/* ---- coordinator_parts.c ---- */
sh_status coord_is_relay(sh_txn *txn, const sh_hash *key, bool *is, sh_error *err);
/* *done false: the key is not enrolled. */
sh_status coord_relay_permit(coord_step *s, const sh_hash *key, bool permit, bool *done);
/* How many nodes that drift the check-in stands for: those behind it, when the key is a relay's. */
sh_status coord_drifting(sh_txn *txn, const sh_hash *key, const sh_msg_checkin *checkin,
                         uint32_t *n, sh_error *err);
sh_status coord_relays_count(sh_coord *c, sh_txn *txn, sh_error *err);
uint32_t coord_parts_of(const sh_update_meta *meta); /* 1: a node's own */
/* The i-th; of a node's own update it is the update itself. */
sh_update_part coord_part_at(const sh_update_id *id, const sh_update_meta *meta, uint32_t i);
/* TWICE, RELAY, or *reason unchanged. */
sh_status coord_parts_reason(coord_step *s, const sh_update_id *id, const sh_update_meta *meta,
                             sh_reason *reason);
sh_status coord_parts_mark(coord_step *s, const sh_update_meta *meta);
/* What a part's samples count at most: a node says its samples itself, so they count at most
 * COORD_WEIGHT_FACTOR_MAX times the (lower) median of all parts of the updates. */
sh_status coord_parts_cap(coord_step *s, const sh_update_id *ids, size_t n, uint64_t *cap);
uint64_t coord_parts_samples(const sh_update_id *id, const sh_update_meta *meta, uint64_t cap);

/* ---- coordinator_relay.c: of a relay only, but for open and close ---- */
/* In a new store, and in one that was begun in the same way: nothing is opened when this is no
 * relay. */
sh_status coord_relay_open(coord_step *s, bool is_new);
void coord_relay_close(sh_coord *c);
sh_status coord_relay_event(coord_step *s, const sh_coord_event *event);
/* At the end of every step: begins what is due, sends, sets the timer. */
sh_status coord_relay_end(coord_step *s);
sh_status coord_relay_advance(coord_step *s);
sh_status coord_relay_stacked(coord_step *s, const sh_coord_job_result *result);
void coord_relay_job(const sh_coord *c, sh_coord_job *job);
void coord_relay_plan(const coord_step *s, sh_msg_plan *plan);
void coord_relay_status(const sh_coord *c, sh_coord_status *out);

/* ---- coordinator_canary.c ---- */
sh_status coord_canary_begin(coord_step *s);
/* Decides, if the answers are enough or the time is up; else sets the timer. */
sh_status coord_canary_consider(coord_step *s);
/* Fills the plan's evaluation, if this node is to do one. */
sh_status coord_canary_plan(coord_step *s, const sh_hash *node, const sh_msg_checkin *checkin,
                            sh_evaluate_plan *plan);
/* An item that is new; *good false: it cannot be read. */
sh_status coord_on_evaluation(coord_step *s, const sh_update_id *id, sh_bytes payload, bool *good);
sh_status coord_canary_forget(coord_step *s, const sh_hash *node); /* NULL: all answers */

/* ---- coordinator_command.c ---- */
sh_status coord_on_command(coord_step *s, const sh_coord_event *event);

/* ---- coordinator_release.c ---- */
/* Publishes row (candidate, parent, losses, ... filled) as the next version: chunks, manifest,
 * rows. model: the bytes; empty: the store has the chunks of blob. Fills version and at_ms. */
sh_status coord_publish(coord_step *s, sh_release_row *row, sh_bytes model, const sh_blob *blob);
sh_status coord_releases_load(sh_coord *c, sh_txn *txn, sh_error *err);
/* *done false: the version is not there, is the current one, or its bytes are not. */
sh_status coord_rollback(coord_step *s, uint64_t version, sh_bytes model, bool *done);
sh_status coord_genesis(coord_step *s, const sh_genesis *genesis);
/* The store was a backup: a new epoch, new numbers, and the current release under a new version. */
sh_status coord_restored(coord_step *s, uint64_t made_ms);
/* A node reports an active version that this store has never issued: it was set back without a
 * mark. The next version will be above it. */
sh_status coord_lift(coord_step *s, uint64_t version);
/* A release that a parent signed becomes the current one; its chunks are in the store. */
sh_status coord_adopt(coord_step *s, sh_bytes manifest, uint64_t candidate, const char *verdict);
void coord_release_release(coord_release *release);

#endif
