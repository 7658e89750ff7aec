/*
 * The simulated network. Between a node and the aggregator lies a link with delay, jitter,
 * bandwidth and loss of the device's class, and the faults that the script has for it. What
 * becomes of a message is drawn from (seed, node, direction, the message's number) and, for each
 * fault, from what the fault is, so that the fate that one fault has for a message does not change
 * with other faults.
 *
 * A message in flight is lost when its connection has ended before it comes to the node's end; what
 * a node had sent may still come to the aggregator.
 */
#include <string.h>

#include "experiments/world/world.h"
#include "shared/base/hash.h"

#define STREAM_LINK  0x4c494e4bu
#define STREAM_FAULT 0x464c5400u
#define QUICK_MS     20u                 /* transfer time that is not worth an event */
#define LATE         (UINT64_C(1) << 32) /* of a DELIVER's tag: the link's end has seen it */
#define BACKLOG_MS   600000u /* a link that has more to send drops, as a full queue does */

typedef struct {
    bool lost, twice;
    uint64_t late_ms, twice_ms, bytes_s;
    const world_fault *corrupt;
    uint64_t corrupt_draw;
} fate;

static uint64_t fault_draw(const world *w, uint32_t i, const world_fault *f, uint64_t number)
{
    uint64_t h = world_mix(f->at_ms, (uint64_t)f->kind << 32 | f->target);
    return world_draw(w, i, STREAM_FAULT + (uint32_t)f->kind, world_mix(h, number));
}

static void add_fault(world_part *p, uint32_t i, const world_fault *f, bool up, uint64_t number,
                      fate *to)
{
    uint64_t draw = fault_draw(p->w, i, f, number);
    bool hits = world_unit(draw) < f->rate;
    uint64_t *count = &p->counts.faults[f->kind];
    uint64_t held = 1 + (draw & 0xffffffff) % (f->number + 1);
    switch (f->kind) {
    case WORLD_DROP:
        to->lost = to->lost || hits;
        *count += hits;
        break;
    case WORLD_DUPLICATE:
        to->twice = to->twice || hits;
        to->twice_ms = held;
        *count += hits;
        break;
    case WORLD_REORDER:
        to->late_ms += hits ? held : 0;
        *count += hits;
        break;
    case WORLD_DELAY:
        to->late_ms += f->number;
        ++*count;
        break;
    case WORLD_ONE_WAY_UP:
    case WORLD_ONE_WAY_DOWN:
        hits = up == (f->kind == WORLD_ONE_WAY_UP);
        to->lost = to->lost || hits;
        *count += hits;
        break;
    case WORLD_PARTITION:
        to->lost = true;
        ++*count;
        break;
    case WORLD_SLOW:
        to->bytes_s = SH_MIN(to->bytes_s, SH_MAX(f->number, (uint64_t)1));
        ++*count;
        break;
    case WORLD_CORRUPT_MESSAGE:
        if (hits) {
            to->corrupt = f;
            to->corrupt_draw = draw;
            ++*count;
        }
        break;
    default:
        break;
    }
}

static fate fate_of(world_part *p, uint32_t i, bool up)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    const world_class *c = &w->fleet->classes[n->cls];
    uint64_t number = ++n->messages[up ? 0 : 1] << 1 | up;
    uint64_t draw = world_draw(w, i, STREAM_LINK, number);
    fate to = {.bytes_s = (uint64_t)(up ? c->bytes_up_s : c->bytes_down_s)};
    to.lost = world_unit(draw) < c->loss;
    for (uint32_t k = 0; k < n->n_active; k++)
        add_fault(p, i, n->active[k].fault, up, number, &to);
    return to;
}

static void corrupt(sh_buf *message, const fate *to)
{
    if (to->corrupt && message->len > 0)
        message->data[to->corrupt->number % message->len] ^= (uint8_t)(1 + to->corrupt_draw % 255);
}

/* When the link has sent so many bytes more; 0: its queue is full. */
static uint64_t sent_at(world_node *n, bool up, uint64_t now_ms, size_t bytes, uint64_t bytes_s)
{
    uint64_t *busy = &n->busy_ms[up ? 0 : 1];
    uint64_t from = SH_MAX(*busy, now_ms);
    if (from > now_ms + BACKLOG_MS)
        return 0;
    *busy = from + 1000 * (uint64_t)bytes / bytes_s;
    return *busy;
}

sh_status world_copy(const sh_buf *message, sh_buf *copy, sh_error *err)
{
    sh_buf_init(copy, SH_WIRE_MESSAGE_MAX);
    if (sh_buf_append(copy, message->data, message->len) != SH_OK)
        return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a message");
    return SH_OK;
}

static uint64_t delay_of(const world *w, uint32_t i, uint64_t number)
{
    const world_class *c = &w->fleet->classes[w->nodes[i].cls];
    uint64_t draw = world_draw(w, i, STREAM_LINK + 1, number);
    return (uint64_t)c->delay_ms + draw % ((uint64_t)c->jitter_ms + 1);
}

static sh_status send_one(world_part *p, uint32_t i, sh_buf message, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[i];
    fate to = fate_of(p, i, true);
    uint64_t number = n->messages[0] << 1 | 1;
    sim_event e = {.target = w->n_nodes + w->n_clones,
                   .from = i,
                   .kind = SIM_EV_DELIVER,
                   .tag = n->connection};
    uint64_t sent = sent_at(n, true, p->now_ms, message.len, to.bytes_s);
    if (to.lost || sent == 0) {
        sh_buf_release(&message);
        return SH_OK;
    }
    p->counts.messages_up++;
    p->counts.bytes_up += message.len;
    corrupt(&message, &to);
    e.at_ms = sent + delay_of(w, i, number) + to.late_ms;
    if (to.twice) {
        sim_event again = e;
        again.at_ms += to.twice_ms;
        SH_TRY(world_copy(&message, &again.message, err));
        SH_TRY(world_mail(p, again, err));
    }
    e.message = message;
    return world_mail(p, e, err);
}

sh_status world_send_up(world_part *p, uint32_t i, sh_buf *message, sh_error *err)
{
    world_node *n = &p->w->nodes[i];
    sh_buf mine = *message, more = {0};
    *message = (sh_buf){0};
    n->hash = world_mix(n->hash, mine.len);
    if (mine.len >= 16) {
        uint64_t head[2]; /* holds the message's own hash */
        memcpy(head, mine.data, sizeof head);
        n->hash = world_mix(n->hash, head[0] ^ head[1]);
    }
    if (!n->online) {
        sh_buf_release(&mine);
        return SH_OK;
    }
    if (n->n_active > 0)
        SH_TRY(world_lie(p, i, &mine, &more, err));
    SH_TRY(send_one(p, i, mine, err));
    return more.len > 0 ? send_one(p, i, more, err) : SH_OK;
}

sh_status world_send_down(world_part *p, const sh_hash *key, sh_buf *message, sh_error *err)
{
    world *w = p->w;
    uint32_t key_of = 0;
    memcpy(&key_of, key->b, sizeof key_of);
    world_route route = world_center_route(w, key_of);
    sh_buf mine = *message;
    *message = (sh_buf){0};
    if (route.connection == 0) { /* sh_net_server_send says that it is not there */
        sh_buf_release(&mine);
        return SH_OK;
    }
    world_oracle_coord_sent(w->oracle, p->now_ms, key, mine.data, mine.len);
    sim_event e = {.target = route.node,
                   .from = w->n_nodes + w->n_clones,
                   .kind = SIM_EV_DELIVER,
                   .tag = route.connection,
                   .message = mine};
    /* The aggregator's own numbers: the node's are its partition's. */
    e.at_ms = p->now_ms + delay_of(w, route.node, p->numbers);
    return world_mail(p, e, err);
}

sh_status world_arrive(world_part *p, sim_event *e, bool *now, sh_error *err)
{
    world *w = p->w;
    world_node *n = &w->nodes[e->target];
    *now = (e->tag & LATE) != 0;
    if (*now)
        return SH_OK;
    fate to = fate_of(p, e->target, false);
    if (to.lost)
        return SH_OK;
    SH_TRY(world_lie_down(p, e->target, &e->message, err));
    uint64_t sent = sent_at(n, false, p->now_ms, e->message.len, to.bytes_s);
    if (sent == 0)
        return SH_OK;
    corrupt(&e->message, &to);
    if (n->chunks_bad > 0) {
        bool done = false;
        SH_TRY(world_corrupt_chunk(&e->message, world_draw(w, e->target, STREAM_LINK, sent), &done,
                                   err));
        n->chunks_bad -= done;
        p->counts.faults[WORLD_CORRUPT_CHUNK] += done;
    }
    sim_event later = {
        .target = e->target, .from = e->target, .kind = SIM_EV_DELIVER, .tag = e->tag | LATE};
    if (to.twice) {
        later.at_ms = sent + to.late_ms + to.twice_ms;
        SH_TRY(world_copy(&e->message, &later.message, err));
        SH_TRY(world_push(p, later, err));
    }
    if (sent + to.late_ms <= p->now_ms + QUICK_MS) {
        *now = true;
        return SH_OK;
    }
    later.at_ms = sent + to.late_ms;
    later.message = e->message;
    e->message = (sh_buf){0};
    return world_push(p, later, err);
}
