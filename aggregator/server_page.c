/* GET /: the status page: one HTML document, no scripts, nothing from elsewhere. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "aggregator/server_internal.h"

static const char head[] =
    "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">"
    "<meta name=\"viewport\" content=\"width=device-width\">"
    "<meta http-equiv=\"refresh\" content=\"10\"><title>Shoal aggregator</title><style>"
    "body{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;"
    "color:#1b2733;background:#fff}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}"
    "table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25rem .6rem;"
    "border-bottom:1px solid #dde3e8;vertical-align:top}th{font-weight:600}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}"
    ".verdict{padding:.7rem 1rem;border-left:5px solid #2a7a4b;background:#eef6f0}"
    ".verdict.warn{border-color:#a8620a;background:#fdf4e7}"
    ".verdict.bad{border-color:#a42020;background:#fbeeee}"
    "code{font-size:.9em}@media(prefers-color-scheme:dark){body{color:#dce3ea;background:#14191e}"
    "th,td{border-color:#2d3740}.verdict{background:#17261d}.verdict.warn{background:#2b2214}"
    ".verdict.bad{background:#2d1717}}</style>";

static void put(sh_buf *out, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* What does not fit is left out: the buffer's limit is the page's. */
static void put(sh_buf *out, const char *format, ...)
{
    char text[2048];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n > 0)
        (void)!sh_buf_append(out, text, SH_MIN((size_t)n, sizeof text - 1));
}

static void put_escaped(sh_buf *out, const char *text)
{
    for (const char *p = text; *p != '\0'; p++) {
        switch (*p) {
        case '&':
            put(out, "&amp;");
            break;
        case '<':
            put(out, "&lt;");
            break;
        case '>':
            put(out, "&gt;");
            break;
        case '"':
            put(out, "&quot;");
            break;
        default:
            put(out, "%c", (unsigned char)*p < ' ' ? ' ' : *p);
        }
    }
}

static void put_time(sh_buf *out, uint64_t ms)
{
    char text[32];
    struct tm tm;
    time_t seconds = (time_t)(ms / 1000);
    if (ms == 0 || gmtime_r(&seconds, &tm) == NULL ||
        strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &tm) == 0)
        put(out, "<td>never</td>");
    else
        put(out, "<td>%s</td>", text);
}

static void put_verdict(sh_buf *out, const server_view *v)
{
    const sh_coord_status *c = &v->coord;
    const char *kind = "", *text;
    if (!v->up) {
        kind = " bad";
        text = "Messages are not taken in: the store is full or broken. See the log.";
    } else if (c->paused) {
        kind = " warn";
        text = "Paused: no training, no merges, until resumed.";
    } else if (c->closed || c->closing) {
        kind = " warn";
        text = c->closed ? "Closed: everything that came in is decided; updates are refused."
                         : "Closing: what is in is merged, no more training.";
    } else if (v->enrolled == 0) {
        kind = " warn";
        text = "No node is enrolled: shoal aggregator enrol KEY lets one in.";
    } else if (v->stale * 2 > v->enrolled) {
        kind = " warn";
        text = "Most nodes have not checked in for a long time.";
    } else if (c->merging || c->gating || c->evaluating) {
        text = c->merging  ? "Merging a candidate."
               : c->gating ? "Gating a candidate on the operator's texts."
                           : "Nodes score a candidate on their own feedback.";
    } else {
        text = c->rounds_begun ? "Rounds are running; updates are being collected."
                               : "Watching: too few nodes report drift to begin rounds.";
    }
    put(out, "<p class=\"verdict%s\"><strong>%s</strong><br>", kind, text);
    put(out,
        "Release %llu · round %u · %u updates wait · %llu of %llu nodes reporting, %llu drifting · "
        "%llu connections</p>",
        (unsigned long long)c->version, c->round, c->buffered, (unsigned long long)v->reporting,
        (unsigned long long)v->enrolled, (unsigned long long)v->drifting,
        (unsigned long long)v->connections);
}

static void put_number(sh_buf *out, double x)
{
    if (isfinite(x))
        put(out, "<td class=\"n\">%.4f</td>", x);
    else
        put(out, "<td class=\"n\">–</td>");
}

static void put_releases(sh_buf *out, const server_view *v)
{
    put(out, "<h2>Decisions</h2><div class=\"wide\"><table><tr><th class=\"n\">Candidate<th "
             "class=\"n\">Release<th>Time (UTC)<th>Verdict<th class=\"n\">Parent's loss<th "
             "class=\"n\">Its loss<th class=\"n\">Updates<th class=\"n\">Canaries</tr>");
    for (size_t i = 0; i < v->n_releases; i++) {
        const sh_release_row *r = &v->releases[i];
        put(out, "<tr><td class=\"n\">%llu</td>", (unsigned long long)r->candidate);
        if (r->version > 0)
            put(out, "<td class=\"n\">%llu</td>", (unsigned long long)r->version);
        else
            put(out, "<td class=\"n\">–</td>");
        put_time(out, r->at_ms);
        put(out, "<td>");
        put_escaped(out, r->verdict);
        put(out, "</td>");
        put_number(out, r->suite.b[0] || r->loss_parent != 0 ? r->loss_parent : NAN);
        put_number(out, r->suite.b[0] || r->loss_candidate != 0 ? r->loss_candidate : NAN);
        put(out, "<td class=\"n\">%u</td><td class=\"n\">%u</td></tr>", r->updates,
            r->canary_nodes);
    }
    put(out, "</table></div>");
}

static void put_nodes(sh_buf *out, const server_view *v)
{
    char hex[SH_HASH_HEX_BYTES];
    put(out, "<h2>Nodes</h2><div class=\"wide\"><table><tr><th>Key<th>Name<th>State<th>Last "
             "check-in (UTC)<th class=\"n\">Release<th class=\"n\">Inferences<th "
             "class=\"n\">Dropped</tr>");
    for (size_t i = 0; i < v->n_nodes; i++) {
        const view_node *n = &v->nodes[i];
        sh_hex(n->key.b, sizeof n->key.b, hex);
        put(out, "<tr><td><code>%.16s</code></td><td>", hex);
        put_escaped(out, n->name);
        put(out, "</td><td>%s</td>",
            n->revoked        ? "revoked"
            : n->last_ms == 0 ? "enrolled, never seen"
            : n->stale        ? "stale"
            : n->drifting     ? "drifting"
                              : "reporting");
        put_time(out, n->last_ms);
        put(out, "<td class=\"n\">%llu</td><td class=\"n\">%llu</td><td class=\"n\">%llu</td></tr>",
            (unsigned long long)n->version, (unsigned long long)n->inferences,
            (unsigned long long)n->dropped);
    }
    put(out, "</table></div>");
    if (v->enrolled + v->revoked > v->n_nodes)
        put(out, "<p>%llu more: shoal aggregator nodes lists them.</p>",
            (unsigned long long)(v->enrolled + v->revoked - v->n_nodes));
}

static void put_updates(sh_buf *out, const server_view *v)
{
    const sh_coord_status *c = &v->coord;
    put(out, "<h2>Updates</h2><p>%llu in, %llu merged, %u waiting",
        (unsigned long long)c->updates_in, (unsigned long long)c->updates_merged, c->buffered);
    for (int i = SH_REASON_NONE + 1; i < SH_REASONS; i++)
        if (c->updates_refused[i] > 0)
            put(out, ", %llu refused (%s)", (unsigned long long)c->updates_refused[i],
                sh_reason_name((sh_reason)i));
    put(out, ".</p>");
}

static void put_parent(sh_buf *out, const server_view *v)
{
    const sh_coord_status *c = &v->coord;
    if (!c->relay)
        return;
    put(out, "<p>A relay of <code>");
    put_escaped(out, v->upstream);
    put(out, "</code>, which is %s: %llu updates made for it, %llu owed.</p>",
        c->parent_welcome ? "connected" : (c->parent_up ? "reached, and does not know it" : "away"),
        (unsigned long long)c->relayed, (unsigned long long)c->relay_owed);
}

void server_handle_page(void *arg, const sh_http_request *request, sh_http_reply *reply)
{
    (void)request;
    server_view *view = server_view_copy(arg);
    if (view == NULL) {
        sh_http_fail(reply, 503, "overloaded_error", NULL, NULL, "no memory");
        return;
    }
    sh_buf *out = &reply->body;
    (void)!sh_buf_append(out, head, sizeof head - 1);
    put(out, "<h1>Shoal aggregator</h1>");
    put_parent(out, view);
    put_verdict(out, view);
    put_releases(out, view);
    put_updates(out, view);
    put_nodes(out, view);
    put(out, "<p>shoal-aggregator %s · numbers for programs: <a href=\"/metrics\">/metrics</a></p>",
        SHOAL_VERSION);
    reply->content_type = "text/html; charset=utf-8";
    free(view);
}
