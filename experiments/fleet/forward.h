/*
 * The network between nodes and aggregator: a TCP forwarder with one listening port a node, whose
 * link can be cut and restored. A cut link ends what is open and refuses what comes.
 *
 * Threads: one of its own does all the forwarding; the functions are for others. Ownership:
 * create/destroy.
 */
#ifndef FLEET_FORWARD_H
#define FLEET_FORWARD_H

#include "shared/base/status.h"

#define FLEET_LINKS_MAX      64
#define FLEET_LINK_CONNS_MAX 8
#define FLEET_LINK_BUFFER    65536u

typedef struct fleet_forward fleet_forward;
SH_MUST_USE sh_status fleet_forward_create(size_t n_links, fleet_forward **out, sh_error *err);
void fleet_forward_destroy(fleet_forward **forward);
uint16_t fleet_forward_port(const fleet_forward *forward, size_t link);
/* Where connections go from now on; 0: nowhere, they are refused. */
void fleet_forward_target(fleet_forward *forward, uint16_t port);
void fleet_forward_cut(fleet_forward *forward, size_t link, bool cut);
/* Bytes that passed since the start, towards the aggregator and back. */
void fleet_forward_bytes(fleet_forward *forward, size_t link, uint64_t *up, uint64_t *down);

#endif
