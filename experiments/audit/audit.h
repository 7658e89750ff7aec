/*
 * The audit: were all items that nodes made counted, and counted once? It reads only what the two
 * sides stored (the nodes' ledgers and outboxes, the aggregator's rows), and knows nothing of how
 * the run went.
 *
 *   lost   an item in a node's ledger that the aggregator acknowledged but does not have, or that
 *          is owed but no longer in the outbox (dropped by quota is not lost: it is counted); a
 *          sequence that is missing from a ledger; an update "merged" that no release lists
 *   twice  an update that published releases list more than once, two or the same one; one
 *          node's same bytes merged under two sequences
 *   wrong  an item whose bytes differ between the sides; an update that a release lists but whose
 *          row says otherwise; an aggregator's row that its node never made
 *
 * Over relays a node's update is followed to the update that it went up in: that is owed by the
 * relay, or its parent's row names the part; otherwise it is lost. A release that lists a relay's
 * update lists its parts.
 *
 * Each finding is a line of text: what, which node, which sequence.
 */
#ifndef SHOAL_AUDIT_H
#define SHOAL_AUDIT_H

#include "shared/base/json.h"
#include "shared/store/store.h"

#define SH_AUDIT_ITEMS_MAX    (16u << 20)
#define SH_AUDIT_FINDINGS_MAX 100 /* lines kept; all are counted */

typedef struct sh_audit sh_audit;

SH_MUST_USE sh_status sh_audit_create(sh_audit **out, sh_error *err);
void sh_audit_destroy(sh_audit **audit);
/* The aggregator's store first, then each relay's, then each node's. Read transactions of their
 * own. */
SH_MUST_USE sh_status sh_audit_add_aggregator(sh_audit *audit, sh_store *store, sh_error *err);
SH_MUST_USE sh_status sh_audit_add_relay(sh_audit *audit, sh_store *store, const char *name,
                                         sh_error *err);
/* name: for the findings. */
SH_MUST_USE sh_status sh_audit_add_node(sh_audit *audit, sh_store *store, const char *name,
                                        sh_error *err);

typedef struct {
    uint64_t nodes, relays, made, acknowledged, owed, dropped, merged, refused, pending;
    uint64_t lost, twice, wrong;
} sh_audit_result;
/* Compares; the findings are a new array of strings. */
void sh_audit_finish(sh_audit *audit, sh_audit_result *out, json_t **findings);
/* The result as one JSON object; takes over findings. */
json_t *sh_audit_document(const sh_audit_result *result, json_t *findings);

#endif
