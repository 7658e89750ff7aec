/*
 * The inference engine of a node: requests of many threads, each on the release that it began with,
 * while releases are swapped under them.
 *
 * A request's prompt is compared, token by token, with the texts of the same user in the engine's
 * slots; the slot with the longest common start goes on with its cache, so that a text that grows
 * from request to request is one session: what was typed since its last request is measured, once
 * (edge-node/service.h), and the rest is not run again. A common start that is less than a half of
 * the slot's text is another text. A prompt that continues no slot begins a session in an empty
 * slot, or in the one that was used longest ago. A prompt with nothing new in it (a retry) gets a
 * record whose prompt_tokens are 0: the monitor takes no measurement of the prompt from it.
 * A new text that begins like one in another slot (the same instructions before it) takes that
 * start's cache over: only of the same user, or of nobody's prompts for nobody's, unless
 * share_prefix is set, because the time until the first token tells what others have asked.
 *
 * Invariants
 *   - A model is closed when it is not the active one any more and its last request has ended; a
 *     request ends on the model that it began with.
 *   - Memory: `slots` contexts of `context` tokens, made at the first activation; a slot that
 *     changes its model gives its old one back first. One runner (scratch of SH_BATCH_ROWS rows) a
 *     model in memory.
 *   - A request that finds all slots busy waits, first come, first served, at most queue_max of
 *     them and wait_ms_max long, then SH_ERR_LIMIT ("busy"), and no longer than its client does.
 *   - Requests that run at once share passes over the weights (edge-node/batch.h); their texts and
 *     numbers are those of requests that run alone.
 *   - A prompt and max_tokens fit the context: a session of the engine never slides.
 *   - Measuring is of what the author typed, never of what the model proposed; the record has no
 *     text.
 * Threads: all functions from any thread; a generation belongs to one at a time. `finished` is
 * called before the slot is free, so that what it hands to is a part of the back-pressure: the
 * thread that empties finished's queue must not wait for requests (sh_engine_forget, a begin).
 * Ownership: frozen is borrowed and outlives the engine; models are taken over.
 *
 *     SH_TRY(sh_engine_create(&(sh_engine_options){.frozen = frozen, ...}, &engine, err));
 *     SH_TRY(sh_engine_activate(engine, &model, version, err));
 *     SH_TRY(sh_generation_begin(engine, &request, &generation, &too_long, err));
 *     for (bool done = false; status == SH_OK && !done;)
 *         status = sh_generation_next(generation, &text, &done, err); ... send text, clear it
 *     sh_generation_end(&generation);
 */
#ifndef SH_EDGE_ENGINE_H
#define SH_EDGE_ENGINE_H

#include "edge-node/node.h"
#include "edge-node/service.h"
#include "shared/model/chat.h"

#define SH_STOPS_MAX        4
#define SH_STOP_BYTES_MAX   64
#define SH_USER_BYTES_MAX   128
#define SH_MAX_TOKENS_MAX   1024 /* that a request may ask for, within the context */
#define SH_TEMPERATURE_MAX  2
#define SH_TOP_LOGPROBS_MAX 20
#define SH_TOP_K_MAX        (1u << 20)
#define SH_PENALTY_MAX      10  /* repeat_penalty */
#define SH_EMBED_INPUTS_MAX 256 /* of a request */

/* What a user's name is in rows and events: 64 bits of its BLAKE2b, never 0; 0 for NULL. */
uint64_t sh_engine_user(const char *name);

typedef struct sh_engine sh_engine;
typedef struct {
    const sh_frozen *frozen;       /* borrowed */
    uint32_t slots;                /* requests at once, and texts remembered; 0: 4, at most 256 */
    uint32_t context;              /* tokens a slot; 0: the model's, at most 1,024 */
    uint32_t queue_max;            /* 0: 64 */
    uint32_t wait_ms_max;          /* 0: 30,000 */
    uint32_t threads;              /* of a pass; 0: 1 */
    sh_kv_type kv;                 /* of the slots' caches */
    bool share_prefix;             /* starts of texts among users */
    uint64_t (*now_ms)(void *arg); /* for records */
    /* Each request that ended without an error, early or not, on its thread: the record and the row
     * (tokens borrowed; without those of a stop string) for the core. May block for as long as its
     * queue is full. */
    void (*finished)(void *arg, const sh_record *record, const sh_completion_row *row);
    void *arg;
} sh_engine_options;
SH_MUST_USE sh_status sh_engine_create(const sh_engine_options *options, sh_engine **out,
                                       sh_error *err);
void sh_engine_destroy(sh_engine **engine); /* no request runs, no reader has a model */
/* Refuses requests from now on and wakes those that wait (SH_ERR_CANCELLED). */
void sh_engine_stop(sh_engine *engine);

/* Requests that begin from now on use this model (taken over; not on an error), packed or not, as
 * it is (sh_model_pack). SH_ERR_MISMATCH: its vocabulary is not the fleet's, or its context is
 * smaller than the engine's. */
SH_MUST_USE sh_status sh_engine_activate(sh_engine *engine, sh_model **model, uint64_t version,
                                         sh_error *err);
/* The active model for other readers (tokenizer, training export): counted, put back with
 * sh_engine_release_model. NULL before the first activation. */
const sh_model *sh_engine_use_model(sh_engine *engine, uint64_t *version);
void sh_engine_release_model(sh_engine *engine, const sh_model *model);
/* Forgets every text in the slots (an erasure), and wipes its tokens from memory; waits until the
 * requests that run now have ended and were handed to `finished`. */
void sh_engine_forget(sh_engine *engine);
/* The same for a thread that must not wait: marks, and whether all that was marked is forgotten. */
void sh_engine_forget_soon(sh_engine *engine);
bool sh_engine_is_forgotten(sh_engine *engine);
/* Ids of completions are above `last`. */
void sh_engine_set_last_id(sh_engine *engine, uint64_t last);

/* Whether whoever asked is still there; asked while a request waits, and while its prompt is run.
 */
typedef struct sh_request_client {
    bool (*gone)(void *arg);
    void *arg;
} sh_request_client;

typedef struct {
    const char *prompt; /* UTF-8 or any bytes */
    size_t prompt_bytes;
    const sh_chat_message *messages; /* a chat, instead of the prompt */
    size_t n_messages;
    uint32_t max_tokens;
    float temperature, top_p; /* 0, 1: greedy; at most SH_TEMPERATURE_MAX, 1 */
    uint32_t top_k;           /* 0: off; at most SH_TOP_K_MAX */
    float min_p;              /* 0: off; at most 1 */
    float repeat_penalty;     /* 0, 1: off; at most SH_PENALTY_MAX */
    uint64_t seed;            /* 0: from the id */
    bool logprobs;            /* of each token, and of the top_logprobs likeliest in its place */
    uint32_t top_logprobs;    /* 0 to SH_TOP_LOGPROBS_MAX */
    const char *stops[SH_STOPS_MAX];
    size_t n_stops;
    const char *user;                /* NULL: not said */
    const sh_request_client *client; /* until begin returns; NULL: stays */
} sh_request;

typedef enum { SH_FINISH_LENGTH, SH_FINISH_STOP } sh_finish;
typedef struct sh_generation sh_generation;
/* Waits for a slot and runs the prompt. SH_ERR_LIMIT: busy, or no model yet, or the prompt is
 * longer than the context leaves room for (then the text says so, and *too_long is set);
 * SH_ERR_INVALID: an empty prompt, a parameter out of its range; SH_ERR_CANCELLED: stopping, or the
 * client is gone. */
SH_MUST_USE sh_status sh_generation_begin(sh_engine *engine, const sh_request *request,
                                          sh_generation **out, bool *too_long, sh_error *err);
/* Appends the next piece of text: whole UTF-8 characters (what the model says that is no UTF-8 is
 * U+FFFD), nothing of a stop string. *done at the end, with or without a last piece; then it may be
 * called again and appends nothing. After an error only end may be called. */
SH_MUST_USE sh_status sh_generation_next(sh_generation *generation, sh_buf *text, bool *done,
                                         sh_error *err);
/* Another answer to the same prompt, on the same slot and model, with an id of its own and the seed
 * before it plus one. Ends the one before. */
SH_MUST_USE sh_status sh_generation_again(sh_generation *generation, sh_error *err);
/* How many tokens' text was appended, all of it (without those of a stop string). */
uint32_t sh_generation_shown(const sh_generation *generation);
typedef struct {
    int32_t token;
    float logprob; /* natural; of the model's own distribution, before temperature and the rest */
    uint32_t n_likeliest;
    const sh_token_logprob *likeliest; /* borrowed until the generation ends, or again */
} sh_generation_token;
/* Token i of those generated; with `logprobs` only. */
sh_generation_token sh_generation_get_token(const sh_generation *generation, uint32_t i);
/* Appends a token's bytes, of whatever encoding. */
SH_MUST_USE sh_status sh_generation_token_text(const sh_generation *generation, int32_t token,
                                               sh_buf *out);
typedef struct {
    uint64_t id, version;
    uint32_t prompt_tokens, cached_tokens; /* without BOS; cached: not run again */
    uint32_t completion_tokens;            /* generated, those of a stop string too */
    sh_finish finish;
    uint32_t ttft_us, token_us;
} sh_generation_info;
sh_generation_info sh_generation_get_info(const sh_generation *generation);
/* Ends it, early too: the slot is free again; `finished` is called. */
void sh_generation_end(sh_generation **generation);

/* ---- embeddings ---- */
typedef struct {
    const char *text;
    size_t text_bytes;
    const int32_t *tokens; /* instead of the text; BOS is added to neither but where the model's */
    size_t n_tokens;
} sh_embed_input;
typedef struct {
    const sh_embed_input *inputs;
    size_t n;                        /* 1 to SH_EMBED_INPUTS_MAX */
    const sh_request_client *client; /* NULL: stays */
} sh_embed_request;
typedef struct {
    uint64_t version;
    uint32_t width, tokens; /* tokens: of all inputs, without BOS */
    float *vectors;         /* [n, width], malloc'ed */
} sh_embeddings;
/* For each input the mean of the last hidden state over its tokens, scaled to length 1. Takes a
 * place and a slot (whose text is forgotten), makes no record. Errors as of begin. */
SH_MUST_USE sh_status sh_engine_embed(sh_engine *engine, const sh_embed_request *request,
                                      sh_embeddings *out, bool *too_long, sh_error *err);

typedef struct {
    uint64_t requests, refused; /* since the start; refused: busy or stopping */
    uint64_t prompt_tokens, completion_tokens;
    uint32_t running, waiting, slots;
    uint64_t version;
    uint64_t models_open; /* 1, more while requests end on older ones */
    uint32_t width;       /* of the active model; 0: none */
    sh_chat_family family;
    uint64_t passes, pass_rows; /* over the weights; rows in all of them */
} sh_engine_status;
sh_engine_status sh_engine_get_status(sh_engine *engine);

#endif
