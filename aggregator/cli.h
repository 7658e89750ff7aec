/*
 * The program `shoal`: one function a subcommand, each with main's contract. stdout is data, stderr
 * messages, the exit code 0 (ok), 1 (failed) or 2 (usage or bad input). argv[0] is the
 * subcommand's name.
 */
#ifndef SH_AGGREGATOR_CLI_H
#define SH_AGGREGATOR_CLI_H

#include <stdio.h>

#include "shared/base/json.h"
#include "shared/base/option.h"

typedef struct {
    const char *name, *about; /* about: one line of the parent's --help */
    int (*run)(int argc, char **argv);
} sh_cli_entry;

typedef struct {
    const char *name, *about; /* "shoal model" */
    const sh_cli_entry *entries;
    size_t n;
} sh_cli_menu;

/* Runs the entry that argv[1] names with argv + 1. */
int sh_cli_dispatch(const sh_cli_menu *menu, int argc, char **argv);
/* Parses into *options. True: go on. False: *exit_code is what to return (--help was printed, or
 * an error reported); args is released then. A word that is no option is an error. */
bool sh_cli_parse(const sh_command *command, int argc, char **argv, void *options, sh_args *args,
                  int *exit_code);
/* The same for a command that takes words: they are in args. */
bool sh_cli_parse_words(const sh_command *command, int argc, char **argv, void *options,
                        sh_args *args, int *exit_code);
/* SH_ERR_USAGE "-m FILE is missing (see shoal model inspect --help)" when value is NULL. */
SH_MUST_USE sh_status sh_cli_need(const sh_command *command, const char *value, const char *flag,
                                  sh_error *err);
/* Writes JSON in one line and a newline to stdout. Takes over value. */
SH_MUST_USE sh_status sh_cli_print_json(json_t *value, sh_error *err);
/* SH_ERR_IO when what was printed did not reach stdout (a full disk, a closed pipe). */
SH_MUST_USE sh_status sh_cli_flush(sh_error *err);

int sh_cli_model(int argc, char **argv);      /* cli_model.c */
int sh_cli_aggregator(int argc, char **argv); /* cli_admin.c */
int sh_cli_init(int argc, char **argv);       /* cli_init.c */
int sh_cli_report(int argc, char **argv);     /* report_main.c */

#endif
