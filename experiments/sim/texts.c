#include "experiments/sim/texts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/base/json.h"

static void list_release(sim_text_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        free(list->texts[i].tokens);
    free(list->texts);
    *list = (sim_text_list){0};
}

void sim_texts_release(sim_texts *t)
{
    for (int s = 0; s < SIM_SPLITS; s++) {
        list_release(&t->before[s]);
        for (size_t i = 0; i < t->n_topics; i++)
            list_release(&t->topic[i][s]);
    }
    *t = (sim_texts){0};
}

void sim_texts_keep(sim_texts *t, size_t n)
{
    for (; t->n_topics > n; t->n_topics--)
        for (int s = 0; s < SIM_SPLITS; s++)
            list_release(&t->topic[t->n_topics - 1][s]);
}

static sh_status load_list(const char *dir, const char *prefix, int split,
                           const sh_tokenizer *tokenizer, sim_text_list *list, sh_error *err)
{
    static const char *const names[SIM_SPLITS] = {"traffic", "gate", "heldout"};
    char name[64], path[SH_PATH_BYTES];
    uint8_t *bytes = NULL;
    size_t n = 0;
    snprintf(name, sizeof name, "%s-%s.txt", prefix, names[split]);
    SH_TRY(sh_path_join(path, sizeof path, dir, name, err));
    SH_TRY(sh_file_read(path, SIM_TEXT_FILE_MAX, &bytes, &n, err));
    sh_status status = SH_OK;
    for (char *line = (char *)bytes; *line;) {
        char *end = strchr(line, '\n');
        size_t length = end ? (size_t)(end - line) : strlen(line), n_tokens = 0;
        sim_text text = {0};
        if (length) {
            SH_GOTO(sh_array_reserve((void **)&list->texts, &list->cap, list->n + 1,
                                     sizeof *list->texts, 1u << 22));
            SH_GOTO(sh_tokenize(tokenizer, line, length, 0, &text.tokens, &n_tokens, err));
            text.n = (uint32_t)n_tokens;
            list->texts[list->n++] = text;
        }
        line += length + (end != NULL);
    }
    if (list->n == 0)
        status = sh_fail(err, SH_ERR_INVALID, "%s: no text in it", path);
cleanup:
    free(bytes);
    return status;
}

sh_status sim_texts_find(const char *dir, sh_error *err)
{
    char path[SH_PATH_BYTES];
    SH_TRY(sh_path_join(path, sizeof path, dir, "manifest.json", err));
    if (!sh_file_exists(path))
        return sh_fail(err, SH_ERR_NOT_FOUND,
                       "%s: not there; scripts/make-texts %s makes the texts", path, dir);
    return SH_OK;
}

sh_status sim_texts_load(const char *dir, const sh_tokenizer *tokenizer, sim_texts *out,
                         sh_error *err)
{
    char path[SH_PATH_BYTES];
    json_t *manifest = NULL;
    sh_status status = SH_OK;
    SH_TRY(sim_texts_find(dir, err));
    SH_TRY(sh_path_join(path, sizeof path, dir, "manifest.json", err));
    SH_TRY(sh_json_load(path, &manifest, err));
    const json_t *topics = json_object_get(manifest, "topics");
    size_t n = json_array_size(topics);
    if (n == 0 || n > SIM_TOPICS_MAX)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID, "%s: \"topics\" should name 1 to %d topics", path,
                        SIM_TOPICS_MAX));
    for (int s = 0; s < SIM_SPLITS; s++)
        SH_GOTO(load_list(dir, "before", s, tokenizer, &out->before[s], err));
    for (size_t t = 0; t < n; t++) {
        const char *name = json_string_value(json_array_get(topics, t));
        char prefix[32];
        snprintf(out->names[t], sizeof out->names[t], "%s", name ? name : "?");
        snprintf(prefix, sizeof prefix, "topic-%02zu", t);
        out->n_topics = t + 1;
        for (int s = 0; s < SIM_SPLITS; s++)
            SH_GOTO(load_list(dir, prefix, s, tokenizer, &out->topic[t][s], err));
    }
cleanup:
    json_decref(manifest);
    if (status != SH_OK)
        sim_texts_release(out);
    return status;
}

sh_status sim_texts_join(const sim_text_list *list, size_t max, int32_t **out, size_t *n)
{
    size_t total = 0;
    for (size_t i = 0; i < list->n && total < max; i++)
        total += list->texts[i].n;
    total = SH_MIN(total, max);
    int32_t *tokens = sh_calloc(SH_MAX(total, 1), sizeof *tokens);
    if (!tokens)
        return SH_ERR_NO_MEMORY;
    size_t at = 0;
    for (size_t i = 0; at < total; i++) {
        size_t take = SH_MIN(list->texts[i].n, total - at);
        memcpy(tokens + at, list->texts[i].tokens, take * sizeof *tokens);
        at += take;
    }
    *out = tokens;
    *n = total;
    return SH_OK;
}
