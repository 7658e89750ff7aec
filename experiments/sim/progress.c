/*
 * Progress on stderr: a block that is drawn over in place on a terminal, plain lines elsewhere.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "experiments/sim/sim.h"

#define LIVE_S  0.2
#define PLAIN_S 10.0
#define ROWS    6

typedef struct {
    bool live;
    int drawn; /* rows on the screen that belong to us */
    double last_s;
    char news[160];
} progress;

double sim_wall_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

void sim_progress_begin(sim *s)
{
    progress *p = sh_calloc(1, sizeof *p);
    const char *term = getenv("TERM");
    if (p) {
        p->live = isatty(STDERR_FILENO) && !s->options.plain && term && strcmp(term, "dumb") != 0;
        p->last_s = sim_wall_seconds();
    }
    s->progress = p;
}

typedef struct {
    uint32_t online;
    uint64_t made, acked, windows, alarmed, newest;
} counts;

static counts count(const sim *s)
{
    counts c = {0};
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        const sim_node *n = &s->nodes[i];
        c.online += n->online;
        c.made += n->updates_made;
        c.acked += n->updates_acked;
        c.windows += n->windows;
        c.alarmed += n->alarm_window != 0;
        uint64_t version = n->core ? sh_node_get_status(n->core).active_version : n->active_version;
        c.newest += version == s->version_seen && version > 0;
    }
    return c;
}

static const char *virtual_time(const sim *s, char *out, size_t n)
{
    uint64_t m = s->now_ms / 60000;
    snprintf(out, n, "%llud %02llu:%02llu", (unsigned long long)(m / 1440),
             (unsigned long long)(m / 60 % 24), (unsigned long long)(m % 60));
    return out;
}

static void draw_bar(double share, int width)
{
    int full = (int)(share * width + 0.5);
    for (int i = 0; i < width; i++)
        fputs(i < full ? "█" : "░", stderr);
}

static double phase_share(const sim *s, const counts *c)
{
    double n = s->n_nodes;
    switch (s->phase) {
    case SIM_PHASE_BEFORE:
        return SH_MIN((double)c->windows / (n * (double)s->options.windows_before), 1);
    case SIM_PHASE_DRIFT:
        return (double)c->alarmed / n;
    case SIM_PHASE_LEARN:
        return SH_MIN(
            (double)(s->version_seen ? s->version_seen - 1 : 0) / (double)s->options.rounds, 1);
    default:
        return (double)c->newest / n;
    }
}

static void draw_live(sim *s, progress *p)
{
    counts c = count(s);
    char when[32];
    if (p->drawn)
        fprintf(stderr, "\033[%dA", p->drawn);
    double wall_s = sim_wall_seconds() - s->wall_start_s;
    if (s->real_processes)
        fprintf(stderr, "\033[J  time          %.0f s\n", wall_s);
    else
        fprintf(stderr, "\033[J  virtual time  %s   wall %.0f s\n",
                virtual_time(s, when, sizeof when), wall_s);
    fprintf(stderr, "  phase         %-8s ", sim_phase_names[s->phase]);
    draw_bar(phase_share(s, &c), 30);
    fprintf(stderr, "\n  nodes online  %u/%u   alarmed %llu   on newest release %llu\n", c.online,
            s->n_nodes, (unsigned long long)c.alarmed, (unsigned long long)c.newest);
    fprintf(stderr, "  updates       made %llu   acknowledged %llu\n", (unsigned long long)c.made,
            (unsigned long long)c.acked);
    if (s->gate_loss > 0)
        fprintf(stderr, "  release       %llu   held-out loss (gate suite) %.3f\n",
                (unsigned long long)SH_MAX(s->version_seen, 1), s->gate_loss);
    else
        fprintf(stderr, "  release       1   held-out loss not measured yet\n");
    fprintf(stderr, "  %.110s\n", p->news);
    p->drawn = ROWS;
    fflush(stderr);
}

static void draw_plain(sim *s)
{
    counts c = count(s);
    char when[32], loss[32] = "-";
    if (s->gate_loss > 0)
        snprintf(loss, sizeof loss, "%.3f", s->gate_loss);
    if (!s->real_processes)
        fprintf(stderr, "time=\"%s\" ", virtual_time(s, when, sizeof when));
    fprintf(stderr,
            "phase=%s done=%.0f%% online=%u/%u alarmed=%llu updates=%llu acked=%llu "
            "release=%llu loss=%s wall_s=%.0f\n",
            sim_phase_names[s->phase], 100 * phase_share(s, &c), c.online, s->n_nodes,
            (unsigned long long)c.alarmed, (unsigned long long)c.made, (unsigned long long)c.acked,
            (unsigned long long)SH_MAX(s->version_seen, 1), loss,
            sim_wall_seconds() - s->wall_start_s);
}

void sim_progress_tick(sim *s, bool force)
{
    progress *p = s->progress;
    if (!p || (!force && !s->real_processes && s->events % 64 != 0))
        return;
    double now = sim_wall_seconds();
    if (!force && now - p->last_s < (p->live ? LIVE_S : PLAIN_S))
        return;
    p->last_s = now;
    if (p->live)
        draw_live(s, p);
    else
        draw_plain(s);
}

void sim_progress_line(sim *s, const char *format, ...)
{
    progress *p = s->progress;
    if (!p)
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(p->news, sizeof p->news, format, args);
    va_end(args);
    if (p->live)
        draw_live(s, p);
    else
        fprintf(stderr, "%s\n", p->news);
}

void sim_progress_end(sim *s)
{
    if (s->progress)
        sim_progress_tick(s, true);
    free(s->progress);
    s->progress = NULL;
}
