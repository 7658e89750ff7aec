/*
 * The node's daemon: the shell that binds the core (node.h) to LMDB, ZeroMQ, HTTP, the inference
 * engine and the training child. docs/node.md is its manual.
 *
 * One thread, the caller's, owns store and core: its loop waits for the network, the admin socket,
 * signals, the training child, and what other threads post to it.
 *   - HTTP threads run requests in the engine and post each finished inference (bounded queue; a
 *     full one makes them wait), or a rating, whose answer they wait for.
 *   - One worker runs installations, smoke tests and evaluations, one at a time.
 *   - Training is a child process, killed at any moment without harm.
 * Inferences are committed together, at the latest store.commit-ms after they came; everything else
 * at once. Actions of a step are carried out after its commit.
 */
#ifndef SH_EDGE_DAEMON_H
#define SH_EDGE_DAEMON_H

#include "edge-node/settings.h"

/* Runs until SIGTERM, SIGINT or the admin command "stop"; makes the node's folder the working
 * directory. SH_OK after a graceful stop. */
SH_MUST_USE sh_status sh_daemon_run(const sh_settings *settings, sh_error *err);

#endif
