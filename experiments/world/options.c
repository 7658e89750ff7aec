/* The command line of `shoal-sim faults`. */
#include "experiments/world/world.h"

#define O world_options

static const sh_option table[] = {
    SH_OPT_INT(O, seed, 's', "seed", "A", 1, 0, 9007199254740991.0,
               "decides everything that is random"),
    SH_OPT_INT(O, seeds, 0, "seeds", "COUNT", 1, 1, WORLD_SEEDS_MAX,
               "runs with the seeds A to A + COUNT - 1, whole ones in parallel"),
    SH_OPT_INT(O, nodes, 'n', "nodes", "N", 20, 1, WORLD_NODES_MAX, "nodes of the fleet"),
    SH_OPT_INT(O, days, 'd', "days", "D", 2, 1, WORLD_DAYS_MAX,
               "of virtual time; then the fleet is given time to come to rest"),
    SH_OPT_INT(O, threads, 't', "threads", "T", 2, 1, WORLD_THREADS_MAX, "no result depends on it"),
    SH_OPT_STRING(O, canary, 0, "canary", "NAME", NULL,
                  "a known bug to switch on, which must be found; list: their names"),
    SH_OPT_STRING(O, script, 0, "script", "FILE", NULL,
                  "schedule of faults to run, with its seed, nodes and days"),
    SH_OPT_LIST(O, devices, 0, "devices", "FILE",
                "class of devices; may be given again (default: phones, gateways and shop-floor "
                "PCs)"),
    SH_OPT_STRING(O, faults, 0, "faults", "LIST", "on", "on, off, or kinds of faults with commas"),
    SH_OPT_FLAG(O, shrink, 0, "shrink", "make the script of the first failing seed short"),
    SH_OPT_FLAG(O, json, 0, "json", "print one JSON object on stdout"),
};

const sh_command world_faults_command = {
    "shoal-sim faults",
    "[--seed A] [--seeds COUNT] [--nodes N] [--days D] [--threads T] [--canary NAME]\n"
    "       [--script FILE] [--devices FILE] [--faults on|off|NAME,...] [--shrink] [--json]",
    table,
    SH_COUNT(table),
    "Runs the shipping node and coordinator cores as a fleet under virtual time, with faults of\n"
    "network, disks, processes, clocks and nodes, and checks at every step that nothing\n"
    "acknowledged is lost and nothing counts twice. Exit status 1 when a promise was broken.",
    "shoal-sim faults --seed 7 --nodes 20 --days 2 --threads 2 --json"};
