/*
 * What shoal-node does to a folder when no daemon runs on it: setting a node up, and erasing.
 */
#ifndef SH_EDGE_SETUP_H
#define SH_EDGE_SETUP_H

#include "edge-node/settings.h"
#include "shared/base/hash.h"

/* Makes dir's folders, keys and node.yaml, and copies the aggregator's bundle after checking that
 * its files belong together. token_file: a file with an enrolment token, which is kept until the
 * aggregator has let the node in; NULL: the operator enrols its key. SH_ERR_EXISTS: a node was set
 * up there; nothing is changed. What an interrupted call left is made whole by the next one. */
SH_MUST_USE sh_status sh_setup_node(const char *dir, const char *bundle, const char *aggregator,
                                    const char *token_file, sh_hash *public_key, sh_error *err);

/* A file with a token in 64 hexadecimal digits, as `shoal aggregator token add` prints it. */
SH_MUST_USE sh_status sh_setup_read_token(const char *path, sh_hash *token, sh_error *err);

/* Erases what a user (0: everybody) wrote from the store of a node that does not run, and from its
 * file. The node's folder is the working directory. SH_ERR_EXISTS: a process has the store. */
SH_MUST_USE sh_status sh_erase_offline(const sh_settings *settings, uint64_t user, uint64_t *rows,
                                       sh_error *err);

#endif
