#include "experiments/sim/events.h"

#include <stdlib.h>

static bool before(const sim_event *a, const sim_event *b)
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

sh_status sim_queue_insert(sim_queue *q, sim_event event)
{
    sh_status status =
        sh_array_reserve((void **)&q->items, &q->cap, q->n + 1, sizeof *q->items, SIM_EVENTS_MAX);
    if (status != SH_OK) {
        sh_buf_release(&event.message);
        return status;
    }
    size_t i = q->n++;
    for (; i && before(&event, &q->items[(i - 1) / 2]); i = (i - 1) / 2)
        q->items[i] = q->items[(i - 1) / 2];
    q->items[i] = event;
    return SH_OK;
}

bool sim_queue_pop(sim_queue *q, sim_event *out)
{
    if (q->n == 0)
        return false;
    *out = q->items[0];
    sim_event last = q->items[--q->n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= q->n)
            break;
        if (child + 1 < q->n && before(&q->items[child + 1], &q->items[child]))
            child++;
        if (!before(&q->items[child], &last))
            break;
        q->items[i] = q->items[child];
        i = child;
    }
    if (q->n)
        q->items[i] = last;
    return true;
}

void sim_queue_release(sim_queue *q)
{
    for (size_t i = 0; i < q->n; i++)
        sh_buf_release(&q->items[i].message);
    free(q->items);
    *q = (sim_queue){0};
}
