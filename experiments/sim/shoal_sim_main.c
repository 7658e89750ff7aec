/* shoal-sim: command line of the fleet simulator. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/sim/sim.h"
#include "experiments/world/world.h"
#include "shared/base/canary.h"
#include "shared/base/file.h"
#include "shared/base/hash.h"
#include "shared/base/log.h"

static const char usage[] = "usage: shoal-sim run [EXPERIMENT] [options]\n"
                            "       shoal-sim faults [options]\n"
                            "       shoal-sim run --help, shoal-sim faults --help\n";

static sh_status parse(int argc, char **argv, sim_options *o, sh_args *args, sh_error *err)
{
    char yaml[SH_PATH_BYTES];
    const char *experiment = NULL;
    SH_TRY(sh_options_parse(&sim_run_command, argc, argv, o, args, err));
    if (args->help)
        return SH_OK;
    if (args->n_positional > 1)
        return sh_fail(err, SH_ERR_USAGE, "one EXPERIMENT at most; \"%s\" is a second one",
                       args->positional[1]);
    if (args->n_positional == 0)
        return SH_OK;
    experiment = args->positional[0];
    SH_TRY(sh_path_join(yaml, sizeof yaml, experiment, "experiment.yaml", err));
    sh_args_release(args);
    *args = (sh_args){0};
    return sh_options_parse_file(&sim_run_command, yaml, argc, argv, o, args, err);
}

static sh_status check_options(const sim_options *o, sh_error *err)
{
    const struct {
        const char *key;
        int64_t node;
    } nodes[] = {{"faults.crash-training-node", o->crash_training_node},
                 {"faults.poison-scale-node", o->poison_scale_node},
                 {"faults.poison-sign-node", o->poison_sign_node}};
    for (size_t i = 0; i < SH_COUNT(nodes); i++)
        if (nodes[i].node >= o->nodes)
            return sh_fail(err, SH_ERR_USAGE, "%s: node %d, but the fleet has nodes 0 to %d",
                           nodes[i].key, (int)nodes[i].node, (int)o->nodes - 1);
    static const char *const failpoints[] = {"merge.before_commit", "merge.after_commit",
                                             "gate.before_commit", "gate.after_commit"};
    size_t known = 0;
    while (known < SH_COUNT(failpoints) && strcmp(o->merge_failpoint, failpoints[known]) != 0)
        known++;
    if (known == SH_COUNT(failpoints))
        return sh_fail(
            err, SH_ERR_USAGE, "faults.merge-failpoint: \"%s\" is none of %s, %s, %s, %s",
            o->merge_failpoint, failpoints[0], failpoints[1], failpoints[2], failpoints[3]);
    if (strcmp(o->learning, "real") == 0 && strcmp(o->store, "lmdb") != 0)
        return sh_fail(err, SH_ERR_USAGE,
                       "store: real learning needs lmdb, whose files the audit reads");
    return SH_OK;
}

/* The summary is written in any case, whatever stopped the run. */
static sh_status run(const sim_options *o, bool *ok, sh_error *err)
{
    sim *s = NULL;
    sim_measures measures = {0};
    sh_error run_error = {0};
    json_t *summary = NULL;
    sh_status status = sim_create(o, &s, err);
    if (status != SH_OK) { /* not over an earlier run's */
        sh_error ignored;
        if (status != SH_ERR_EXISTS && strcmp(o->learning, "real") == 0)
            (void)(sim_summary_unborn("shoal-sim", o, err, &ignored) == SH_OK);
        return status;
    }
    sim_progress_begin(s);
    status = sim_run(s, &run_error);
    if (status == SH_OK && strcmp(o->learning, "real") == 0)
        status = sim_measure(s, &measures, &run_error);
    sim_progress_end(s);
    sh_status written = sim_summary(s, &measures, &run_error, &summary, ok, err);
    if (status != SH_OK)
        *err = run_error;
    else
        status = written;
    if (summary && o->json) {
        json_dumpf(summary, stdout, JSON_INDENT(2));
        printf("\n");
    } else if (summary) {
        sim_print_table(summary);
    }
    json_decref(summary);
    sim_destroy(&s);
    return status;
}

static bool print_help(const sh_command *command)
{
    sh_buf help;
    sh_buf_init(&help, 1u << 16);
    bool ok = sh_options_help(command, &help) == SH_OK;
    fwrite(help.data, 1, help.len, stdout);
    sh_buf_release(&help);
    return ok;
}

static bool print_canaries(void)
{
    for (int canary = 1; canary < SH_CANARIES; canary++)
        printf("%s\n", sh_canary_name((sh_canary)canary));
    return fflush(stdout) == 0;
}

static int run_faults(int argc, char **argv)
{
    sh_error err = {0};
    world_options o = {0};
    sh_args args = {0};
    bool failed = false;
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = sh_options_parse(&world_faults_command, argc, argv, &o, &args, &err);
    if (status == SH_OK && args.help)
        failed = !print_help(&world_faults_command);
    else if (status == SH_OK && o.canary && strcmp(o.canary, "list") == 0)
        failed = !print_canaries();
    else if (status == SH_OK && args.n_positional > 0)
        status = sh_fail(&err, SH_ERR_USAGE, "faults takes options only, not \"%s\"",
                         args.positional[0]);
    else if (status == SH_OK)
        status = world_faults(&o, &failed, &err);
    sh_args_release(&args);
    if (status != SH_OK)
        return sh_error_report("shoal-sim", &err);
    return failed ? 1 : 0;
}

int main(int argc, char **argv)
{
    sh_error err = {0};
    sim_options o;
    sh_args args = {0};
    bool ok = false;
    if (argc > 1 && strcmp(argv[1], "faults") == 0)
        return run_faults(argc - 1, argv + 1);
    if (argc < 2 || strcmp(argv[1], "run") != 0) {
        bool help = argc > 1 && strcmp(argv[1], "--help") == 0;
        if (argc > 1 && !help)
            fprintf(stderr, "shoal-sim: unknown command '%s'; there are run and faults\n", argv[1]);
        else
            fputs(usage, help ? stdout : stderr);
        return help ? 0 : 2;
    }
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = parse(argc - 1, argv + 1, &o, &args, &err);
    if (status == SH_OK && args.help) {
        ok = print_help(&sim_run_command);
    } else {
        if (status == SH_OK)
            status = check_options(&o, &err);
        if (status == SH_OK)
            status = run(&o, &ok, &err);
    }
    sh_args_release(&args);
    if (status != SH_OK)
        return sh_error_report("shoal-sim", &err);
    return ok ? 0 : 1;
}
