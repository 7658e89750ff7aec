/*
 * An encoded window, little-endian; v is a LEB128 varint in its shortest form, z a zigzag varint:
 *
 *     4 bytes magic "SHWN"; u16 version; u8 flags (1: token counts are whole, 0: suppressed)
 *     u8 metrics, u8 bins, u8 projections, u8 token buckets: the schema, refused if another
 *     u8 0; u32 bytes in all
 *     v origin, index, windows, release, first seq, last seq - first seq, start ms,
 *       end ms - start ms, inferences, prompt tokens, output tokens
 *     v feedback[4], stop[8], edit distance; z log-probability, entropy, repetition sums
 *     float least log-probability
 *     for each metric: v n; z sum; v sum of squares; v bins[16]
 *     two sketches (ttft, token), each: v used buckets; if any: v index of the highest bucket, and
 *       for each used bucket from the highest down: v buckets skipped, v count
 *     256 bytes of distinct ranks; v token counts[64]
 *     z projection sums[16]; z covariance sums[136] (rows of the upper triangle); v drops[4]
 *     8 bytes checksum: first bytes of BLAKE2b-256 of all before
 */
#include "shared/stats/window.h"

#include <math.h>
#include <string.h>

#include "shared/stats/bytes.h"

#define WINDOW_MAGIC 0x4e574853U /* "SHWN" */
#define WINDOW_HEAD  16
#define WINDOW_TAIL  8
#define FLAG_WHOLE   1U
#define VALUE_MAX    4096.0 /* of what goes into a fixed-point sum */
#define LOW_PROBABLE (-64.0)

typedef struct {
    const char *name, *unit;
    double low, high;
    bool model_dependent;
} metric_info;

static const metric_info metrics[SH_METRICS] = {
    [SH_METRIC_NLL] = {"nll", "nats", 0, 16, true},
    [SH_METRIC_REJECT] = {"reject", "share", 0, 1, true},
    [SH_METRIC_LENGTH] = {"length", "doublings", 0, 16, false},
    [SH_METRIC_BYTES] = {"bytes", "share", 0, 1, false},
    [SH_METRIC_PROJECTION] = {"projection", "sd", -4, 4, false},
    [SH_METRIC_BUCKETS] = {"buckets", "sd", -4, 4, false},
};

static const metric_info *info(sh_metric metric)
{
    SH_ASSERT((unsigned)metric < SH_METRICS);
    return &metrics[metric];
}

const char *sh_metric_name(sh_metric metric)
{
    return (unsigned)metric < SH_METRICS ? metrics[metric].name : "?";
}

const char *sh_metric_unit(sh_metric metric)
{
    return (unsigned)metric < SH_METRICS ? metrics[metric].unit : "?";
}

bool sh_metric_is_model_dependent(sh_metric metric)
{
    return info(metric)->model_dependent;
}

double sh_metric_low(sh_metric metric)
{
    return info(metric)->low;
}

double sh_metric_high(sh_metric metric)
{
    return info(metric)->high;
}

static double clip(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

/* A finite value in fixed point; what is not finite counts as 0. */
static int64_t fixed(double value)
{
    return isfinite(value) ? llround(clip(value, -VALUE_MAX, VALUE_MAX) * SH_FIXED_POINT) : 0;
}

/* A prompt as far as its record shows it, for the distinct count. */
static uint64_t fingerprint(const sh_record *record)
{
    uint64_t h = sh_mix64(record->prompt_tokens), word;
    for (size_t i = 0; i < sizeof(record->bucket); i += sizeof(word)) {
        memcpy(&word, record->bucket + i, sizeof(word));
        h = sh_mix64(h ^ word);
    }
    for (size_t i = 0; i < SH_PROJECTIONS; i += sizeof(word)) {
        memcpy(&word, record->projection + i, sizeof(word));
        h = sh_mix64(h ^ word);
    }
    return h;
}

void sh_window_init(sh_window *window, uint64_t origin, uint64_t index, uint32_t release_version)
{
    memset(window, 0, sizeof(*window));
    window->origin = origin;
    window->index = index;
    window->windows = 1;
    window->release_version = release_version;
}

void sh_window_add(sh_window *window, const sh_record *record)
{
    bool first = window->inferences == 0;
    window->first_seq = first ? record->seq : SH_MIN(window->first_seq, record->seq);
    window->last_seq = first ? record->seq : SH_MAX(window->last_seq, record->seq);
    window->start_ms = first ? record->at_ms : SH_MIN(window->start_ms, record->at_ms);
    window->end_ms = first ? record->at_ms : SH_MAX(window->end_ms, record->at_ms);
    window->inferences++;
    window->prompt_tokens += record->prompt_tokens;
    window->output_tokens += record->output_tokens;
    window->stop[SH_MIN(record->stop, SH_WINDOW_STOPS - 1)]++;
    window->logprob_sum += fixed(record->mean_logprob);
    window->entropy_sum += fixed(record->mean_entropy);
    window->repeated_sum += fixed(record->repeated_4grams);
    if (isfinite(record->least_logprob) && record->least_logprob < window->least_logprob)
        window->least_logprob = (float)clip(record->least_logprob, LOW_PROBABLE, 0);
    sh_quantiles_add(&window->ttft_us, record->ttft_us);
    if (record->output_tokens > 1)
        sh_quantiles_add(&window->token_us, record->token_us);
    sh_distinct_add(&window->prompts, fingerprint(record));
    for (unsigned b = 0; b < SH_TOKEN_BUCKETS; b++)
        window->bucket[b] += sh_record_bucket(record, b);
    int64_t *covariance = window->covariance_sum;
    for (size_t i = 0; i < SH_PROJECTIONS; i++) {
        window->projection_sum[i] += record->projection[i];
        for (size_t j = i; j < SH_PROJECTIONS; j++)
            *covariance++ += record->projection[i] * record->projection[j];
    }
}

void sh_window_add_metric(sh_window *window, sh_metric metric, double value)
{
    if (isnan(value))
        return;
    const metric_info *m = info(metric);
    sh_window_metric *at = &window->metric[metric];
    value = clip(value, m->low, m->high);
    at->n++;
    at->sum += fixed(value);
    at->square_sum += fixed(value * value);
    double x = (value - m->low) / (m->high - m->low);
    at->histogram[SH_MIN((unsigned)(x * SH_HISTOGRAM_BINS), SH_HISTOGRAM_BINS - 1U)]++;
}

double sh_window_mean(const sh_window *window, sh_metric metric)
{
    const sh_window_metric *m = &window->metric[metric];
    return m->n ? (double)m->sum / SH_FIXED_POINT / m->n : 0;
}

double sh_window_spread(const sh_window *window, sh_metric metric)
{
    const sh_window_metric *m = &window->metric[metric];
    if (m->n < 2)
        return 0;
    double mean = sh_window_mean(window, metric);
    double centred = (double)m->square_sum / SH_FIXED_POINT - m->n * mean * mean;
    return centred > 0 ? sqrt(centred / (m->n - 1)) : 0;
}

bool sh_window_same(const sh_window *a, const sh_window *b)
{
    return a->origin == b->origin && a->index == b->index && a->windows == b->windows;
}

/* Adds arrays of one integer type; false when an addition overflows. */
#define ADD_ARRAY(into, from) add_array_ok((into), (from), SH_COUNT(into))
#define DEFINE_ADD(name, type)                                                                     \
    static bool name(type *into, const type *from, size_t n)                                       \
    {                                                                                              \
        bool ok = true;                                                                            \
        for (size_t i = 0; i < n; i++)                                                             \
            ok = !__builtin_add_overflow(into[i], from[i], &into[i]) && ok;                        \
        return ok;                                                                                 \
    }
DEFINE_ADD(add_u32, uint32_t)
DEFINE_ADD(add_u64, uint64_t)
DEFINE_ADD(add_i64, int64_t)
#define add_array_ok(into, from, n)                                                                \
    _Generic((into), uint32_t * : add_u32, uint64_t * : add_u64, int64_t * : add_i64)(into, from, n)
#define ADD_ONE(into, from, field) add_array_ok(&(into)->field, &(from)->field, 1)

static bool add_counts(sh_window *into, const sh_window *from)
{
    bool ok = ADD_ONE(into, from, windows) && ADD_ONE(into, from, inferences) &&
              ADD_ONE(into, from, prompt_tokens) && ADD_ONE(into, from, output_tokens) &&
              ADD_ONE(into, from, edit_distance) && ADD_ONE(into, from, logprob_sum) &&
              ADD_ONE(into, from, entropy_sum) && ADD_ONE(into, from, repeated_sum) &&
              ADD_ARRAY(into->feedback, from->feedback) && ADD_ARRAY(into->stop, from->stop) &&
              ADD_ARRAY(into->bucket, from->bucket) && ADD_ARRAY(into->drops, from->drops) &&
              ADD_ARRAY(into->projection_sum, from->projection_sum) &&
              ADD_ARRAY(into->covariance_sum, from->covariance_sum);
    for (size_t i = 0; ok && i < SH_METRICS; i++) {
        sh_window_metric *a = &into->metric[i];
        const sh_window_metric *b = &from->metric[i];
        ok = ADD_ONE(a, b, n) && ADD_ONE(a, b, sum) && ADD_ONE(a, b, square_sum) &&
             ADD_ARRAY(a->histogram, b->histogram);
    }
    return ok;
}

sh_status sh_window_merge(sh_window *into, const sh_window *from, sh_error *err)
{
    if (sh_window_same(into, from))
        return sh_fail(err, SH_ERR_EXISTS, "window %llu of this node is already counted",
                       (unsigned long long)from->index);
    if (into->release_version != from->release_version)
        return sh_fail(err, SH_ERR_MISMATCH, "windows of releases %u and %u do not merge",
                       into->release_version, from->release_version);
    sh_window sum = *into;
    bool from_first =
        from->origin < into->origin || (from->origin == into->origin && from->index < into->index);
    if (from_first) {
        sum.origin = from->origin;
        sum.index = from->index;
    }
    if (from->inferences > 0) {
        bool empty = into->inferences == 0;
        sum.first_seq = empty ? from->first_seq : SH_MIN(into->first_seq, from->first_seq);
        sum.start_ms = empty ? from->start_ms : SH_MIN(into->start_ms, from->start_ms);
        sum.last_seq = SH_MAX(into->last_seq, from->last_seq);
        sum.end_ms = SH_MAX(into->end_ms, from->end_ms);
    }
    sum.least_logprob = SH_MIN(into->least_logprob, from->least_logprob);
    sh_distinct_merge(&sum.prompts, &from->prompts);
    if (!add_counts(&sum, from) || sh_quantiles_merge(&sum.ttft_us, &from->ttft_us) != SH_OK ||
        sh_quantiles_merge(&sum.token_us, &from->token_us) != SH_OK)
        return sh_fail(err, SH_ERR_LIMIT, "window %llu: a merged count would overflow",
                       (unsigned long long)from->index);
    *into = sum;
    return SH_OK;
}

static void write_quantiles(sh_writer *w, const sh_quantiles *sketch)
{
    uint32_t used = 0, skipped = 0;
    for (size_t k = 0; k < SH_QUANTILE_BUCKETS; k++)
        used += sketch->count[k] > 0;
    sh_write_varint(w, used);
    if (used == 0)
        return;
    sh_write_varint(w, sketch->top);
    for (size_t k = 0; k < SH_QUANTILE_BUCKETS; k++) {
        if (sketch->count[k] == 0) {
            skipped++;
            continue;
        }
        sh_write_varint(w, skipped);
        sh_write_varint(w, sketch->count[k]);
        skipped = 0;
    }
}

static void write_metric(sh_writer *w, const sh_window_metric *metric)
{
    sh_write_varint(w, metric->n);
    sh_write_zigzag(w, metric->sum);
    sh_write_varint(w, (uint64_t)metric->square_sum);
    for (size_t b = 0; b < SH_HISTOGRAM_BINS; b++)
        sh_write_varint(w, metric->histogram[b]);
}

static void write_body(sh_writer *w, const sh_window *x, bool whole)
{
    const uint64_t numbers[] = {x->origin,       x->index,
                                x->windows,      x->release_version,
                                x->first_seq,    x->last_seq - x->first_seq,
                                x->start_ms,     x->end_ms - x->start_ms,
                                x->inferences,   x->prompt_tokens,
                                x->output_tokens};
    for (size_t i = 0; i < SH_COUNT(numbers); i++)
        sh_write_varint(w, numbers[i]);
    for (size_t i = 0; i < SH_FEEDBACK_KINDS; i++)
        sh_write_varint(w, x->feedback[i]);
    for (size_t i = 0; i < SH_WINDOW_STOPS; i++)
        sh_write_varint(w, x->stop[i]);
    sh_write_varint(w, x->edit_distance);
    sh_write_zigzag(w, x->logprob_sum);
    sh_write_zigzag(w, x->entropy_sum);
    sh_write_zigzag(w, x->repeated_sum);
    sh_write_float(w, x->least_logprob);
    for (size_t i = 0; i < SH_METRICS; i++)
        write_metric(w, &x->metric[i]);
    write_quantiles(w, &x->ttft_us);
    write_quantiles(w, &x->token_us);
    sh_write_bytes(w, x->prompts.rank, SH_DISTINCT_REGISTERS);
    for (size_t i = 0; i < SH_TOKEN_BUCKETS; i++)
        sh_write_varint(w, whole || x->bucket[i] >= SH_TOKEN_COUNT_LEAST ? x->bucket[i] : 0);
    for (size_t i = 0; i < SH_PROJECTIONS; i++)
        sh_write_zigzag(w, x->projection_sum[i]);
    for (size_t i = 0; i < SH_COVARIANCES; i++)
        sh_write_zigzag(w, x->covariance_sum[i]);
    for (size_t i = 0; i < SH_DROPS; i++)
        sh_write_varint(w, x->drops[i]);
}

sh_status sh_window_encode(const sh_window *window, bool whole, sh_buf *out)
{
    sh_buf body;
    sh_buf_init(&body, SH_WINDOW_BYTES_MAX);
    sh_writer w = {&body, SH_OK};
    sh_write_fixed(&w, WINDOW_MAGIC, 4);
    sh_write_fixed(&w, SH_WINDOW_VERSION, 2);
    const uint8_t head[] = {whole ? FLAG_WHOLE : 0, SH_METRICS,       SH_HISTOGRAM_BINS,
                            SH_PROJECTIONS,         SH_TOKEN_BUCKETS, 0};
    sh_write_bytes(&w, head, sizeof(head));
    sh_write_fixed(&w, 0, 4); /* the length, set below */
    write_body(&w, window, whole);
    sh_status status = w.status;
    if (status == SH_OK) {
        uint64_t bytes = body.len + WINDOW_TAIL;
        for (unsigned i = 0; i < 4; i++)
            body.data[WINDOW_HEAD - 4 + i] = (uint8_t)(bytes >> (8 * i));
        sh_write_fixed(&w, sh_checksum64(body.data, body.len), WINDOW_TAIL);
        status = w.status;
    }
    if (status == SH_OK)
        status = sh_buf_append(out, body.data, body.len);
    sh_buf_release(&body);
    return status;
}

static void read_quantiles(sh_reader *r, sh_quantiles *out)
{
    uint32_t used = sh_read_varint32(r), k = 0;
    if (used == 0)
        return;
    out->top = sh_read_varint32(r);
    if (out->top > SH_QUANTILE_INDEX_MAX || used > SH_QUANTILE_BUCKETS)
        r->ok = false;
    for (uint32_t i = 0; r->ok && i < used; i++, k++) {
        uint32_t skipped = sh_read_varint32(r), count = sh_read_varint32(r);
        if (count == 0 || skipped >= SH_QUANTILE_BUCKETS - k || (i == 0 && skipped > 0)) {
            r->ok = false;
            return;
        }
        k += skipped;
        out->count[k] = count;
        out->n += count;
    }
    if (out->n > UINT32_MAX)
        r->ok = false;
}

static void read_metric(sh_reader *r, sh_window_metric *metric)
{
    metric->n = sh_read_varint32(r);
    metric->sum = sh_read_zigzag(r);
    uint64_t squares = sh_read_varint(r), total = 0;
    for (size_t b = 0; b < SH_HISTOGRAM_BINS; b++) {
        metric->histogram[b] = sh_read_varint32(r);
        total += metric->histogram[b];
    }
    if (squares > INT64_MAX || total != metric->n)
        r->ok = false;
    metric->square_sum = r->ok ? (int64_t)squares : 0;
}

static void read_counts(sh_reader *r, sh_window *x)
{
    x->origin = sh_read_varint(r);
    x->index = sh_read_varint(r);
    x->windows = sh_read_varint32(r);
    x->release_version = sh_read_varint32(r);
    x->first_seq = sh_read_varint(r);
    uint64_t seqs = sh_read_varint(r);
    x->start_ms = sh_read_varint(r);
    uint64_t ms = sh_read_varint(r);
    if (__builtin_add_overflow(x->first_seq, seqs, &x->last_seq) ||
        __builtin_add_overflow(x->start_ms, ms, &x->end_ms) || x->windows == 0)
        r->ok = false;
    x->inferences = sh_read_varint32(r);
    x->prompt_tokens = sh_read_varint(r);
    x->output_tokens = sh_read_varint(r);
    for (size_t i = 0; i < SH_FEEDBACK_KINDS; i++)
        x->feedback[i] = sh_read_varint32(r);
    for (size_t i = 0; i < SH_WINDOW_STOPS; i++)
        x->stop[i] = sh_read_varint32(r);
    x->edit_distance = sh_read_varint(r);
    x->logprob_sum = sh_read_zigzag(r);
    x->entropy_sum = sh_read_zigzag(r);
    x->repeated_sum = sh_read_zigzag(r);
    x->least_logprob = sh_read_float(r);
    if (!(x->least_logprob <= 0 && x->least_logprob >= LOW_PROBABLE))
        r->ok = false;
}

static void read_body(sh_reader *r, sh_window *x, bool whole)
{
    read_counts(r, x);
    for (size_t i = 0; i < SH_METRICS; i++)
        read_metric(r, &x->metric[i]);
    read_quantiles(r, &x->ttft_us);
    read_quantiles(r, &x->token_us);
    for (size_t i = 0; i < SH_DISTINCT_REGISTERS; i++) {
        x->prompts.rank[i] = (uint8_t)sh_read_fixed(r, 1);
        if (x->prompts.rank[i] > SH_DISTINCT_RANK_MAX)
            r->ok = false;
    }
    for (size_t i = 0; i < SH_TOKEN_BUCKETS; i++) {
        x->bucket[i] = sh_read_varint(r);
        if (!whole && x->bucket[i] > 0 && x->bucket[i] < SH_TOKEN_COUNT_LEAST)
            r->ok = false; /* a sender that does not suppress */
    }
    for (size_t i = 0; i < SH_PROJECTIONS; i++)
        x->projection_sum[i] = sh_read_zigzag(r);
    for (size_t i = 0; i < SH_COVARIANCES; i++)
        x->covariance_sum[i] = sh_read_zigzag(r);
    for (size_t i = 0; i < SH_DROPS; i++)
        x->drops[i] = sh_read_varint(r);
    if (r->at != r->end)
        r->ok = false;
}

sh_status sh_window_decode(const void *bytes, size_t n, sh_window *out, sh_error *err)
{
    sh_reader head = {bytes, (const uint8_t *)bytes + n, true};
    if (n < WINDOW_HEAD + WINDOW_TAIL || n > SH_WINDOW_BYTES_MAX)
        return sh_fail(err, SH_ERR_INVALID, "window: %zu bytes is no window's length", n);
    if (sh_read_fixed(&head, 4) != WINDOW_MAGIC)
        return sh_fail(err, SH_ERR_INVALID, "window: wrong magic");
    unsigned version = (unsigned)sh_read_fixed(&head, 2), flags = (unsigned)sh_read_fixed(&head, 1);
    if (version != SH_WINDOW_VERSION)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "window: version %u, expected %d", version,
                       SH_WINDOW_VERSION);
    const uint8_t schema[] = {SH_METRICS, SH_HISTOGRAM_BINS, SH_PROJECTIONS, SH_TOKEN_BUCKETS};
    if (memcmp(head.at, schema, sizeof(schema)) != 0)
        return sh_fail(err, SH_ERR_UNSUPPORTED, "window: its schema is not ours");
    head.at += sizeof(schema);
    if (sh_read_fixed(&head, 1) != 0 || flags > FLAG_WHOLE || sh_read_fixed(&head, 4) != n)
        return sh_fail(err, SH_ERR_INVALID, "window: head and length disagree");
    sh_reader tail = {(const uint8_t *)bytes + n - WINDOW_TAIL, (const uint8_t *)bytes + n, true};
    if (sh_read_fixed(&tail, WINDOW_TAIL) != sh_checksum64(bytes, n - WINDOW_TAIL))
        return sh_fail(err, SH_ERR_CORRUPT, "window: checksum does not hold");
    sh_window window = {0};
    sh_reader body = {head.at, (const uint8_t *)bytes + n - WINDOW_TAIL, true};
    read_body(&body, &window, flags & FLAG_WHOLE);
    if (!body.ok)
        return sh_fail(err, SH_ERR_INVALID, "window %llu: a count is cut off or out of range",
                       (unsigned long long)window.index);
    *out = window;
    return SH_OK;
}
