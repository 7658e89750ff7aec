/*
 * Canaries: known bugs that the simulator must find. They exist only in the second build of the
 * cores that shoal-sim links (SHOAL_CANARIES); in every other build SH_CANARY is the constant false
 * and the compiler leaves nothing of them.
 *
 *     if (!SH_CANARY(FORGET_GAP)) ... the right thing ...
 */
#ifndef SH_BASE_CANARY_H
#define SH_BASE_CANARY_H

#include "shared/base/status.h"

typedef enum {
    SH_CANARY_NONE,
    SH_CANARY_ACK_BEFORE_COMMIT,  /* the aggregator's shell sends before its commit */
    SH_CANARY_NO_SYNC,            /* the aggregator's shell does not sync */
    SH_CANARY_FORGET_GAP,         /* the inbox forgets the marks above a gap */
    SH_CANARY_DELETE_ON_SEND,     /* the node deletes an item when it sends it */
    SH_CANARY_UPDATE_TWICE,       /* an update sent again goes into the buffer again */
    SH_CANARY_INSTALL_UNCHECKED,  /* chunks and installed files are not checked */
    SH_CANARY_OLD_MANIFEST,       /* the node takes a manifest older than its release */
    SH_CANARY_TOMBSTONE_UNMARKED, /* a tombstone is acknowledged, its range not marked */
    SH_CANARY_NO_LEASE,           /* the aggregator does not check leases */
    SH_CANARY_FORGET_BUDGET,      /* a start of the node begins the day's bytes anew */
    SH_CANARY_IGNORE_LATER,       /* the node does not wait as long as it was asked to */
    SH_CANARY_LOSE_ROW,           /* a window takes the place of one that is to be kept */
    SH_CANARY_LOSE_REQUEST,       /* a request is not taken in while a job trains */
    SH_CANARIES
} sh_canary;

const char *sh_canary_name(sh_canary canary); /* "none", "ack-before-commit", ... */
sh_canary sh_canary_find(const char *name); /* SH_CANARIES: no bug has this name; "none" neither */

#ifdef SHOAL_CANARIES
extern sh_canary sh_canary_on; /* set before threads start, and not changed while they run */
#define SH_CANARY(name) (sh_canary_on == SH_CANARY_##name)
#else
#define SH_CANARY(name) false
#endif

#endif
