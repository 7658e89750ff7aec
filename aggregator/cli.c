#include "aggregator/cli.h"

#include <errno.h>
#include <string.h>

#include "shared/base/log.h"

#define HELP_BYTES_MAX (1u << 20)

static void print_menu(const sh_cli_menu *menu, FILE *to)
{
    fprintf(to, "Usage: %s COMMAND [options]\n\n%s\n\nCommands:\n", menu->name, menu->about);
    for (size_t i = 0; i < menu->n; i++)
        fprintf(to, "  %-12s %s\n", menu->entries[i].name, menu->entries[i].about);
    fprintf(to, "\n%s COMMAND --help says more.\n", menu->name);
}

int sh_cli_dispatch(const sh_cli_menu *menu, int argc, char **argv)
{
    sh_error err = {0};
    if (argc < 2) {
        print_menu(menu, stderr);
        return sh_status_exit_code(SH_ERR_USAGE);
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_menu(menu, stdout);
        if (sh_cli_flush(&err) != SH_OK)
            return sh_error_report("shoal", &err);
        return 0;
    }
    for (size_t i = 0; i < menu->n; i++)
        if (strcmp(argv[1], menu->entries[i].name) == 0)
            return menu->entries[i].run(argc - 1, argv + 1);
    (void)sh_fail(&err, SH_ERR_USAGE, "'%s' is no command of %s (see %s --help)", argv[1],
                  menu->name, menu->name);
    return sh_error_report("shoal", &err);
}

static sh_status print_help(const sh_command *command, sh_error *err)
{
    sh_buf text;
    sh_buf_init(&text, HELP_BYTES_MAX);
    sh_status status = sh_options_help(command, &text);
    if (status == SH_OK) {
        fwrite(text.data, 1, text.len, stdout);
        status = sh_cli_flush(err);
    } else {
        sh_fail(err, status, "help: out of memory");
    }
    sh_buf_release(&text);
    return status;
}

bool sh_cli_parse_words(const sh_command *command, int argc, char **argv, void *options,
                        sh_args *args, int *exit_code)
{
    sh_error err = {0};
    sh_status status = sh_options_parse(command, argc, argv, options, args, &err);
    if (status == SH_OK && !args->help)
        return true;
    if (status == SH_OK)
        status = print_help(command, &err);
    *exit_code = status == SH_OK ? 0 : sh_error_report("shoal", &err);
    sh_args_release(args);
    return false;
}

bool sh_cli_parse(const sh_command *command, int argc, char **argv, void *options, sh_args *args,
                  int *exit_code)
{
    sh_error err = {0};
    if (!sh_cli_parse_words(command, argc, argv, options, args, exit_code))
        return false;
    if (args->n_positional == 0)
        return true;
    (void)sh_fail(&err, SH_ERR_USAGE, "'%s' is no option (see %s --help)", args->positional[0],
                  command->name);
    *exit_code = sh_error_report("shoal", &err);
    sh_args_release(args);
    return false;
}

sh_status sh_cli_need(const sh_command *command, const char *value, const char *flag, sh_error *err)
{
    if (value != NULL && value[0] != '\0')
        return SH_OK;
    return sh_fail(err, SH_ERR_USAGE, "%s is missing (see %s --help)", flag, command->name);
}

sh_status sh_cli_flush(sh_error *err)
{
    errno = 0;
    if (fflush(stdout) != 0 || ferror(stdout))
        return sh_fail(err, SH_ERR_IO, "standard output: %s",
                       errno != 0 ? strerror(errno) : "not everything could be written");
    return SH_OK;
}

sh_status sh_cli_print_json(json_t *value, sh_error *err)
{
    const int failed = json_dumpf(value, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(value);
    if (failed != 0)
        return sh_fail(err, SH_ERR_IO, "standard output: the result could not be written");
    putchar('\n');
    return sh_cli_flush(err);
}
