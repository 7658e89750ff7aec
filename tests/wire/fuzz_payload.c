/* The payloads of items: what is accepted encodes to the same bytes. */
#include <string.h>

#include "shared/wire/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const sh_buf *again, const uint8_t *data, size_t size)
{
    SH_ASSERT(again->len == size && memcmp(again->data, data, size) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    sh_buf again;
    sh_buf_init(&again, SH_WIRE_MESSAGE_MAX);
    sh_update_meta update;
    sh_alarm alarm;
    sh_evaluation evaluation;
    sh_error err = {0};
    if (sh_update_meta_decode(data, size, &update, &err) == SH_OK) {
        SH_ASSERT(sh_update_meta_encode(&update, &again, NULL) == SH_OK);
        check(&again, data, size);
    } else {
        SH_ASSERT(err.text[0]);
    }
    sh_buf_clear(&again);
    if (sh_alarm_decode(data, size, &alarm, &err) == SH_OK) {
        SH_ASSERT(sh_alarm_encode(&alarm, &again, NULL) == SH_OK);
        check(&again, data, size);
    }
    sh_buf_clear(&again);
    if (sh_evaluation_decode(data, size, &evaluation, &err) == SH_OK) {
        SH_ASSERT(sh_evaluation_encode(&evaluation, &again, NULL) == SH_OK);
        check(&again, data, size);
    }
    sh_buf_release(&again);
    return 0;
}
