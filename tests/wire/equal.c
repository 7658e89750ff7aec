#include "tests/wire/equal.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

sh_buf encoded(const sh_msg *msg)
{
    sh_buf out;
    sh_buf_init(&out, SH_WIRE_MESSAGE_MAX);
    sh_error err = {0};
    if (sh_msg_encode(msg, &out, &err) != SH_OK)
        fail_msg("encode %s: %s", sh_msg_type_name(msg->type), err.text);
    return out;
}

void assert_bytes(sh_bytes got, sh_bytes want)
{
    assert_int_equal(got.n, want.n);
    if (want.n)
        assert_memory_equal(got.data, want.data, want.n);
}

void assert_blob(const sh_blob *a, const sh_blob *b)
{
    assert_memory_equal(&a->sha256, &b->sha256, sizeof(sh_hash));
    assert_int_equal(a->bytes, b->bytes);
    assert_int_equal(a->n_chunks, b->n_chunks);
    if (b->n_chunks)
        assert_memory_equal(a->chunk_hashes, b->chunk_hashes, (size_t)b->n_chunks * 32);
}
