/*
 * What the files of the ingest benchmark share.
 *   bench_main.c  options, turns, what is printed
 *   rig.c         a real aggregator in a process of its own: folder, start, counters, audit
 *   load.c        the messages of a turn, made before it
 *   ours.c        senders that speak the protocol to it
 *   raw.c         the peer: ZeroMQ's own sockets and a file that is synced
 *   clients.c     a process of many nodes that come back
 *   fleet.c       what becomes of all of them when the aggregator is killed
 */
#ifndef BENCH_INGEST_H
#define BENCH_INGEST_H

#include "aggregator/coordinator.h"
#include "experiments/fleet/process.h"
#include "shared/base/json.h"
#include "shared/net/net.h"

#define BENCH_TURN_UPDATES 1000u /* the coordinator's buffer is not much larger */
#define BENCH_TURN_WINDOWS 20000u
#define BENCH_NODE_WINDOWS 1024
#define BENCH_WINDOW_BYTES 8192u
#define BENCH_SENDERS_MAX  64u
#define BENCH_FLIGHT_MAX   4u     /* updates of one node that the aggregator takes at a time */
#define BENCH_WAIT_MS      60000u /* without any progress: a turn has failed */

typedef struct {
    const char *dir;
    int64_t senders, flight, update_bytes, turns, turn_units, connections, processes, io_threads,
        rate;
    bool windows, json, returning;
    /* of a child */
    const char *child, *endpoint, *server_key, *out;
    int64_t first;
} bench_options;

/* ---- rig.c ---- */
typedef struct {
    char dir[SH_PATH_BYTES], log[SH_PATH_BYTES], program[SH_PATH_BYTES];
    char endpoint[128];
    uint16_t http_port;
    sh_hash key;         /* of the aggregator */
    sh_hash base_sha256; /* of release 1 */
    fleet_process process;
} bench_rig;
/* A new folder below `dir`, with a small model of random weights as its first release. */
sh_status bench_rig_make(bench_rig *rig, const char *dir, sh_error *err);
/* extra: more words, NULL at the end; may be NULL. The second start takes the first one's port. */
sh_status bench_rig_start(bench_rig *rig, const char *const *extra, sh_error *err);
sh_status bench_rig_stop(bench_rig *rig, int signal_number, sh_error *err);
void bench_rig_release(bench_rig *rig);                    /* kills it, deletes the folder */
double bench_rig_metric(bench_rig *rig, const char *name); /* -1: no answer */
uint64_t bench_rig_peak_rss(const bench_rig *rig);         /* VmHWM of what runs, bytes */
double bench_cpu_s(const fleet_process *process);          /* that it took until now */
/* Of the folder of one that does not run. */
sh_status bench_rig_store(const bench_rig *rig, sh_store **store, sh_error *err);
/* How many updates are there whole (bytes match their SHA-256), how many windows. */
sh_status bench_rig_audit(const bench_rig *rig, uint64_t *updates, uint64_t *windows,
                          sh_error *err);
void bench_remove(const char *dir);

/* ---- load.c ---- */
typedef struct { /* an update or a window; bytes of messages as they go out */
    sh_bytes item;
    sh_bytes *chunks; /* [n_chunks], in order */
    sh_hash *names;
    uint32_t n_chunks;
    uint64_t bytes; /* of the update, or the window */
    double sent_ms; /* when it was, for the first time; < 0: not yet */
    double acked_ms;
} bench_unit;
typedef struct {
    sh_net_keys keys;
    uint64_t epoch;
    bench_unit *units; /* [n_units]; number i has sequence i + 1 */
    uint32_t n_units;
} bench_node;
typedef struct {
    bench_node *nodes;
    uint32_t n_nodes;
    uint64_t n_units, bytes, wire_bytes;
    sh_buf *memory; /* [n_nodes] */
} bench_load;
sh_status bench_load_make(bench_load *load, const bench_options *o, const bench_rig *rig,
                          uint64_t seed, sh_error *err);
void bench_load_reset(bench_load *load); /* times */
void bench_load_release(bench_load *load);

/* ---- results of a turn ---- */
typedef struct {
    double seconds, units_per_s, bytes_per_s, p50_ms, p99_ms;
    double commits, messages;
    double cpu_s; /* of the receiving process: what others on the machine change least */
} bench_turn;
bench_turn bench_turn_of(const bench_load *load, double seconds);
double bench_now_ms(void);

/* ---- ours.c, raw.c ---- */
sh_status bench_ours(const bench_options *o, bench_load *load, bench_rig *rig, bench_turn *turn,
                     sh_error *err);
sh_status bench_raw(const bench_options *o, bench_load *load, bench_turn *turn, sh_error *err);
int bench_raw_server(const bench_options *o);

/* ---- clients.c, fleet.c ---- */
int bench_clients(const bench_options *o);
sh_status bench_return(const bench_options *o, json_t **result, sh_error *err);

#endif
