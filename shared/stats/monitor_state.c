/*
 * An encoded monitor, little-endian; v is a LEB128 varint, d a float64, f a float32:
 *
 *     4 bytes magic "SHMN"; u16 version; u8 metrics; u8 lambdas of a detector
 *     v bytes of the open window, then the window (whole; see window.c)
 *     u8 has a release; v release
 *     for each metric: baseline; reference; up and down detector
 *         baseline: u8 ready, and if so d mean, spread, error of the mean, excess variance
 *         reference: v n; if n > 0: d sum, sum of squares, open batch's sum; f batches[n / 16]
 *         detector (only with a ready baseline): d bound, excess variance, log M[6]
 *     profile: v projections, prompts, bucket total; zigzag sums[16]; v squares[16]; v buckets[64]
 *     v next known release; 4 of: u8 used, and if so v version, two baselines
 *     8 bytes checksum: first bytes of BLAKE2b-256 of all before
 */
#include <math.h>

#include "shared/stats/bytes.h"
#include "shared/stats/monitor_internal.h"

#define STATE_MAGIC   0x4e4d4853U /* "SHMN" */
#define STATE_VERSION 1
#define STATE_TAIL    8

static void write_baseline(sh_writer *w, const sh_baseline *b)
{
    sh_write_fixed(w, b->ready, 1);
    if (!b->ready)
        return;
    sh_write_double(w, b->mean);
    sh_write_double(w, b->spread);
    sh_write_double(w, b->mean_error);
    sh_write_double(w, b->excess_variance);
}

static void write_detector(sh_writer *w, const sh_edetector *d)
{
    sh_write_double(w, d->bound);
    sh_write_double(w, d->excess_variance);
    for (size_t k = 0; k < SH_EDETECTOR_LAMBDAS; k++)
        sh_write_double(w, d->log_m[k]);
}

static void write_watch(sh_writer *w, const sh_watch *watch)
{
    write_baseline(w, &watch->baseline);
    const sh_reference *r = &watch->collecting;
    sh_write_varint(w, r->n);
    if (r->n > 0) {
        sh_write_double(w, r->sum);
        sh_write_double(w, r->square_sum);
        sh_write_double(w, r->batch_sum);
        for (size_t i = 0; i < r->n / SH_REFERENCE_BATCH; i++)
            sh_write_float(w, r->batch[i]);
    }
    if (watch->baseline.ready) {
        write_detector(w, &watch->up);
        write_detector(w, &watch->down);
    }
}

static void write_state(sh_writer *w, const sh_monitor *m)
{
    sh_write_fixed(w, m->has_release, 1);
    sh_write_varint(w, m->release);
    for (size_t i = 0; i < SH_METRICS; i++)
        write_watch(w, &m->watch[i]);
    const sh_profile *p = &m->profile;
    sh_write_varint(w, p->projections);
    sh_write_varint(w, p->prompts);
    sh_write_varint(w, p->bucket_total);
    for (size_t i = 0; i < SH_PROJECTIONS; i++)
        sh_write_zigzag(w, p->projection_sum[i]);
    for (size_t i = 0; i < SH_PROJECTIONS; i++)
        sh_write_varint(w, (uint64_t)p->projection_squares[i]);
    for (size_t i = 0; i < SH_TOKEN_BUCKETS; i++)
        sh_write_varint(w, p->bucket[i]);
    sh_write_varint(w, m->known_next);
    for (size_t k = 0; k < SH_KNOWN_RELEASES; k++) {
        sh_write_fixed(w, m->known[k].used, 1);
        if (!m->known[k].used)
            continue;
        sh_write_varint(w, m->known[k].version);
        for (size_t i = 0; i < SH_MODEL_METRICS; i++)
            write_baseline(w, &m->known[k].baseline[i]);
    }
}

sh_status sh_monitor_encode(const sh_monitor *monitor, sh_buf *out)
{
    sh_status status;
    sh_buf window, body;
    sh_buf_init(&window, SH_WINDOW_BYTES_MAX);
    sh_buf_init(&body, SH_MONITOR_BYTES_MAX);
    SH_GOTO(sh_window_encode(&monitor->window, true, &window));
    sh_writer w = {&body, SH_OK};
    sh_write_fixed(&w, STATE_MAGIC, 4);
    sh_write_fixed(&w, STATE_VERSION, 2);
    sh_write_fixed(&w, SH_METRICS, 1);
    sh_write_fixed(&w, SH_EDETECTOR_LAMBDAS, 1);
    sh_write_varint(&w, window.len);
    sh_write_bytes(&w, window.data, window.len);
    write_state(&w, monitor);
    SH_GOTO(w.status);
    sh_write_fixed(&w, sh_checksum64(body.data, body.len), STATE_TAIL);
    SH_GOTO(w.status);
    status = sh_buf_append(out, body.data, body.len);
cleanup:
    sh_buf_release(&window);
    sh_buf_release(&body);
    return status;
}

static bool read_flag(sh_reader *r)
{
    uint64_t value = sh_read_fixed(r, 1);
    if (value > 1)
        r->ok = false;
    return value == 1;
}

/* A number of ours is finite and, unless it may be negative, not below 0. */
static double read_number(sh_reader *r, bool may_be_negative)
{
    double value = sh_read_double(r);
    if (!isfinite(value) || (!may_be_negative && value < 0))
        r->ok = false;
    return r->ok ? value : 0;
}

static void read_baseline(sh_reader *r, sh_baseline *b)
{
    b->ready = read_flag(r);
    if (!b->ready)
        return;
    b->mean = read_number(r, true);
    b->spread = read_number(r, false);
    b->mean_error = read_number(r, false);
    b->excess_variance = read_number(r, false);
}

static void read_detector(sh_reader *r, sh_edetector *d)
{
    d->bound = read_number(r, false);
    d->excess_variance = read_number(r, false);
    if (!(d->bound > 0 && d->bound < 1))
        r->ok = false;
    for (size_t k = 0; k < SH_EDETECTOR_LAMBDAS; k++) {
        d->log_m[k] = sh_read_double(r); /* may be -infinity */
        if (!(d->log_m[k] <= SH_EDETECTOR_LOG_MAX))
            r->ok = false;
    }
}

static void read_watch(sh_reader *r, bool scored, sh_watch *watch)
{
    read_baseline(r, &watch->baseline);
    if (scored && watch->baseline.ready && !(watch->baseline.spread > 0))
        r->ok = false; /* it is divided by */
    sh_reference *c = &watch->collecting;
    c->n = sh_read_varint32(r);
    if (c->n > SH_REFERENCE_MAX)
        r->ok = false;
    if (r->ok && c->n > 0) {
        c->sum = read_number(r, true);
        c->square_sum = read_number(r, false);
        c->batch_sum = read_number(r, true);
        for (size_t i = 0; i < c->n / SH_REFERENCE_BATCH; i++) {
            c->batch[i] = sh_read_float(r);
            if (!isfinite(c->batch[i]))
                r->ok = false;
        }
    }
    if (watch->baseline.ready) {
        read_detector(r, &watch->up);
        read_detector(r, &watch->down);
    }
}

static void read_profile(sh_reader *r, sh_profile *p)
{
    p->projections = sh_read_varint32(r);
    p->prompts = sh_read_varint32(r);
    p->bucket_total = sh_read_varint(r);
    if (p->projections > SH_REFERENCE_MAX || p->prompts > SH_REFERENCE_MAX ||
        p->bucket_total > (uint64_t)SH_REFERENCE_MAX * SH_TOKEN_BUCKETS * SH_BUCKET_MAX)
        r->ok = false;
    const int64_t sum_max = 128 * (int64_t)p->projections, squares_max = 128 * sum_max;
    for (size_t i = 0; i < SH_PROJECTIONS; i++) {
        p->projection_sum[i] = sh_read_zigzag(r);
        if (p->projection_sum[i] < -sum_max || p->projection_sum[i] > sum_max)
            r->ok = false;
    }
    for (size_t i = 0; i < SH_PROJECTIONS; i++) {
        uint64_t squares = sh_read_varint(r);
        if (squares > (uint64_t)squares_max)
            r->ok = false;
        p->projection_squares[i] = r->ok ? (int64_t)squares : 0;
    }
    for (size_t i = 0; i < SH_TOKEN_BUCKETS; i++) {
        p->bucket[i] = sh_read_varint(r);
        if (p->bucket[i] > p->bucket_total)
            r->ok = false;
    }
}

static void read_state(sh_reader *r, sh_monitor *m)
{
    m->has_release = read_flag(r);
    m->release = sh_read_varint32(r);
    for (size_t i = 0; i < SH_METRICS; i++)
        read_watch(r, i == SH_METRIC_PROJECTION || i == SH_METRIC_BUCKETS, &m->watch[i]);
    read_profile(r, &m->profile);
    m->known_next = sh_read_varint32(r);
    if (m->known_next >= SH_KNOWN_RELEASES)
        r->ok = false;
    for (size_t k = 0; k < SH_KNOWN_RELEASES; k++) {
        m->known[k].used = read_flag(r);
        if (!m->known[k].used)
            continue;
        m->known[k].version = sh_read_varint32(r);
        for (size_t i = 0; i < SH_MODEL_METRICS; i++)
            read_baseline(r, &m->known[k].baseline[i]);
    }
    if (r->at != r->end)
        r->ok = false;
}

static sh_status read_head(const void *bytes, size_t n, sh_reader *r, sh_error *err)
{
    *r = (sh_reader){bytes, (const uint8_t *)bytes + n, true};
    if (sh_read_fixed(r, 4) != STATE_MAGIC || n > SH_MONITOR_BYTES_MAX)
        return sh_fail(err, SH_ERR_INVALID, "monitor state: wrong magic or length");
    unsigned version = (unsigned)sh_read_fixed(r, 2);
    unsigned metrics = (unsigned)sh_read_fixed(r, 1), lambdas = (unsigned)sh_read_fixed(r, 1);
    if (version != STATE_VERSION || metrics != SH_METRICS || lambdas != SH_EDETECTOR_LAMBDAS)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "monitor state: version %u of %u metrics, expected %d of %d", version,
                       metrics, STATE_VERSION, SH_METRICS);
    if ((size_t)(r->end - r->at) < STATE_TAIL)
        return sh_fail(err, SH_ERR_INVALID, "monitor state: cut off");
    r->end -= STATE_TAIL;
    sh_reader tail = {r->end, r->end + STATE_TAIL, true};
    if (sh_read_fixed(&tail, STATE_TAIL) != sh_checksum64(bytes, n - STATE_TAIL))
        return sh_fail(err, SH_ERR_CORRUPT, "monitor state: checksum does not hold");
    return SH_OK;
}

sh_status sh_monitor_decode(const sh_monitor_options *options, const void *bytes, size_t n,
                            sh_monitor **out, sh_error *err)
{
    sh_monitor *m = NULL;
    sh_reader r;
    sh_status status;
    SH_GOTO(read_head(bytes, n, &r, err));
    SH_GOTO(sh_monitor_create(options, &m, err));
    uint64_t window_bytes = sh_read_varint(&r);
    if (!r.ok || window_bytes > (size_t)(r.end - r.at)) {
        status = sh_fail(err, SH_ERR_INVALID, "monitor state: its window is cut off");
        goto cleanup;
    }
    SH_GOTO(sh_window_decode(r.at, (size_t)window_bytes, &m->window, err));
    r.at += window_bytes;
    read_state(&r, m);
    if (!r.ok) {
        status = sh_fail(err, SH_ERR_INVALID, "monitor state: a number is cut off or out of range");
        goto cleanup;
    }
    *out = m;
    m = NULL;
cleanup:
    sh_monitor_destroy(&m);
    return status;
}
