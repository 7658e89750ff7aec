/*
 * What must hold in a run, whatever its faults: the promises of section 7 of the design, checked
 * from outside of the cores. The engine (experiments/world/world.h) tells the oracle what it saw;
 * the oracle decodes messages and reads rows by itself, keeps what it knows beside the stores, and
 * notes every promise that is broken. It changes nothing in what it watches.
 *
 * Threads. The hooks of node i are called by the thread that owns node i at that time, those of the
 * aggregator by one thread; they touch nothing that another of them touches. Whatever joins the two
 * sides happens in world_oracle_join, which the engine calls with all threads at a barrier: at the
 * end of each window of virtual time that is no longer than the shortest delay of a link, so that
 * what a node learnt in a window was committed in an earlier one. The result (violations and their
 * order) does not depend on the number of threads.
 *
 * The engine's side of it
 *   - makes the bytes of every update, of every training, different (content is how the oracle
 *     finds that something counted twice);
 *   - calls world_oracle_node_step after each commit, before it carries out the actions;
 *   - calls world_oracle_coord_stepped after each step of the aggregator, and
 * world_oracle_coord_step once for each that a commit made durable, in order, before the actions go
 * out; and world_oracle_coord_sent when bytes do leave for a node.
 *
 *     world_oracle *oracle = NULL;
 *     SH_TRY(world_oracle_create(&options, &oracle, err));
 *     ... run: hooks, and at each barrier world_oracle_join(oracle, now_ms) ...
 *     world_oracle_finish(oracle, now_ms, coord, coord_store, nodes);
 *     if (world_oracle_violations(oracle) > 0) { const world_violation *v = ..._get(oracle, 0); }
 *   cleanup:
 *     world_oracle_destroy(&oracle);
 */
#ifndef WORLD_ORACLE_H
#define WORLD_ORACLE_H

#include "aggregator/coordinator.h"
#include "edge-node/node.h"

#define WORLD_VIOLATIONS_KEPT 256u /* with their text; all are counted */

typedef enum {
    WORLD_RULE_DURABLE,   /* an acknowledged item is there, after every crash and at the end */
    WORLD_RULE_ONCE,      /* no update and no item counts twice */
    WORLD_RULE_OUTBOX,    /* an item leaves an outbox when it is committed above, or is counted */
    WORLD_RULE_CONTENT,   /* what the aggregator has is what the node made */
    WORLD_RULE_VERSION,   /* versions never go back */
    WORLD_RULE_MODEL,     /* a node activates only what a published, signed manifest names */
    WORLD_RULE_LIMIT,     /* memory and queues are under their named limits */
    WORLD_RULE_INFERENCE, /* an inference is taken, or counted as dropped for a full store */
    WORLD_RULE_CORE,      /* a core's step fails only for what its shell did to it */
    WORLD_RULE_DELIVERED, /* at the end: every owed item is delivered */
    WORLD_RULE_CONVERGED, /* at the end: every node has confirmed the newest release */
    WORLD_RULES
} world_rule;
const char *world_rule_name(world_rule rule);

typedef struct {
    world_rule rule;
    uint64_t at_ms;
    uint32_t target; /* node, or WORLD_AGGREGATOR */
    char text[200];
} world_violation;

typedef struct {
    uint32_t nodes;
    sh_sign_public_key release_key; /* the real one */
    const sh_node_options *node;    /* limits that nodes run with; borrowed for the oracle's life */
    uint64_t store_bytes_max;       /* of a node; 0: not checked */
    uint32_t node_items_max;  /* alarms, windows that are kept of one (node, epoch); 0: 1024 */
    uint32_t staleness_max;   /* releases that an update's base may be behind */
    uint64_t asked_bytes_max; /* of updates' chunks on their way; 0: not checked */
    bool says_later;          /* the aggregator has rates, and nodes are told to come back later */
    /* Nodes i with i % stride == 0 are checked at each step, the others at joins and at the end;
     * 1: all. */
    uint32_t stride;
} world_oracle_options;

typedef struct world_oracle world_oracle;
SH_MUST_USE sh_status world_oracle_create(const world_oracle_options *options, world_oracle **out,
                                          sh_error *err);
void world_oracle_destroy(world_oracle **oracle);

/* ---- a node, by its thread ---- */

/* The key under which node `node` sends from now on; once before its first boot, and again after a
 * rotation (items stay filed under the first). Single-threaded (at a barrier). */
void world_oracle_node_key(world_oracle *o, uint32_t node, const sh_hash *key);
/* The node lies from now on: promises to it hold no longer, promises to others do. */
void world_oracle_node_lies(world_oracle *o, uint32_t node);
/* Its store is not what it was: emptied after corruption, set back, or a copy of another's. What it
 * had made and not delivered is not owed any more. */
void world_oracle_node_replaced(world_oracle *o, uint32_t node, uint64_t at_ms);
/* A core was made from the store, and its transaction is committed. */
void world_oracle_node_boot(world_oracle *o, uint32_t node, uint64_t at_ms, const sh_node *core,
                            sh_store *store);
/* A step is committed. */
void world_oracle_node_step(world_oracle *o, uint32_t node, uint64_t at_ms,
                            const sh_node_event *event, const sh_node_actions *actions,
                            const sh_node *core, sh_store *store);
/* create or step or its commit failed with `status`; excused: the shell had a fault on (disk full,
 * a crash in a write, a corrupt store) that makes this status. */
void world_oracle_node_failed(world_oracle *o, uint32_t node, uint64_t at_ms, sh_status status,
                              const char *text, bool excused);
/* A slot's file now has these bytes (their SHA-256 as the shell found them, not as it was told). */
void world_oracle_node_slot(world_oracle *o, uint32_t node, uint32_t slot, const sh_hash *sha256);
/* A user's request while the node is up: taken (its INFERENCE event is committed), or not taken and
 * counted because the store is full; neither is a violation. */
typedef enum { WORLD_INFERENCE_TAKEN, WORLD_INFERENCE_FULL, WORLD_INFERENCE_LOST } world_inference;
void world_oracle_node_inference(world_oracle *o, uint32_t node, uint64_t at_ms,
                                 world_inference what);

/* ---- the aggregator, by its thread ---- */
void world_oracle_coord_boot(world_oracle *o, uint64_t at_ms, const sh_coord *core,
                             sh_store *store);
/* A step was made and is not committed: it may be, and its process die before that is shown. */
void world_oracle_coord_stepped(world_oracle *o, const sh_coord_event *event);
void world_oracle_coord_step(world_oracle *o, uint64_t at_ms, const sh_coord_actions *actions,
                             const sh_coord *core, sh_store *store);
void world_oracle_coord_failed(world_oracle *o, uint64_t at_ms, sh_status status, const char *text,
                               bool excused);
/* These bytes leave for the node with that key: from here on what they say is promised. */
void world_oracle_coord_sent(world_oracle *o, uint64_t at_ms, const sh_hash *key, const void *bytes,
                             size_t n);

/* ---- both, with no thread running ---- */
void world_oracle_join(world_oracle *o, uint64_t now_ms);
uint64_t world_oracle_join_due(const world_oracle *o); /* before then a join does nothing */
/* Reads every row of the aggregator's store: everything promised is there, nothing counts twice. */
void world_oracle_audit(world_oracle *o, uint64_t now_ms, sh_store *coord_store);

typedef struct {         /* what the engine has of a node at the end */
    const sh_node *core; /* NULL: it is switched off for good (a clone): nothing is owed */
    sh_store *store;
} world_oracle_node;
/* Faults have stopped and the fleet had its time: audits, and checks that it came to rest. core
 * NULL: the aggregator's could not be made, or the run ended while it was down. */
void world_oracle_finish(world_oracle *o, uint64_t now_ms, const sh_coord *core,
                         sh_store *coord_store, const world_oracle_node *nodes);

/* All counted so far, those not kept included; call after a join. Kept ones are sorted by time,
 * target and rule. */
uint64_t world_oracle_violations(const world_oracle *o);
size_t world_oracle_kept(const world_oracle *o);
const world_violation *world_oracle_get(const world_oracle *o, size_t i);

typedef struct { /* what was checked: a run in which this is 0 has shown nothing */
    uint64_t node_steps, coord_steps, joins, audits;
    uint64_t acks_promised, items_made, items_committed, items_dropped, releases, activations;
    uint64_t inferences_taken, inferences_full;
    uint64_t quiets; /* times that a node was told to come back later */
} world_oracle_counts;
world_oracle_counts world_oracle_get_counts(const world_oracle *o);

#endif
