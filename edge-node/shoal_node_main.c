/*
 * shoal-node: the daemon of a device, and what an operator does with its folder. Thin: everything
 * is in daemon.h and setup.h; here are words, help and exit codes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "edge-node/daemon.h"
#include "edge-node/engine.h"
#include "edge-node/setup.h"
#include "shared/base/log.h"
#include "shared/net/admin.h"

#define PROGRAM        "shoal-node"
#define TEXT_MAX       (1u << 20)
#define STATUS_WAIT_MS 5000
#define ERASE_WAIT_MS  600000 /* it waits for running requests and jobs, and rewrites the store */

typedef struct {
    const char *dir, *bundle, *aggregator, *token_file;
} init_options;
static const sh_option init_table[] = {
    SH_OPT_STRING(init_options, dir, 'd', "dir", "DIR", NULL, "folder to make"),
    SH_OPT_STRING(
        init_options, bundle, 'b', "bundle", "BUNDLE", NULL,
        "the aggregator's folder bundle/: genesis.gguf, genesis.manifest, aggregator.pub, "
        "release.pub"),
    SH_OPT_STRING(init_options, aggregator, 'a', "aggregator", "ENDPOINT", NULL,
                  "where the aggregator listens: tcp://HOST:PORT"),
    SH_OPT_STRING(init_options, token_file, 't', "token-file", "FILE", NULL,
                  "an enrolment token (shoal aggregator token add): the node enrols itself"),
};
static const sh_command init_command = {
    PROGRAM " init",
    "--dir DIR --bundle BUNDLE --aggregator tcp://HOST:PORT [--token-file FILE]",
    init_table,
    SH_COUNT(init_table),
    "Sets a node up: folders, keys, configuration. Prints its public key, with which the\n"
    "aggregator enrols it, and the next commands.",
    PROGRAM " init --dir node-1 --bundle bundle --aggregator tcp://10.0.0.1:7420"};

typedef struct {
    const char *dir, *user;
    bool all;
} erase_options;
static const sh_option erase_table[] = {
    SH_OPT_STRING(erase_options, dir, 'd', "dir", "DIR", NULL, "the node's folder"),
    SH_OPT_STRING(erase_options, user, 'u', "user", "NAME", NULL,
                  "erase what was sent with this name in the requests' field \"user\""),
    SH_OPT_FLAG(erase_options, all, 0, "all", "erase everybody's"),
};
static const sh_command erase_command = {
    PROGRAM " erase",
    "--dir DIR (--user NAME | --all)",
    erase_table,
    SH_COUNT(erase_table),
    "Erases feedback and completions from the node, and from the store's file. Statistics, which\n"
    "hold no text, stay, and so does what was learned from it and sent before.",
    PROGRAM " erase --dir /var/lib/shoal-node --user alice"};

typedef struct {
    const char *dir;
    bool json;
} status_options;
static const sh_option status_table[] = {
    SH_OPT_STRING(status_options, dir, 'd', "dir", "DIR", NULL, "the node's folder"),
    SH_OPT_FLAG(status_options, json, 0, "json", "print one JSON object"),
};
static const sh_command status_command = {PROGRAM " status",
                                          "--dir DIR [--json]",
                                          status_table,
                                          SH_COUNT(status_table),
                                          "What a running node says of itself.",
                                          PROGRAM " status --dir /var/lib/shoal-node"};

typedef struct {
    const char *dir;
} rotate_options;
static const sh_option rotate_table[] = {
    SH_OPT_STRING(rotate_options, dir, 'd', "dir", "DIR", NULL, "the node's folder"),
};
static const sh_command rotate_command = {
    PROGRAM " rotate",
    "--dir DIR",
    rotate_table,
    SH_COUNT(rotate_table),
    "Changes the key of a running node, which stays the same node for its aggregator. Prints the\n"
    "next public key; the change goes on by itself, and status says how far it is.",
    PROGRAM " rotate --dir /var/lib/shoal-node"};

static sh_status flush_out(sh_error *err)
{
    return fflush(stdout) == 0 ? SH_OK : sh_fail(err, SH_ERR_IO, "standard output: cannot write");
}

static sh_status print(sh_status (*make)(const sh_command *, sh_buf *), const sh_command *command,
                       sh_error *err)
{
    sh_buf text;
    sh_buf_init(&text, TEXT_MAX);
    sh_status status = make(command, &text);
    if (status == SH_OK) {
        fwrite(text.data, 1, text.len, stdout);
        status = flush_out(err);
    } else {
        sh_fail(err, status, "no memory");
    }
    sh_buf_release(&text);
    return status;
}

/* True: go on. False: help was printed, or *status says why not. */
static bool parse(const sh_command *command, int argc, char **argv, void *options, sh_args *args,
                  sh_status *status, sh_error *err)
{
    *status = sh_options_parse(command, argc, argv, options, args, err);
    if (*status == SH_OK && args->help) {
        *status = print(sh_options_help, command, err);
        return false;
    }
    if (*status == SH_OK && args->n_positional)
        *status = sh_fail(err, SH_ERR_USAGE, "'%s' is no option (see %s --help)",
                          args->positional[0], command->name);
    return *status == SH_OK;
}

static sh_status not_running(const char *dir, sh_error *err)
{
    return sh_fail(err, SH_ERR_IO, "%s: no shoal-node runs here; start it: shoal-node --dir %s",
                   dir, dir);
}

static sh_status need(const char *value, const char *flag, const sh_command *command, sh_error *err)
{
    if (value && value[0])
        return SH_OK;
    return sh_fail(err, SH_ERR_USAGE, "%s is missing (see %s --help)", flag, command->name);
}

/* ---- commands ---- */

static sh_status run(int argc, char **argv, sh_error *err)
{
    sh_settings settings = {0};
    bool help = false;
    SH_TRY(sh_settings_parse(argc, argv, &settings, &help, err));
    if (help)
        return print(sh_options_help, &sh_settings_command, err);
    sh_log_set_level(SH_LOG_INFO);
    sh_status status = sh_daemon_run(&settings, err);
    sh_settings_release(&settings);
    return status;
}

static sh_status init(int argc, char **argv, sh_error *err)
{
    init_options o = {0};
    sh_args args = {0};
    sh_hash key;
    char hex[SH_HASH_HEX_BYTES];
    sh_status status;
    if (!parse(&init_command, argc, argv, &o, &args, &status, err))
        goto cleanup;
    SH_GOTO(need(o.dir, "--dir", &init_command, err));
    SH_GOTO(need(o.bundle, "--bundle", &init_command, err));
    SH_GOTO(need(o.aggregator, "--aggregator", &init_command, err));
    SH_GOTO(sh_setup_node(o.dir, o.bundle, o.aggregator, o.token_file, &key, err));
    sh_hex(key.b, sizeof key.b, hex);
    if (o.token_file)
        printf("public key %s\n\nNext:\n  " PROGRAM " --dir %s\n", hex, o.dir);
    else
        printf("public key %s\n\n"
               "Next, on the aggregator's machine:\n"
               "  shoal aggregator enrol %s --dir AGGREGATOR\n"
               "and then here:\n"
               "  " PROGRAM " --dir %s\n",
               hex, hex, o.dir);
    SH_GOTO(flush_out(err));
cleanup:
    sh_args_release(&args);
    return status;
}

/* Goes to the folder and calls the daemon there. SH_ERR_NOT_FOUND: none runs. */
static sh_status call(json_t *request, int timeout_ms, json_t **reply, sh_error *err)
{
    sh_net_keys node = {0}, admin = {0};
    sh_status status = SH_OK;
    SH_GOTO(sh_net_keys_load(SH_NODE_FILE_KEYS, &node, err));
    SH_GOTO(sh_net_keys_load(SH_NODE_FILE_ADMIN_KEYS, &admin, err));
    SH_GOTO(sh_admin_call(SH_ADMIN_ENDPOINT, &node.public_key, &admin, request, timeout_ms, reply,
                          err));
cleanup:
    sh_net_keys_forget(&node);
    sh_net_keys_forget(&admin);
    return status;
}

static sh_status enter(const char *dir, sh_settings *settings, sh_error *err)
{
    SH_TRY(sh_settings_of_dir(dir, settings, err));
    if (chdir(settings->dir) != 0 || !sh_file_exists(SH_NODE_FILE_KEYS)) {
        sh_settings_release(settings);
        return sh_fail(err, SH_ERR_USAGE, "%s: no node was set up here; shoal-node init does that",
                       dir);
    }
    return SH_OK;
}

/* By the daemon that runs there, else on the store itself. */
static sh_status erase_from(const sh_settings *settings, const erase_options *o, uint64_t *rows,
                            sh_error *err)
{
    json_t *request = json_object(), *reply = NULL;
    sh_json_set(request, "command", json_string("erase"));
    if (o->all)
        sh_json_set(request, "all", json_true());
    else
        sh_json_set(request, "user", json_string(o->user));
    /* Without the socket's file nobody is there to wait for. */
    sh_status status = SH_ERR_NOT_FOUND;
    if (sh_file_exists("admin.sock"))
        status = call(request, ERASE_WAIT_MS, &reply, err);
    json_decref(request);
    if (status == SH_ERR_NOT_FOUND)
        return sh_erase_offline(settings, o->all ? 0 : sh_engine_user(o->user), rows, err);
    SH_TRY(status);
    *rows = (uint64_t)json_integer_value(json_object_get(reply, "rows"));
    json_decref(reply);
    return SH_OK;
}

static sh_status erase(int argc, char **argv, sh_error *err)
{
    erase_options o = {0};
    sh_args args = {0};
    sh_settings settings = {0};
    uint64_t rows = 0;
    sh_status status;
    if (!parse(&erase_command, argc, argv, &o, &args, &status, err))
        goto cleanup;
    SH_GOTO(need(o.dir, "--dir", &erase_command, err));
    if (o.all == (o.user != NULL && o.user[0]))
        SH_GOTO(sh_fail(err, SH_ERR_USAGE, "erase: either --user NAME or --all"));
    SH_GOTO(enter(o.dir, &settings, err));
    SH_GOTO(erase_from(&settings, &o, &rows, err));
    printf("erased %llu rows\n", (unsigned long long)rows);
    SH_GOTO(flush_out(err));
cleanup:
    sh_settings_release(&settings);
    sh_args_release(&args);
    return status;
}

/* Tells the daemon that runs in `dir` one word. */
static sh_status tell(const char *dir, const char *word, json_t **reply, sh_error *err)
{
    sh_settings settings = {0};
    SH_TRY(enter(dir, &settings, err));
    json_t *request = json_object();
    sh_json_set(request, "command", json_string(word));
    sh_status status = call(request, STATUS_WAIT_MS, reply, err);
    json_decref(request);
    sh_settings_release(&settings);
    return status == SH_ERR_NOT_FOUND ? not_running(dir, err) : status;
}

static sh_status rotate(int argc, char **argv, sh_error *err)
{
    rotate_options o = {0};
    sh_args args = {0};
    json_t *reply = NULL;
    sh_status status;
    if (!parse(&rotate_command, argc, argv, &o, &args, &status, err))
        goto cleanup;
    SH_GOTO(need(o.dir, "--dir", &rotate_command, err));
    SH_GOTO(tell(o.dir, "rotate", &reply, err));
    printf("next public key %s\n", json_string_value(json_object_get(reply, "key")));
    SH_GOTO(flush_out(err));
cleanup:
    json_decref(reply);
    sh_args_release(&args);
    return status;
}

static void print_link(const json_t *reply, const char *state)
{
    const char *why = json_string_value(json_object_get(reply, "link_reason"));
    const char *advice = json_string_value(json_object_get(reply, "link_advice"));
    printf("%-20s %s%s%s\n", "link", state, why ? ": " : "", why ? why : "");
    if (advice)
        printf("%-20s %s\n", "", advice);
}

static void print_status(const json_t *reply)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)reply, key, value)
    {
        if (strcmp(key, "ok") == 0 || strcmp(key, "link_reason") == 0 ||
            strcmp(key, "link_advice") == 0)
            continue;
        if (strcmp(key, "link") == 0)
            print_link(reply, json_string_value(value));
        else if (json_is_string(value))
            printf("%-20s %s\n", key, json_string_value(value));
        else if (json_is_boolean(value))
            printf("%-20s %s\n", key, json_is_true(value) ? "yes" : "no");
        else
            printf("%-20s %lld\n", key, (long long)json_integer_value(value));
    }
}

static sh_status show_status(int argc, char **argv, sh_error *err)
{
    status_options o = {0};
    sh_args args = {0};
    json_t *reply = NULL;
    sh_status status;
    if (!parse(&status_command, argc, argv, &o, &args, &status, err))
        goto cleanup;
    SH_GOTO(need(o.dir, "--dir", &status_command, err));
    SH_GOTO(tell(o.dir, "status", &reply, err));
    if (o.json) {
        json_dumpf(reply, stdout, JSON_COMPACT);
        putchar('\n');
    } else {
        print_status(reply);
    }
    SH_GOTO(flush_out(err));
cleanup:
    json_decref(reply);
    sh_args_release(&args);
    return status;
}

static sh_status make_sample(const sh_command *command, sh_buf *out)
{
    (void)command;
    return sh_settings_sample(NULL, out);
}

static sh_status sample_config(int argc, char **argv, sh_error *err)
{
    if (argc > 1)
        return sh_fail(err, SH_ERR_USAGE, "sample-config: '%s' is no option; it has none", argv[1]);
    return print(make_sample, NULL, err);
}

static sh_status version(int argc, char **argv, sh_error *err)
{
    (void)argc, (void)argv;
    puts(PROGRAM " " SHOAL_VERSION);
    return flush_out(err);
}

static const char usage[] =
    "Usage: " PROGRAM " [run] --dir DIR [--config FILE] [options]    serve, learn, sync\n"
    "       " PROGRAM " init --dir DIR --bundle BUNDLE --aggregator ENDPOINT\n"
    "       " PROGRAM " erase --dir DIR (--user NAME | --all)\n"
    "       " PROGRAM " rotate --dir DIR                              changes its key\n"
    "       " PROGRAM " status --dir DIR [--json]\n"
    "       " PROGRAM " sample-config                               node.yaml with its help\n"
    "       " PROGRAM " COMMAND --help\n\n"
    "A kill or a power cut loses at most the records of inferences of the last store.commit-ms\n"
    "(1000 ms); feedback that was answered is never lost.\n";

static sh_status help(int argc, char **argv, sh_error *err)
{
    (void)argc, (void)argv;
    fputs(usage, stdout);
    return flush_out(err);
}

static const struct {
    const char *name;
    sh_status (*run)(int argc, char **argv, sh_error *err);
} commands[] = {
    {"run", run},           {"init", init},          {"erase", erase},
    {"rotate", rotate},     {"status", show_status}, {"sample-config", sample_config},
    {"--version", version}, {"--help", help},        {"-h", help},
    {"help", help},
};

int main(int argc, char **argv)
{
    sh_error err = {0};
    sh_status status = SH_ERR_USAGE;
    if (argc < 2) {
        fputs(usage, stderr);
        return sh_status_exit_code(status);
    }
    if (sh_crypto_init(&err) != SH_OK)
        return sh_error_report(PROGRAM, &err);
    for (size_t i = 0; i < SH_COUNT(commands); i++)
        if (strcmp(argv[1], commands[i].name) == 0) {
            status = commands[i].run(argc - 1, argv + 1, &err);
            goto end;
        }
    if (argv[1][0] == '-')
        status = run(argc, argv, &err);
    else
        status = sh_fail(&err, SH_ERR_USAGE,
                         "'%s' is no command; there are run, init, erase, rotate, status, "
                         "sample-config",
                         argv[1]);
end:
    if (status == SH_OK)
        return 0;
    int code = sh_error_report(PROGRAM, &err);
    /* A port or a folder that another process has is no wrong use of the command. */
    return status == SH_ERR_EXISTS ? sh_status_exit_code(SH_ERR_IO) : code;
}
