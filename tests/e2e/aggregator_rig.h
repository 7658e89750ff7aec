/*
 * A real shoal-aggregator on loopback, made by its own init from a tiny model, with nodes that the
 * test plays over the real transport: they check in as drifting, send an update made of random
 * numbers, score candidates, and take releases whose signature they check. Include after cmocka.h.
 */
#ifndef SH_TESTS_E2E_AGGREGATOR_RIG_H
#define SH_TESTS_E2E_AGGREGATOR_RIG_H

#include "shared/base/json.h"
#include "shared/model/model.h"
#include "shared/net/net.h"
#include "shared/wire/wire.h"
#include "tests/e2e/harness.h"

#define AGG_WAIT_MS E2E_WAIT_MS
#define AGG_PEERS   3

typedef struct {
    bool there, acked;
    uint64_t seq, number; /* number: round, or candidate */
    sh_buf payload;
} agg_item;

typedef struct {
    sh_net_keys keys;
    sh_net_client *client;
    uint64_t epoch, version; /* version: newest release that was offered */
    bool up, refused, welcomed;
    uint64_t acks, errors;
    agg_item update, evaluation;
    sh_buf blob; /* the update's bytes */
    sh_blob described;
    uint8_t *chunks;
} agg_peer;

typedef struct {
    const char *program, *tool; /* shoal-aggregator, shoal */
    char root[64], dir[128], base[96], suites[96];
    char endpoint[128], http[64];
    e2e_process process;
    sh_hash server_key;
    sh_sign_public_key release_pk;
    sh_model *model; /* the genesis */
    sh_net *net;
    agg_peer peers[AGG_PEERS];
} agg_rig;

void agg_make(agg_rig *r, const char *program, const char *tool);
void agg_release(agg_rig *r); /* kills it */
/* The log is begun anew. The first start takes any port, later ones the same. failpoints may be
 * NULL, words are more flags, NULL at the end. */
void agg_start(agg_rig *r, const char *const *words, const char *failpoints);
void agg_ready(agg_rig *r);                    /* waits for event=ready */
bool agg_logged(agg_rig *r, const char *text); /* now */
bool agg_saw(agg_rig *r, const char *text);    /* waits; false: it ended before */
int agg_end(agg_rig *r, int signal_number);    /* exit code, or 128 + signal */
int agg_wait(agg_rig *r);                      /* the same, when it ends by itself */
bool agg_runs(agg_rig *r);
/* `shoal aggregator WORDS --dir DIR --json`; NULL: it failed, with exit code *code. */
json_t *agg_tool(agg_rig *r, const char *const *words, int *code);
json_t *agg_status(agg_rig *r);
int agg_http(agg_rig *r, const char *path, char *out, size_t out_bytes); /* HTTP status */

void agg_enrol(agg_rig *r, unsigned peer); /* by the tool */
void agg_dial(agg_rig *r, unsigned peer);
void agg_hang_up(agg_rig *r, unsigned peer);
/* Plays all peers that dialed for about `ms`. */
void agg_play(agg_rig *r, unsigned ms);

#endif
