/*
 * The simulators' event queue: a heap ordered by (virtual time, target, number). Only what the
 * order needs is moved about; the events lie still beside it. The number is given on shoal-sim
 * run's one thread, so the order is the same whatever the workers do; in experiments/world the
 * maker of an event numbers it.
 */
#ifndef SIM_EVENTS_H
#define SIM_EVENTS_H

#include "shared/base/buf.h"

#define SIM_EVENTS_MAX (16u << 20)

typedef enum {
    SIM_EV_DELIVER, /* message to target */
    SIM_EV_TIMER,
    SIM_EV_LINK,    /* periods of presence: the link goes up or down */
    SIM_EV_JOB,     /* a job's virtual end */
    SIM_EV_USER,    /* the user begins the next text */
    SIM_EV_RESTART, /* after a crash */
    /* of experiments/world */
    SIM_EV_FAULT,     /* job: the fault, borrowed; tag: bit 0: it begins (else it ends) */
    SIM_EV_BACKUP,    /* job: the fault that will need the store as it is now */
    SIM_EV_DIE,       /* an armed crash did not come by itself */
    SIM_EV_CONNECTED, /* tag: 1 the peer is there, 0 it is gone */
    SIM_EV_COMMIT,    /* the group's end */
} sim_event_kind;

typedef struct {
    uint64_t at_ms, number;
    uint32_t target, from; /* node index; the aggregator is n_nodes */
    uint32_t life; /* of the target when the event was made: a crash outdates timers, jobs */
    sim_event_kind kind;
    sh_buf message; /* DELIVER; owned */
    void *job;      /* JOB: owned by the event's maker until it is popped */
    uint64_t tag;   /* TIMER: generation; DELIVER: connection; LINK: 1 up, 0 down */
} sim_event;

typedef struct { /* an event's place in the order, and in items */
    uint64_t at_ms, number;
    uint32_t target, item;
} sim_queue_key;

typedef struct {
    sim_queue_key *keys; /* [n] the heap; [0] is the next event */
    sim_event *items;    /* [cap] */
    uint32_t *free;      /* [cap] items that are free, from n on */
    size_t n, cap;
    uint64_t next_number;
} sim_queue;

/* Takes over event.message. SH_ERR_LIMIT over SIM_EVENTS_MAX (the message is freed). */
SH_MUST_USE sh_status sim_queue_push(sim_queue *queue, sim_event event);
/* The same with a number that the caller gave: of (time, target, number) there is one event. */
SH_MUST_USE sh_status sim_queue_insert(sim_queue *queue, sim_event event);
bool sim_queue_pop(sim_queue *queue, sim_event *out); /* false: empty */
void sim_queue_release(sim_queue *queue);

#endif
