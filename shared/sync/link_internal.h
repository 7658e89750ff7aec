/*
 * Who the sender is, across starts: META "lease" of its store. See docs/protocol.md, "Leases", and
 * docs/decisions/0015.
 *
 * link_starts: the starts of the core whose leases the aggregator may have on record, newest first,
 * each with the outbox's next sequences when it began: where a copy of the store that was made just
 * before it parted from this one.
 */
#ifndef SH_SYNC_LINK_INTERNAL_H
#define SH_SYNC_LINK_INTERNAL_H

#include "shared/sync/link.h"

typedef struct {
    uint8_t lease[sizeof(sh_hash)];
    uint64_t next_seq[SH_CLASSES];
} link_start;

typedef struct {
    uint32_t n;
    link_start items[SH_WIRE_LEASES_MAX];
} link_starts;

/* Loads epoch, segments and counters into s->link, makes what is not there, and begins a start: it
 * has a lease of its own from here on. */
sh_status link_identity_open(const sh_link_step *s);
sh_status link_starts_load(const sh_link_step *s, link_starts *out);
/* The epoch is this start's: earlier ones are history. */
sh_status link_welcomed(const sh_link_step *s);
/* Another sender has the epoch: takes a new one for what was made since start `common` - 1, the
 * first that the two have not in common. common 0: they parted during this start. */
sh_status link_renew(const sh_link_step *s, uint32_t common);

/* The last local sequence of a class in segment i; the current one has no end. */
uint64_t link_segment_last(const sh_link *l, uint32_t i, uint8_t cls);
/* The same of the segment that local sequence seq lies in. */
uint64_t link_range_last(const sh_link *l, uint8_t cls, uint64_t seq);

#endif
