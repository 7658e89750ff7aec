/*
 * What a node keeps of one inference: numbers, never text and never token ids.
 *
 * Invariants: a record is at most 128 bytes, in memory and encoded; it holds no text, and nothing
 * from which a token of the prompt could be told but 64 hashed counts of 4 bits each.
 * Threads: plain data. Ownership: by value.
 *
 *     sh_record r = {.at_ms = now, .release_version = 3, .prompt_tokens = n};
 *     for (size_t i = 0; i < n; i++)
 *         sh_record_count_token(&r, tokens[i]);
 *     uint8_t bytes[SH_RECORD_BYTES];
 *     sh_record_encode(&r, bytes);
 */
#ifndef SH_STATS_RECORD_H
#define SH_STATS_RECORD_H

#include "shared/base/status.h"

#define SH_PROJECTIONS   16
#define SH_TOKEN_BUCKETS 64
#define SH_BUCKET_MAX    15 /* a 4-bit count saturates here */

typedef enum {
    SH_FEEDBACK_NONE,
    SH_FEEDBACK_ACCEPT,
    SH_FEEDBACK_EDIT,
    SH_FEEDBACK_REJECT
} sh_feedback_kind;
#define SH_FEEDBACK_KINDS 4

typedef struct {
    uint64_t seq; /* set by the node core */
    uint64_t at_ms;
    uint32_t release_version;
    uint32_t ttft_us,
        token_us; /* time to first token, per token after it (virtual in simulation) */
    uint16_t prompt_tokens, output_tokens;
    float prompt_nll; /* mean over the newly typed tokens, nats; 0 or NaN: none */
    float mean_logprob, least_logprob, mean_entropy; /* of the output */
    float byte_fallback; /* share of prompt tokens that are byte tokens */
    float repeated_4grams;
    uint8_t stop, feedback; /* stop reason 0..7; sh_feedback_kind */
    uint16_t edit_distance;
    int8_t projection[SH_PROJECTIONS];    /* of the prompt's mean frozen embedding; all 0: none */
    uint8_t bucket[SH_TOKEN_BUCKETS / 2]; /* hashed token counts of the prompt, low nibble first */
    uint8_t reserved[12];
} sh_record;
_Static_assert(sizeof(sh_record) <= 128, "a record is at most 128 bytes");

/* Adds one prompt token to its hashed bucket, saturating at SH_BUCKET_MAX. */
void sh_record_count_token(sh_record *record, int32_t token);
/* Count of bucket b, b < SH_TOKEN_BUCKETS. */
unsigned sh_record_bucket(const sh_record *record, unsigned b);

#define SH_RECORD_BYTES 120
/* Little-endian, the same on every machine; the bytes are described at the head of record.c. */
void sh_record_encode(const sh_record *record, uint8_t out[SH_RECORD_BYTES]);
/* SH_ERR_INVALID: length, magic or an enumeration; SH_ERR_UNSUPPORTED: version; SH_ERR_CORRUPT:
 * checksum. */
SH_MUST_USE sh_status sh_record_decode(const void *bytes, size_t n, sh_record *out, sh_error *err);

#endif
