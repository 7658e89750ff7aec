/*
 * A real shoal-node on loopback: a folder made by `shoal-node init` from a bundle of the test's own
 * (a tiny model, an aggregator that the test plays), the process, its log, and HTTP to it. Include
 * after cmocka.h.
 */
#ifndef SH_TESTS_E2E_NODE_RIG_H
#define SH_TESTS_E2E_NODE_RIG_H

#include "shared/base/buf.h"
#include "shared/base/json.h"
#include "shared/net/net.h"
#include "shared/wire/wire.h"
#include "tests/e2e/harness.h"

#define RIG_WAIT_MS E2E_WAIT_MS

typedef struct {
    const char *program;
    temp_dir dir;
    char bundle[96], node[96];
    sh_sign_secret_key release_key;
    sh_sign_public_key release_pub;
    sh_net_keys aggregator; /* the aggregator that the test plays */
    sh_hash public_key;     /* the node's */
    e2e_process process;
    unsigned port;
    unsigned starts;
} node_rig;

/* A bundle, and a node made of it. endpoint NULL: an aggregator that is not there. */
void node_rig_make(node_rig *r, const char *program, const char *endpoint);
void node_rig_release(node_rig *r); /* kills the node */
/* A model of the tiny kind as GGUF bytes and its signed manifest. */
void node_rig_release_make(node_rig *r, uint64_t version, uint64_t seed, sh_buf *model,
                           sh_buf *manifest);
/* words: more flags, NULL at the end. failpoints may be NULL. The log is begun anew. */
void node_rig_start(node_rig *r, const char *const *words, const char *failpoints);
void node_rig_ready(node_rig *r); /* waits for event=ready and takes the port */
/* Waits until the log has `text`, at most RIG_WAIT_MS; false: the node ended before. */
bool node_rig_saw(node_rig *r, const char *text);
bool node_rig_logged(node_rig *r, const char *text); /* now */
int node_rig_end(node_rig *r, int signal_number);    /* exit code, or 128 + signal */
int node_rig_wait(node_rig *r);                      /* the same, when it ends by itself */

/* One request; the answer's body into out (0-terminated). Returns the HTTP status, -1: none. */
int node_rig_http(node_rig *r, const char *method, const char *path, const char *body, char *out,
                  size_t out_bytes);
/* A completion of 4 tokens; its id into id[64]. */
void node_rig_complete(node_rig *r, const char *prompt, const char *user, char *id);
int node_rig_feedback(node_rig *r, const char *id, const char *action, const char *text);
json_t *node_rig_status(node_rig *r); /* shoal-node status --json */

#endif
