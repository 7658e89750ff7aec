/*
 * The shell of the real aggregator: brings the coordinator core its events (messages of nodes over
 * the transport, ends of jobs, operators' commands, time) and carries out what it asks for.
 *
 * Invariants
 *   - One thread, that of sh_server_run, owns the core and writes the store. Merges, gates and
 *     backups run one at a time on a worker, which only reads the store.
 *   - Actions are carried out after the commit. Messages that wait are stepped in groups of one
 *     transaction, bounded by the SERVER_GROUP_ limits below. A WANT goes at once: the chunks come
 *     while the disk takes the item, and if that fails they are chunks that nobody asked for.
 *   - A step or commit that fails takes the whole group back: the core is made again from the store
 *     after a pause, and what was not acknowledged comes again.
 *   - A node is let in by its key alone: enrolled, or any with enrol_any, and not revoked.
 * Enrolling and revoking act from the command's commit on.
 *   - HTTP handlers read a snapshot that the loop makes; they never touch core or store.
 * Threads: create, run and destroy on one thread. From create to destroy, SIGTERM and SIGINT are
 * the server's; one server a process. The working directory is the aggregator's folder (folder.h).
 */
#ifndef SH_AGGREGATOR_SERVER_H
#define SH_AGGREGATOR_SERVER_H

#include "aggregator/settings.h"

/* A transaction of messages. LMDB writes the chunks of one with one call, which is to stay below
 * 2 MiB: on a virtual machine calls from there on were seen to take up to 14 ms, ten times as long
 * a byte as smaller ones (likely for huge pages, which the kernel then looks for). */
#define SERVER_GROUP_STEPS       256u       /* messages stepped in it, at most */
#define SERVER_GROUP_IN_BYTES    (1u << 20) /* of them */
#define SERVER_GROUP_AHEAD_BYTES (7u << 18) /* in its place while there are some read ahead */
#define SERVER_GROUP_OUT_BYTES   (8u << 20) /* answers that wait for the commit */
#define SERVER_GROUP_MS          20u        /* from the first step to the commit */
#define SERVER_FETCH_BYTES       (4u << 20) /* read and hashed meanwhile, for groups to come */
/* What one node can make the process hold, beside what libzmq needs for a connection (net.h):
 * SERVER_PEER_IN messages of SERVER_PEER_IN_BYTES that wait to be stepped and one that is being
 * read, and the answers of two WANTs, which come one at a time. A node that keeps to the protocol
 * sends items of that size only when it owes them, and of chunks no more than it was asked for,
 * which is limit.asked-bytes over all nodes. */
#define SERVER_PEER_IN       16u
#define SERVER_PEER_IN_BYTES (SH_WIRE_ITEM_MAX + 4096u)
#define SERVER_PEER_OUT      32u /* and twice chunk-budget */
#define SERVER_TASKS_MAX     8u  /* jobs and backups that wait for the worker */

typedef struct sh_server sh_server;
/* Opens keys, store, sockets and the core. failpoints: of SHOAL_FAILPOINTS, NULL: none. */
SH_MUST_USE sh_status sh_server_create(const sh_aggregator_settings *settings,
                                       const char *failpoints, sh_server **out, sh_error *err);
/* Until SIGTERM, SIGINT or the command "stop". */
SH_MUST_USE sh_status sh_server_run(sh_server *server, sh_error *err);
/* Waits at most stop_wait_ms for the job that runs. False: it still runs, and the process must end
 * by _exit, because the job reads the store; the store is sound whenever that happens, and the job
 * is done again by the next start. */
bool sh_server_destroy(sh_server **server);

#endif
