/*
 * An engine of words that are given, in place of edge-node/engine.c: it ends, fails and waits as a
 * test wants. Its functions are those that the API calls.
 */
#ifndef SH_TESTS_FAKE_ENGINE_H
#define SH_TESTS_FAKE_ENGINE_H

#include <pthread.h>

#include "edge-node/engine.h"

struct sh_engine {
    pthread_mutex_t lock; /* of everything */
    pthread_cond_t changed;
    const char *const *pieces;
    uint32_t n_pieces; /* UINT32_MAX: pieces[0] for ever */
    sh_finish finish;
    sh_status begin_status, next_status; /* next: of the second piece */
    bool too_long;
    bool hold;        /* generations wait before their second piece */
    uint32_t waiting; /* of them */
    uint32_t begun, ended, again, embedded;
    uint64_t version; /* of generations that begin */
    /* the last request */
    sh_request request;
    char prompt[1024]; /* of a chat: lines "role: content" */
    char user[SH_USER_BYTES_MAX + 1], stops[SH_STOPS_MAX][SH_STOP_BYTES_MAX + 1];
};

void fake_engine_init(sh_engine *engine);
void fake_engine_hold(sh_engine *engine, bool hold);
/* Until *counter is n; fails the test after a minute. */
void fake_engine_await(sh_engine *engine, const uint32_t *counter, uint32_t n);

#endif
