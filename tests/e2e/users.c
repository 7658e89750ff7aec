/* The users of harness.h: threads, so nothing here fails a test; what they saw is counted. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/e2e/harness.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/rng.h"
#include "tests/http/client.h"

#define PROMPT_WORDS 5
#define NEWS_MAX     32
#define NEWS_BYTES   36
#define REST_MS      10 /* while the node is down */
#define FINGERPRINT  "\"system_fingerprint\""

static const char *const before_words[] = {"apple", "river", "stone", "cloud", "table", "night",
                                           "paper", "green", "horse", "bread", "small", "light"};
/* Letters beyond the vocabulary, so bytes, and longer: it differs in tokens, lengths, likelihood.
 */
static const char *const after_words[] = {"Größe", "Straßenbahn", "Übermut",  "Äpfel",
                                          "zwölf", "Möglichkeit", "Frühjahr", "Höhlenbär"};
const e2e_topic e2e_before = {before_words, SH_COUNT(before_words), " old mill by the sea"};
const e2e_topic e2e_after = {after_words, SH_COUNT(after_words),
                             " über den sieben Bergen, im grünen Tal"};

const e2e_topic *e2e_news(void)
{
    static char texts[NEWS_MAX][NEWS_BYTES];
    static e2e_topic topics[NEWS_MAX];
    static unsigned turn;
    assert_true(turn < NEWS_MAX);
    sh_rng rng;
    sh_rng_init(&rng, turn, 2, 1);
    for (size_t i = 0; i + 1 < NEWS_BYTES; i++)
        texts[turn][i] = i % 7 == 0 ? ' ' : (char)('a' + sh_rng_below(&rng, 26));
    topics[turn] = (e2e_topic){before_words, SH_COUNT(before_words), texts[turn]};
    return &topics[turn++];
}

static void note_bad(e2e_user *u, const char *what, const client_reply *reply)
{
    if (atomic_fetch_add(&u->bad, 1) == 0)
        snprintf(u->first_bad, sizeof u->first_bad, "%s: status %d: %.300s", what, reply->status,
                 reply->body ? reply->body : "");
}

/* Every mention of the release in a reply is the same one, and there is one. */
static bool of_one_release(const char *body)
{
    const char *first = strstr(body, FINGERPRINT);
    if (!first)
        return false;
    size_t n = strcspn(first, ",}");
    for (const char *at = first; (at = strstr(at + 1, FINGERPRINT)) != NULL;)
        if (strncmp(at, first, n + 1) != 0)
            return false;
    return true;
}

static bool take_id(const char *body, char *id, size_t n)
{
    const char *at = strstr(body, "\"id\":");
    if (!at || !(at = strchr(at + 5, '"')))
        return false;
    snprintf(id, n, "%.*s", (int)strcspn(at + 1, "\""), at + 1);
    return id[0] != 0;
}

/* False: the request did not end well, so there is nothing to rate. */
static bool ask(e2e_user *u, sh_rng *rng, const e2e_topic *topic, char *id, size_t n_id)
{
    char prompt[256] = "", body[512];
    bool stream = sh_rng_below(rng, 4) != 0, well = false;
    for (size_t i = 0, n = 0; i < PROMPT_WORDS; i++)
        n += (size_t)snprintf(prompt + n, sizeof prompt - n, "%s%s", i ? " " : "",
                              topic->words[sh_rng_below(rng, topic->n_words)]);
    snprintf(body, sizeof body,
             "{\"prompt\": \"%s\", \"max_tokens\": %u, \"user\": \"%s\", \"stream\": %s}", prompt,
             u->max_tokens, u->name, stream ? "true" : "false");
    atomic_fetch_add(&u->asked, 1);
    client_reply reply =
        client_ask((uint16_t)atomic_load(&u->port), "POST", "/v1/completions", NULL, body);
    if (reply.status == 0 || (reply.status == 200 && !reply.whole))
        atomic_fetch_add(&u->broken, 1);
    else if (reply.status == 503 && strstr(reply.body, "stopping"))
        atomic_fetch_add(&u->broken, 1);
    else if (reply.status != 200 || !of_one_release(reply.body) ||
             (stream && !strstr(reply.body, "data: [DONE]")) || !take_id(reply.body, id, n_id))
        note_bad(u, "completion", &reply);
    else
        well = true;
    atomic_fetch_add(&u->whole, well);
    client_release(&reply);
    return well;
}

static void rate(e2e_user *u, sh_rng *rng, const e2e_topic *topic, const char *id)
{
    char body[512];
    bool accept = sh_rng_below(rng, 8) == 0;
    snprintf(body, sizeof body, "{\"id\": \"%s\", \"action\": \"%s\"%s%s%s}", id,
             accept ? "accept" : "edit", accept ? "" : ", \"text\": \"", accept ? "" : topic->text,
             accept ? "" : "\"");
    client_reply reply =
        client_ask((uint16_t)atomic_load(&u->port), "POST", "/v1/feedback", NULL, body);
    if (reply.status == 200 && reply.whole)
        atomic_fetch_add(&u->acknowledged, 1);
    else if (reply.status == 0 || reply.status == 200)
        atomic_fetch_add(&u->doubtful, 1);
    else if (reply.status == 404)
        atomic_fetch_add(&u->forgotten, 1);
    else if (!(reply.status == 503 && strstr(reply.body, "stopping")))
        note_bad(u, "feedback", &reply);
    client_release(&reply);
}

static void *live(void *arg)
{
    e2e_user *u = arg;
    sh_rng rng;
    char id[64];
    sh_rng_init(&rng, u->seed, 1, 1);
    while (!atomic_load(&u->stop)) {
        const e2e_topic *topic = atomic_load(&u->topic);
        if (atomic_load(&u->port) == 0) {
            (void)poll(NULL, 0, REST_MS);
            continue;
        }
        if (ask(u, &rng, topic, id, sizeof id))
            rate(u, &rng, topic, id);
        (void)poll(NULL, 0, (int)u->pause_ms);
    }
    return NULL;
}

void e2e_user_start(e2e_user *u)
{
    if (!atomic_load(&u->topic))
        atomic_store(&u->topic, &e2e_before);
    if (u->max_tokens == 0)
        u->max_tokens = 6;
    atomic_store(&u->stop, false);
    assert_int_equal(pthread_create(&u->thread, NULL, live, u), 0);
    atomic_store(&u->runs, true);
}

void e2e_user_stop(e2e_user *u)
{
    if (!atomic_exchange(&u->runs, false))
        return;
    atomic_store(&u->stop, true);
    pthread_join(u->thread, NULL);
}
