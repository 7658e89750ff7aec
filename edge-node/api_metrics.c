#include "edge-node/api_internal.h"

#include <stdio.h>

void api_metrics_init(sh_api *api)
{
    api->ttft = (sh_histogram){
        .bounds = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}, .n_bounds = 12};
    api->per_token = (sh_histogram){
        .bounds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1}, .n_bounds = 10};
}

void api_count_code(sh_api *api, api_endpoint endpoint, int code)
{
    pthread_mutex_lock(&api->lock);
    api_count *counts = api->counts[endpoint];
    size_t i = 0;
    /* There are fewer codes in this API than places. */
    while (i < API_CODES_MAX - 1 && counts[i].code && counts[i].code != code)
        i++;
    counts[i].code = code;
    counts[i].n++;
    pthread_mutex_unlock(&api->lock);
}

void api_observe(sh_api *api, const sh_generation_info *info)
{
    pthread_mutex_lock(&api->lock);
    if (info->completion_tokens)
        sh_histogram_add(&api->ttft, info->ttft_us / 1e6);
    if (info->completion_tokens > 1)
        sh_histogram_add(&api->per_token, info->token_us / 1e6);
    pthread_mutex_unlock(&api->lock);
}

static void put_counts(const sh_api *api, sh_buf *out)
{
    static const char *const names[] = {[API_COMPLETIONS] = "/v1/completions",
                                        [API_CHAT] = "/v1/chat/completions",
                                        [API_EMBEDDINGS] = "/v1/embeddings"};
    const char *requests = "shoal_inference_requests_total";
    const char *feedback = "shoal_feedback_requests_total";
    char code[16];
    sh_metric_family(out, requests, "counter", "Inference requests that have ended.");
    for (size_t e = 0; e < SH_COUNT(names); e++)
        for (size_t i = 0; i < API_CODES_MAX && api->counts[e][i].code; i++) {
            snprintf(code, sizeof code, "%d", api->counts[e][i].code);
            sh_metric_label labels[] = {{"endpoint", names[e]}, {"code", code}};
            sh_metric_sample(out, requests, labels, 2, (double)api->counts[e][i].n);
        }
    sh_metric_family(out, feedback, "counter", "Feedback requests that have ended.");
    for (size_t i = 0; i < API_CODES_MAX && api->counts[API_FEEDBACK][i].code; i++) {
        snprintf(code, sizeof code, "%d", api->counts[API_FEEDBACK][i].code);
        sh_metric_sample(out, feedback, &(sh_metric_label){"code", code}, 1,
                         (double)api->counts[API_FEEDBACK][i].n);
    }
}

static void put_engine(const sh_api *api, sh_buf *out)
{
    sh_engine_status s = sh_engine_get_status(api->options.engine);
    const char *tokens = "shoal_inference_tokens_total";
    sh_metric_family(out, tokens, "counter", "Tokens of requests that have ended.");
    sh_metric_sample(out, tokens, &(sh_metric_label){"kind", "prompt"}, 1, (double)s.prompt_tokens);
    sh_metric_sample(out, tokens, &(sh_metric_label){"kind", "completion"}, 1,
                     (double)s.completion_tokens);
    sh_metric_one(out, "shoal_inference_refused_total", "counter",
                  "Requests that the engine refused: busy, stopping or without a model.",
                  (double)s.refused);
    sh_metric_one(out, "shoal_inference_running", "gauge", "Requests that run.", s.running);
    sh_metric_one(out, "shoal_inference_waiting", "gauge", "Requests that wait for a slot.",
                  s.waiting);
    sh_metric_one(out, "shoal_inference_slots", "gauge", "Requests that can run at once.", s.slots);
    sh_metric_one(out, "shoal_inference_passes_total", "counter",
                  "Passes over the model's weights.", (double)s.passes);
    sh_metric_one(out, "shoal_inference_pass_rows_total", "counter",
                  "Tokens of all sequences in these passes.", (double)s.pass_rows);
    sh_metric_one(out, "shoal_models_open", "gauge",
                  "Models in memory: more than one while requests end on an older release.",
                  (double)s.models_open);
    char version[24];
    snprintf(version, sizeof version, "%llu", (unsigned long long)s.version);
    sh_metric_label labels[] = {{"version", version}, {"name", api->model_name}};
    sh_metric_family(out, "shoal_model_info", "gauge", "The release that new requests use.");
    sh_metric_sample(out, "shoal_model_info", labels, 2, 1);
}

void api_handle_metrics(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    sh_api *api = arg;
    (void)request;
    reply->content_type = SH_METRICS_TYPE;
    pthread_mutex_lock(&api->lock);
    put_counts(api, &reply->body);
    sh_metric_histogram(&reply->body, "shoal_inference_time_to_first_token_seconds",
                        "From a request's start to its first token; waiting for a slot counts.",
                        &api->ttft);
    sh_metric_histogram(&reply->body, "shoal_inference_time_per_output_token_seconds",
                        "Mean time of each token after the first, a request.", &api->per_token);
    pthread_mutex_unlock(&api->lock);
    put_engine(api, &reply->body);
    if (api->options.backend.metrics)
        api->options.backend.metrics(api->options.backend.arg, &reply->body);
}
