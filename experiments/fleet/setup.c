/*
 * Folders, keys and command lines of a real fleet, made with the same tools as an operator's.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/fleet/fleet.h"
#include "shared/net/net.h"

#define TOOL_S          60
#define MODEL_BYTES_MAX (256u << 20)
#define COMMIT_MS       200 /* of a node's inferences: the loss window */
#define OBJECTS_KEPT    1000
#define ROUND_MS_MAX    90000

/* ---- the gate's texts ---- */

/* One line: the texts of a list, up to max tokens. */
static sh_status write_slice(fleet *f, const char *dir, const char *name, const sim_text_list *list,
                             size_t max, sh_error *err)
{
    char file[64], path[SH_PATH_BYTES];
    const sh_tokenizer *tokenizer = f->sim->models[0].model->tokenizer;
    int32_t *tokens = NULL;
    size_t n = 0, k = 0;
    sh_buf text;
    sh_status status = SH_OK;
    sh_buf_init(&text, SIM_TEXT_FILE_MAX);
    for (; name[k] && k < sizeof file - 8; k++)
        file[k] = isalnum((unsigned char)name[k]) ? name[k] : '-';
    snprintf(file + k, sizeof file - k, ".txt");
    SH_GOTO(sh_path_join(path, sizeof path, dir, file, err));
    SH_GOTO(sim_texts_join(list, max, &tokens, &n));
    for (size_t i = 0; i < n; i++)
        SH_GOTO(sh_detokenize(tokenizer, tokens[i], &text));
    /* The tokenizer puts a space before a text: the first one would come twice. */
    size_t skip = text.len > 0 && text.data[0] == ' ';
    SH_GOTO(sh_file_write_atomic(path, text.data + skip, text.len - skip, err));
cleanup:
    sh_buf_release(&text);
    free(tokens);
    return status;
}

static sh_status write_suites(fleet *f, const char *dir, sh_error *err)
{
    const sim_texts *t = &f->sim->texts;
    size_t budget = (size_t)f->options.sim.gate_tokens;
    SH_TRY(sh_dir_make(dir, err));
    SH_TRY(write_slice(f, dir, "before", &t->before[SIM_GATE], 4 * budget, err));
    for (size_t k = 0; k < t->n_topics; k++)
        SH_TRY(write_slice(f, dir, t->names[k], &t->topic[k][SIM_GATE], budget, err));
    return SH_OK;
}

/* ---- the aggregator ---- */

static sh_status init_aggregator(fleet *f, const char *suites, sh_error *err)
{
    fleet_words w = {0};
    fleet_words_add(&w, f->shoal_aggregator);
    fleet_words_add(&w, "init");
    fleet_words_addf(&w, "--dir=%s", f->aggregator_dir);
    fleet_words_addf(&w, "--base=%s", f->options.sim.base);
    fleet_words_addf(&w, "--suites=%s", suites);
    fleet_words_add(&w, "--listen=tcp://127.0.0.1:*");
    return fleet_run_tool(&w, f->tools_log, TOOL_S, err);
}

static void add_learning(fleet_words *w, const sim_options *o)
{
    fleet_words_int(w, "learn.buffer", SH_MIN(o->buffer, SH_MAX(1, o->nodes / 2)));
    fleet_words_int(w, "learn.rank", o->rank);
    fleet_words_real(w, "learn.alpha", o->alpha);
    fleet_words_real(w, "learn.lr", o->lr);
    fleet_words_real(w, "learn.lr-final", o->lr_final);
    fleet_words_real(w, "learn.clip", o->clip);
    fleet_words_int(w, "learn.batch", o->batch);
    fleet_words_int(w, "learn.context", o->context);
    fleet_words_int(w, "learn.warmup", o->warmup);
    fleet_words_real(w, "learn.passes", o->passes);
    fleet_words_int(w, "learn.steps-max", o->steps_max);
    fleet_words_int(w, "learn.tokens-min", o->tokens_min);
    fleet_words_int(w, "learn.drifting-min", (o->nodes * 8 + 9) / 10);
    fleet_words_int(w, "learn.round-ms-max", ROUND_MS_MAX);
    fleet_words_int(w, "merge.staleness-max", o->staleness_max);
    fleet_words_real(w, "merge.staleness-discount", o->staleness_discount);
    fleet_words_real(w, "merge.server-scale", o->server_scale);
    fleet_words_real(w, "merge.norm-factor-max", o->norm_factor_max);
    fleet_words_real(w, "merge.cosine-min", o->cosine_min);
    fleet_words_real(w, "gate.overall-max", o->gate_overall_max);
    fleet_words_real(w, "gate.slice-max", o->gate_slice_max);
    fleet_words_int(w, "gate.tokens", 0); /* all that the files hold */
}

static const char *environment_of(const char *failpoints, char *out, size_t out_bytes)
{
    if (!failpoints)
        return NULL;
    snprintf(out, out_bytes, "SHOAL_FAILPOINTS=%s", failpoints);
    return out;
}

sh_status fleet_start_aggregator(fleet *f, const char *failpoints, sh_error *err)
{
    fleet_words w = {0};
    char environment[128];
    fleet_words_add(&w, f->shoal_aggregator);
    fleet_words_add(&w, "run");
    fleet_words_addf(&w, "--dir=%s", f->aggregator_dir);
    fleet_words_add(&w, "--listen=tcp://127.0.0.1:*");
    fleet_words_add(&w, "--http.port=0");
    fleet_words_int(&w, "jobs.threads", f->options.sim.threads);
    fleet_words_int(&w, "objects.kept", OBJECTS_KEPT);
    fleet_words_int(&w, "checkin-ms", f->options.checkin_ms);
    fleet_words_int(&w, "canary.nodes-min", f->options.sim.canary_nodes_min);
    fleet_words_int(&w, "canary.tokens-min", f->options.sim.canary_tokens_min);
    fleet_words_int(&w, "canary.ms-max", ROUND_MS_MAX);
    add_learning(&w, &f->options.sim);
    return fleet_process_start(&f->aggregator, &w,
                               environment_of(failpoints, environment, sizeof environment),
                               f->aggregator_log, err);
}

sh_status fleet_command(fleet *f, const char *word, const char *more, sh_error *err)
{
    fleet_words w = {0};
    fleet_words_add(&w, f->shoal);
    fleet_words_add(&w, "aggregator");
    fleet_words_add(&w, word);
    if (more)
        fleet_words_add(&w, more);
    fleet_words_addf(&w, "--dir=%s", f->aggregator_dir);
    return fleet_run_tool(&w, f->tools_log, TOOL_S, err);
}

/* ---- nodes ---- */

static sh_status init_node(fleet *f, uint32_t i, sh_error *err)
{
    fleet_node *n = &f->nodes[i];
    fleet_words w = {0};
    char path[SH_PATH_BYTES];
    sh_net_keys keys;
    fleet_words_add(&w, f->shoal_node);
    fleet_words_add(&w, "init");
    fleet_words_addf(&w, "--dir=%s", n->dir);
    fleet_words_addf(&w, "--bundle=%s/bundle", f->aggregator_dir);
    fleet_words_addf(&w, "--aggregator=tcp://127.0.0.1:%u", fleet_forward_port(f->forward, i));
    SH_TRY(fleet_run_tool(&w, f->tools_log, TOOL_S, err));
    SH_TRY(sh_path_join(path, sizeof path, n->dir, "node.key", err));
    SH_TRY(sh_net_keys_load(path, &keys, err));
    f->sim->nodes[i].key = keys.public_key;
    sh_net_keys_forget(&keys);
    return SH_OK;
}

static sh_status enrol(fleet *f, uint32_t i, sh_error *err)
{
    char hex[SH_HASH_HEX_BYTES];
    fleet_words w = {0};
    sh_hex(f->sim->nodes[i].key.b, sizeof f->sim->nodes[i].key.b, hex);
    fleet_words_add(&w, f->shoal);
    fleet_words_add(&w, "aggregator");
    fleet_words_add(&w, "enrol");
    fleet_words_add(&w, hex);
    fleet_words_addf(&w, "--dir=%s", f->aggregator_dir);
    fleet_words_addf(&w, "--name=%s", f->nodes[i].name);
    return fleet_run_tool(&w, f->tools_log, TOOL_S, err);
}

sh_status fleet_enrol(fleet *f, sh_error *err)
{
    for (uint32_t i = 0; i < f->n_nodes; i++)
        SH_TRY(enrol(f, i, err));
    return SH_OK;
}

/* The program that node i trains with; NULL: the one that it takes by itself. */
static const char *liar_of(const fleet *f, uint32_t i)
{
    if ((int64_t)i == f->options.sim.poison_scale_node)
        return "shoal-liar-scale";
    return (int64_t)i == f->options.sim.poison_sign_node ? "shoal-liar-sign" : NULL;
}

sh_status fleet_start_node(fleet *f, uint32_t i, const char *failpoints, sh_error *err)
{
    const sim_options *o = &f->options.sim;
    fleet_node *n = &f->nodes[i];
    fleet_words w = {0};
    char environment[128], liar[SH_PATH_BYTES];
    fleet_words_add(&w, f->shoal_node);
    fleet_words_add(&w, "run");
    fleet_words_addf(&w, "--dir=%s", n->dir);
    fleet_words_add(&w, "--http.port=0");
    fleet_words_int(&w, "engine.slots", 2 + FLEET_STREAMERS);
    fleet_words_int(&w, "engine.threads", 1); /* the nodes share this machine's processors */
    fleet_words_int(&w, "monitor.window", o->window);
    fleet_words_int(&w, "monitor.reference", o->reference);
    fleet_words_real(&w, "monitor.average-run-length", o->average_run_length);
    fleet_words_int(&w, "feedback.tokens-max", o->feedback_tokens);
    fleet_words_int(&w, "store.commit-ms", COMMIT_MS);
    fleet_words_int(&w, "retry.min-ms", 500);
    fleet_words_int(&w, "retry.max-ms", 5000);
    fleet_words_int(&w, "confirm-inferences", 20);
    if (liar_of(f, i)) {
        SH_TRY(fleet_program(liar_of(f, i), liar, sizeof liar, err));
        fleet_words_addf(&w, "--train.program=%s", liar);
    }
    return fleet_process_start(
        &n->process, &w, environment_of(failpoints, environment, sizeof environment), n->log, err);
}

/* ---- life ---- */

static sh_status find_programs(fleet *f, sh_error *err)
{
    static const char *const others[] = {"shoal-train", "shoal-audit", "shoal-fleet"};
    char path[SH_PATH_BYTES];
    for (size_t k = 0; k < SH_COUNT(others); k++)
        SH_TRY(fleet_program(others[k], path, sizeof path, err));
    SH_TRY(fleet_program("shoal", f->shoal, sizeof f->shoal, err));
    SH_TRY(fleet_program("shoal-node", f->shoal_node, sizeof f->shoal_node, err));
    return fleet_program("shoal-aggregator", f->shoal_aggregator, sizeof f->shoal_aggregator, err);
}

static sh_status make_folders(fleet *f, char *suites, sh_error *err)
{
    const char *out = f->options.sim.out;
    char path[SH_PATH_BYTES];
    static const char *const fresh[] = {"aggregator", "nodes"};
    for (size_t k = 0; k < SH_COUNT(fresh); k++) {
        SH_TRY(sh_path_join(path, sizeof path, out, fresh[k], err));
        if (sh_file_exists(path))
            return sh_fail(err, SH_ERR_EXISTS,
                           "%s: there is a run in it already; give another --out or remove it",
                           path);
    }
    SH_TRY(sh_dir_make(path, err)); /* nodes */
    SH_TRY(sh_path_join(f->sim->objects, sizeof f->sim->objects, out, "objects", err));
    SH_TRY(sh_dir_make(f->sim->objects, err));
    SH_TRY(sh_path_join(path, sizeof path, out, "logs", err));
    SH_TRY(sh_dir_make(path, err));
    SH_TRY(sh_path_join(f->tools_log, sizeof f->tools_log, path, "tools.log", err));
    SH_TRY(sh_path_join(f->aggregator_log, sizeof f->aggregator_log, path, "aggregator.log", err));
    SH_TRY(sh_path_join(f->aggregator_dir, sizeof f->aggregator_dir, out, "aggregator", err));
    SH_TRY(sh_path_join(suites, SH_PATH_BYTES, out, "suites", err));
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        fleet_node *n = &f->nodes[i];
        char name[64];
        snprintf(n->name, sizeof n->name, "node-%05u", i);
        snprintf(name, sizeof name, "nodes/%s", n->name);
        SH_TRY(sh_path_join(n->dir, sizeof n->dir, out, name, err));
        snprintf(name, sizeof name, "%s.log", n->name);
        SH_TRY(sh_path_join(n->log, sizeof n->log, path, name, err));
    }
    return SH_OK;
}

/* The genesis release as the base's own quantization: texts are needed before the aggregator's
 * folder can be made, and their tokens need its vocabulary. */
static sh_status load_texts(fleet *f, sh_error *err)
{
    sim *s = f->sim;
    SH_TRY(sh_job_genesis(s->options.base, SH_TYPE_Q8_0, s->objects, &s->genesis_master,
                          &s->genesis_model, err));
    s->genesis_sha = sh_sha256(s->genesis_model.data, s->genesis_model.len);
    SH_TRY(sim_load_texts(s, err));
    sim_texts_keep(&s->texts, f->n_nodes); /* those that somebody types */
    for (uint32_t i = 0; i < f->n_nodes; i++)
        s->nodes[i].topic = i % (uint32_t)s->texts.n_topics;
    return SH_OK;
}

/* The fleet must run what was measured with: the same base makes the same bytes. */
static sh_status check_genesis(fleet *f, sh_error *err)
{
    char path[SH_PATH_BYTES];
    sh_hash sha256;
    SH_TRY(sh_path_join(path, sizeof path, f->aggregator_dir, "bundle/genesis.gguf", err));
    SH_TRY(sh_sha256_file(path, &sha256, NULL, err));
    if (!sh_hash_equal(&sha256, &f->sim->genesis_sha))
        return sh_fail(err, SH_ERR_MISMATCH, "%s: not the model that %s makes", path,
                       f->options.sim.base);
    return SH_OK;
}

sh_status fleet_create(const fleet_options *options, fleet **out, sh_error *err)
{
    fleet *f = sh_calloc(1, sizeof *f);
    char suites[SH_PATH_BYTES];
    sh_status status = SH_OK;
    if (!f)
        return sh_fail(err, SH_ERR_NO_MEMORY, "fleet: no memory");
    f->options = *options;
    f->n_nodes = (uint32_t)options->sim.nodes;
    pthread_mutex_init(&f->failure_mutex, NULL);
    f->nodes = sh_calloc(f->n_nodes, sizeof *f->nodes);
    if (!f->nodes)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "fleet: no memory for %u nodes", f->n_nodes));
    for (uint32_t i = 0; i < f->n_nodes; i++) {
        f->nodes[i].fleet = f;
        f->nodes[i].index = i;
    }
    SH_GOTO(find_programs(f, err));
    SH_GOTO(sim_find_inputs(&options->sim, err));
    SH_GOTO(sim_create_empty(&options->sim, &f->sim, err));
    f->sim->real_processes = true;
    f->sim->program = "shoal-fleet";
    f->sim->command = &fleet_run_command;
    f->sim->command_options = &f->options;
    SH_GOTO(make_folders(f, suites, err));
    sim_progress_begin(f->sim);
    sim_progress_line(f->sim, "setting up: keys and folders of %u nodes", f->n_nodes);
    SH_GOTO(load_texts(f, err));
    SH_GOTO(write_suites(f, suites, err));
    SH_GOTO(init_aggregator(f, suites, err));
    SH_GOTO(check_genesis(f, err));
    SH_GOTO(fleet_forward_create(f->n_nodes, &f->forward, err));
    for (uint32_t i = 0; i < f->n_nodes; i++)
        SH_GOTO(init_node(f, i, err));
    *out = f;
    f = NULL;
cleanup:
    fleet_destroy(&f);
    return status;
}

void fleet_destroy(fleet **fp)
{
    fleet *f = *fp;
    if (!f)
        return;
    fleet_users_stop(f);
    for (uint32_t i = 0; f->nodes && i < f->n_nodes; i++)
        fleet_process_release(&f->nodes[i].process);
    fleet_process_release(&f->aggregator);
    fleet_forward_destroy(&f->forward);
    if (f->sim)
        sim_progress_end(f->sim);
    sim_destroy(&f->sim);
    pthread_mutex_destroy(&f->failure_mutex);
    free(f->nodes);
    free(f);
    *fp = NULL;
}
