/* shoal-audit: was everything counted, and counted once? Reads what the two sides of a run stored.
 */
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "aggregator/coordinator.h"
#include "edge-node/node.h"
#include "experiments/audit/audit.h"
#include "shared/base/file.h"
#include "shared/base/hash.h"
#include "shared/base/log.h"
#include "shared/base/option.h"

#define NODES_MAX 100000

typedef struct {
    const char *dir, *out;
} options;

static const sh_option table[] = {
    SH_OPT_STRING(options, dir, 'd', "dir", "DIR", NULL,
                  "folder of a run: aggregator/, relays/*/ and nodes/*/ hold the stores"),
    SH_OPT_STRING(options, out, 'o', "out", "FILE", NULL, "JSON goes here; else to stdout"),
};
static const sh_command command = {
    "shoal-audit",
    "--dir DIR [--out FILE]",
    table,
    SH_COUNT(table),
    "Compares the nodes' ledgers and outboxes with the aggregator's rows: items lost, counted "
    "twice\n"
    "or changed. Exit status 0: none; 1: some, each named in \"findings\".",
    "shoal-audit --dir out/quickstart-seed-1"};

/* A simulated process keeps its store in `dir`, a real one in `dir`/store. The tables are
 * those of version 1, so that older runs are read, too: the audit needs no other. */
static sh_status open_store(const char *dir, const char *const *tables, size_t n, sh_store **out,
                            sh_error *err)
{
    sh_store_options o = {.tables = tables, .n_tables = n, .read_only = true};
    char inner[SH_PATH_BYTES];
    SH_TRY(sh_path_join(inner, sizeof inner, dir, "store", err));
    return sh_store_open_lmdb(sh_file_exists(inner) ? inner : dir, &o, out, err);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* The names in nodes/, sorted; *n of them, each malloc'ed. */
static sh_status list_nodes(const char *dir, char ***out, size_t *n, sh_error *err)
{
    DIR *d = opendir(dir);
    size_t cap = 0;
    sh_status status = SH_OK;
    if (!d)
        return sh_fail(err, SH_ERR_NOT_FOUND, "%s: %s; --dir should be the folder of a run", dir,
                       strerror(errno));
    for (struct dirent *e; status == SH_OK && (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.')
            continue;
        status = sh_array_reserve((void **)out, &cap, *n + 1, sizeof **out, NODES_MAX);
        char *name = status == SH_OK ? strdup(e->d_name) : NULL;
        if (name)
            (*out)[(*n)++] = name;
        else
            status = sh_fail(err, SH_ERR_LIMIT, "%s: more than %d nodes", dir, NODES_MAX);
    }
    closedir(d);
    if (*n)
        qsort(*out, *n, sizeof **out, by_name);
    return status;
}

static sh_status add_node(sh_audit *audit, const char *path, const char *name, sh_error *err)
{
    sh_store *store = NULL;
    SH_TRY(open_store(path, sh_node_tables, SH_NODE_T_COMPLETION, &store, err));
    sh_status status = sh_audit_add_node(audit, store, name, err);
    sh_store_close(&store);
    return status;
}

static sh_status add_relay(sh_audit *audit, const char *path, const char *name, sh_error *err)
{
    sh_store *store = NULL;
    SH_TRY(open_store(path, sh_coord_tables, SH_COORD_TABLES, &store, err));
    sh_status status = sh_audit_add_relay(audit, store, name, err);
    sh_store_close(&store);
    return status;
}

/* Everything in a folder of dir, by the names in it. */
static sh_status audit_each(sh_audit *audit, const char *dir, const char *folder,
                            sh_status (*add)(sh_audit *, const char *, const char *, sh_error *),
                            sh_error *err)
{
    char nodes[SH_PATH_BYTES], path[SH_PATH_BYTES];
    char **names = NULL;
    size_t n = 0;
    sh_status status = SH_OK;
    SH_GOTO(sh_path_join(nodes, sizeof nodes, dir, folder, err));
    SH_GOTO(list_nodes(nodes, &names, &n, err));
    for (size_t i = 0; i < n; i++) {
        SH_GOTO(sh_path_join(path, sizeof path, nodes, names[i], err));
        SH_GOTO(add(audit, path, names[i], err));
    }
cleanup:
    for (size_t i = 0; i < n; i++)
        free(names[i]);
    free(names);
    return status;
}

static sh_status run(const options *o, bool *clean, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_audit *audit = NULL;
    sh_store *store = NULL;
    sh_audit_result result;
    json_t *findings = NULL, *root = NULL;
    sh_status status = SH_OK;
    if (!o->dir)
        return sh_fail(err, SH_ERR_USAGE, "--dir is needed; see --help");
    SH_GOTO(sh_audit_create(&audit, err));
    SH_GOTO(sh_path_join(path, sizeof path, o->dir, "aggregator", err));
    SH_GOTO(open_store(path, sh_coord_tables, SH_COORD_T_EVALUATION, &store, err));
    SH_GOTO(sh_audit_add_aggregator(audit, store, err));
    SH_GOTO(sh_path_join(path, sizeof path, o->dir, "relays", err));
    if (sh_file_exists(path))
        SH_GOTO(audit_each(audit, o->dir, "relays", add_relay, err));
    SH_GOTO(audit_each(audit, o->dir, "nodes", add_node, err));
    sh_audit_finish(audit, &result, &findings);
    root = sh_audit_document(&result, findings);
    *clean = result.lost + result.twice + result.wrong == 0;
    if (o->out) {
        SH_GOTO(sh_json_save(o->out, root, err));
    } else {
        json_dumpf(root, stdout, JSON_INDENT(2));
        printf("\n");
    }
cleanup:
    json_decref(root);
    sh_store_close(&store);
    sh_audit_destroy(&audit);
    return status;
}

int main(int argc, char **argv)
{
    sh_error err = {0};
    options o;
    sh_args args = {0};
    bool clean = true;
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = sh_options_parse(&command, argc, argv, &o, &args, &err);
    if (status == SH_OK && args.help) {
        sh_buf help;
        sh_buf_init(&help, 1u << 16);
        status = sh_options_help(&command, &help);
        fwrite(help.data, 1, help.len, stdout);
        sh_buf_release(&help);
    } else if (status == SH_OK) {
        status = run(&o, &clean, &err);
    }
    sh_args_release(&args);
    if (status != SH_OK) /* 2: the audit could not be made, which is neither yes nor no */
        return sh_error_report("shoal-audit", &err), 2;
    return clean ? 0 : 1;
}
