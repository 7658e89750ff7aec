#include "experiments/sim/events.h"

#include <stdlib.h>

#define CHILDREN 4u /* of a heap's place: they lie beside each other */

static bool before(const sim_queue_key *a, const sim_queue_key *b)
{
    if (a->at_ms != b->at_ms)
        return a->at_ms < b->at_ms;
    if (a->target != b->target)
        return a->target < b->target;
    return a->number < b->number;
}

sh_status sim_queue_push(sim_queue *q, sim_event event)
{
    event.number = q->next_number++;
    return sim_queue_insert(q, event);
}

/* All three arrays have the heap's cap. */
static sh_status grow(sim_queue *q)
{
    size_t caps[3] = {q->cap, q->cap, q->cap};
    SH_TRY(
        sh_array_reserve((void **)&q->keys, &caps[0], q->n + 1, sizeof *q->keys, SIM_EVENTS_MAX));
    SH_TRY(
        sh_array_reserve((void **)&q->items, &caps[1], q->n + 1, sizeof *q->items, SIM_EVENTS_MAX));
    SH_TRY(
        sh_array_reserve((void **)&q->free, &caps[2], q->n + 1, sizeof *q->free, SIM_EVENTS_MAX));
    for (size_t i = q->cap; i < caps[0]; i++)
        q->free[i] = (uint32_t)i;
    q->cap = caps[0];
    return SH_OK;
}

sh_status sim_queue_insert(sim_queue *q, sim_event event)
{
    sh_status status = q->n < q->cap ? SH_OK : grow(q);
    if (status != SH_OK) {
        sh_buf_release(&event.message);
        return status;
    }
    sim_queue_key key = {event.at_ms, event.number, event.target, q->free[q->n]};
    q->items[key.item] = event;
    size_t i = q->n++;
    for (; i && before(&key, &q->keys[(i - 1) / CHILDREN]); i = (i - 1) / CHILDREN)
        q->keys[i] = q->keys[(i - 1) / CHILDREN];
    q->keys[i] = key;
    return SH_OK;
}

bool sim_queue_pop(sim_queue *q, sim_event *out)
{
    if (q->n == 0)
        return false;
    *out = q->items[q->keys[0].item];
    q->free[--q->n] = q->keys[0].item;
    sim_queue_key last = q->keys[q->n];
    size_t i = 0;
    for (;;) {
        size_t first = CHILDREN * i + 1, end = SH_MIN(first + CHILDREN, q->n), child = first;
        if (first >= q->n)
            break;
        for (size_t k = first + 1; k < end; k++)
            if (before(&q->keys[k], &q->keys[child]))
                child = k;
        if (!before(&q->keys[child], &last))
            break;
        q->keys[i] = q->keys[child];
        i = child;
    }
    q->keys[i] = last;
    if (q->n > 0)
        __builtin_prefetch(&q->items[q->keys[0].item]);
    return true;
}

void sim_queue_release(sim_queue *q)
{
    for (size_t i = 0; i < q->n; i++)
        sh_buf_release(&q->items[q->keys[i].item].message);
    free(q->keys);
    free(q->items);
    free(q->free);
    *q = (sim_queue){0};
}
