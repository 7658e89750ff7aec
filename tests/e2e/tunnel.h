/*
 * A bad network between two network namespaces, by packets: a TUN device in each, and a thread that
 * carries IP packets from one to the other, with loss, delay, jitter (so that they overtake each
 * other), repetition, damage, a limited rate and times at which nothing passes. What netem does,
 * with a seed, and also where the kernel has no netem (docs/decisions/0022). Linux; needs the right
 * to make namespaces and /dev/net/tun. Include after cmocka.h.
 *
 * Threads: one of its own carries; the functions are for the test's main thread, whose namespace
 * tunnel_enter changes: what it starts then, processes and threads, is in there.
 */
#ifndef SH_TESTS_E2E_TUNNEL_H
#define SH_TESTS_E2E_TUNNEL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "shared/base/rng.h"

#define TUNNEL_PACKETS_MAX 512u  /* under way a direction; what comes then is lost */
#define TUNNEL_PACKET_MAX  2048u /* bytes; the devices have an MTU of 1,500 */
#define TUNNEL_ADDRESS_A   "10.77.0.1"
#define TUNNEL_ADDRESS_B   "10.77.0.2"

typedef struct {
    unsigned lose, repeat, damage; /* of 1,000 packets */
    unsigned delay_ms, jitter_ms;  /* delay_ms + 0 .. jitter_ms, each packet on its own */
    unsigned rate_kb_s;            /* 0: no limit */
    unsigned down_ms, up_ms;       /* passes nothing for so long, then all; down_ms 0: never */
    bool only_a_to_b, only_b_to_a; /* nothing the other way */
} tunnel_weather;

typedef struct {
    uint64_t due_us;
    size_t n;
    uint8_t bytes[TUNNEL_PACKET_MAX];
} tunnel_packet;

typedef struct {
    int tun; /* packets for the other side are read from here */
    uint64_t free_us;
    tunnel_packet *queue; /* [TUNNEL_PACKETS_MAX], in no order */
    size_t n;
} tunnel_side;

typedef struct {
    int home, spaces[2]; /* namespaces */
    tunnel_side sides[2];
    sh_rng rng;
    pthread_mutex_t lock;
    tunnel_weather weather;
    pthread_t thread;
    atomic_bool stop, runs;
    atomic_ullong carried, lost, repeated, damaged, overtaken, too_many;
} tunnel;

/* Returns NULL, or why it cannot be done here. Side 0 has address A, side 1 address B. */
const char *tunnel_start(tunnel *t, uint64_t seed);
void tunnel_stop(tunnel *t); /* takes a zeroed one */
void tunnel_set(tunnel *t, const tunnel_weather *weather);
/* 0 or 1: that side's namespace; -1: back to where it was. */
void tunnel_enter(tunnel *t, int side);

#endif
