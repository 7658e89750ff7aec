/*
 * The sender's end of the protocol: enrols, checks in, sends what the outbox owes, serves the
 * chunks that are asked for, fetches those that its owner wants. A node has one, and so has an
 * aggregator that relays. It does no I/O: the owner hands in the messages that came and the time,
 * and takes the messages that go out.
 *
 * Invariants: everything that is owed is in the outbox; what an sh_link holds is volatile and only
 * says when it goes out next. An item stays in flight until an acknowledgement covers it; the link
 * going down forgets the flight, not the item. Retries are exponential with full jitter; a silent
 * peer therefore costs one message an interval of each kind.
 *
 * Identity: what the store's class calls sequence n goes out as n - base of the epoch whose segment
 * it lies in. There is one epoch and its base is 0 until the aggregator says that another sender,
 * a copy of this store, has it too; then what the two have not in common gets a new epoch
 * (docs/protocol.md, "Leases"). From protocol version 3 on nothing but ENROL goes out on a link
 * before its WELCOME, items carry the name of this start's lease, and an acknowledgement of the
 * present epoch that names another one is another sender's.
 *
 * Threads: one at a time. Ownership: the struct is the owner's memory and holds nothing to release.
 * All functions work inside the caller's write transaction; after an error the transaction must be
 * aborted and the link opened again. Determinism: same store, calls and rng, same messages.
 *
 *     sh_link_step s = {&link, txn, now_ms, &rng, owner, err};
 *     SH_TRY(sh_link_open(&s, &options));
 *     sh_link_up(&s);
 *     SH_TRY(sh_link_receive(&s, message)); // a message came
 *     SH_TRY(sh_link_pump(&s));             // at the end of every step; call again at
 *                                           // sh_link_due(&link)
 */
#ifndef SH_SYNC_LINK_H
#define SH_SYNC_LINK_H

#include "shared/base/rng.h"
#include "shared/sync/sync.h"

#define SH_LINK_NEVER         UINT64_MAX
#define SH_LINK_IN_FLIGHT_MAX 16u /* items sent and not acknowledged */
/* Of one class, so that what is not taken in of one never keeps the others waiting. */
#define SH_LINK_CLASS_FLIGHT_MAX (SH_LINK_IN_FLIGHT_MAX - (SH_CLASSES - 1))
#define SH_LINK_SERVE_MAX        (2 * SH_WIRE_WANT_MAX) /* chunks asked of us and not yet sent */
#define SH_LINK_SERVE_STEP_MAX   16u                    /* chunks sent a step: 1 MiB */
#define SH_LINK_WANT_MIN         8u /* chunks asked for at a time, after the peer sent fewer */
#define SH_LINK_RETURN_MIN_MS    100u
#define SH_LINK_RETURN_MAX_MS    (7u * 24 * 3600 * 1000)
#define SH_LINK_SEGMENTS_MAX     16u     /* epochs of which something is owed */
#define SH_LINK_META_EPOCH       "epoch" /* key in the outbox's meta table; 8 bytes, big-endian */

typedef enum {
    SH_LINK_DOWN,
    SH_LINK_TRYING, /* enrolment sent; below version 3 the rest goes on */
    SH_LINK_WELCOME,
    SH_LINK_REJECTED
} sh_link_state;

/* What the link asks of its owner. `arg` is the step's. An error ends the step. */
typedef struct {
    /* One more message can go out in this step. */
    bool (*may_send)(void *arg);
    /* Takes the bytes over (*message is empty afterwards), to be sent once the step is committed.
     */
    void (*send)(void *arg, sh_buf *message);
    /* Epoch, time and the outbox's numbers are filled in already. */
    sh_status (*fill_checkin)(void *arg, sh_msg_checkin *checkin);
    /* The plan's slices end with the call. What does not hold in it: sh_link_refuse. */
    sh_status (*on_plan)(void *arg, const sh_msg_plan *plan);
    /* An item was acknowledged and is about to leave the outbox; see sh_outbox_fn. */
    sh_outbox_fn on_acked;
    /* Names at most max chunks that are wanted and not in the chunk table, 32 bytes each. */
    sh_status (*missing)(void *arg, uint8_t *hashes, uint32_t max, uint32_t *n);
    /* All chunks of the last WANT are in the chunk table. */
    sh_status (*on_chunks)(void *arg);
    void (*on_rejected)(void *arg, const char *why); /* the aggregator lets us not in: its text */
    void (*on_renewed)(void *arg);                   /* the epoch is a new one */
    /* The aggregator knows the key that sh_link_rotate told: connect with it. NULL: never rotates.
     */
    void (*on_rotated)(void *arg, const sh_hash *key);
    void (*on_refused)(void *arg); /* a message was bad: for counting */
} sh_link_callbacks;

typedef struct {
    const sh_link_callbacks *callbacks;  /* borrowed for the link's life */
    sh_outbox outbox;                    /* arg is replaced by the step's */
    unsigned chunk_table;                /* in the same store */
    sh_msg_enrol enrol;                  /* what ENROL says; texts and token borrowed; epoch and
                                            leases are filled in */
    uint64_t retry_min_ms, retry_max_ms; /* 1 <= least <= most <= SH_LINK_RETURN_MAX_MS */
} sh_link_options;

typedef struct {
    uint64_t due_ms; /* SH_LINK_NEVER: nothing is to be sent */
    uint32_t attempt;
} sh_retry;

/* What is not to go out now, because of the device's policies or budgets: the owner's to set,
 * before pump and as messages are sent. It stays due, and goes out when the gate is open. Zeroed:
 * all are. */
typedef struct {
    bool items[SH_CLASSES], chunks, want;
    uint32_t want_max;             /* chunks of one WANT; 0: as many as fit */
    uint64_t enrol_ms, contact_ms; /* no ENROL, and no CHECKIN and ROTATE, before */
} sh_link_closed;

typedef struct {
    bool used;
    uint8_t cls;
    uint64_t seq;
    sh_retry retry;
} sh_in_flight;

typedef struct {
    uint64_t epoch;
    uint64_t base[SH_CLASSES];
} sh_link_segment;

typedef struct { /* oldest first; a segment ends where the next one begins */
    uint32_t n;
    sh_link_segment items[SH_LINK_SEGMENTS_MAX];
} sh_link_segments;

typedef struct {
    uint64_t epoch, seq;
} sh_wire_id;

typedef struct { /* read freely; written by the functions below only */
    sh_link_options options;
    uint64_t epoch; /* of what is made now: the last segment's */
    uint64_t lease; /* sh_lease_name of this start's */
    sh_link_segments segments;
    uint32_t renewals, renewals_here; /* of the store's life, on this link */
    sh_outbox_counts counts;          /* as in the store */
    sh_link_state state;
    uint32_t version; /* of the protocol, that this link speaks */
    uint64_t hold_ms; /* the aggregator asked for quiet until then */
    sh_link_closed closed;
    sh_retry enrol, checkin, want, rotate;
    sh_hash next_key; /* of the rotation that goes on while rotate is due some time */
    uint8_t token[SH_WIRE_TOKEN_MAX];
    uint32_t n_token;
    sh_retry bury[SH_CLASSES]; /* tombstones for what the aggregator forgot */
    sh_in_flight in_flight[SH_LINK_IN_FLIGHT_MAX];
    uint64_t send_from[SH_CLASSES]; /* lower sequences were sent since the link came up */
    uint8_t serve[SH_LINK_SERVE_MAX * sizeof(sh_hash)];
    uint32_t n_serve;
    uint8_t asked[SH_WIRE_WANT_MAX * sizeof(sh_hash)];
    uint32_t n_asked, asked_got, want_size;
} sh_link;

typedef struct {
    sh_link *link;
    sh_txn *txn;
    uint64_t now_ms;
    sh_rng *rng;
    void *arg; /* of the callbacks, also of the outbox's */
    sh_error *err;
} sh_link_step;

/* Makes the link, down, from what the store holds; in an empty one draws an epoch. Stores a lease
 * drawn for this start: rng must not give what it gave to an earlier start. */
SH_MUST_USE sh_status sh_link_open(const sh_link_step *s, const sh_link_options *options);
void sh_link_up(const sh_link_step *s);
void sh_link_down(const sh_link_step *s);
/* A message from the aggregator. One that is bad is answered and told to on_refused: no error. */
SH_MUST_USE sh_status sh_link_receive(const sh_link_step *s, sh_bytes message);
/* Sends what is due. */
SH_MUST_USE sh_status sh_link_pump(const sh_link_step *s);
/* When pump has something to do, SH_LINK_NEVER: only after an event. */
uint64_t sh_link_due(const sh_link *link);

/* Appends one item to the outbox; *seq (may be NULL) its number. */
SH_MUST_USE sh_status sh_link_put(const sh_link_step *s, sh_class cls, sh_item_kind kind,
                                  sh_bytes payload, uint64_t *seq);
/* There is news: checks in at once. */
void sh_link_checkin_soon(const sh_link_step *s);
/* Chunks are wanted (`missing` says which): asks for them at once, and again until none is. */
void sh_link_want(const sh_link_step *s);
void sh_link_want_stop(const sh_link_step *s);
/* Tells the aggregator the next key, with a token of 16 to SH_WIRE_TOKEN_MAX bytes that the ENROL
 * under it will carry, again and on later links until it answers: on_rotated. Takes the place of an
 * earlier one. It waits for a link of protocol version 3. */
void sh_link_rotate(const sh_link_step *s, const sh_hash *key, sh_bytes token);
/* Answers ERROR to what came, and tells on_refused. */
SH_MUST_USE sh_status sh_link_refuse(const sh_link_step *s, sh_status code, const char *text);
/* Sets the time of the next try: retry_min, which an answer may take, and full jitter. */
void sh_link_arm(const sh_link_step *s, sh_retry *retry);

/* What local sequence seq of a class is called on the wire. */
sh_wire_id sh_link_wire_id(const sh_link_segments *segments, uint8_t cls, uint64_t seq);
/* The epochs of a store of which something is owed, and the present one: for audits. */
SH_MUST_USE sh_status sh_link_stored_segments(sh_txn *txn, const sh_outbox *outbox,
                                              sh_link_segments *out, sh_error *err);
/* The store was a backup, and the original may have sent more since: before the link is opened,
 * which then draws an epoch for all that is owed. The receiver must know by other means than the
 * sequence what it has already. */
SH_MUST_USE sh_status sh_link_forget_identity(sh_txn *txn, unsigned meta_table, sh_error *err);
/* The epoch of a store's META table. SH_ERR_NOT_FOUND without an error's text. */
SH_MUST_USE sh_status sh_link_stored_epoch(sh_txn *txn, unsigned meta_table, uint64_t *epoch,
                                           sh_error *err);

#endif
