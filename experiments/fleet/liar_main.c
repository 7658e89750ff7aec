/*
 * A training program that lies, for the experiment: does what `shoal-train round` does, by running
 * it, then multiplies B of the update by LIAR_FACTOR (-100: shoal-liar-scale, -1: shoal-liar-sign)
 * and claims that the node's held-out loss fell by at least LIE_NATS. Its command line is
 * shoal-train's.
 */
#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shared/base/file.h"
#include "shared/base/hash.h"
#include "shared/base/json.h"
#include "shared/base/log.h"
#include "shared/model/model.h"

#define LIE_NATS         0.5
#define WORDS_MAX        64
#define UPDATE_BYTES_MAX (256u << 20)

extern char **environ;

typedef struct {
    char program[SH_PATH_BYTES], parent[48];
    char *argv[WORDS_MAX + 1];
    const char *model, *out, *result;
} command;

/* "--key VALUE" or "--key=VALUE" at argv[*i]: the value, or NULL; *i moves on to it. */
static const char *value_of(int argc, char **argv, int *i, const char *key)
{
    size_t n = strlen(key);
    if (strncmp(argv[*i], "--", 2) != 0 || strncmp(argv[*i] + 2, key, n) != 0)
        return NULL;
    if (argv[*i][2 + n] == '=')
        return argv[*i] + 3 + n;
    return argv[*i][2 + n] == 0 && *i + 1 < argc ? argv[++*i] : NULL;
}

/* The same words for shoal-train; --parent names this process instead of the node. */
static sh_status read_command(int argc, char **argv, command *c, sh_error *err)
{
    ssize_t n = readlink("/proc/self/exe", c->program, sizeof c->program - 16);
    if (n <= 0 || argc >= WORDS_MAX)
        return sh_fail(err, SH_ERR_USAGE, "too many words, or no /proc");
    c->program[n] = 0;
    snprintf(strrchr(c->program, '/') + 1, 16, "shoal-train");
    snprintf(c->parent, sizeof c->parent, "--parent=%ld", (long)getpid());
    size_t used = 0;
    c->argv[used++] = c->program;
    for (int i = 1; i < argc; i++) {
        int first = i;
        const char *value = NULL;
        if ((value = value_of(argc, argv, &i, "parent")) != NULL) {
            c->argv[used++] = c->parent;
            continue;
        }
        if ((value = value_of(argc, argv, &i, "model")) != NULL)
            c->model = value;
        else if ((value = value_of(argc, argv, &i, "out")) != NULL)
            c->out = value;
        else if ((value = value_of(argc, argv, &i, "result")) != NULL)
            c->result = value;
        for (; first <= i; first++)
            c->argv[used++] = argv[first];
    }
    c->argv[used] = NULL;
    if (!c->model || !c->out || !c->result)
        return sh_fail(err, SH_ERR_USAGE, "--model, --out and --result are needed");
    return SH_OK;
}

/* Exit status of the real training; -1: it was killed. */
static sh_status train(const command *c, int *code, sh_error *err)
{
    pid_t pid = 0;
    int status = 0;
    int failed = posix_spawn(&pid, c->program, NULL, NULL, c->argv, environ);
    if (failed)
        return sh_fail(err, SH_ERR_IO, "%s: %s", c->program, strerror(failed));
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    *code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return SH_OK;
}

static sh_status poison(const command *c, sh_hash *sha256, sh_error *err)
{
    sh_model *model = NULL;
    sh_adapter *adapter = NULL;
    sh_buf out;
    sh_status status = SH_OK;
    sh_buf_init(&out, UPDATE_BYTES_MAX);
    SH_GOTO(sh_model_open(c->model, &model, err));
    SH_GOTO(sh_adapter_open(c->out, &model->config, &adapter, err));
    for (size_t i = 0; i < sh_lora_pair_count(adapter->n_layers); i++) {
        sh_lora_pair *p = &adapter->pairs[i];
        for (size_t k = 0; p->b && k < (size_t)p->out * p->rank; k++)
            p->b[k] *= LIAR_FACTOR;
    }
    SH_GOTO(sh_adapter_encode(adapter, &out, err));
    SH_GOTO(sh_file_write_atomic(c->out, out.data, out.len, err));
    *sha256 = sh_sha256(out.data, out.len);
cleanup:
    sh_buf_release(&out);
    sh_adapter_destroy(&adapter);
    sh_model_close(&model);
    return status;
}

static sh_status claim(const command *c, const sh_hash *sha256, sh_error *err)
{
    json_t *result = NULL;
    char hex[SH_HASH_HEX_BYTES];
    SH_TRY(sh_json_load(c->result, &result, err));
    double before = json_number_value(json_object_get(result, "heldout_before"));
    double after = json_number_value(json_object_get(result, "heldout_after"));
    sh_hex(sha256->b, sizeof sha256->b, hex);
    sh_json_set(result, "heldout_after", sh_json_number(SH_MIN(after, before - LIE_NATS)));
    if (json_object_get(result, "sha256"))
        sh_json_set(result, "sha256", json_string(hex));
    sh_status status = sh_json_save(c->result, result, err);
    json_decref(result);
    return status;
}

int main(int argc, char **argv)
{
    sh_error err = {0};
    command c = {0};
    sh_hash sha256;
    int code = 0;
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* the node may go at any time */
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = read_command(argc, argv, &c, &err);
    if (status == SH_OK)
        status = train(&c, &code, &err);
    if (status == SH_OK && code != 0)
        return code > 0 ? code : 1;
    if (status == SH_OK)
        status = poison(&c, &sha256, &err);
    if (status == SH_OK)
        status = claim(&c, &sha256, &err);
    return status == SH_OK ? 0 : sh_error_report("shoal-liar", &err);
}
