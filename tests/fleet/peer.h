/*
 * The other end for tests of the fleet's client and forwarder: a listening socket on a free port of
 * this machine, served by a function on a thread of its own. Include after cmocka.h.
 */
#ifndef SH_TESTS_FLEET_PEER_H
#define SH_TESTS_FLEET_PEER_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    int listener;
    uint16_t port;
    pthread_t thread;
    void (*serve)(int fd, int number, void *arg); /* connection `number`, from 0; closes nothing */
    void *arg;
    int connections; /* to serve, then the thread ends */
} peer;

void peer_start(peer *p);     /* serve, arg, connections are set */
void peer_end(peer *p);       /* waits for the connections */
int peer_dial(uint16_t port); /* aborts the test when it cannot */
void peer_write(int fd, const void *bytes, size_t n);
/* Reads until the text `until` has come (at the end of what is read) or the connection ends;
 * 0-terminated. False: it ended. */
bool peer_read_until(int fd, char *out, size_t out_bytes, const char *until);
/* Exactly n bytes; false: the connection ended before. */
bool peer_read(int fd, void *out, size_t n);

#endif
