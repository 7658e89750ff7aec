/*
 * The simulated link: delay and bandwidth with jitter, which reorders; loss and duplicates at given
 * rates. A message in flight is lost when its receiver crashes; one to a node when its link goes
 * down; one to the aggregator sometimes: what a node had sent may arrive after it crashed.
 */
#include <string.h>

#include "experiments/sim/sim.h"

static uint64_t delay_of(sim *s, size_t bytes)
{
    double base = (double)s->options.delay_ms * (0.5 + 1.5 * sh_rng_unit(&s->net_rng));
    return (uint64_t)(base + 1000.0 * (double)bytes / (double)s->options.bandwidth) + 1;
}

static sh_status copy_message(const sh_buf *from, sh_buf *to)
{
    sh_buf_init(to, from->max);
    return sh_buf_append(to, from->data, from->len);
}

sh_status sim_send(sim *s, uint32_t from, uint32_t to, sh_buf message, sh_error *err)
{
    sim_node *node = &s->nodes[from == s->n_nodes ? to : from];
    double lost = sh_rng_unit(&s->net_rng), doubled = sh_rng_unit(&s->net_rng);
    uint64_t delay = delay_of(s, message.len), again = delay_of(s, message.len);
    if (!node->online || !s->coord_up || !node->up || lost < s->options.drop) {
        sh_buf_release(&message);
        return SH_OK;
    }
    sim_event e = {.at_ms = s->now_ms + delay,
                   .target = to,
                   .from = from,
                   .life = to == s->n_nodes ? s->coord_life : s->nodes[to].life,
                   .kind = SIM_EV_DELIVER,
                   .tag = node->connection};
    if (doubled < s->options.duplicate) {
        sim_event copy = e;
        copy.at_ms = s->now_ms + again;
        if (copy_message(&message, &copy.message) != SH_OK) {
            sh_buf_release(&message);
            return sh_fail(err, SH_ERR_NO_MEMORY, "simulation: no memory for a message");
        }
        SH_TRY(sim_push(s, copy, err));
    }
    e.message = message;
    return sim_push(s, e, err);
}
