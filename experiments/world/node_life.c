/*
 * Boot, death, links and faults of a simulated node.
 */
#include <stdlib.h>
#include <string.h>

#include "experiments/world/world.h"
#include "shared/store/simulated.h"

#define BOOT_TRIES_MAX  3u
#define DOWN_MS_MIN     1000u
#define PRESENCE_MS     WORLD_HOUR_MS
#define RETURN_MS       60000u /* nodes come back so long after the aggregator, spread */
#define STREAM_CORE     0x4e4f4445u
#define STREAM_PRESENCE 0x50524553u
#define STREAM_AWAY     0x41574159u

/* ---- boot ---- */

sh_status world_node_restart_in(world_part *p, uint32_t i, uint64_t ms, sh_error *err)
{
    return world_push(p,
                      (sim_event){.at_ms = p->now_ms + ms,
                                  .target = i,
                                  .from = i,
                                  .kind = SIM_EV_RESTART,
                                  .tag = ++p->w->nodes[i].restart},
                      err);
}

static void set_file(world *w, uint32_t i, uint32_t slot, const sh_hash *sha256, bool there)
{
    w->nodes[i].files[slot] = (world_file){*sha256, there};
    world_oracle_node_slot(w->oracle, i, slot, sha256);
}

/* The environment is set aside: an empty one, the release that the device came with. */
static void set_aside(world_part *p, uint32_t i)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_store_simulate_set_aside(n->store);
    n->store_bad = false;
    n->files[1] = (world_file){0};
    set_file(w, i, 0, &w->genesis_sha, true);
    world_oracle_node_replaced(w->oracle, i, p->now_ms);
}

bool world_node_file_holds(const world_node *n, sh_txn *txn, uint32_t slot)
{
    sh_bytes bytes;
    sh_manifest manifest;
    sh_error ignored;
    if (sh_node_get_slot(txn, slot, &bytes, &ignored) != SH_OK ||
        sh_manifest_decode(bytes.data, bytes.n, &manifest, &ignored) != SH_OK)
        return true;
    return n->files[slot].there && sh_hash_equal(&n->files[slot].sha256, &manifest.model.sha256);
}

static uint32_t lost_slots(const world_node *n, sh_txn *txn)
{
    uint32_t lost = 0;
    for (uint32_t slot = 0; slot < 2; slot++)
        if (!world_node_file_holds(n, txn, slot))
            lost |= 1u << slot;
    return lost;
}

static sh_status make_core(world_part *p, uint32_t i, sh_error *text)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_node_options options = w->node_options;
    sh_txn *txn = NULL;
    sh_status status = SH_OK;
    sh_rng rng;
    options.cores = (uint32_t)w->fleet->classes[n->cls].cores;
    options.memory_bytes = (uint64_t)w->fleet->classes[n->cls].memory_bytes;
    sh_rng_init(&rng, w->seed, (uint64_t)i << 40 | n->sequence, STREAM_CORE);
    n->timer++;
    SH_GOTO(sh_txn_begin(n->store, SH_TXN_RESERVE, &txn, text));
    options.lost_slots = lost_slots(n, txn);
    SH_GOTO(sh_node_create(&options, (sh_bytes){w->genesis_manifest.data, w->genesis_manifest.len},
                           world_node_now(n, p->now_ms), &rng, txn, p->actions, &n->core, text));
    SH_GOTO(sh_txn_commit(&txn, text));
cleanup:
    sh_txn_abort(&txn);
    if (status != SH_OK) {
        sh_node_destroy(&n->core);
        sh_node_actions_clear(p->actions);
    }
    return status;
}

void world_node_full(const world_part *p, world_node *n)
{
    bool again = n->full_pause_ms && p->now_ms < n->full_until_ms + n->full_pause_ms;
    n->full_pause_ms =
        again ? SH_MIN(2 * n->full_pause_ms, WORLD_FULL_PAUSE_MAX_MS) : WORLD_FULL_PAUSE_MS;
    n->full_until_ms = p->now_ms + n->full_pause_ms;
}

static sh_status boot_failed(world_part *p, uint32_t i, sh_status why, const sh_error *text,
                             sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    bool full = why == SH_ERR_FULL;
    /* A core is made with the reserve, which is there when the disk is full. */
    world_oracle_node_failed(w->oracle, i, p->now_ms, why, text->text, why == SH_ERR_CRASHED);
    if (why == SH_ERR_CRASHED)
        return world_node_die(p, i, err);
    if (full && !world_node_is_full(p, n))
        world_node_full(p, n);
    uint64_t pause = full ? n->full_until_ms - p->now_ms : WORLD_REMAKE_MS;
    return world_node_restart_in(p, i, pause, err);
}

sh_status world_node_boot(world_part *p, uint32_t i, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    sh_error text = {0};
    sh_status status = SH_OK;
    if (!n->up) {
        sh_store_simulate_restart(n->store, 0);
        world_node_start_clock(n, p->now_ms);
        n->full_until_ms = n->full_pause_ms = 0;
    }
    bool began = n->up;
    n->up = true;
    for (unsigned tries = 0; tries < BOOT_TRIES_MAX; tries++) {
        status = make_core(p, i, &text);
        if (status != SH_ERR_CORRUPT || !n->store_bad)
            break;
        set_aside(p, i);
    }
    p->counts.boots++;
    n->hash = world_mix(n->hash, 0xb007 ^ (uint64_t)status);
    if (status != SH_OK)
        return boot_failed(p, i, status, &text, err);
    sh_node_status s = sh_node_get_status(n->core);
    if (s.active_version == 1) /* comes with the program */
        set_file(w, i, s.active_slot, &w->genesis_sha, true);
    world_oracle_node_boot(w->oracle, i, p->now_ms, n->core, n->store);
    SH_TRY(world_node_carry_out(p, i, p->actions, err));
    if (began && n->online && n->core) { /* made again: it has the link already */
        sh_node_event e = {.kind = SH_NODE_LINK_UP};
        return world_node_step(p, i, &e, err);
    }
    return world_node_relink(p, i, err);
}

sh_status world_node_begin(world_part *p, uint32_t i, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    double hour = (double)WORLD_HOUR_MS / w->fleet->classes[n->cls].inferences_hour;
    n->off = false;
    n->server_up = true;
    SH_TRY(world_push(p,
                      (sim_event){.at_ms = p->now_ms + (uint64_t)(hour * sh_rng_unit(&n->rng)),
                                  .target = i,
                                  .from = i,
                                  .kind = SIM_EV_USER},
                      err));
    SH_TRY(world_node_boot(p, i, err));
    return world_node_presence(p, i, err);
}

/* ---- links ---- */

static sh_status tell_gone(world_part *p, uint32_t i, uint32_t connection, sh_error *err)
{
    world *w = p->w;
    sim_event e = {.at_ms = p->now_ms + w->fleet->delay_ms_min,
                   .target = w->n_nodes + w->n_clones,
                   .from = i,
                   .life = connection,
                   .kind = SIM_EV_CONNECTED};
    return world_mail(p, e, err);
}

sh_status world_node_relink(world_part *p, uint32_t i, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    bool up = n->up && n->wanted && n->server_up && !n->off;
    if (up == n->online)
        return SH_OK;
    if (!up)
        SH_TRY(tell_gone(p, i, n->connection, err));
    n->online = up;
    n->connection++;
    n->hash = world_mix(n->hash, 0x11a4 ^ (uint64_t)up);
    sh_node_event e = {.kind = up ? SH_NODE_LINK_UP : SH_NODE_LINK_DOWN};
    return n->core ? world_node_step(p, i, &e, err) : SH_OK;
}

/* Once an hour, each node at its own minute: whether it has a network until the next time. */
sh_status world_node_presence(world_part *p, uint32_t i, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    const world_class *c = &w->fleet->classes[n->cls];
    uint64_t hour = p->now_ms / WORLD_HOUR_MS;
    double chance =
        c->online_hour[hour % WORLD_HOURS] * c->online_weekday[hour / WORLD_HOURS % WORLD_WEEKDAYS];
    uint64_t minute = world_draw(w, i, STREAM_PRESENCE, 0) % PRESENCE_MS;
    uint64_t next = p->now_ms - p->now_ms % PRESENCE_MS + minute;
    if (n->off)
        return SH_OK;
    if (next <= p->now_ms)
        next += PRESENCE_MS;
    bool leaves = world_unit(world_draw(w, i, STREAM_AWAY, hour)) < c->leave_day / WORLD_HOURS;
    if (leaves && p->now_ms >= n->away_until_ms)
        n->away_until_ms = p->now_ms + (uint64_t)c->away_ms;
    n->wanted = w->settling || (p->now_ms >= n->away_until_ms &&
                                world_unit(world_draw(w, i, STREAM_PRESENCE, 1 + hour)) < chance);
    SH_TRY(world_push(p, (sim_event){.at_ms = next, .target = i, .from = i, .kind = SIM_EV_LINK},
                      err));
    return world_node_relink(p, i, err);
}

/* ---- death ---- */

sh_status world_node_die(world_part *p, uint32_t i, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    if (!n->up)
        return SH_OK;
    sh_node_destroy(&n->core);
    if (n->online)
        SH_TRY(tell_gone(p, i, n->connection, err));
    n->up = n->online = n->dies_after = false;
    n->life++;
    n->connection++;
    n->timer++;
    n->busy_ms[0] = n->busy_ms[1] = 0;
    n->hash = world_mix(n->hash, 0xdead);
    if (n->off)
        return SH_OK;
    return world_node_restart_in(p, i, SH_MAX(n->down_ms, DOWN_MS_MIN), err);
}

/* ---- faults ---- */

const world_fault *world_node_active(const world_node *n, world_fault_kind kind)
{
    for (uint32_t k = 0; k < n->n_active; k++)
        if (n->active[k].fault->kind == kind)
            return n->active[k].fault;
    return NULL;
}

static sh_status add_active(world_node *n, const world_fault *f, sh_error *err)
{
    if (n->n_active == WORLD_ACTIVE_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "script: more than %u faults of one node at a time",
                       WORLD_ACTIVE_MAX);
    world_active *grown = realloc(n->active, (n->n_active + 1) * sizeof *grown);
    if (!grown)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a fault");
    n->active = grown;
    n->active[n->n_active++].fault = f;
    return SH_OK;
}

static void end_active(world_part *p, uint32_t i, const world_fault *f)
{
    world_node *n = &p->w->nodes[i];
    uint32_t k = 0;
    while (k < n->n_active && n->active[k].fault != f)
        k++;
    if (k == n->n_active)
        return;
    n->n_active--;
    memmove(&n->active[k], &n->active[k + 1], (n->n_active - k) * sizeof n->active[0]);
    if (n->n_active == 0) {
        free(n->active);
        n->active = NULL;
    }
    if (f->kind == WORLD_DISK_FULL && !world_node_active(n, WORLD_DISK_FULL))
        sh_store_simulate_room(n->store, UINT64_MAX);
    if (f->kind == WORLD_CLOCK_SKEW) {
        n->clock_ms += (int64_t)(n->clock_rate * (double)(p->now_ms - n->clock_from_ms));
        n->clock_rate = 0;
    }
}

/* A copy of a store is drawn from a device that is off: see docs/decisions/0015. The device is on
 * again at once. */
static sh_status copy_store(world_part *p, uint32_t i, sh_store **out, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    if (n->up) {
        n->down_ms = 0;
        SH_TRY(world_node_die(p, i, err));
        sh_store_simulate_restart(n->store, 0);
    }
    return sh_store_copy_memory(n->store, out, err);
}

static sh_status set_back(world_part *p, uint32_t i, const world_fault *f, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    if (!n->backup)
        return SH_OK;
    p->counts.faults[f->kind]++;
    n->down_ms = (uint32_t)SH_MIN(f->for_ms, (uint64_t)UINT32_MAX);
    SH_TRY(world_node_die(p, i, err));
    sh_store_simulate_restart(n->store, 0);
    SH_TRY(sh_store_restore_memory(n->store, n->backup, err));
    sh_store_close(&n->backup);
    for (uint32_t slot = 0; slot < 2; slot++)
        set_file(p->w, i, slot, &n->backup_files[slot].sha256, n->backup_files[slot].there);
    n->store_bad = false;
    world_oracle_node_replaced(p->w->oracle, i, p->now_ms);
    return SH_OK;
}

/* The disk's copy starts on a second device, which lies in the same partition. */
static sh_status clone(world_part *p, const sim_event *e, sh_error *err)
{
    world *w = p->w;
    const world_fault *f = e->job;
    uint32_t i = e->target, at = (uint32_t)(e->tag >> 1);
    world_node *n = &w->nodes[i], *copy = &w->nodes[at];
    if ((e->tag & 1) == 0) {
        copy->off = true;
        copy->wanted = false;
        SH_TRY(world_node_relink(p, at, err));
        SH_TRY(world_node_die(p, at, err));
        sh_store_close(&copy->store); /* nobody starts it again */
        return SH_OK;
    }
    if (sh_store_simulate_crashed(n->store) || n->store_bad || copy->store)
        return SH_OK;
    p->counts.faults[f->kind]++;
    SH_TRY(copy_store(p, i, &copy->store, err));
    for (uint32_t slot = 0; slot < 2; slot++)
        set_file(w, at, slot, &n->files[slot].sha256, n->files[slot].there);
    copy->session = n->session + 1000000;
    world_oracle_node_replaced(w->oracle, at, p->now_ms);
    return world_node_begin(p, at, err);
}

static sh_status begin_point(world_part *p, uint32_t i, const world_fault *f, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    uint32_t down_ms = (uint32_t)SH_MIN(f->for_ms, (uint64_t)UINT32_MAX);
    switch (f->kind) {
    case WORLD_CRASH:
        p->counts.faults[f->kind] += n->up;
        n->down_ms = down_ms;
        return world_node_die(p, i, err);
    case WORLD_TORN:
        p->counts.faults[f->kind] += n->up;
        n->down_ms = down_ms;
        if (n->up && f->rate >= 0.5)
            n->dies_after = true;
        else if (n->up)
            sh_store_simulate_crash(n->store, SH_MAX(f->number, 1), false);
        return SH_OK;
    case WORLD_CLOCK_JUMP:
        p->counts.faults[f->kind]++;
        n->clock_ms += (int64_t)f->number;
        return SH_OK;
    case WORLD_CORRUPT_CHUNK:
        if (f->number % 2 == 1) {
            n->chunks_bad++; /* counted when one comes */
            return SH_OK;
        }
        if (n->files[n->slot].there) {
            sh_hash changed = n->files[n->slot].sha256;
            p->counts.faults[f->kind]++;
            changed.b[f->number / 2 % sizeof changed.b] ^= 1;
            set_file(w, i, n->slot, &changed, false);
        }
        return SH_OK;
    case WORLD_RESTORE:
        return set_back(p, i, f, err);
    case WORLD_CORRUPT_STORE:
        p->counts.faults[f->kind]++;
        n->store_bad = true;
        sh_store_simulate_corrupt(n->store);
        return SH_OK;
    default:
        return SH_OK;
    }
}

static sh_status begin_fault(world_part *p, uint32_t i, const world_fault *f, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    if (world_fault_is_lie(f->kind))
        world_oracle_node_lies(w->oracle, i);
    if (f->kind == WORLD_DISK_FULL) {
        uint64_t room = sh_store_bytes_used(n->store) + f->number;
        p->counts.faults[f->kind] += n->store_bad ? 0 : 1;
        sh_store_simulate_room(n->store, room);
        return add_active(n, f, err);
    }
    if (f->kind == WORLD_CLOCK_SKEW) {
        if (n->clock_rate != 0)
            return SH_OK;
        p->counts.faults[f->kind]++;
        n->clock_rate = f->rate;
        n->clock_from_ms = p->now_ms;
        return add_active(n, f, err);
    }
    if (world_fault_is_link(f->kind) || world_fault_is_lie(f->kind))
        return add_active(n, f, err);
    return begin_point(p, i, f, err);
}

sh_status world_node_fault(world_part *p, const sim_event *e, sh_error *err)
{
    uint32_t i = e->target;
    world_node *n = &p->w->nodes[i];
    const world_fault *f = e->job;
    if (e->kind == SIM_EV_BACKUP) {
        if (n->store_bad || sh_store_simulate_crashed(n->store))
            return SH_OK;
        sh_store_close(&n->backup);
        memcpy(n->backup_files, n->files, sizeof n->files);
        return copy_store(p, i, &n->backup, err);
    }
    if (f->kind == WORLD_CLONE)
        return clone(p, e, err);
    if (e->tag != 0)
        return begin_fault(p, i, f, err);
    end_active(p, i, f);
    return SH_OK;
}

void world_node_release(world_node *n)
{
    sh_node_destroy(&n->core);
    sh_store_close(&n->store);
    sh_store_close(&n->backup);
    sh_buf_release(&n->replay);
    free(n->active);
    n->active = NULL;
}
