/* `shoal init node|aggregator`: runs the daemon's own init, found beside this program. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "aggregator/cli.h"
#include "shared/base/file.h"
#include "shared/base/log.h"

#define INIT_ARGS_MAX 64

static sh_status find_beside(const char *name, char *out, sh_error *err)
{
    char self[SH_PATH_BYTES];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0)
        return sh_fail(err, SH_ERR_IO, "/proc/self/exe: %s", strerror(errno));
    self[n] = '\0';
    *strrchr(self, '/') = '\0';
    SH_TRY(sh_path_join(out, SH_PATH_BYTES, self, name, err));
    if (!sh_file_exists(out))
        return sh_fail(err, SH_ERR_NOT_FOUND, "%s is not there; install it beside shoal", out);
    return SH_OK;
}

static int hand_over(const char *name, int argc, char **argv)
{
    char path[SH_PATH_BYTES];
    char *words[INIT_ARGS_MAX + 3];
    char init[] = "init";
    sh_error err = {0};
    if (argc > INIT_ARGS_MAX) {
        (void)sh_fail(&err, SH_ERR_USAGE, "more than %d arguments", INIT_ARGS_MAX);
        return sh_error_report("shoal", &err);
    }
    if (find_beside(name, path, &err) != SH_OK)
        return sh_error_report("shoal", &err);
    words[0] = path;
    words[1] = init;
    for (int i = 1; i < argc; i++)
        words[i + 1] = argv[i];
    words[argc + 1] = NULL;
    execv(path, words);
    (void)sh_fail(&err, SH_ERR_IO, "%s: %s", path, strerror(errno));
    return sh_error_report("shoal", &err);
}

static int init_node(int argc, char **argv)
{
    return hand_over("shoal-node", argc, argv);
}

static int init_aggregator(int argc, char **argv)
{
    return hand_over("shoal-aggregator", argc, argv);
}

int sh_cli_init(int argc, char **argv)
{
    static const sh_cli_entry entries[] = {
        {"aggregator", "makes an aggregator's folder: keys, first release, configuration",
         init_aggregator},
        {"node", "makes a node's folder from an aggregator's bundle", init_node},
    };
    static const sh_cli_menu menu = {
        "shoal init", "Sets a program up: makes its folder and prints the next command.", entries,
        SH_COUNT(entries)};
    return sh_cli_dispatch(&menu, argc, argv);
}
