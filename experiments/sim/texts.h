/*
 * The texts of an experiment (made by shoal-corpus), tokenized once. One passage is one text that a
 * simulated user types, or a piece of a gate or held-out set.
 */
#ifndef SIM_TEXTS_H
#define SIM_TEXTS_H

#include "shared/model/tokenizer.h"
#include "shared/stats/monitor.h"

#define SIM_TOPICS_MAX    64
#define SIM_TEXT_FILE_MAX (64u << 20)

typedef struct {
    int32_t *tokens; /* owned */
    uint32_t n;
} sim_text;

typedef struct {
    sim_text *texts;
    size_t n, cap;
} sim_text_list;

enum { SIM_TRAFFIC, SIM_GATE, SIM_HELDOUT, SIM_SPLITS };

typedef struct {
    sim_text_list before[SIM_SPLITS];
    sim_text_list topic[SIM_TOPICS_MAX][SIM_SPLITS];
    char names[SIM_TOPICS_MAX][32];
    size_t n_topics;
} sim_texts;

/* One inference's feedback: the author's tokens from it to the next one. */
typedef struct {
    uint32_t offset, n;
    bool accepted;
} sim_row;

/* Whether the folder is there. SH_ERR_NOT_FOUND says how it is made. */
SH_MUST_USE sh_status sim_texts_find(const char *dir, sh_error *err);
SH_MUST_USE sh_status sim_texts_load(const char *dir, const sh_tokenizer *tokenizer, sim_texts *out,
                                     sh_error *err);
void sim_texts_release(sim_texts *texts);
/* Forgets all topics but the first n. */
void sim_texts_keep(sim_texts *texts, size_t n);
/* The first texts of a list, joined, at most max tokens. *out is malloc'ed. */
SH_MUST_USE sh_status sim_texts_join(const sim_text_list *list, size_t max, int32_t **out,
                                     size_t *n);

#endif
