/* The program `shoal-aggregator`: run, init, restore, sample-config. */
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "aggregator/cli.h"
#include "aggregator/folder.h"
#include "aggregator/server.h"
#include "shared/base/log.h"
#include "shared/math/blas.h"

#define PROGRAM        "shoal-aggregator"
#define TEXT_BYTES_MAX (1u << 20)
/* What is allocated and freed with every message that comes in, a chunk and its pages in LMDB, is
 * kept for the next one: by itself glibc gives it back each time, and each page of it is a fault
 * again. */
#define HEAP_BLOCK_MAX                                                                             \
    ((int)SERVER_PEER_IN_BYTES + 65536) /* larger ones are mapped, and given back */
#define HEAP_KEPT_MAX (32 << 20) /* free bytes at the end of a heap, of which there are few */

/* ---- run ---- */

static sh_status enter(const char *dir, sh_error *err)
{
    SH_TRY(sh_folder_check(dir, err));
    if (chdir(dir) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: cannot go there", dir);
    return SH_OK;
}

static int run(const sh_aggregator_settings *settings)
{
    sh_error err = {0};
    sh_server *server = NULL;
    sh_log_level level;
    sh_status status = sh_log_parse_level(settings->log_level, &level, &err);
    if (status != SH_OK)
        return sh_error_report(PROGRAM, &err);
    sh_log_set_level(level);
    signal(SIGPIPE, SIG_IGN);
    (void)mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_MAX);
    (void)mallopt(M_TRIM_THRESHOLD, HEAP_KEPT_MAX);
    sh_blas_init();
    status = enter(settings->dir, &err);
    if (status == SH_OK)
        status = sh_server_create(settings, getenv("SHOAL_FAILPOINTS"), &server, &err);
    if (status == SH_OK)
        status = sh_server_run(server, &err);
    if (status != SH_OK)
        err.code = status;
    int code = status == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
    /* A port or a folder that another process has is no wrong use of the command. */
    if (status == SH_ERR_EXISTS)
        code = sh_status_exit_code(SH_ERR_IO);
    if (!sh_server_destroy(&server)) {
        sh_log(SH_LOG_WARN, "job_cut_off", "it is done again by the next start");
        fflush(NULL);
        _exit(code);
    }
    return code;
}

static int print_help(const sh_command *command)
{
    sh_error err = {0};
    sh_buf text;
    sh_buf_init(&text, TEXT_BYTES_MAX);
    sh_status status = sh_options_help(command, &text);
    if (status == SH_OK) {
        fwrite(text.data, 1, text.len, stdout);
        status = sh_cli_flush(&err);
    }
    sh_buf_release(&text);
    return status == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
}

static int main_run(int argc, char **argv)
{
    sh_aggregator_settings settings;
    sh_args args = {0};
    sh_error err = {0};
    int code;
    if (sh_aggregator_settings_read(argc, argv, &settings, &args, &err) != SH_OK)
        code = sh_error_report(PROGRAM, &err);
    else if (args.help)
        code = print_help(&sh_aggregator_command);
    else
        code = run(&settings);
    sh_args_release(&args);
    return code;
}

/* ---- init ---- */

typedef struct {
    const char *dir, *base, *suites, *listen, *config, *relay, *upstream;
} init_options;

static const sh_option init_table[] = {
    SH_OPT_STRING(init_options, dir, 'd', "dir", "DIR", NULL, "folder to make; new or empty"),
    SH_OPT_STRING(init_options, base, 'b', "base", "FILE", NULL,
                  "full-precision GGUF that the first release is made of"),
    SH_OPT_STRING(init_options, suites, 0, "suites", "DIR", NULL,
                  "*.txt files that judge every candidate; copied. Can be added later"),
    SH_OPT_STRING(init_options, listen, 0, "listen", "ENDPOINT", NULL,
                  "where nodes connect; tcp://0.0.0.0:7420 when not given"),
    SH_OPT_STRING(init_options, config, 0, "config", "FILE", NULL,
                  "settings to begin with, as sample-config prints them"),
    SH_OPT_STRING(init_options, relay, 0, "relay", "BUNDLE", NULL,
                  "makes a relay, by a copy of its parent's bundle/; no --base, no --suites"),
    SH_OPT_STRING(init_options, upstream, 0, "upstream", "ENDPOINT", NULL,
                  "the parent of a relay, tcp://HOST:PORT"),
};
static const sh_command init_command = {
    "shoal-aggregator init",
    "--dir DIR (--base FILE [--suites DIR] | --relay BUNDLE --upstream ENDPOINT)\n"
    "           [--listen ENDPOINT] [--config FILE]",
    init_table,
    SH_COUNT(init_table),
    "Makes an aggregator's folder: keys, first release, configuration, and bundle/, which is what\n"
    "a node needs to be set up and holds no secret. Prints the next commands.\n"
    "With --relay it is a regional aggregator's, between its nodes and a parent: its key is "
    "printed\n"
    "for the parent to enrol.",
    "shoal-aggregator init --dir /var/lib/shoal-aggregator --base models/base-f16.gguf "
    "--suites suites",
};

static int print_init(const init_options *o, const char *listen)
{
    sh_error err = {0};
    printf("Made %s: keys, release 1, aggregator.yaml, bundle/.\n", o->dir);
    if (o->suites == NULL)
        printf("Put texts that judge candidates into %s/suites/: nothing is released without.\n",
               o->dir);
    printf("Next:\n"
           "  shoal-aggregator --dir %s\n"
           "on each node, with a copy of %s/bundle:\n"
           "  shoal-node init --dir NODE --bundle bundle --aggregator %s\n"
           "and here, with the key that it prints:\n"
           "  shoal aggregator enrol KEY --dir %s\n",
           o->dir, o->dir,
           strncmp(listen, "tcp://0.0.0.0:", 14) == 0 ? "tcp://THIS-HOST:7420" : listen, o->dir);
    return sh_cli_flush(&err) == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
}

static sh_status check_relay(const init_options *o, sh_error *err)
{
    SH_TRY(sh_cli_need(&init_command, o->relay, "--relay BUNDLE", err));
    SH_TRY(sh_cli_need(&init_command, o->upstream, "--upstream ENDPOINT", err));
    if (o->base != NULL || o->suites != NULL)
        return sh_fail(err, SH_ERR_USAGE,
                       "--base and --suites are not a relay's: its parent releases and judges");
    if (strncmp(o->upstream, "tcp://", 6) != 0)
        return sh_fail(err, SH_ERR_USAGE, "--upstream: '%s' is not of the form tcp://HOST:PORT",
                       o->upstream);
    return SH_OK;
}

static int print_relay(const init_options *o, const sh_hash *key)
{
    sh_error err = {0};
    char hex[SH_HASH_HEX_BYTES];
    sh_hex(key->b, sizeof key->b, hex);
    printf("public key %s\n"
           "Made %s: keys, the parent's first release, aggregator.yaml, bundle/.\n"
           "Next, at the parent:\n"
           "  shoal aggregator enrol %s --relay --dir PARENT\n"
           "here:\n"
           "  shoal-aggregator --dir %s\n"
           "and on each of its nodes, with a copy of %s/bundle, as with any aggregator.\n",
           hex, o->dir, hex, o->dir, o->dir);
    return sh_cli_flush(&err) == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
}

static sh_status init(const init_options *o, sh_aggregator_settings *settings, sh_args *args,
                      sh_hash *upstream, sh_error *err)
{
    char name[] = PROGRAM, *argv[] = {name, NULL};
    SH_TRY(sh_cli_need(&init_command, o->dir, "--dir DIR", err));
    if (o->relay == NULL && o->upstream == NULL)
        SH_TRY(sh_cli_need(&init_command, o->base, "--base FILE", err));
    else
        SH_TRY(check_relay(o, err));
    SH_TRY(sh_options_parse_file(&sh_aggregator_command, o->config, 1, argv, settings, args, err));
    if (o->listen != NULL)
        settings->listen = o->listen;
    if (o->upstream != NULL)
        settings->upstream = o->upstream;
    sh_folder_init make = {.dir = o->dir,
                           .base = o->base,
                           .suites = o->suites,
                           .relay = o->relay,
                           .settings = settings};
    return sh_folder_make(&make, upstream, err);
}

static int main_init(int argc, char **argv)
{
    init_options o;
    sh_aggregator_settings settings;
    sh_args args = {0}, config = {0};
    sh_error err = {0};
    int code = 0;
    if (!sh_cli_parse(&init_command, argc, argv, &o, &args, &code))
        return code;
    sh_hash upstream;
    sh_status status = init(&o, &settings, &config, &upstream, &err);
    err.code = status;
    if (status != SH_OK)
        code = sh_error_report(PROGRAM, &err);
    else
        code = o.relay != NULL ? print_relay(&o, &upstream) : print_init(&o, settings.listen);
    sh_args_release(&config);
    sh_args_release(&args);
    return code;
}

/* ---- restore ---- */

typedef struct {
    const char *dir, *from;
} restore_options;

static const sh_option restore_table[] = {
    SH_OPT_STRING(restore_options, from, 'f', "from", "BACKUP", NULL,
                  "folder that shoal aggregator backup made"),
    SH_OPT_STRING(restore_options, dir, 'd', "dir", "DIR", NULL, "folder to make; new or empty"),
};
static const sh_command restore_command = {
    "shoal-aggregator restore",
    "--from BACKUP --dir DIR",
    restore_table,
    SH_COUNT(restore_table),
    "Checks every file of a backup and makes an aggregator's folder from it. The restored\n"
    "aggregator begins a new epoch and never gives a version number that was given before.\n"
    "The one that the backup was taken from must not run any more.",
    "shoal-aggregator restore --from /backup/shoal --dir /var/lib/shoal-aggregator",
};

static int main_restore(int argc, char **argv)
{
    restore_options o;
    sh_args args = {0};
    sh_error err = {0};
    int code = 0;
    if (!sh_cli_parse(&restore_command, argc, argv, &o, &args, &code))
        return code;
    sh_status status = sh_cli_need(&restore_command, o.from, "--from BACKUP", &err);
    if (status == SH_OK)
        status = sh_cli_need(&restore_command, o.dir, "--dir DIR", &err);
    if (status == SH_OK)
        status = sh_folder_restore(o.from, o.dir, &err);
    if (status == SH_OK)
        printf("Restored %s. Next:\n  shoal-aggregator --dir %s\n", o.dir, o.dir);
    if (status == SH_OK)
        status = sh_cli_flush(&err);
    err.code = status;
    code = status == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
    sh_args_release(&args);
    return code;
}

/* ---- sample-config ---- */

static int main_sample(int argc, char **argv)
{
    (void)argc, (void)argv;
    sh_command command = sh_aggregator_command;
    sh_error err = {0};
    sh_buf text;
    command.options += SH_AGGREGATOR_SETTINGS_FLAGS;
    command.n_options -= SH_AGGREGATOR_SETTINGS_FLAGS;
    sh_buf_init(&text, TEXT_BYTES_MAX);
    sh_status status = sh_options_sample(&command, &text);
    if (status == SH_OK) {
        fwrite(text.data, 1, text.len, stdout);
        status = sh_cli_flush(&err);
    }
    sh_buf_release(&text);
    return status == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
}

int main(int argc, char **argv)
{
    static const sh_cli_entry commands[] = {
        {"run", "", main_run},
        {"init", "", main_init},
        {"restore", "", main_restore},
        {"sample-config", "", main_sample},
    };
    sh_error err = {0};
    umask(077); /* keys, and updates that were learned from people's texts */
    if (sh_crypto_init(&err) != SH_OK)
        return sh_error_report(PROGRAM, &err);
    if (argc == 2 && (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "version") == 0)) {
        printf("%s %s\n", PROGRAM, SHOAL_VERSION);
        return sh_cli_flush(&err) == SH_OK ? 0 : sh_error_report(PROGRAM, &err);
    }
    for (size_t i = 0; argc > 1 && i < SH_COUNT(commands); i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].run(argc - 1, argv + 1);
    return main_run(argc, argv);
}
