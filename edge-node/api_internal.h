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

typedef enum {
    API_COMPLETIONS,
    API_CHAT,
    API_EMBEDDINGS,
    API_FEEDBACK,
    API_ENDPOINTS
} api_endpoint;
enum {
    API_CODES_MAX = 16,
    API_CHOICES_MAX = 8,
    API_LOGPROBS_MAX = 5,         /* top ones of a completion; of a chat SH_TOP_LOGPROBS_MAX */
    API_EMBED_BYTES_A_VALUE = 26, /* in a reply, at most */
    API_CLIENT_GONE = 499,        /* counted for a request whose client left; nobody is told */
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
    uint32_t n;         /* choices */
    sh_request request; /* its strings lie in root, or in texts */
    sh_chat_message *messages;
    char **texts; /* [n_texts] contents that were put together */
    size_t n_texts;
    json_t *root;
} api_ask;

/* Parses a body of n bytes as a JSON object. NULL: the reply says what is wrong. */
json_t *api_parse_body(const sh_http_request *request, sh_http_reply *reply);
/* False: the reply says what is wrong. Released by api_ask_release in both cases. */
bool api_ask_parse(const sh_api *api, const sh_http_request *request, bool chat, api_ask *out,
                   sh_http_reply *reply);
void api_ask_release(api_ask *ask);

/* Refuses; false. param NULL: the body as a whole. */
bool api_refuse(sh_http_reply *reply, const char *param, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Whether `model` is absent or ours. */
bool api_check_model(const sh_api *api, const json_t *root, sh_http_reply *reply);
const json_t *api_field(const json_t *root, const char *name); /* NULL: absent, or null */

/* ---- api_logprobs.c ---- */

/* Log-probabilities of a text's tokens, in the shape of the endpoint. */
typedef struct {
    bool chat;
    uint32_t n_taken; /* tokens of the generation that were taken */
    size_t offset;    /* characters of their texts */
} api_logprobs;
/* The generation's tokens whose text was appended since the last call. New reference; null for
 * logprobs NULL. */
json_t *api_logprobs_take(api_logprobs *logprobs, const sh_generation *generation);

/* ---- api_embed.c ---- */

void api_handle_embeddings(void *arg, const sh_http_request *request, sh_http_reply *reply);

/* ---- api_complete.c ---- */

/* Says why the engine did not take a request. param: the field that is at fault when one is. */
void api_fail_engine(sh_http_reply *reply, const char *param, sh_status status, bool too_long,
                     const sh_error *err);
bool api_client_gone(void *client); /* for sh_request_client */

void api_handle_completions(void *arg, const sh_http_request *request, sh_http_reply *reply);
void api_handle_chat(void *arg, const sh_http_request *request, sh_http_reply *reply);

/* ---- api_metrics.c ---- */

void api_metrics_init(sh_api *api);
void api_count_code(sh_api *api, api_endpoint endpoint, int code);
void api_observe(sh_api *api, const sh_generation_info *info);
void api_handle_metrics(void *arg, const sh_http_request *request, sh_http_reply *reply);

#endif
