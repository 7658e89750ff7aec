/*
 * The protocol's messages: structs, and their bytes in MessagePack. docs/protocol.md is the
 * grammar; this header and it change together.
 *
 * A message is one byte string: the array [version, type, hash, body], where hash is the first 16
 * bytes of BLAKE2b-256 of body and body is a bin holding a MessagePack array of the type's fields.
 * Decoding checks every count against the bytes left before anything is reserved (MessagePack
 * itself has no size limit), the version, the hash, every limit below and that nothing is left
 * over. Decoded slices point into the caller's bytes.
 * The sender is never a field: it is the key that the transport authenticated.
 */
#ifndef SH_WIRE_WIRE_H
#define SH_WIRE_WIRE_H

#include "shared/base/buf.h"
#include "shared/base/hash.h"

#define SH_WIRE_VERSION      3 /* 2: federated evaluation; 3: leases, tokens, rotation, relays */
#define SH_WIRE_VERSION_MIN  1 /* the oldest that is still spoken */
#define SH_WIRE_MESSAGE_MAX  (1u << 20)
#define SH_WIRE_TEXT_MAX     256
#define SH_CHUNK_BYTES       65536u
#define SH_BLOB_CHUNKS_MAX   4096u /* 256 MiB a blob */
#define SH_WIRE_ITEM_MAX     (256u << 10)
#define SH_WIRE_MANIFEST_MAX (160u << 10)
#define SH_WIRE_FORMAT_MAX   15
#define SH_WIRE_WANT_MAX     64u /* chunks asked for in one WANT */
#define SH_ACK_BITMAP_WORDS  16u /* 1,024 sequences above the high-water mark */
#define SH_WIRE_LEASES_MAX   32u /* in one ENROL */
#define SH_WIRE_START_BYTES  (8 * SH_CLASSES)
#define SH_WIRE_TOKEN_MAX    64u   /* bytes of a token */
#define SH_WIRE_CLASS_MAX    31    /* bytes of a device class's name */
#define SH_WIRE_TIME_MAX     96u   /* bytes of a signed time */
#define SH_UPDATE_PARTS_MAX  1024u /* updates that a relay merges into one */

typedef enum {
    SH_MSG_ENROL = 1, /* node: who I am and can do */
    SH_MSG_WELCOME,   /* aggregator: accepted, or why not */
    SH_MSG_CHECKIN,   /* node: state up */
    SH_MSG_PLAN,      /* aggregator: plan down */
    SH_MSG_ITEM,      /* node: one outbox item */
    SH_MSG_ACK,       /* aggregator: what it has committed of a class */
    SH_MSG_WANT,      /* both: send me these chunks */
    SH_MSG_CHUNK,     /* both: a chunk */
    SH_MSG_ERROR,     /* both: what was wrong with what you sent */
    SH_MSG_ROTATE,    /* node: my next key; aggregator: it may connect. From version 3 on */
} sh_msg_type;

typedef enum { /* outbox classes, most precious first */
               SH_CLASS_UPDATE = 0,
               SH_CLASS_ALARM,
               SH_CLASS_WINDOW,
               SH_CLASS_RECORD,
               SH_CLASSES
} sh_class;

typedef struct {
    const void *data;
    size_t n;
} sh_bytes; /* borrowed */

/* A blob by content: whole-file SHA-256 and the BLAKE2b-256 of each chunk of SH_CHUNK_BYTES (the
 * last may be shorter). */
typedef struct {
    sh_hash sha256;
    uint64_t bytes;
    uint32_t n_chunks;
    const uint8_t *chunk_hashes; /* [n_chunks * 32], borrowed */
} sh_blob;

typedef struct {
    uint32_t n;
    const uint8_t *hashes; /* [n * 32], borrowed */
} sh_hash_list;

typedef struct {
    uint64_t epoch;
    const char *agent, *kernel; /* kernel: level of the kernels, that is the SIMD that it has */
    uint32_t cores;
    uint64_t memory_bytes;
    /* from version 3 on */
    const char *device_class; /* as its owner named it; "": not said */
    uint64_t disk_bytes;      /* that its store may take */
    uint32_t slots;           /* model files that it keeps */
    sh_bytes token;           /* one-time token of an enrolment or a rotation; empty: none */
    sh_hash_list leases;      /* [0] this start's, then those that the aggregator may have on
                                 record, at most SH_WIRE_LEASES_MAX; n 0: the node does not guard
                                 against copies of its store. See docs/protocol.md, "Leases" */
    sh_bytes starts;          /* sh_start_put's of each lease, in the epoch; empty: not said */
} sh_msg_enrol;

typedef struct {
    bool accepted;
    const char *text;
    /* from version 3 on */
    bool renew;              /* another sender has this epoch: take a new one */
    uint64_t retry_after_ms; /* not accepted: enrol again after so long; 0: as the node likes */
    uint64_t epoch;          /* of the ENROL that this answers; 0: not said */
    uint32_t common;         /* renew: index in ENROL's leases of the newest that the other sender
                                had as well; their number: none */
    uint64_t lease;          /* sh_lease_name of the ENROL's first; 0: not said */
    sh_bytes parted;         /* renew: sh_start_put's of the other sender's first start after
                                `common`; empty: none that is known */
} sh_msg_welcome;

/* Bits of sh_msg_checkin.conditions: what the device says of itself now. */
enum {
    SH_CONDITION_STORE_FULL = 1u << 0,
    SH_CONDITION_METERED = 1u << 1,
    SH_CONDITION_BATTERY = 1u << 2, /* no external power */
    SH_CONDITION_BUSY = 1u << 3,    /* its user is at work */
    SH_CONDITION_HOT = 1u << 4,
    SH_CONDITION_HOURS = 1u << 5,  /* outside of the hours given */
    SH_CONDITION_BUDGET = 1u << 6, /* a byte budget is used up */
    SH_CONDITION_CLOCK = 1u << 7,  /* its clock is more than a day off */
    SH_CONDITIONS_ALL = (1u << 8) - 1
};

typedef struct {
    uint64_t epoch, now_ms;
    uint64_t active_version, confirmed_version; /* releases */
    uint64_t installing_version;                /* 0: none */
    uint32_t training_round;                    /* 0: idle */
    uint64_t examples, example_tokens;          /* feedback that a training could use */
    uint64_t outbox_items, outbox_bytes;
    uint64_t dropped[SH_CLASSES]; /* items lost to quotas so far */
    uint64_t inferences, windows;
    bool drifting; /* an alarm stands */
    /* from version 3 on */
    uint64_t disk_free, store_bytes, store_bytes_max;
    uint64_t refused_full; /* inferences and items that a full store did not take */
    uint32_t stores_lost;  /* environments set aside as corrupt */
    uint32_t conditions;   /* SH_CONDITION_ bits */
    uint64_t bytes_up_day, bytes_down_day;
    uint32_t nodes, nodes_drifting; /* behind a relay; a node: 0 */
} sh_msg_checkin;

typedef struct {
    bool train;
    uint32_t round;
    uint64_t base_version;
    sh_hash base_sha256;
    uint64_t a_seed;
    uint32_t rank;
    float alpha, lr, lr_final, clip;
    uint32_t batch, context, passes_milli, steps_max, warmup; /* passes_milli: 1000 is one pass */
    uint32_t tokens_min; /* do not train on fewer target tokens, those held out not counted */
} sh_train_plan;

/* Federated evaluation: score a candidate beside its parent on the node's own held-out feedback.
 * Nothing of it is ever activated, so it carries no signature: what is released comes as a
 * manifest. */
typedef struct {
    uint64_t candidate;      /* 0: nothing to evaluate */
    uint64_t parent_version; /* a node that runs another release does not evaluate */
    sh_blob model;
} sh_evaluate_plan;

typedef struct {
    uint64_t return_after_ms;
    sh_train_plan train;
    sh_bytes manifest;         /* signed manifest of the release to take; empty: stay */
    sh_evaluate_plan evaluate; /* from version 2 on */
    sh_bytes time;             /* sh_time_sign's; empty: none. From version 3 on */
} sh_msg_plan;

typedef enum {
    SH_ITEM_UPDATE = 1, /* payload: sh_update_meta */
    SH_ITEM_ALARM,      /* payload: sh_alarm */
    SH_ITEM_WINDOW,     /* payload: stats' encoded window */
    SH_ITEM_TOMBSTONE,  /* sequences seq .. last_seq were dropped by quota */
    SH_ITEM_EVALUATION, /* payload: sh_evaluation; class ALARM; from version 2 on */
} sh_item_kind;

typedef struct {
    uint64_t epoch;
    uint8_t cls;       /* sh_class */
    uint64_t seq;      /* from 1, without gaps within (epoch, class) */
    uint8_t kind;      /* sh_item_kind */
    uint64_t last_seq; /* tombstones; else = seq */
    sh_bytes payload;
    uint64_t lease; /* sh_lease_name of the start that sends in its epoch; 0: of what copies have in
                       common, or from one that does not guard against them. From version 3 on */
} sh_msg_item;

typedef struct {
    uint64_t epoch;
    uint8_t cls;
    uint64_t high_water;                  /* every sequence <= this is committed */
    uint64_t bitmap[SH_ACK_BITMAP_WORDS]; /* bit i: high_water + 1 + i is committed */
    uint64_t
        lease; /* sh_lease_name of the start whose epoch it is; 0: not said. From version 3 on */
} sh_msg_ack;

typedef struct {
    sh_hash hash;
    sh_bytes bytes;
    bool checked; /* not on the wire: the decoder found that the bytes are those of the name */
} sh_msg_chunk;

typedef struct {
    const char *code, *text; /* code: a status name */
    uint64_t retry_after_ms;
} sh_msg_error;

typedef struct { /* the answer repeats key and says nothing of the token */
    sh_hash key;
    sh_bytes token; /* 16 to SH_WIRE_TOKEN_MAX bytes from the node, empty from the aggregator */
} sh_msg_rotate;

typedef struct {
    uint32_t version; /* encode: 0 is SH_WIRE_VERSION; fields that a version has not are left out.
                         decode: the one that it was written in; what it has not is zero */
    sh_msg_type type;
    union {
        sh_msg_enrol enrol;
        sh_msg_welcome welcome;
        sh_msg_checkin checkin;
        sh_msg_plan plan;
        sh_msg_item item;
        sh_msg_ack ack;
        sh_hash_list want; /* chunks: 1 to SH_WIRE_WANT_MAX */
        sh_msg_chunk chunk;
        sh_msg_error error;
        sh_msg_rotate rotate;
    };
    /* Storage of decoded texts: the text pointers of a copied sh_msg still point at the original.
     */
    char text[3][SH_WIRE_TEXT_MAX + 1];
} sh_msg;

/* Appends the message's bytes to out. SH_ERR_LIMIT when a field passes its limit, SH_ERR_INVALID
 * when it breaks another rule: texts are UTF-8 of at most SH_WIRE_TEXT_MAX bytes without control
 * characters, floats finite, sequences >= 1, a WANT and a chunk not empty, a tombstone's payload
 * empty, a blob's n_chunks what its bytes need. Decoding checks the same rules. */
SH_MUST_USE sh_status sh_msg_encode(const sh_msg *msg, sh_buf *out, sh_error *err);
/* SH_ERR_INVALID, SH_ERR_UNSUPPORTED (version), SH_ERR_CORRUPT (hash), SH_ERR_LIMIT. */
SH_MUST_USE sh_status sh_msg_decode(const void *bytes, size_t n, sh_msg *out, sh_error *err);
/* The same with a choice of what is hashed, for who takes in many chunks:
 *   SH_CHECK_ENVELOPE  the body, as sh_msg_decode does
 *   SH_CHECK_NAME      a CHUNK's bytes against its name, and not the body as well, in which there
 *                      is nothing else; any other message's body
 *   SH_CHECK_DONE      nothing: these very bytes were decoded before, with SH_CHECK_NAME */
typedef enum { SH_CHECK_ENVELOPE, SH_CHECK_NAME, SH_CHECK_DONE } sh_msg_check;
SH_MUST_USE sh_status sh_msg_decode_checked(const void *bytes, size_t n, sh_msg_check check,
                                            sh_msg *out, sh_error *err);
const char *sh_msg_type_name(sh_msg_type type);

/* The next sequence of each class, as a message carries it: 8 bytes each, highest first. */
void sh_start_put(uint8_t out[SH_WIRE_START_BYTES], const uint64_t next_seq[SH_CLASSES]);
void sh_start_get(const uint8_t in[SH_WIRE_START_BYTES], uint64_t next_seq[SH_CLASSES]);
/* What items and acknowledgements call a lease: its first 8 bytes, highest first; never 0. */
uint64_t sh_lease_name(const uint8_t lease[sizeof(sh_hash)]);

/* ---- payloads ---- */
typedef struct { /* one node's update: what the aggregator needs to know before it has the blob */
    sh_blob blob;
    uint32_t round;
    uint64_t base_version;
    sh_hash base_sha256;
    uint64_t a_seed;
    uint32_t rank;
    float alpha;
    uint64_t samples;                     /* target tokens trained on, once each */
    uint64_t tokens_seen;                 /* over all passes */
    double heldout_before, heldout_after; /* node's own held-out part, nats a token */
    sh_bytes parts; /* of a relay: n * SH_UPDATE_PART_BYTES, see sh_update_part_put; empty: the
                       sender trained it itself */
} sh_update_meta;
/* One node's update that a relay merged: who made it, as the relay knows it. Sorted by (node,
 * epoch, seq), each once; samples sum up to the update's. */
typedef struct {
    sh_hash node;
    uint64_t epoch, seq, samples;
} sh_update_part;
#define SH_UPDATE_PART_BYTES 56u
void sh_update_part_put(uint8_t out[SH_UPDATE_PART_BYTES], const sh_update_part *part);
sh_update_part sh_update_part_get(const uint8_t in[SH_UPDATE_PART_BYTES]);
SH_MUST_USE sh_status sh_update_meta_encode(const sh_update_meta *meta, sh_buf *out, sh_error *err);
SH_MUST_USE sh_status sh_update_meta_decode(const void *bytes, size_t n, sh_update_meta *out,
                                            sh_error *err);

typedef struct {
    uint64_t window; /* index on the node */
    uint64_t release_version, inferences;
    uint32_t metric; /* stats' number */
    double log_evalue, effect;
    uint64_t at_ms;
} sh_alarm;
SH_MUST_USE sh_status sh_alarm_encode(const sh_alarm *alarm, sh_buf *out, sh_error *err);
SH_MUST_USE sh_status sh_alarm_decode(const void *bytes, size_t n, sh_alarm *out, sh_error *err);

/* What a node found out about a candidate: sums and counts of its own held-out feedback, a slice
 * each, nothing else. */
#define SH_EVALUATION_SLICES_MAX 8
typedef enum { /* slices: by what the user had done with the text */
               SH_SLICE_ACCEPTED,
               SH_SLICE_CORRECTED,
               SH_SLICES
} sh_slice_kind;
typedef struct {
    uint32_t slice; /* sh_slice_kind; each at most once, growing */
    uint64_t tokens;
    double nll_parent, nll_candidate; /* sums over the tokens, nats */
} sh_slice_score;
typedef struct {
    uint64_t candidate, parent_version;
    sh_hash candidate_sha256;
    uint32_t n;
    sh_slice_score slices[SH_EVALUATION_SLICES_MAX];
} sh_evaluation;
SH_MUST_USE sh_status sh_evaluation_encode(const sh_evaluation *evaluation, sh_buf *out,
                                           sh_error *err);
SH_MUST_USE sh_status sh_evaluation_decode(const void *bytes, size_t n, sh_evaluation *out,
                                           sh_error *err);

/* A release's manifest: MessagePack of the fields, then its Ed25519 signature over those bytes.
 * parent < version. */
typedef struct {
    uint64_t version, parent; /* monotonic; genesis is 1, its parent 0 */
    uint64_t created_ms;
    sh_blob model;        /* quantized GGUF */
    const char *format;   /* "Q8_0"; decoded: points at format_text */
    sh_hash suite_sha256; /* gate data */
    double gate_loss_parent, gate_loss;
    uint32_t updates_merged;
    char format_text[SH_WIRE_FORMAT_MAX + 1];
} sh_manifest;
SH_MUST_USE sh_status sh_manifest_sign(const sh_manifest *manifest, const sh_sign_secret_key *sk,
                                       sh_buf *out, sh_error *err);
/* SH_ERR_AUTH when the signature is not pk's; nothing is read before that. */
SH_MUST_USE sh_status sh_manifest_verify(const void *bytes, size_t n, const sh_sign_public_key *pk,
                                         sh_manifest *out, sh_error *err);

/* Without a look at the signature: of bytes that sh_manifest_verify has passed before. */
SH_MUST_USE sh_status sh_manifest_decode(const void *bytes, size_t n, sh_manifest *out,
                                         sh_error *err);

/* The aggregator's time, signed by the release key: ["shoal-time", 1, now_ms], then the signature.
 * A floor, not a clock: the true time is not before it. */
SH_MUST_USE sh_status sh_time_sign(uint64_t now_ms, const sh_sign_secret_key *sk, sh_buf *out,
                                   sh_error *err);
SH_MUST_USE sh_status sh_time_verify(sh_bytes stamp, const sh_sign_public_key *pk, uint64_t *now_ms,
                                     sh_error *err);
/* What it says, whoever signed it: to find out whether verifying it would change anything. */
SH_MUST_USE sh_status sh_time_peek(sh_bytes stamp, uint64_t *now_ms, sh_error *err);

/* Fills chunk hashes (malloc'ed, the caller's) and SHA-256 of a blob's bytes. SH_ERR_LIMIT over
 * SH_BLOB_CHUNKS_MAX chunks. */
SH_MUST_USE sh_status sh_blob_describe(const void *bytes, size_t n, sh_blob *out,
                                       uint8_t **chunk_hashes, sh_error *err);

#endif
