/*
 * Who the sender is, across starts: META "lease" of its store. See docs/protocol.md, "Leases", and
 * docs/decisions/0015.
 *
 * link_starts: the starts of the core whose leases the aggregator may have on record, newest first,
 * each with the outbox's next sequences when it began: where this store parted from another copy of
 * it that has not the start.
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
/* Another sender has the epoch: takes a new one for what was made since the two parted. `common`:
 * the newest start that both have. parted: the sequences, in this epoch, at which the other one's
 * next start began; NULL: not known. */
sh_status link_renew(const sh_link_step *s, uint32_t common, const uint64_t parted[SH_CLASSES]);
/* The sequences at which a start began, in the present epoch. */
void link_start_sequences(const sh_link *l, const link_start *start, uint64_t out[SH_CLASSES]);

/* The last local sequence of a class in segment i; the current one has no end. */
uint64_t link_segment_last(const sh_link *l, uint32_t i, uint8_t cls);
/* The same of the segment that local sequence seq lies in. */
uint64_t link_range_last(const sh_link *l, uint8_t cls, uint64_t seq);

#endif
