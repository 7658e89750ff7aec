/* shoal-fleet: a real fleet of processes on this machine. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/fleet/fleet.h"
#include "shared/base/hash.h"
#include "shared/base/log.h"

static const char usage[] = "usage: shoal-fleet run [EXPERIMENT] [options]\n"
                            "       shoal-fleet run --help\n";

/* What the fleet has no option for is as the simulator has it by default. */
static sh_status parse(int argc, char **argv, fleet_options *o, sh_args *args, sh_error *err)
{
    char yaml[SH_PATH_BYTES], name[] = "shoal-fleet";
    char *none[] = {name, NULL};
    sh_args ignored = {0};
    SH_TRY(sh_options_parse(&sim_run_command, 1, none, &o->sim, &ignored, err));
    sh_args_release(&ignored);
    SH_TRY(sh_options_parse(&fleet_run_command, argc, argv, o, args, err));
    if (args->help || args->n_positional == 0)
        return SH_OK;
    if (args->n_positional > 1)
        return sh_fail(err, SH_ERR_USAGE, "one EXPERIMENT at most; \"%s\" is a second one",
                       args->positional[1]);
    SH_TRY(sh_path_join(yaml, sizeof yaml, args->positional[0], "fleet.yaml", err));
    sh_args_release(args);
    *args = (sh_args){0};
    return sh_options_parse_file(&fleet_run_command, yaml, argc, argv, o, args, err);
}

static sh_status check_options(const fleet_options *o, sh_error *err)
{
    const struct {
        const char *key;
        int64_t node;
    } nodes[] = {{"faults.crash-training-node", o->sim.crash_training_node},
                 {"faults.poison-scale-node", o->sim.poison_scale_node},
                 {"faults.poison-sign-node", o->sim.poison_sign_node}};
    for (size_t i = 0; i < SH_COUNT(nodes); i++)
        if (nodes[i].node >= o->sim.nodes)
            return sh_fail(err, SH_ERR_USAGE, "%s: node %d, but the fleet has nodes 0 to %d",
                           nodes[i].key, (int)nodes[i].node, (int)o->sim.nodes - 1);
    if (o->sim.canary_nodes_min > o->sim.nodes)
        return sh_fail(err, SH_ERR_USAGE, "canary.nodes-min: %d nodes of %d",
                       (int)o->sim.canary_nodes_min, (int)o->sim.nodes);
    return SH_OK;
}

static void catch_signals(void)
{
    struct sigaction action = {.sa_handler = fleet_interrupt};
    sigemptyset(&action.sa_mask);
    action.sa_flags = (int)SA_RESETHAND; /* a second one ends the program at once */
    (void)sigaction(SIGINT, &action, NULL);
    (void)sigaction(SIGTERM, &action, NULL);
    (void)signal(SIGPIPE, SIG_IGN);
}

/* The summary is written in any case, whatever stopped the run. */
static sh_status run(const fleet_options *o, bool *ok, sh_error *err)
{
    fleet *f = NULL;
    sim_measures measures = {0};
    sh_error run_error = {0}, later = {0};
    json_t *summary = NULL;
    sh_status status = fleet_create(o, &f, err);
    if (status != SH_OK) { /* not over an earlier run's */
        if (status != SH_ERR_EXISTS)
            (void)(sim_summary_unborn("shoal-fleet", &o->sim, err, &later) == SH_OK);
        return status;
    }
    status = fleet_run(f, &run_error);
    sh_status collected = fleet_collect(f, status == SH_OK ? &run_error : &later);
    if (status == SH_OK)
        status = collected;
    if (status == SH_OK)
        status = sim_measure(f->sim, &measures, &run_error);
    sim_progress_end(f->sim);
    fleet_extra(f);
    sh_status written = SH_OK;
    if (collected == SH_OK)
        written = sim_summary(f->sim, &measures, &run_error, &summary, ok, err);
    else /* no stores, no rows */
        written = sim_summary_unborn("shoal-fleet", &o->sim, &run_error, err);
    if (status != SH_OK)
        *err = run_error;
    else
        status = written;
    if (summary && o->sim.json) {
        json_dumpf(summary, stdout, JSON_INDENT(2));
        printf("\n");
    } else if (summary) {
        sim_print_table(summary);
    }
    json_decref(summary);
    fleet_destroy(&f);
    return status;
}

int main(int argc, char **argv)
{
    sh_error err = {0};
    static fleet_options o;
    sh_args args = {0};
    bool ok = false;
    if (argc > 1 && strcmp(argv[1], "child") == 0)
        return fleet_child_main(argc, argv);
    if (argc < 2 || strcmp(argv[1], "run") != 0) {
        bool help = argc > 1 && strcmp(argv[1], "--help") == 0;
        if (argc > 1 && !help)
            fprintf(stderr, "shoal-fleet: unknown command '%s'; there is only run\n", argv[1]);
        else
            fputs(usage, help ? stdout : stderr);
        return help ? 0 : 2;
    }
    catch_signals();
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = parse(argc - 1, argv + 1, &o, &args, &err);
    if (status == SH_OK && args.help) {
        sh_buf help;
        sh_buf_init(&help, 1u << 16);
        ok = sh_options_help(&fleet_run_command, &help) == SH_OK;
        fwrite(help.data, 1, help.len, stdout);
        sh_buf_release(&help);
    } else {
        if (status == SH_OK)
            status = check_options(&o, &err);
        if (status == SH_OK)
            status = run(&o, &ok, &err);
    }
    sh_args_release(&args);
    if (status != SH_OK)
        return sh_error_report("shoal-fleet", &err);
    return ok ? 0 : 1;
}
