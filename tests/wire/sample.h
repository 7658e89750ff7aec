/* Random messages and payloads for the tests of wire, and for its fuzzing corpus. */
#ifndef TESTS_WIRE_SAMPLE_H
#define TESTS_WIRE_SAMPLE_H

#include "shared/base/rng.h"
#include "shared/wire/wire.h"

#define SAMPLE_HASHES 80 /* more than a WANT may have */
#define SAMPLE_PARTS  32

/* A message and what its slices and texts point at. */
typedef struct {
    sh_msg msg;
    char text[3][SH_WIRE_TEXT_MAX + 1];
    uint8_t bytes[SH_WIRE_ITEM_MAX + 1];
    uint8_t hashes[SAMPLE_HASHES * 32];
    uint8_t time[SH_WIRE_TIME_MAX];
} sample;

/* A message of version 1. size_max: of the bins that may be large. */
void sample_msg(sh_rng *rng, sh_msg_type type, size_t size_max, sample *out);
/* Makes it one of version 2, perhaps with what only that has. */
void sample_msg_2(sh_rng *rng, sample *out);
/* Makes that one of version 3: its fields are filled, and a ROTATE. */
void sample_msg_3(sh_rng *rng, sample *out);

typedef struct {
    uint8_t hashes[8 * 32], parts[SAMPLE_PARTS * SH_UPDATE_PART_BYTES];
    sh_update_meta update;
    sh_alarm alarm;
    sh_manifest manifest;
    sh_evaluation evaluation;
} sample_payloads;
void sample_payload(sh_rng *rng, sample_payloads *out);
/* Gives a sample's update n parts. */
void sample_relayed(uint64_t seed, uint32_t n, sample_payloads *out);

/* Appends an envelope with the right hash around any body. */
void sample_wrap(uint64_t version, uint8_t type, const void *body, size_t n, sh_buf *out);

#endif
