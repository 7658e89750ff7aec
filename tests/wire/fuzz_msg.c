/*
 * Messages: any bytes end in a status; what is accepted encodes to the same bytes. The input is
 * tried as it is, and, because nobody guesses a hash, as a type and a body in a right envelope, of
 * version 1, or 2 when the type's highest bit is set, or 3 when the one below it is.
 */
#include <string.h>

#include "tests/wire/sample.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try(const uint8_t *data, size_t size)
{
    sh_msg msg;
    sh_error err = {0};
    sh_status status = sh_msg_decode(data, size, &msg, &err);
    if (status != SH_OK) {
        SH_ASSERT(err.code == status && err.text[0]);
        return;
    }
    sh_buf again;
    sh_buf_init(&again, SH_WIRE_MESSAGE_MAX);
    SH_ASSERT(sh_msg_encode(&msg, &again, NULL) == SH_OK);
    SH_ASSERT(again.len == size && memcmp(again.data, data, size) == 0);
    sh_buf_release(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    try(data, size);
    if (size == 0 || size > SH_WIRE_MESSAGE_MAX - 64)
        return 0;
    sh_buf wrapped;
    sh_buf_init(&wrapped, SH_WIRE_MESSAGE_MAX);
    unsigned version = data[0] & 0x40 ? 3 : data[0] & 0x80 ? 2 : 1;
    sample_wrap(version, data[0] & 0x3f, data + 1, size - 1, &wrapped);
    try(wrapped.data, wrapped.len);
    sh_buf_release(&wrapped);
    return 0;
}
