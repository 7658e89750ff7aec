/*
 * Inside of the engine: engine.c (models, places, slots), engine_request.c (generations and
 * embeddings on them).
 *
 * Who holds what: a request takes one of `slots` places (admit), which promises it a free slot; a
 * slot is one session. Models are counted in by requests, readers and by being active, and closed
 * by whoever counts the last one out, together with the runner of its passes; before that, the
 * caches of the slots that were run on it are given back. A slot remembers by the number of the
 * activation, never by address, which model its session was run on: that model may be gone.
 *
 * The mutex guards everything in sh_engine but the insides of a busy slot, which are its
 * request's; nothing is computed under it but the comparison of a prompt with the texts. A slot
 * that is read (another one copies the start of its text) is changed by nobody: who has chosen it
 * waits.
 */
#ifndef SH_EDGE_ENGINE_INTERNAL_H
#define SH_EDGE_ENGINE_INTERNAL_H

#include <pthread.h>

#include "edge-node/batch.h"
#include "edge-node/engine.h"
#include "shared/model/text_filter.h"

#define ENGINE_SLOTS_MAX 256u

typedef struct model_use {
    struct model_use *next;
    sh_model *model;
    sh_runner *runner;
    sh_chat_family family;
    uint64_t version, number; /* number: of the activation */
    uint32_t users;           /* requests, readers; one more while it is active */
} model_use;

typedef struct {
    sh_engine *engine;
    sh_session *session;
    sh_batch_member member;
    const sh_request_client *client; /* while a prompt is run */
    uint64_t number;                 /* of the activation that the session was run on; 0: none */
    uint64_t id, user;               /* of the text; id 0: there is none */
    uint64_t used;                   /* when, in requests */
    uint32_t readers;
    bool busy, forgotten; /* forgotten: while it was in use */
} slot;

struct sh_engine {
    sh_engine_options o;
    pthread_mutex_t lock;
    pthread_cond_t idle; /* a slot is free again, or not read any more */
    sh_team *team;
    sh_batcher *batcher;
    slot *slots; /* [o.slots] */
    model_use *models, *active;
    uint64_t n_activations, n_uses, last_id;
    struct waiter *first_waiter, *last_waiter;
    bool stopping;
    sh_engine_status status; /* version, models_open: when asked */
};

/* A request's place, model and slot. */
typedef struct {
    sh_engine *engine;
    model_use *model;
    slot *slot;
    uint64_t id;
    bool failed; /* the slot's text is no good */
} engine_seat;

/* Gives the request a place and the model that is active then; waits while its client is there. */
SH_MUST_USE sh_status engine_admit(engine_seat *seat, const sh_request_client *client,
                                   sh_error *err);
/* The opposite of admit and choose_slot, of as much of them as was done. */
void engine_leave(engine_seat *seat);
uint64_t engine_next_id(sh_engine *engine);

/* What a prompt found in the slots. */
typedef struct {
    uint32_t shared; /* tokens of the slot's text that are the prompt's */
    slot *donor;     /* NULL, or whose text begins with more of them; to be put back */
    uint32_t donated;
} engine_match;
/* Takes the free slot whose text the prompt goes on with, else an empty one, else the one that was
 * used longest ago. n 0: not for a text. */
engine_match engine_choose_slot(engine_seat *seat, uint64_t user, const int32_t *tokens,
                                uint32_t n);
void engine_release_donor(sh_engine *engine, slot *donor);
/* Makes the slot's session one of the request's model; its text stays. */
SH_MUST_USE sh_status engine_attach(engine_seat *seat, sh_error *err);
sh_session_runner engine_session_runner(slot *s, const model_use *use);

#endif
