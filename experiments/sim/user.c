#include "experiments/sim/user.h"

#include <stdlib.h>

#define OPENING_WORDS 3 /* nobody is offered a word before these */

void sim_typed_release(sim_typed *t)
{
    free(t->records);
    free(t->rows);
    *t = (sim_typed){0};
}

/* The token where the n_words-th word after `at` begins, or the text's end. */
static uint32_t skip_words(const sim_typing *t, uint32_t at, uint32_t n_words)
{
    for (; n_words && at < t->text->n; n_words--)
        at += sh_word_length(t->frozen, t->text->tokens + at, t->text->n - at, t->text->n);
    return at;
}

static sh_status ask(const sim_typing *t, sh_session *session, uint32_t at, sh_record *record,
                     sim_row *row, sh_error *err)
{
    sh_completion done;
    const int32_t *wanted = t->text->tokens + at;
    SH_TRY(sh_session_complete(session, SH_WORD_TOKENS_MAX, &done, err));
    uint32_t n = sh_word_length(t->frozen, wanted, t->text->n - at, SH_JUDGED_TOKENS_MAX);
    sh_feedback_kind kind = sh_completion_judge(&done, wanted, n);
    *record = done.record;
    record->at_ms = t->start_ms + t->duration_ms * at / t->text->n;
    record->ttft_us = (uint32_t)(t->us_per_token * done.evaluated);
    record->token_us = (uint32_t)t->us_per_token;
    *row = (sim_row){.offset = at, .accepted = kind == SH_FEEDBACK_ACCEPT};
    return SH_OK;
}

sh_status sim_type_text(const sim_typing *t, sim_typed *out, sh_error *err)
{
    sh_rng rng;
    sh_session *session = NULL;
    sim_typed r = {0};
    uint32_t typed = 0, n = t->text->n;
    sh_status status = SH_OK;
    sh_rng_init(&rng, t->seed, n, 0x55534552);
    r.records = sh_calloc(n, sizeof *r.records);
    r.rows = sh_calloc(n, sizeof *r.rows);
    if (!r.records || !r.rows)
        SH_GOTO(sh_fail(err, SH_ERR_NO_MEMORY, "user: no memory for a text of %u tokens", n));
    sh_session_options so = {.release_version = t->release_version};
    SH_GOTO(sh_session_create(t->model, t->frozen, &so, &session, err));
    SH_GOTO(sh_session_begin(session, err));
    uint32_t at = skip_words(t, 0, OPENING_WORDS);
    r.opening = at;
    while (at < n) {
        SH_GOTO(sh_session_type(session, t->text->tokens + typed, at - typed, err));
        typed = at;
        SH_GOTO(ask(t, session, at, &r.records[r.n], &r.rows[r.n], err));
        at = skip_words(t, at, 1 + (uint32_t)sh_rng_below(&rng, 2 * t->words_between - 1));
        r.rows[r.n].n = at - typed;
        r.accepted += r.rows[r.n].accepted;
        r.n++;
    }
    *out = r;
    r = (sim_typed){0};
cleanup:
    sh_session_destroy(&session);
    sim_typed_release(&r);
    return status;
}
