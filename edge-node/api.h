/*
 * The node's HTTP API over the engine: OpenAI-compatible /v1/completions, /v1/chat/completions,
 * /v1/embeddings, /v1/models; /v1/feedback; /healthz; /metrics. docs/api.md is its manual.
 *
 * What touches the store goes through the daemon (sh_api_backend), because one thread owns the
 * core: feedback is answered after its commit.
 * Threads: handlers run on the server's threads; the backend's functions are called from them.
 */
#ifndef SH_EDGE_API_H
#define SH_EDGE_API_H

#include "edge-node/engine.h"
#include "shared/http/http.h"
#include "shared/http/metrics.h"

#define SH_API_TEXT_BYTES_MAX (64u << 10) /* of a feedback's text; its tokens have a limit, too */

typedef struct {
    uint64_t id;
    sh_feedback_kind kind;
    const char *text; /* what the author wrote from the end of the prompt on; NULL: not said */
    size_t text_bytes;
} sh_api_feedback;

typedef struct {
    void *arg;
    /* Commits, then returns. SH_ERR_NOT_FOUND: no such completion, or past its retention;
     * SH_ERR_EXISTS: it was rated otherwise; SH_ERR_LIMIT: text of too many tokens, or the queue is
     * full; SH_ERR_FULL: the disk is; SH_ERR_CANCELLED: stopping, or no model yet. The same rating
     * again is SH_OK. */
    sh_status (*feedback)(void *arg, const sh_api_feedback *feedback, sh_error *err);
    /* Appends the node's own metrics (what the engine and the API do not know). */
    void (*metrics)(void *arg, sh_buf *out);
    /* False: not healthy, with the reason in `text`. */
    bool (*healthy)(void *arg, char *text, size_t text_bytes);
} sh_api_backend;

typedef struct sh_api sh_api;
typedef struct {
    sh_engine *engine; /* borrowed */
    sh_api_backend backend;
    const char *model_name; /* NULL: "shoal", which names it in any case */
    const char *address;
    uint16_t port;
    const char *token;
    uint32_t connections_max;
} sh_api_options;
SH_MUST_USE sh_status sh_api_create(const sh_api_options *options, sh_api **out, sh_error *err);
void sh_api_destroy(sh_api **api); /* after sh_engine_stop */
uint16_t sh_api_port(const sh_api *api);

#endif
