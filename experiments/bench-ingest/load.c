/*
 * What is sent in a turn: each node's updates (random bytes, as chunks) or windows, encoded before
 * the clock runs. Both sides send these bytes.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "experiments/bench-ingest/bench.h"
#include "shared/base/rng.h"

#define OVERHEAD_MAX 4096u /* of one message */

double bench_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* Encodes msg at the end of memory, which has room. */
static sh_status put(sh_buf *memory, const sh_msg *msg, sh_bytes *out, sh_error *err)
{
    size_t at = memory->len;
    SH_TRY(sh_msg_encode(msg, memory, err));
    *out = (sh_bytes){memory->data + at, memory->len - at};
    return SH_OK;
}

static sh_status put_item(bench_node *node, uint32_t i, sh_bytes payload, bool window,
                          sh_buf *memory, sh_error *err)
{
    sh_msg msg = {.type = SH_MSG_ITEM,
                  .item = {.epoch = node->epoch,
                           .cls = window ? SH_CLASS_WINDOW : SH_CLASS_UPDATE,
                           .seq = i + 1,
                           .last_seq = i + 1,
                           .kind = window ? SH_ITEM_WINDOW : SH_ITEM_UPDATE,
                           .payload = payload}};
    return put(memory, &msg, &node->units[i].item, err);
}

static sh_status put_update(bench_node *node, uint32_t i, sh_bytes bytes, const bench_rig *rig,
                            sh_buf *memory, sh_error *err)
{
    bench_unit *unit = &node->units[i];
    uint8_t *names = NULL;
    sh_update_meta meta = {.round = 1,
                           .base_version = 1,
                           .base_sha256 = rig->base_sha256,
                           .rank = 8,
                           .alpha = 16,
                           .samples = 1000,
                           .tokens_seen = 1000,
                           .heldout_before = 3,
                           .heldout_after = 2.9};
    sh_buf payload;
    sh_status status = SH_OK;
    sh_buf_init(&payload, SH_WIRE_ITEM_MAX);
    SH_GOTO(sh_blob_describe(bytes.data, bytes.n, &meta.blob, &names, err));
    SH_GOTO(sh_update_meta_encode(&meta, &payload, err));
    SH_GOTO(put_item(node, i, (sh_bytes){payload.data, payload.len}, false, memory, err));
    unit->n_chunks = meta.blob.n_chunks;
    unit->chunks = sh_calloc(unit->n_chunks, sizeof *unit->chunks);
    unit->names = sh_calloc(unit->n_chunks, sizeof *unit->names);
    if (unit->chunks == NULL || unit->names == NULL)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %u chunks", unit->n_chunks));
    memcpy(unit->names, names, unit->n_chunks * sizeof *unit->names);
    for (uint32_t k = 0; k < unit->n_chunks; k++) {
        size_t at = (size_t)k * SH_CHUNK_BYTES;
        sh_msg msg = {.type = SH_MSG_CHUNK,
                      .chunk = {.hash = unit->names[k],
                                .bytes = {(const uint8_t *)bytes.data + at,
                                          SH_MIN(bytes.n - at, (size_t)SH_CHUNK_BYTES)}}};
        SH_GOTO(put(memory, &msg, &unit->chunks[k], err));
    }
cleanup:
    sh_buf_release(&payload);
    free(names);
    return status;
}

static sh_status make_node(bench_load *load, uint32_t number, const bench_options *o,
                           const bench_rig *rig, sh_rng *rng, sh_error *err)
{
    bench_node *node = &load->nodes[number];
    sh_buf *memory = &load->memory[number];
    size_t n = o->windows ? BENCH_WINDOW_BYTES : (size_t)o->update_bytes;
    size_t chunks = (n + SH_CHUNK_BYTES - 1) / SH_CHUNK_BYTES;
    size_t most = node->n_units * (n + (chunks + 1) * (OVERHEAD_MAX + 32));
    sh_status status = SH_OK;
    SH_TRY(sh_net_keys_make(&node->keys, err));
    node->epoch = number + 1;
    node->units = sh_calloc(node->n_units, sizeof *node->units);
    uint8_t *bytes = sh_calloc(n, 1);
    sh_buf_init(memory, most);
    if (node->units == NULL || bytes == NULL || sh_buf_reserve(memory, most) == NULL)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %zu bytes of messages", most));
    for (uint32_t i = 0; i < node->n_units; i++) {
        for (size_t k = 0; k + 8 <= n; k += 8) {
            uint64_t word = sh_rng_u64(rng);
            memcpy(bytes + k, &word, 8);
        }
        node->units[i].bytes = n;
        if (o->windows)
            SH_GOTO(put_item(node, i, (sh_bytes){bytes, n}, true, memory, err));
        else
            SH_GOTO(put_update(node, i, (sh_bytes){bytes, n}, rig, memory, err));
    }
    load->n_units += node->n_units;
    load->bytes += (uint64_t)node->n_units * n;
    load->wire_bytes += memory->len;
cleanup:
    free(bytes);
    return status;
}

sh_status bench_load_make(bench_load *load, const bench_options *o, const bench_rig *rig,
                          uint64_t seed, sh_error *err)
{
    sh_rng rng;
    uint32_t n = (uint32_t)o->senders;
    sh_rng_init(&rng, seed, 0, 0x494e4745);
    *load = (bench_load){.nodes = sh_calloc(n, sizeof *load->nodes),
                         .memory = sh_calloc(n, sizeof *load->memory),
                         .n_nodes = n};
    if (load->nodes == NULL || load->memory == NULL)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for %u senders", n);
    for (uint32_t i = 0; i < n; i++) {
        load->nodes[i].n_units = (uint32_t)(o->turn_units / n);
        SH_TRY(make_node(load, i, o, rig, &rng, err));
    }
    bench_load_reset(load);
    return SH_OK;
}

void bench_load_reset(bench_load *load)
{
    for (uint32_t i = 0; i < load->n_nodes; i++)
        for (uint32_t k = 0; k < load->nodes[i].n_units; k++)
            load->nodes[i].units[k].sent_ms = load->nodes[i].units[k].acked_ms = -1;
}

void bench_load_release(bench_load *load)
{
    for (uint32_t i = 0; i < load->n_nodes && load->nodes != NULL; i++) {
        bench_node *node = &load->nodes[i];
        for (uint32_t k = 0; node->units != NULL && k < node->n_units; k++) {
            free(node->units[k].chunks);
            free(node->units[k].names);
        }
        free(node->units);
        sh_net_keys_forget(&node->keys);
        if (load->memory != NULL)
            sh_buf_release(&load->memory[i]);
    }
    free(load->nodes);
    free(load->memory);
    *load = (bench_load){0};
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

bench_turn bench_turn_of(const bench_load *load, double seconds)
{
    bench_turn turn = {.seconds = seconds,
                       .units_per_s = (double)load->n_units / seconds,
                       .bytes_per_s = (double)load->bytes / seconds};
    double *waits = sh_calloc(SH_MAX(load->n_units, UINT64_C(1)), sizeof *waits);
    size_t n = 0;
    if (waits == NULL)
        return turn;
    for (uint32_t i = 0; i < load->n_nodes; i++)
        for (uint32_t k = 0; k < load->nodes[i].n_units; k++) {
            const bench_unit *unit = &load->nodes[i].units[k];
            waits[n++] = unit->acked_ms - unit->sent_ms;
        }
    if (n > 0) {
        qsort(waits, n, sizeof *waits, compare);
        turn.p50_ms = waits[(size_t)floor(0.5 * (double)(n - 1))];
        turn.p99_ms = waits[(size_t)ceil(0.99 * (double)(n - 1))];
    }
    free(waits);
    return turn;
}
