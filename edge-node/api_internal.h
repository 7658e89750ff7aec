/*
 * Inside of the API: api.c (server, feedback, models, health), api_request.c (what a client asks
 * for), api_complete.c (how it is answered), api_metrics.c (what is counted).
 */
#ifndef SH_EDGE_API_INTERNAL_H
#define SH_EDGE_API_INTERNAL_H

#include <pthread.h>

#include "edge-node/api.h"

#define API_MODELS_PATH "/v1/models/"
#define API_NAME        "shoal" /* names the model whatever it is configured as */

typedef enum { API_COMPLETIONS, API_CHAT, API_FEEDBACK, API_ENDPOINTS } api_endpoint;
enum {
    API_CODES_MAX = 16,
    API_CLIENT_GONE = 499, /* counted for a stream whose client left; nobody is told */
};

typedef struct {
    int code; /* 0: free */
    uint64_t n;
} api_count;

struct sh_api {
    sh_api_options options;
    char *model_name;
    uint64_t created_s;
    sh_http *http;
    pthread_mutex_t lock; /* of everything below */
    api_count counts[API_ENDPOINTS][API_CODES_MAX];
    sh_histogram ttft, per_token;
};

/* ---- api_request.c ---- */

typedef struct {
    bool chat, stream, include_usage;
    sh_request request; /* its strings lie in root or prompt */
    sh_buf prompt;      /* of a chat, put together */
    json_t *root;
} api_ask;

/* Parses a body of n bytes as a JSON object. NULL: the reply says what is wrong. */
json_t *api_parse_body(const sh_http_request *request, sh_http_reply *reply);
/* False: the reply says what is wrong. Released by api_ask_release in both cases. */
bool api_ask_parse(const sh_api *api, const sh_http_request *request, bool chat, api_ask *out,
                   sh_http_reply *reply);
void api_ask_release(api_ask *ask);

/* ---- api_complete.c ---- */

void api_handle_completions(void *arg, const sh_http_request *request, sh_http_reply *reply);
void api_handle_chat(void *arg, const sh_http_request *request, sh_http_reply *reply);

/* ---- api_metrics.c ---- */

void api_metrics_init(sh_api *api);
void api_count_code(sh_api *api, api_endpoint endpoint, int code);
void api_observe(sh_api *api, const sh_generation_info *info);
void api_handle_metrics(void *arg, const sh_http_request *request, sh_http_reply *reply);

#endif
