/*
 * Decoders of shared/stats: a window, a record, a monitor's state. The checksum is put right first,
 * or no fuzzer would get past it. What decodes must encode to the same bytes and merge safely.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/stats/bytes.h"
#include "shared/stats/monitor.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check_window(const uint8_t *bytes, size_t n)
{
    sh_window window, other;
    if (sh_window_decode(bytes, n, &window, NULL) != SH_OK)
        return;
    sh_buf again;
    sh_buf_init(&again, SH_WINDOW_BYTES_MAX);
    bool whole = bytes[6] & 1;
    SH_ASSERT(sh_window_encode(&window, whole, &again) == SH_OK);
    SH_ASSERT(again.len == n && memcmp(again.data, bytes, n) == 0);
    sh_buf_release(&again);
    other = window;
    other.index ^= 1;
    (void)!sh_window_merge(&other, &window, NULL);
    for (size_t i = 0; i < SH_METRICS; i++)
        SH_ASSERT(sh_window_spread(&other, (sh_metric)i) >= 0);
    SH_ASSERT(sh_quantiles_get(&other.ttft_us, 0.5) >= 0);
}

static void check_monitor(const uint8_t *bytes, size_t n)
{
    const sh_monitor_options options = {.window = 64, .reference = 64};
    sh_monitor *monitor = NULL;
    sh_window_result closed;
    if (sh_monitor_decode(&options, bytes, n, &monitor, NULL) != SH_OK)
        return;
    (void)!sh_monitor_tick(monitor, 1, &closed);
    sh_monitor_set_release(monitor, 3);
    sh_monitor_destroy(&monitor);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    sh_record record;
    uint8_t *bytes = malloc(size + 1);
    if (bytes == NULL)
        return 0;
    if (size > 0)
        memcpy(bytes, data, size);
    if (size >= 8) {
        uint64_t sum = sh_checksum64(bytes, size - 8);
        for (unsigned i = 0; i < 8; i++)
            bytes[size - 8 + i] = (uint8_t)(sum >> (8 * i));
    }
    (void)!sh_record_decode(bytes, size, &record, NULL);
    check_window(bytes, size);
    check_monitor(bytes, size);
    free(bytes);
    return 0;
}
