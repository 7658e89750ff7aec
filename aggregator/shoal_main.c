/* The program `shoal`: a table of subcommands, each in a file of its own. */
#include <string.h>

#include "aggregator/cli.h"
#include "shared/base/hash.h"
#include "shared/base/log.h"

static int print_version(int argc, char **argv)
{
    (void)argc, (void)argv;
    printf("shoal %s\n", SHOAL_VERSION);
    sh_error err = {0};
    return sh_cli_flush(&err) == SH_OK ? 0 : sh_error_report("shoal", &err);
}

static const sh_cli_entry commands[] = {
    {"model", "inspect, measure, run and quantize a model file", sh_cli_model},
    {"aggregator", "command an aggregator: status, enrol, rollback, backup, ...",
     sh_cli_aggregator},
    {"init", "make the folder of a node or an aggregator", sh_cli_init},
    {"report", "make the drift report of a run", sh_cli_report},
    {"version", "print the version", print_version},
};

int main(int argc, char **argv)
{
    static const sh_cli_menu menu = {
        .name = "shoal",
        .about = "Tools for a fleet of small language models that learn together.",
        .entries = commands,
        .n = SH_COUNT(commands),
    };
    sh_error err = {0};
    if (sh_crypto_init(&err) != SH_OK)
        return sh_error_report("shoal", &err);
    if (argc == 2 && strcmp(argv[1], "--version") == 0)
        return print_version(argc, argv);
    return sh_cli_dispatch(&menu, argc, argv);
}
