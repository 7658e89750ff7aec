/*
 * A growing byte buffer with a declared maximum, and overflow-checked allocation.
 *
 * Invariant: len <= cap <= max. Owner: the caller, by value; a zeroed sh_buf with max set by
 * sh_buf_init is valid and sh_buf_release takes a zeroed one. Not thread-safe.
 */
#ifndef SH_BASE_BUF_H
#define SH_BASE_BUF_H

#include <string.h>

#include "shared/base/status.h"

typedef struct {
    uint8_t *data;
    size_t len, cap, max;
} sh_buf;

void sh_buf_init(sh_buf *buf, size_t max_bytes);
void sh_buf_release(sh_buf *buf);
void sh_buf_clear(sh_buf *buf); /* len = 0, memory kept */

/* SH_ERR_LIMIT past max, SH_ERR_NO_MEMORY; the buffer is unchanged on error. The few bytes of an
 * encoder's field go in without a call. */
#define SH_BUF_FEW 64u
SH_MUST_USE sh_status sh_buf_append_grown(sh_buf *buf, const void *bytes, size_t n);
SH_MUST_USE static inline sh_status sh_buf_append(sh_buf *buf, const void *bytes, size_t n)
{
    if (n == 0 || n > SH_BUF_FEW || n > buf->cap - buf->len)
        return sh_buf_append_grown(buf, bytes, n);
    memcpy(buf->data + buf->len, bytes, n);
    buf->len += n;
    return SH_OK;
}
SH_MUST_USE sh_status sh_buf_printf(sh_buf *buf, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
/* Makes room for n more bytes and returns where they go (len is not moved), NULL on error. What
 * lies behind len is lost when the buffer grows again. */
void *sh_buf_reserve(sh_buf *buf, size_t n);

/* Zeroed array of n items, NULL when n * size overflows or memory is out. Free with free(). */
void *sh_calloc(size_t n, size_t size);
/* 64-byte aligned, zeroed; for numeric work. Free with free(). */
void *sh_alloc_aligned(size_t bytes);
/* Grows *array (items of `size` bytes) so that it holds at least `need`, doubling *cap, never past
 * max items: SH_ERR_LIMIT then. */
SH_MUST_USE sh_status sh_array_reserve(void **array, size_t *cap, size_t need, size_t size,
                                       size_t max);

/* Fault injection for tests: the n-th allocation from now (through this header) fails; 0 turns it
 * off. Returns how many allocations were made since the last call, the first of which begins the
 * count. */
size_t sh_alloc_fail_after(size_t n);

#endif
