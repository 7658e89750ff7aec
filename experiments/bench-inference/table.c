/* What was measured, as JSON and as tables. */
#include "experiments/bench-inference/bench.h"
#include "experiments/version.h"

json_t *bench_results(const bench_run *run)
{
    json_t *root = json_object(), *rows = json_array(), *ceilings = json_array();
    sh_json_set(root, "commit", json_string(SHOAL_COMMIT));
    sh_json_set(root, "machine", json_string(run->machine));
    sh_json_set(root, "kernel", json_string(run->kernel));
    sh_json_set(root, "rounds", json_integer(run->rounds));
    sh_json_set(root, "peer", run->llama_bench != NULL ? json_string("llama-bench") : json_null());
    for (size_t i = 0; i < run->n_ceilings; i++) {
        const bench_ceiling *c = &run->ceilings[i];
        json_t *o = json_object();
        sh_json_set(o, "threads", json_integer(c->threads));
        sh_json_set(o, "read_bytes_per_s", sh_json_number(c->read_bytes_per_s));
        sh_json_set(o, "int8_ops_per_s", sh_json_number(c->int8_ops_per_s));
        sh_json_set(o, "f32_flops", sh_json_number(c->f32_flops));
        json_array_append_new(ceilings, o);
    }
    for (size_t i = 0; i < run->n_rows; i++) {
        const bench_row *r = &run->rows[i];
        json_t *o = json_object();
        sh_json_set(o, "shape", json_string(r->what->shape));
        sh_json_set(o, "type", json_string(r->what->type));
        sh_json_set(o, "threads", json_integer(r->threads));
        sh_json_set(o, "prefill_tokens", json_integer(r->what->prefill));
        sh_json_set(o, "decode_tokens", json_integer(r->what->decode));
        sh_json_set(o, "prefill_tokens_per_s", sh_json_number(r->prefill));
        sh_json_set(o, "decode_tokens_per_s", sh_json_number(r->decode));
        if (r->what->lora)
            sh_json_set(o, "decode_without_lora_tokens_per_s", sh_json_number(r->decode_base));
        if (r->what->lora)
            sh_json_set(o, "decode_with_over_without_lora", sh_json_number(r->lora_ratio));
        sh_json_set(o, "decode_read_share", sh_json_number(r->read_share));
        if (r->peer_decode > 0) {
            sh_json_set(o, "peer_prefill_tokens_per_s", sh_json_number(r->peer_prefill));
            sh_json_set(o, "peer_decode_tokens_per_s", sh_json_number(r->peer_decode));
            sh_json_set(o, "prefill_over_peer", sh_json_number(r->prefill_ratio));
            sh_json_set(o, "decode_over_peer", sh_json_number(r->decode_ratio));
        }
        sh_json_set(o, "weight_bytes", sh_json_number(r->weight_bytes));
        sh_json_set(o, "rss_bytes", sh_json_number(r->rss_bytes));
        sh_json_set(o, "load_s", sh_json_number(r->load_s));
        sh_json_set(o, "first_token_s", sh_json_number(r->first_token_s));
        sh_json_set(o, "first_token_in_place_s", sh_json_number(r->first_token_in_place_s));
        json_array_append_new(rows, o);
    }
    sh_json_set(root, "ceilings", ceilings);
    sh_json_set(root, "rows", rows);
    return root;
}

/* "| 451.0 | **2.10×** (≥ 2.0) " or dashes. */
static sh_status peer_cells(sh_buf *out, double peer, double ratio, double goal)
{
    if (peer <= 0)
        return sh_buf_printf(out, " – | – |");
    SH_TRY(sh_buf_printf(out, " %.1f | %s%.2f×%s", peer, ratio >= goal ? "" : "*", ratio,
                         ratio >= goal ? "" : "* (missed)"));
    return goal > 0 ? sh_buf_printf(out, " (≥ %.1f) |", goal) : sh_buf_printf(out, " |");
}

static sh_status rate_rows(const bench_run *run, sh_buf *out)
{
    SH_TRY(sh_buf_printf(
        out, "| model | threads | | tokens/s | llama.cpp | ratio (goal) | of the ceiling |\n"
             "| --- | --- | --- | --- | --- | --- | --- |\n"));
    for (size_t i = 0; i < run->n_rows; i++) {
        const bench_row *r = &run->rows[i];
        const bench_case *c = r->what;
        if (c->lora)
            continue;
        SH_TRY(sh_buf_printf(out, "| %s %s | %d | decode %d | %.1f |", c->shape, c->type,
                             r->threads, c->decode, r->decode));
        SH_TRY(peer_cells(out, r->peer_decode, r->decode_ratio, c->decode_goal));
        SH_TRY(sh_buf_printf(out, " %.0f %% of bandwidth", 100 * r->read_share));
        if (c->bandwidth_goal > 0)
            SH_TRY(sh_buf_printf(out, "%s (≥ %.0f)",
                                 r->read_share >= c->bandwidth_goal ? "" : ", *missed*",
                                 100 * c->bandwidth_goal));
        SH_TRY(sh_buf_printf(out, " |\n"));
        SH_TRY(
            sh_buf_printf(out, "| | %d | prefill %d | %.1f |", r->threads, c->prefill, r->prefill));
        SH_TRY(peer_cells(out, r->peer_prefill, r->prefill_ratio, c->prefill_goal));
        SH_TRY(sh_buf_printf(out, " |\n"));
    }
    return SH_OK;
}

static sh_status other_rows(const bench_run *run, sh_buf *out)
{
    SH_TRY(sh_buf_printf(
        out, "\n| model | threads | load, packing | to first token | without packing | resident "
             "| weights |\n| --- | --- | --- | --- | --- | --- | --- |\n"));
    for (size_t i = 0; i < run->n_rows; i++) {
        const bench_row *r = &run->rows[i];
        if (r->what->lora)
            continue;
        SH_TRY(sh_buf_printf(out, "| %s %s | %d | %.3f s | %.3f s | %.3f s | %.1f MB | %.1f MB |\n",
                             r->what->shape, r->what->type, r->threads, r->load_s, r->first_token_s,
                             r->first_token_in_place_s, r->rss_bytes * 1e-6,
                             r->weight_bytes * 1e-6));
    }
    SH_TRY(sh_buf_printf(out, "\n| adapter of rank 16 on all matrices | threads | decode without "
                              "| with | slower by (goal) |\n| --- | --- | --- | --- | --- |\n"));
    for (size_t i = 0; i < run->n_rows; i++) {
        const bench_row *r = &run->rows[i];
        if (r->what->lora)
            SH_TRY(sh_buf_printf(out, "| %s %s | %d | %.1f | %.1f | %.1f %% (≤ 10) |\n",
                                 r->what->shape, r->what->type, r->threads, r->decode_base,
                                 r->decode, 100 * (1 - r->lora_ratio)));
    }
    return SH_OK;
}

sh_status bench_tables(const bench_run *run, sh_buf *out)
{
    SH_TRY(
        sh_buf_printf(out, "%s, kernel %s, commit %.12s; medians of %d rounds%s.\n\n", run->machine,
                      run->kernel, SHOAL_COMMIT, run->rounds,
                      run->llama_bench != NULL ? ", in turns with llama.cpp's llama-bench" : ""));
    SH_TRY(rate_rows(run, out));
    SH_TRY(other_rows(run, out));
    SH_TRY(sh_buf_printf(out, "\n| ceilings of this machine | read from memory | int8 | f32 |\n"
                              "| --- | --- | --- | --- |\n"));
    for (size_t i = 0; i < run->n_ceilings; i++) {
        const bench_ceiling *c = &run->ceilings[i];
        SH_TRY(sh_buf_printf(out, "| %d thread%s | %.1f GB/s | %.0f Gop/s | %.0f GFLOP/s |\n",
                             c->threads, c->threads == 1 ? "" : "s", c->read_bytes_per_s * 1e-9,
                             c->int8_ops_per_s * 1e-9, c->f32_flops * 1e-9));
    }
    return SH_OK;
}
