/* Bodies of the API's requests: any bytes end in a reply with a status, never in a crash or a leak.
 * The first byte chooses the endpoint. The engine has no model, so what is accepted is "busy". */
#include "edge-node/api_internal.h"

#include <string.h>

static uint64_t now_ms(void *arg)
{
    (void)arg;
    return 0;
}

static void finished(void *arg, const sh_record *record, const sh_completion_row *row)
{
    (void)arg;
    (void)record;
    (void)row;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const handle[])(void *, const sh_http_request *, sh_http_reply *) = {
        api_handle_completions, api_handle_chat, api_handle_embeddings};
    static sh_api api;
    static char name[] = "shoal";
    static const char frozen; /* nobody looks at it before there is a model */
    if (!api.model_name) {
        sh_engine_options o = {
            .frozen = (const void *)&frozen, .now_ms = now_ms, .finished = finished};
        sh_error err = {0};
        SH_ASSERT(sh_engine_create(&o, &api.options.engine, &err) == SH_OK);
        pthread_mutex_init(&api.lock, NULL);
        api_metrics_init(&api);
        api.model_name = name;
    }
    if (size == 0)
        return 0;
    sh_buf body; /* 0-terminated, as the server's are */
    sh_buf_init(&body, size + 1);
    if (sh_buf_append(&body, data + 1, size - 1) == SH_OK && sh_buf_append(&body, "", 1) == SH_OK) {
        sh_http_request request = {.method = "POST", .body = body.data, .n = size - 1};
        sh_http_reply reply = {0};
        sh_buf_init(&reply.body, SH_HTTP_REPLY_MAX);
        handle[data[0] % SH_COUNT(handle)](&api, &request, &reply);
        SH_ASSERT(reply.status >= 400 && reply.status <= 503 && !reply.next);
        SH_ASSERT(reply.body.len > 2 && memcmp(reply.body.data, "{\"error\":", 9) == 0);
        sh_buf_release(&reply.body);
    }
    sh_buf_release(&body);
    return 0;
}
