/* Random messages and payloads for the tests of wire, and for its fuzzing corpus. */
#ifndef TESTS_WIRE_SAMPLE_H
#define TESTS_WIRE_SAMPLE_H

#include "shared/base/rng.h"
#include "shared/wire/wire.h"

#define SAMPLE_HASHES 80 /* more than a WANT may have */

/* A message and what its slices and texts point at. */
typedef struct {
    sh_msg msg;
    char text[2][SH_WIRE_TEXT_MAX + 1];
    uint8_t bytes[SH_WIRE_ITEM_MAX + 1];
    uint8_t hashes[SAMPLE_HASHES * 32];
} sample;

/* A message of version 1. size_max: of the bins that may be large. */
void sample_msg(sh_rng *rng, sh_msg_type type, size_t size_max, sample *out);
/* Makes it one of version 2, perhaps with what only that has. */
void sample_msg_2(sh_rng *rng, sample *out);

typedef struct {
    uint8_t hashes[8 * 32];
    sh_update_meta update;
    sh_alarm alarm;
    sh_manifest manifest;
    sh_evaluation evaluation;
} sample_payloads;
void sample_payload(sh_rng *rng, sample_payloads *out);

/* Appends an envelope with the right hash around any body. */
void sample_wrap(uint64_t version, uint8_t type, const void *body, size_t n, sh_buf *out);

#endif
