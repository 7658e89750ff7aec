/* The summary for people: releases, figures, checks. */
#include <stdio.h>
#include <stdlib.h>

#include "experiments/sim/sim.h"

static void print_number(const json_t *root, const char *part, const char *key, const char *name,
                         int decimals)
{
    const json_t *v = json_object_get(part ? json_object_get(root, part) : root, key);
    if (json_is_number(v))
        printf("  %-44s %.*f\n", name, decimals, json_number_value(v));
    else
        printf("  %-44s not measured\n", name);
}

static void print_share(const json_t *root, const char *part, const char *key, const char *name)
{
    const json_t *v = json_object_get(json_object_get(root, part), key);
    if (json_is_number(v))
        printf("  %-44s %.1f %%\n", name, 100 * json_number_value(v));
    else
        printf("  %-44s not measured\n", name);
}

void sim_print_table(const json_t *root)
{
    printf("\n  release  parent  loss(parent)  loss  Q(W)+dW  updates  verdict\n");
    size_t i;
    const json_t *r;
    json_array_foreach(json_object_get(root, "releases"), i, r)
    {
        char version[16] = "-";
        if (json_is_integer(json_object_get(r, "version")))
            snprintf(version, sizeof version, "%d",
                     (int)json_integer_value(json_object_get(r, "version")));
        printf("  %7s  %6d  %12.3f  %.3f  %7.3f  %7d  %s\n", version,
               (int)json_integer_value(json_object_get(r, "parent")),
               json_number_value(json_object_get(r, "loss_parent")),
               json_number_value(json_object_get(r, "loss_candidate")),
               json_number_value(json_object_get(r, "loss_adapter_form")),
               (int)json_integer_value(json_object_get(r, "updates_merged")),
               json_string_value(json_object_get(r, "verdict")));
    }
    printf("\n");
    print_number(root, "heldout_nll", "base", "held-out loss, base (nats a token)", 3);
    print_number(root, "heldout_nll", "local_only", "  each node alone", 3);
    print_number(root, "heldout_nll", "final", "  final release", 3);
    print_number(root, "heldout_nll", "central_lora", "  central LoRA on the pooled data", 3);
    print_share(root, "acceptance", "before", "next word accepted, before the change");
    print_share(root, "acceptance", "after_base", "  after it, with the base");
    print_share(root, "acceptance", "end", "  at the end");
    print_number(root, "bytes", "up_per_update", "bytes up an update", 0);
    print_number(root, "bytes", "down_per_release_node", "bytes down a release and node", 0);
    printf("\n");
    json_array_foreach(json_object_get(root, "checks"), i, r)
    {
        char *value =
            json_dumps(json_object_get(r, "value"), JSON_ENCODE_ANY | JSON_REAL_PRECISION(4));
        printf("  %s  %-42s %s (%s)\n", json_is_true(json_object_get(r, "ok")) ? "ok  " : "FAIL",
               json_string_value(json_object_get(r, "name")), value ? value : "?",
               json_string_value(json_object_get(r, "limit")));
        free(value);
    }
    const char *hash = json_string_value(json_object_get(root, "result_hash"));
    printf("\n  ");
    if (hash)
        printf("result hash %.16s…  ", hash);
    printf("wall %.0f s", json_number_value(json_object_get(root, "wall_s")));
    const json_t *per_s = json_object_get(json_object_get(root, "updates"), "made_per_s");
    if (json_is_number(per_s))
        printf("  %.3g node updates a second", json_number_value(per_s));
    printf("\n");
}
