/*
 * A record's bytes, little-endian, SH_RECORD_BYTES = 120 in all:
 *
 *     0  2  magic "SR"                   44  4  float least log-probability
 *     2  1  version, 1                   48  4  float mean entropy
 *     3  1  stop reason                  52  4  float byte-fallback share
 *     4  8  sequence number              56  4  float repeated 4-gram share
 *    12  8  time, ms                     60  2  edit distance
 *    20  4  release version              62  1  feedback
 *    24  4  time to first token, us      63  1  0
 *    28  4  time a token, us             64 16  projection, int8
 *    32  2  prompt tokens                80 32  bucket counts, two a byte, low nibble first
 *    34  2  output tokens               112  8  checksum: first bytes of BLAKE2b-256 of 0..111
 *    36  4  float prompt NLL
 *    40  4  float mean log-probability
 */
#include "shared/stats/record.h"

#include <string.h>

#include "shared/stats/bytes.h"
#include "shared/stats/sketch.h"

#define RECORD_MAGIC   0x5253 /* "SR" */
#define RECORD_VERSION 1
#define RECORD_BODY    112

void sh_record_count_token(sh_record *record, int32_t token)
{
    unsigned b = (unsigned)(sh_mix64((uint32_t)token) % SH_TOKEN_BUCKETS);
    if (sh_record_bucket(record, b) < SH_BUCKET_MAX)
        record->bucket[b / 2] = (uint8_t)(record->bucket[b / 2] + (b % 2 ? 16 : 1));
}

unsigned sh_record_bucket(const sh_record *record, unsigned b)
{
    SH_ASSERT(b < SH_TOKEN_BUCKETS);
    return b % 2 ? record->bucket[b / 2] >> 4 : record->bucket[b / 2] & 15U;
}

/* The caller has room for SH_RECORD_BYTES, so a fixed buffer stands in for a growing one. */
static uint8_t *put(uint8_t *at, uint64_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        *at++ = (uint8_t)(value >> (8 * i));
    return at;
}

static uint8_t *put_float(uint8_t *at, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return put(at, bits, 4);
}

void sh_record_encode(const sh_record *record, uint8_t out[SH_RECORD_BYTES])
{
    uint8_t *at = put(out, RECORD_MAGIC, 2);
    at = put(at, RECORD_VERSION, 1);
    at = put(at, record->stop, 1);
    at = put(at, record->seq, 8);
    at = put(at, record->at_ms, 8);
    at = put(at, record->release_version, 4);
    at = put(at, record->ttft_us, 4);
    at = put(at, record->token_us, 4);
    at = put(at, record->prompt_tokens, 2);
    at = put(at, record->output_tokens, 2);
    at = put_float(at, record->prompt_nll);
    at = put_float(at, record->mean_logprob);
    at = put_float(at, record->least_logprob);
    at = put_float(at, record->mean_entropy);
    at = put_float(at, record->byte_fallback);
    at = put_float(at, record->repeated_4grams);
    at = put(at, record->edit_distance, 2);
    at = put(at, record->feedback, 1);
    at = put(at, 0, 1);
    memcpy(at, record->projection, SH_PROJECTIONS);
    at += SH_PROJECTIONS;
    memcpy(at, record->bucket, sizeof(record->bucket));
    at += sizeof(record->bucket);
    SH_ASSERT(at == out + RECORD_BODY);
    put(at, sh_checksum64(out, RECORD_BODY), 8);
}

sh_status sh_record_decode(const void *bytes, size_t n, sh_record *out, sh_error *err)
{
    if (n != SH_RECORD_BYTES)
        return sh_fail(err, SH_ERR_INVALID, "record: %zu bytes, expected %d", n, SH_RECORD_BYTES);
    sh_reader r = {bytes, (const uint8_t *)bytes + n, true};
    if (sh_read_fixed(&r, 2) != RECORD_MAGIC)
        return sh_fail(err, SH_ERR_INVALID, "record: wrong magic");
    uint64_t version = sh_read_fixed(&r, 1);
    if (version != RECORD_VERSION)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "record: version %u, expected %d",
                       (unsigned)version, RECORD_VERSION);
    sh_record x = {0};
    x.stop = (uint8_t)sh_read_fixed(&r, 1);
    x.seq = sh_read_fixed(&r, 8);
    x.at_ms = sh_read_fixed(&r, 8);
    x.release_version = (uint32_t)sh_read_fixed(&r, 4);
    x.ttft_us = (uint32_t)sh_read_fixed(&r, 4);
    x.token_us = (uint32_t)sh_read_fixed(&r, 4);
    x.prompt_tokens = (uint16_t)sh_read_fixed(&r, 2);
    x.output_tokens = (uint16_t)sh_read_fixed(&r, 2);
    x.prompt_nll = sh_read_float(&r);
    x.mean_logprob = sh_read_float(&r);
    x.least_logprob = sh_read_float(&r);
    x.mean_entropy = sh_read_float(&r);
    x.byte_fallback = sh_read_float(&r);
    x.repeated_4grams = sh_read_float(&r);
    x.edit_distance = (uint16_t)sh_read_fixed(&r, 2);
    x.feedback = (uint8_t)sh_read_fixed(&r, 1);
    uint64_t zero = sh_read_fixed(&r, 1);
    memcpy(x.projection, r.at, SH_PROJECTIONS);
    memcpy(x.bucket, r.at + SH_PROJECTIONS, sizeof(x.bucket));
    r.at += SH_PROJECTIONS + sizeof(x.bucket);
    if (sh_read_fixed(&r, 8) != sh_checksum64(bytes, RECORD_BODY))
        return sh_fail(err, SH_ERR_CORRUPT, "record %llu: checksum does not hold",
                       (unsigned long long)x.seq);
    if (zero != 0 || x.feedback >= SH_FEEDBACK_KINDS)
        return sh_fail(err, SH_ERR_INVALID, "record %llu: feedback %u is unknown",
                       (unsigned long long)x.seq, x.feedback);
    *out = x;
    return SH_OK;
}
