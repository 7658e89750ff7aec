/*
 * What an aggregator's store says about its fleet, as the JSON object that the report is made from
 * (report.h): a summary as docs/summary.md has it, of a fleet that goes on. The store may be open
 * in a running aggregator: it is read in short transactions.
 *
 * Reference and current histograms: of each node the first and the newest SH_SURVEY_WINDOWS windows
 * that the store keeps; of the metrics that depend on the model only windows of the release that
 * the node runs now, and of each metric windows that have samples of it.
 * A node with fewer than twice as many gives half to each.
 * Threads: none held.
 */
#ifndef SH_AGGREGATOR_SURVEY_H
#define SH_AGGREGATOR_SURVEY_H

#include "aggregator/coordinator.h"
#include "shared/base/json.h"

#define SH_SURVEY_WINDOWS     4
#define SH_SURVEY_POINTS      48   /* of the timeline */
#define SH_SURVEY_DECISIONS   40   /* newest entries of the audit log */
#define SH_SURVEY_SAMPLES_MIN 100u /* a node whose newest windows have fewer is "insufficient" */

typedef struct {
    uint64_t now_ms;   /* 0: the newest check-in (a run that is over) */
    uint64_t stale_ms; /* a node that has not checked in for so long is stale */
} sh_survey_options;
SH_MUST_USE sh_status sh_survey_make(sh_store *store, const sh_survey_options *options,
                                     json_t **out, sh_error *err);

/* A row of "releases", but for taken_by_nodes. */
json_t *sh_survey_release(const sh_release_row *row);

#endif
