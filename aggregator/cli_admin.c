/* `shoal aggregator COMMAND`: an operator's commands to an aggregator that runs on this machine. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "aggregator/cli.h"
#include "aggregator/cli_enrol.h"
#include "aggregator/folder.h"
#include "shared/base/file.h"
#include "shared/base/log.h"
#include "shared/net/admin.h"

#define BACKUP_TIMEOUT_MS 3600000
#define ENROL_BATCH       1000u /* nodes of a list a call */

typedef struct {
    const char *dir, *name, *file;
    bool json, relay;
    int64_t limit, timeout_s, uses;
    double hours;
} admin_options;

static const sh_option table[] = {
    SH_OPT_STRING(
        admin_options, dir, 'd', "dir", "DIR", NULL,
        "the aggregator's folder; SHOAL_AGGREGATOR_DIR in the environment when not given"),
    SH_OPT_FLAG(admin_options, json, 0, "json", "print one JSON object"),
    SH_OPT_STRING(admin_options, name, 0, "name", "NAME", NULL,
                  "enrol: what the node is called in lists; token add: what the token is"),
    SH_OPT_STRING(admin_options, file, 0, "file", "LIST", NULL,
                  "enrol: instead of KEY, a file with a key and a name a line"),
    SH_OPT_INT(admin_options, uses, 0, "uses", "N", 1, 1, 100000,
               "token add: how many nodes it enrols"),
    SH_OPT_REAL(admin_options, hours, 0, "hours", "H", 24, 0.001, 87600,
                "token add: how long it is valid"),
    SH_OPT_FLAG(admin_options, relay, 0, "relay",
                "enrol: it is a relay, whose updates stand for those of its nodes"),
    SH_OPT_INT(admin_options, limit, 0, "limit", "N", 50, 1, 1000,
               "releases, audit: newest entries to show"),
    SH_OPT_INT(admin_options, timeout_s, 0, "timeout", "S", 30, 1, 86400,
               "how long to wait for an answer; a backup is waited for an hour at least"),
};

typedef struct {
    const char *name, *usage, *about, *example;
    const char *argument; /* NULL: none; else the request's member */
    char kind;            /* of the argument: 's' text, 'u' number, 'r' real, 'p' path */
    void (*print)(const json_t *reply);
} admin_command;

/* ---- what people read ---- */

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text != NULL ? text : "";
}

static uint64_t uint_of(const json_t *object, const char *key)
{
    return (uint64_t)json_integer_value(json_object_get(object, key));
}

static bool is_true(const json_t *object, const char *key)
{
    return json_is_true(json_object_get(object, key));
}

static const char *time_of(const json_t *object, const char *key, char out[32])
{
    struct tm tm;
    uint64_t ms = uint_of(object, key);
    time_t seconds = (time_t)(ms / 1000);
    if (ms == 0 || gmtime_r(&seconds, &tm) == NULL ||
        strftime(out, 32, "%Y-%m-%d %H:%M:%SZ", &tm) == 0)
        return "never";
    return out;
}

static const char *loss_of(const json_t *object, const char *key, char out[32])
{
    const json_t *value = json_object_get(object, key);
    if (!json_is_number(value))
        return "-";
    snprintf(out, 32, "%.4f", json_number_value(value));
    return out;
}

static void print_ok(const json_t *reply)
{
    (void)reply;
    puts("ok");
}

static void print_status(const json_t *r)
{
    char when[32];
    const json_t *updates = json_object_get(r, "updates"), *value;
    const char *reason;
    printf("shoal-aggregator %s, since %s\n", text_of(r, "program"),
           time_of(r, "started_ms", when));
    printf("  nodes connect to   %s (%" PRIu64 " connections, %" PRIu64 " handshakes refused)\n",
           text_of(r, "endpoint"), uint_of(r, "connections"), uint_of(r, "handshakes_refused"));
    printf("  status page        http://%s/\n", text_of(r, "http"));
    printf("  store              %" PRIu64 " bytes in use\n", uint_of(r, "store_bytes"));
    if (!is_true(r, "up")) {
        puts("  DOWN               starts again after a failed write; see its log");
        return;
    }
    printf("  nodes              %" PRIu64 " enrolled, %" PRIu64 " drifting, %" PRIu64
           " copies of a store, %" PRIu64 " tokens\n",
           uint_of(r, "enrolled"), uint_of(r, "drifting"), uint_of(r, "clones"),
           uint_of(r, "tokens"));
    if (uint_of(r, "relays") > 0)
        printf("  relays             %" PRIu64 " of them; what waits stands for %" PRIu64
               " nodes' updates\n",
               uint_of(r, "relays"), uint_of(r, "parts"));
    const json_t *parent = json_object_get(r, "parent");
    if (parent != NULL)
        printf("  relay of           %s (%s), %" PRIu64 " updates made for it, %" PRIu64 " owed\n",
               text_of(parent, "endpoint"), text_of(parent, "state"), uint_of(parent, "updates"),
               uint_of(parent, "owed"));
    printf("  release            %" PRIu64 " (%" PRIu64 " published, %" PRIu64
           " candidates refused)\n",
           uint_of(r, "release"), uint_of(r, "releases"), uint_of(r, "candidates_refused"));
    printf("  round              %" PRIu64 ", %" PRIu64 " of %" PRIu64 " updates wait%s%s%s\n",
           uint_of(r, "round"), uint_of(r, "buffered"), uint_of(r, "buffer"),
           is_true(r, "paused") ? ", PAUSED" : "",
           is_true(r, "closed")    ? ", CLOSED"
           : is_true(r, "closing") ? ", CLOSING"
                                   : "",
           is_true(r, "rounds_begun") ? "" : ", waits for drift");
    printf("  phase              %s", text_of(r, "phase"));
    if (uint_of(r, "candidate") > 0)
        printf(" candidate %" PRIu64 ", %" PRIu64 " nodes have scored it", uint_of(r, "candidate"),
               uint_of(r, "evaluations"));
    printf("\n  updates            %" PRIu64 " in, %" PRIu64 " merged", uint_of(updates, "in"),
           uint_of(updates, "merged"));
    json_object_foreach(json_object_get(updates, "refused"), reason, value)
    {
        if (json_integer_value(value) > 0)
            printf(", %" JSON_INTEGER_FORMAT " refused (%s)", json_integer_value(value), reason);
    }
    printf("\n  server scale       %g\n", json_number_value(json_object_get(r, "server_scale")));
}

static void print_releases(const json_t *reply)
{
    char when[32], parent[32], loss[32];
    const json_t *row;
    size_t i;
    printf("%9s %9s  %-20s %9s %9s %7s %8s  %s\n", "CANDIDATE", "RELEASE", "TIME", "PARENT", "LOSS",
           "UPDATES", "CANARIES", "VERDICT");
    json_array_foreach(json_object_get(reply, "releases"), i, row)
    {
        char version[24] = "-";
        if (uint_of(row, "version") > 0)
            snprintf(version, sizeof version, "%" PRIu64, uint_of(row, "version"));
        printf("%9" PRIu64 " %9s  %-20s %9s %9s %7" PRIu64 " %8" PRIu64 "  %s\n",
               uint_of(row, "candidate"), version, time_of(row, "at_ms", when),
               loss_of(row, "loss_parent", parent), loss_of(row, "loss_candidate", loss),
               uint_of(row, "updates"), uint_of(row, "canary_nodes"), text_of(row, "verdict"));
    }
}

static void print_nodes(const json_t *reply)
{
    char when[32];
    const json_t *row;
    size_t i;
    printf("%-64s  %-16s %-9s %-20s %8s %10s %8s\n", "KEY", "NAME", "STATE", "LAST CHECK-IN",
           "RELEASE", "INFERENCES", "DROPPED");
    json_array_foreach(json_object_get(reply, "nodes"), i, row)
    {
        printf("%-64s  %-16s %-9s %-20s %8" PRIu64 " %10" PRIu64 " %8" PRIu64 "\n",
               text_of(row, "key"), text_of(row, "name"),
               is_true(row, "revoked")        ? "revoked"
               : uint_of(row, "last_ms") == 0 ? "enrolled"
               : is_true(row, "drifting")     ? "drifting"
                                              : "ok",
               time_of(row, "last_ms", when), uint_of(row, "version"), uint_of(row, "inferences"),
               uint_of(row, "dropped"));
    }
}

static void print_audit(const json_t *reply)
{
    char when[32];
    const json_t *row;
    size_t i;
    json_array_foreach(json_object_get(reply, "audit"), i, row)
    {
        printf("%6" PRIu64 "  %s  %s\n", uint_of(row, "seq"), time_of(row, "at_ms", when),
               text_of(row, "text"));
    }
}

static void print_rollback(const json_t *reply)
{
    printf("ok: the same model is release %" PRIu64 " now\n", uint_of(reply, "release"));
}

static void print_key(const json_t *reply)
{
    printf("ok: %s\n", text_of(reply, "key"));
}

static void print_backup(const json_t *reply)
{
    printf("ok: %s has everything up to release %" PRIu64 "\n", text_of(reply, "dir"),
           uint_of(reply, "release"));
}

static void print_enrolled(const json_t *reply)
{
    const json_t *key;
    size_t i;
    if (json_object_get(reply, "enrolled") == NULL) {
        print_key(reply);
        return;
    }
    printf("ok: %" PRIu64 " enrolled\n", uint_of(reply, "enrolled"));
    json_array_foreach(json_object_get(reply, "refused"), i, key)
    {
        printf("refused: %s\n", json_string_value(key));
    }
}

static void print_token(const json_t *reply)
{
    char when[32];
    printf("%s\n", text_of(reply, "token"));
    fflush(stdout); /* the token alone is data */
    fprintf(stderr,
            "token %s enrols %" PRIu64
            " node(s) until %s. It is shown once: write it to a file, and "
            "make a node with shoal init node --token-file FILE\n",
            text_of(reply, "id"), uint_of(reply, "uses"), time_of(reply, "expires_ms", when));
}

static void print_tokens(const json_t *reply)
{
    char when[32], until[32];
    const json_t *row;
    size_t i;
    printf("%-16s  %-16s %11s  %-20s %-20s\n", "ID", "NAME", "USES LEFT", "MADE", "EXPIRES");
    json_array_foreach(json_object_get(reply, "tokens"), i, row)
    {
        printf("%-16s  %-16s %5" PRIu64 "/%-5" PRIu64 "  %-20s %-20s%s\n", text_of(row, "id"),
               text_of(row, "name"), uint_of(row, "uses_left"), uint_of(row, "uses"),
               time_of(row, "made_ms", when), time_of(row, "expires_ms", until),
               is_true(row, "expired") ? " expired" : "");
    }
}

static const admin_command commands[] = {
    {"status", "", "What it does, and how many nodes, updates and releases there are.", NULL, NULL,
     0, print_status},
    {"releases", "[--limit N]", "Candidates that were decided, with the gate's figures.", NULL,
     NULL, 0, print_releases},
    {"nodes", "", "Nodes that are enrolled or revoked.", NULL, NULL, 0, print_nodes},
    {"audit", "[--limit N]", "Newest entries of the log of decisions; its whole chain is checked.",
     NULL, NULL, 0, print_audit},
    {"enrol", "(KEY [--name NAME] [--relay] | --file LIST)",
     "Lets nodes in, by the keys that shoal-node init printed; with --relay a relay, by that of "
     "shoal-aggregator init --relay. The whole list is checked before the first of it is enrolled.",
     "shoal aggregator enrol 3f…c1 --name kiosk-7 --dir DIR", "key", 's', print_enrolled},
    {"revoke", "KEY",
     "Shuts a node out at once, with all its keys; its updates that are not merged yet never will "
     "be.",
     NULL, "key", 's', print_key},
    {"pause", "", "No training, no merges, until resumed.", NULL, NULL, 0, print_ok},
    {"resume", "", "Ends a pause.", NULL, NULL, 0, print_ok},
    {"rollback", "VERSION", "Publishes an earlier release's model under a new version.",
     "shoal aggregator rollback 4 --dir DIR", "version", 'u', print_rollback},
    {"server-scale", "X",
     "Factor on the next merges' delta, until a candidate made with it is "
     "refused.",
     NULL, "value", 'r', print_ok},
    {"close", "", "No more training; merges what is in, then only acknowledges.", NULL, NULL, 0,
     print_ok},
    {"backup", "FOLDER", "Copies everything that a restore needs into a new folder, keys included.",
     "shoal aggregator backup /backup/shoal-1 --dir DIR", "dir", 'p', print_backup},
    {"log-level", "LEVEL", "error, warn, info or debug, until the next start.", NULL, "level", 's',
     print_ok},
    {"stop", "", "Ends it as SIGTERM does.", NULL, NULL, 0, print_ok},
};

static const admin_command token_commands[] = {
    {"token add", "[--uses N] [--hours H] [--name NAME]",
     "Makes a token that enrols nodes as they come, and prints it, this once.",
     "shoal aggregator token add --uses 20 --name spring --dir DIR > token", NULL, 0, print_token},
    {"token list", "", "Tokens that are outstanding, or expired and not cleared away yet.", NULL,
     NULL, 0, print_tokens},
    {"token remove", "(ID | NAME)",
     "Withdraws a token, by its id or name; nodes it has enrolled stay.", NULL, "id", 's',
     print_ok},
};

/* ---- the call ---- */

static sh_status add_argument(const admin_command *command, const char *word, json_t *request,
                              sh_error *err)
{
    char path[SH_PATH_BYTES], here[SH_PATH_BYTES], *end = NULL;
    errno = 0;
    switch (command->kind) {
    case 'u': {
        unsigned long long n = strtoull(word, &end, 10);
        if (errno != 0 || end == word || *end != '\0' || word[0] == '-' || n > INT64_MAX)
            return sh_fail(err, SH_ERR_USAGE, "'%s' is no whole number", word);
        sh_json_set(request, command->argument, json_integer((json_int_t)n));
        return SH_OK;
    }
    case 'r': {
        double x = strtod(word, &end);
        if (errno != 0 || end == word || *end != '\0' || !isfinite(x))
            return sh_fail(err, SH_ERR_USAGE, "'%s' is no number", word);
        sh_json_set(request, command->argument, json_real(x));
        return SH_OK;
    }
    case 'p': /* the aggregator has another working directory */
        if (getcwd(here, sizeof here) == NULL)
            return sh_fail(err, SH_ERR_IO, "working directory: %s", strerror(errno));
        if (word[0] == '/')
            snprintf(path, sizeof path, "%s", word);
        else
            SH_TRY(sh_path_join(path, sizeof path, here, word, err));
        sh_json_set(request, command->argument, json_string(path));
        return SH_OK;
    default:
        break;
    }
    json_t *text = json_string(word);
    if (text == NULL)
        return sh_fail(err, SH_ERR_USAGE, "an argument is no UTF-8");
    sh_json_set(request, command->argument, text);
    return SH_OK;
}

static sh_status make_request(const admin_command *command, const admin_options *o,
                              const sh_args *args, json_t *request, sh_error *err)
{
    char verb[32];
    bool list = o->file != NULL && strcmp(command->name, "enrol") == 0;
    size_t want = command->argument != NULL && !list;
    if (args->n_positional != want)
        return sh_fail(err, SH_ERR_USAGE, "use: shoal aggregator %s %s --dir DIR", command->name,
                       command->usage);
    snprintf(verb, sizeof verb, "%s", list ? "enrol-list" : command->name);
    for (char *blank; (blank = strchr(verb, ' ')) != NULL;)
        *blank = '-';
    sh_json_set(request, "command", json_string(verb));
    if (want)
        SH_TRY(add_argument(command, args->positional[0], request, err));
    if (list) {
        json_t *nodes = NULL;
        SH_TRY(sh_cli_read_keys(o->file, &nodes, err));
        sh_json_set(request, "nodes", nodes);
    }
    if (command == &token_commands[0]) {
        sh_json_set(request, "uses", json_integer((json_int_t)o->uses));
        sh_json_set(request, "seconds", json_integer((json_int_t)ceil(o->hours * 3600)));
    }
    if (o->name != NULL) {
        json_t *name = json_string(o->name);
        if (name == NULL)
            return sh_fail(err, SH_ERR_USAGE, "--name is no UTF-8");
        sh_json_set(request, "name", name);
    }
    if (o->relay)
        sh_json_set(request, "relay", json_true());
    sh_json_set(request, "limit", json_integer((json_int_t)o->limit));
    return SH_OK;
}

static sh_status load_server_key(sh_hash *out, sh_error *err)
{
    uint8_t *text = NULL;
    size_t n = 0;
    SH_TRY(sh_file_read(SH_FOLDER_BUNDLE "/aggregator.pub", 4096, &text, &n, err));
    while (n > 0 && text[n - 1] <= ' ')
        text[--n] = '\0';
    sh_status status = sh_hash_parse((const char *)text, out, err);
    free(text);
    return status;
}

/* The nodes of a list, a batch a call: each is one transaction. */
static sh_status call_batches(const sh_hash *server, const sh_net_keys *keys, json_t *request,
                              int timeout_ms, json_t **out, sh_error *err)
{
    json_t *nodes = json_incref(json_object_get(request, "nodes"));
    json_t *all = json_object(), *refused = json_array(), *reply = NULL;
    sh_status status = SH_OK;
    uint64_t enrolled = 0;
    sh_json_set(all, "ok", json_true());
    sh_json_set(all, "refused", refused);
    for (size_t at = 0; at < json_array_size(nodes);) {
        json_t *batch = json_array();
        for (size_t i = 0; i < ENROL_BATCH && at < json_array_size(nodes); i++, at++)
            json_array_append(batch, json_array_get(nodes, at));
        sh_json_set(request, "nodes", batch);
        status = sh_admin_call(SH_ADMIN_ENDPOINT, server, keys, request, timeout_ms, &reply, err);
        if (status != SH_OK) {
            (void)sh_fail_in(err, "%" PRIu64 " nodes were enrolled", enrolled);
            goto cleanup;
        }
        enrolled += uint_of(reply, "enrolled");
        json_array_extend(refused, json_object_get(reply, "refused"));
        json_decref(reply);
        reply = NULL;
    }
    sh_json_set(all, "enrolled", json_integer((json_int_t)enrolled));
    *out = all;
    all = NULL;
cleanup:
    json_decref(all);
    json_decref(nodes);
    return status;
}

/* All pages of a list in one reply. */
static sh_status call_all(const sh_hash *server, const sh_net_keys *keys, json_t *request,
                          int timeout_ms, json_t **out, sh_error *err)
{
    json_t *all = NULL, *reply = NULL;
    sh_status status = SH_OK;
    for (;;) {
        SH_GOTO(sh_admin_call(SH_ADMIN_ENDPOINT, server, keys, request, timeout_ms, &reply, err));
        if (all == NULL) {
            all = reply;
            reply = NULL;
        } else {
            json_array_extend(json_object_get(all, "nodes"), json_object_get(reply, "nodes"));
            sh_json_set(all, "more", json_incref(json_object_get(reply, "more")));
            json_decref(reply);
            reply = NULL;
        }
        const json_t *rows = json_object_get(all, "nodes");
        size_t n = json_array_size(rows);
        if (!is_true(all, "more") || n == 0)
            break;
        sh_json_set(request, "after",
                    json_incref(json_object_get(json_array_get(rows, n - 1), "key")));
    }
    json_object_del(all, "more");
    *out = all;
    all = NULL;
cleanup:
    json_decref(all);
    json_decref(reply);
    return status;
}

static sh_status talk(const admin_command *command, const admin_options *o, json_t *request,
                      json_t **reply, sh_error *err)
{
    const char *dir = o->dir != NULL ? o->dir : getenv("SHOAL_AGGREGATOR_DIR");
    sh_net_keys keys = {0};
    sh_hash server;
    sh_status status = SH_OK;
    int64_t timeout_ms = o->timeout_s * 1000;
    if (dir == NULL || dir[0] == '\0')
        return sh_fail(err, SH_ERR_USAGE, "--dir DIR is missing (see shoal aggregator %s --help)",
                       command->name);
    SH_TRY(sh_folder_check(dir, err));
    if (chdir(dir) != 0)
        return sh_fail(err, SH_ERR_IO, "%s: %s", dir, strerror(errno));
    SH_GOTO(sh_net_keys_load(SH_FOLDER_ADMIN, &keys, err));
    SH_GOTO(load_server_key(&server, err));
    if (command->kind == 'p')
        timeout_ms = SH_MAX(timeout_ms, (int64_t)BACKUP_TIMEOUT_MS);
    if (json_object_get(request, "nodes") != NULL)
        status = call_batches(&server, &keys, request, (int)timeout_ms, reply, err);
    else
        status = call_all(&server, &keys, request, (int)timeout_ms, reply, err);
    if (status == SH_ERR_NOT_FOUND && strstr(err->text, "admin.sock") != NULL)
        (void)sh_fail_in(err, "%s", dir);
cleanup:
    sh_net_keys_forget(&keys);
    return status;
}

static sh_status show(const admin_command *command, bool json, json_t *reply, sh_error *err)
{
    if (json)
        return sh_cli_print_json(reply, err);
    command->print(reply);
    json_decref(reply);
    return sh_cli_flush(err);
}

static int run(const admin_command *command, int argc, char **argv)
{
    char name[64];
    snprintf(name, sizeof name, "shoal aggregator %s", command->name);
    sh_command parsed = {name,           command->usage,  table, SH_COUNT(table),
                         command->about, command->example};
    admin_options o;
    sh_args args = {0};
    sh_error err = {0};
    int code = 0;
    json_t *reply = NULL;
    if (!sh_cli_parse_words(&parsed, argc, argv, &o, &args, &code))
        return code;
    json_t *request = json_object();
    sh_status status = make_request(command, &o, &args, request, &err);
    if (status == SH_OK)
        status = talk(command, &o, request, &reply, &err);
    if (status == SH_OK)
        status = show(command, o.json, reply, &err);
    json_decref(request);
    sh_args_release(&args);
    err.code = status;
    return status == SH_OK ? 0 : sh_error_report("shoal", &err);
}

/* One function for all of them: the word that was dispatched says which. */
static int run_named(int argc, char **argv)
{
    for (size_t i = 0; i < SH_COUNT(commands); i++)
        if (strcmp(commands[i].name, argv[0]) == 0)
            return run(&commands[i], argc, argv);
    return 2;
}

static const char *second_word(const admin_command *command)
{
    return strchr(command->name, ' ') + 1;
}

static int run_token_named(int argc, char **argv)
{
    for (size_t i = 0; i < SH_COUNT(token_commands); i++)
        if (strcmp(second_word(&token_commands[i]), argv[0]) == 0)
            return run(&token_commands[i], argc, argv);
    return 2;
}

static int run_token(int argc, char **argv)
{
    sh_cli_entry entries[SH_COUNT(token_commands)];
    for (size_t i = 0; i < SH_COUNT(token_commands); i++)
        entries[i] = (sh_cli_entry){second_word(&token_commands[i]), token_commands[i].about,
                                    run_token_named};
    sh_cli_menu menu = {"shoal aggregator token",
                        "Enrolment tokens: a node that brings a good one is enrolled as it comes.",
                        entries, SH_COUNT(entries)};
    return sh_cli_dispatch(&menu, argc, argv);
}

int sh_cli_aggregator(int argc, char **argv)
{
    sh_cli_entry entries[SH_COUNT(commands) + 1];
    for (size_t i = 0; i < SH_COUNT(commands); i++)
        entries[i] = (sh_cli_entry){commands[i].name, commands[i].about, run_named};
    entries[SH_COUNT(commands)] =
        (sh_cli_entry){"token", "Enrolment tokens: add, list, remove.", run_token};
    sh_cli_menu menu = {"shoal aggregator",
                        "Commands to an aggregator that runs on this machine, over its admin "
                        "socket.",
                        entries, SH_COUNT(entries)};
    return sh_cli_dispatch(&menu, argc, argv);
}
