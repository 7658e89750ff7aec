#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/sim/rig.h"

#include <stdio.h>
#include <string.h>

/* Small windows: a node needs few inferences until it notices the change and may train. */
static const char *const common[] = {"--learning", "cost",
                                     "--plain",    "--monitor.window",
                                     "32",         "--monitor.reference",
                                     "64",         "--users.windows-before",
                                     "4",          "--learn.tokens-min",
                                     "512"};

static void add_word(rig *r, const char *word)
{
    assert_true(r->n_words < RIG_WORDS_MAX);
    r->words[r->n_words++] = word;
}

void rig_add(rig *r, const char *key, const char *value)
{
    add_word(r, key);
    add_word(r, value);
}

void rig_add_number(rig *r, const char *key, uint64_t value)
{
    assert_true(r->n_numbers < SH_COUNT(r->numbers));
    char *text = r->numbers[r->n_numbers++];
    snprintf(text, sizeof r->numbers[0], "%llu", (unsigned long long)value);
    rig_add(r, key, text);
}

void rig_init(rig *r, const char *const *words)
{
    memset(r, 0, sizeof *r);
    for (size_t i = 0; i < SH_COUNT(common); i++)
        add_word(r, common[i]);
    for (size_t i = 0; words[i] != NULL; i++)
        add_word(r, words[i]);
}

void rig_create(rig *r)
{
    char name[] = "run", *argv[RIG_WORDS_MAX + 1] = {name};
    for (size_t i = 0; i < r->n_words; i++)
        argv[i + 1] = (char *)(uintptr_t)r->words[i];
    OK(sh_crypto_init(err));
    OK(sh_options_parse(&sim_run_command, (int)r->n_words + 1, argv, &r->options, &r->args, err));
    OK(sim_create(&r->options, &r->sim, err));
}

void rig_release(rig *r)
{
    sim_destroy(&r->sim);
    sh_args_release(&r->args);
}

void rig_print_command(const rig *r)
{
    fprintf(stderr, "to see it again: shoal-sim run");
    for (size_t i = 0; i < r->n_words; i++)
        fprintf(stderr, " %s", r->words[i]);
    fprintf(stderr, "\n");
}

sh_status rig_audit(const sim *s, sh_audit_result *out, char *finding, size_t finding_bytes,
                    sh_error *err)
{
    sh_audit *audit = NULL;
    json_t *findings = NULL;
    sh_status status = SH_OK;
    SH_GOTO(sh_audit_create(&audit, err));
    SH_GOTO(sh_audit_add_aggregator(audit, s->coord_store, err));
    for (uint32_t i = 0; i < s->n_nodes; i++) {
        char name[32];
        snprintf(name, sizeof name, "node-%05u", i);
        SH_GOTO(sh_audit_add_node(audit, s->nodes[i].store, name, err));
    }
    sh_audit_finish(audit, out, &findings);
    const char *first = json_string_value(json_array_get(findings, 0));
    snprintf(finding, finding_bytes, "%s", first ? first : "");
cleanup:
    json_decref(findings);
    sh_audit_destroy(&audit);
    return status;
}
