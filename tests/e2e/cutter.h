/*
 * A bad network: a TCP forwarder that is slow, and ends every connection, both ways, after so many
 * bytes. Slow, because what a broken connection still had in its buffers is lost: over loopback
 * that would be nearly all of it. Include after cmocka.h.
 *
 * Threads: one of its own forwards; the functions are for the test's thread.
 */
#ifndef SH_TESTS_E2E_CUTTER_H
#define SH_TESTS_E2E_CUTTER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#define CUTTER_CONNS_MAX 16

typedef struct {
    int from, to; /* -1: free */
    uint64_t passed;
} cutter_conn;

typedef struct {
    unsigned port, target;   /* listens on; forwards to */
    atomic_ullong cut_after; /* bytes of a connection, both directions together; 0: no cuts */
    atomic_ullong up, down;  /* bytes forwarded: to the target, from it */
    atomic_uint connections, cuts;
    int listener;
    cutter_conn conns[CUTTER_CONNS_MAX];
    pthread_t thread;
    atomic_bool stop, runs;
} cutter;

void cutter_start(cutter *c, unsigned port, unsigned target, uint64_t cut_after);
void cutter_stop(cutter *c); /* also one that was never started, when zeroed */

#endif
