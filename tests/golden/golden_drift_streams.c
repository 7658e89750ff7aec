/*
 * Our e-detector on the Bernoulli streams on which other drift detectors were measured.
 *
 * As a user would, each stream's own first REFERENCE observations are the reference; the detector
 * runs from there. An alarm at log(RUN_LENGTH); after one the detector starts again from M = 0.
 * Counted as the golden file does: alarms on the stable stream per 10,000 observations; delay from
 * the change to the first alarm after it, alarms before the change reset the detector.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "shared/stats/edetector.h"
#include "tests/golden/golden.h"

#define REFERENCE  2000
#define RUN_LENGTH 50000.0
#define CHANGE     5000 /* index of the first changed observation; the golden README's */
#define MARGIN     2.0  /* standard errors of the reference mean: what the monitor uses */
/* Goals: design section 11. Delays are held below HDDM_A's, on streams of which its file says that
 * it missed none; one stream in a hundred may be missed. */
#define FALSE_ALARMS_MAX 0.1 /* per 10,000 observations of the stable stream */
#define MISSED_MAX       0.01
#define NAME_BYTES       128

/* CRC-32 of zlib (IEEE 802.3, reflected). */
static uint32_t crc32_of(const uint8_t *bytes, size_t n)
{
    uint32_t crc = 0xffffffffU;
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        for (int k = 0; k < 8; k++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320U : 0);
    }
    return ~crc;
}

static unsigned bit(const uint8_t *row, size_t i)
{
    return row[i / 8] >> (7 - i % 8) & 1U; /* most significant first */
}

typedef struct {
    unsigned alarms;      /* before the change */
    size_t watched;       /* observations */
    long change_to_alarm; /* -1: none */
} outcome;

static outcome run_stream(const uint8_t *row, size_t n, size_t change)
{
    outcome result = {0, 0, -1};
    sh_reference reference = {0};
    for (size_t i = 0; i < REFERENCE; i++)
        sh_reference_add(&reference, bit(row, i));
    /* The draws are independent, which the other detectors take for granted too. */
    sh_reference_stats stats = sh_reference_get(&reference, true);
    sh_edetector detector;
    sh_edetector_init(&detector, stats.mean + MARGIN * stats.mean_error, stats.excess_variance);
    for (size_t i = REFERENCE; i < n; i++) {
        result.watched++;
        sh_edetector_update(&detector, bit(row, i));
        if (sh_edetector_log_value(&detector) < log(RUN_LENGTH))
            continue;
        sh_edetector_reset(&detector);
        if (i >= change) {
            result.change_to_alarm = (long)(i - change + 1);
            break;
        }
        result.alarms++;
    }
    return result;
}

static void check_unpacking(golden *g, const char *stream, size_t row, const uint8_t *bytes,
                            size_t n_bytes, int32_t ones, uint32_t crc)
{
    int32_t counted = 0;
    for (size_t i = 0; i < n_bytes * 8; i++)
        counted += (int32_t)bit(bytes, i);
    golden_check(g, counted == ones, "%s, row %zu: %d ones, expected %d", stream, row, counted,
                 ones);
    uint32_t ours = crc32_of(bytes, n_bytes);
    golden_check(g, ours == crc, "%s, row %zu: CRC-32 %08x, expected %08x", stream, row, ours, crc);
}

/* HDDM_A's recorded delay on a stream, NAN when the file has none. */
static double recorded_delay(const json_t *detectors, const char *stream, const char *name)
{
    char key[NAME_BYTES];
    const char *kind = strchr(stream, '_');
    bool gradual = strncmp(stream, "gradual", strlen("gradual")) == 0;
    snprintf(key, sizeof(key), "delay%s", gradual ? "_gradual" : kind ? kind : "");
    size_t i;
    json_t *row;
    json_array_foreach(json_object_get(detectors, "detectors"), i, row)
    {
        const char *detector = json_string_value(json_object_get(row, "detector"));
        const json_t *delay = json_object_get(row, key);
        if (detector != NULL && strncmp(detector, name, strlen(name)) == 0 && json_is_number(delay))
            return json_number_value(delay);
    }
    return NAN;
}

static void judge_changed(golden *g, const char *stream, const json_t *detectors, double delay,
                          double missed)
{
    double hddm_a = recorded_delay(detectors, stream, "HDDM_A");
    golden_note(g, "%s: delay %.0f, missed %.2f; recorded delays: HDDM_A %.0f, ADWIN (MOA) %.0f",
                stream, delay, missed, hddm_a, recorded_delay(detectors, stream, "ADWIN, MOA"));
    golden_check(g, missed <= MISSED_MAX, "%s: missed %.3f, at most %.3f", stream, missed,
                 MISSED_MAX);
    if (isnan(hddm_a))
        golden_skip(g, "%s: no delay of HDDM_A is recorded", stream);
    else
        golden_check(g, delay < hddm_a, "%s: delay %.1f, HDDM_A's is %.1f", stream, delay, hddm_a);
}

static sh_status run_family(golden *g, const safetensors *file, const safetensor *bits,
                            const json_t *detectors, sh_error *err)
{
    char stream[NAME_BYTES], name[NAME_BYTES + 8];
    const safetensor *ones, *crc;
    size_t n_name = strlen(bits->name) - strlen(".bits");
    if (n_name >= sizeof(stream) || bits->n_dims != 2)
        return sh_fail(err, SH_ERR_INVALID, "'%s' is no table of streams", bits->name);
    memcpy(stream, bits->name, n_name);
    stream[n_name] = '\0';
    snprintf(name, sizeof(name), "%s.ones", stream);
    SH_TRY(safetensors_need(file, name, SAFE_I32, &ones, err));
    snprintf(name, sizeof(name), "%s.crc32", stream);
    SH_TRY(safetensors_need(file, name, SAFE_U32, &crc, err));
    double length;
    snprintf(name, sizeof(name), "%s.length", stream);
    SH_TRY(safetensors_scalar(file, name, &length, err));
    size_t rows = bits->shape[0], row_bytes = bits->shape[1];
    bool stable = strcmp(stream, "stable") == 0;
    if (rows == 0 || ones->n != rows || crc->n != rows || length > (double)row_bytes * 8 ||
        length <= (stable ? REFERENCE : CHANGE))
        return sh_fail(err, SH_ERR_INVALID, "'%s': its parts have other lengths", stream);
    size_t n = (size_t)length;
    double delays = 0, found = 0, alarms = 0, watched = 0;
    for (size_t r = 0; r < rows; r++) {
        const uint8_t *row = (const uint8_t *)bits->data + r * row_bytes;
        check_unpacking(g, stream, r, row, row_bytes, ((const int32_t *)ones->data)[r],
                        ((const uint32_t *)crc->data)[r]);
        outcome o = run_stream(row, n, stable ? n : CHANGE);
        alarms += o.alarms;
        watched += (double)o.watched;
        if (o.change_to_alarm >= 0) {
            delays += (double)o.change_to_alarm;
            found++;
        }
    }
    if (!stable) {
        judge_changed(g, stream, detectors, delays / found, 1 - found / (double)rows);
        return SH_OK;
    }
    double rate = alarms / watched * 10000;
    golden_note(g, "stable: %.0f false alarms in %.0f observations, %.3f per 10,000", alarms,
                watched, rate);
    golden_check(g, rate <= FALSE_ALARMS_MAX, "stable: %.3f false alarms per 10,000, at most %.3f",
                 rate, FALSE_ALARMS_MAX);
    return SH_OK;
}

static sh_status run(golden *g, const json_t *c, sh_error *err)
{
    sh_status status = SH_OK;
    safetensors file = {0};
    json_t *detectors = NULL;
    const char *path;
    SH_GOTO(golden_file(g, c, "detectors", &path, err));
    SH_GOTO(sh_json_load(path, &detectors, err));
    SH_GOTO(golden_file(g, c, "file", &path, err));
    SH_GOTO(safetensors_open(path, &file, err));
    size_t families = 0;
    for (size_t i = 0; i < file.n; i++) {
        const char *dot = strrchr(file.tensors[i].name, '.');
        if (dot == NULL || strcmp(dot, ".bits") != 0)
            continue;
        families++;
        SH_GOTO(run_family(g, &file, &file.tensors[i], detectors, err));
    }
    golden_check(g, families > 0, "the file has no streams");
cleanup:
    safetensors_release(&file);
    json_decref(detectors);
    return status;
}

int main(void)
{
    return golden_main("drift_streams", run);
}
