#include "shared/base/buf.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BUF_FIRST_BYTES 64
#define ALIGN_BYTES     64
#define SMALL_BYTES     1024 /* about what glibc's allocator keeps in a thread's own cache */

static atomic_bool alloc_watched;     /* a test does; else threads would share a counter's line */
static atomic_size_t alloc_count;     /* since the last sh_alloc_fail_after */
static atomic_size_t alloc_countdown; /* the allocation that takes it from 1 to 0 fails */

static bool alloc_allowed(void)
{
    if (!atomic_load_explicit(&alloc_watched, memory_order_relaxed))
        return true;
    atomic_fetch_add_explicit(&alloc_count, 1, memory_order_relaxed);
    size_t left = atomic_load_explicit(&alloc_countdown, memory_order_relaxed);
    while (left > 0)
        if (atomic_compare_exchange_weak(&alloc_countdown, &left, left - 1))
            return left != 1;
    return true;
}

size_t sh_alloc_fail_after(size_t n)
{
    atomic_store(&alloc_watched, true);
    atomic_store(&alloc_countdown, n);
    return atomic_exchange(&alloc_count, 0);
}

/* Small blocks come from malloc: glibc's calloc and realloc (before 2.41) pass by the thread's
 * cache and take the arena's lock each time. */
static void *zeroed(size_t bytes)
{
    if (bytes > SMALL_BYTES)
        return calloc(1, bytes);
    void *memory = malloc(bytes);
    return memory ? memset(memory, 0, bytes) : NULL;
}

static void *resized(void *old, size_t used, size_t bytes)
{
    if (bytes > SMALL_BYTES)
        return realloc(old, bytes);
    void *memory = malloc(bytes);
    if (!memory)
        return NULL;
    if (used > 0)
        memcpy(memory, old, used);
    free(old);
    return memory;
}

void *sh_calloc(size_t n, size_t size)
{
    if (!alloc_allowed() || (size != 0 && n > PTRDIFF_MAX / size))
        return NULL;
    /* An empty array is still a pointer, so that NULL always means failure. */
    return zeroed(SH_MAX(n * size, (size_t)1));
}

void *sh_alloc_aligned(size_t bytes)
{
    if (!alloc_allowed() || bytes > PTRDIFF_MAX - ALIGN_BYTES)
        return NULL;
    size_t rounded = (SH_MAX(bytes, 1) + ALIGN_BYTES - 1) / ALIGN_BYTES * ALIGN_BYTES;
    void *memory = aligned_alloc(ALIGN_BYTES, rounded);
    if (memory)
        memset(memory, 0, rounded);
    return memory;
}

sh_status sh_array_reserve(void **array, size_t *cap, size_t need, size_t size, size_t max)
{
    SH_ASSERT(size > 0);
    if (need <= *cap)
        return SH_OK;
    if (need > max || need > PTRDIFF_MAX / size)
        return SH_ERR_LIMIT;
    size_t most = SH_MIN(max, PTRDIFF_MAX / size);
    size_t grown = *cap < 8 ? 8 : (*cap > most / 2 ? most : *cap * 2);
    grown = SH_MIN(SH_MAX(grown, need), most);
    /* The caller's pointer has its own type, so it is read and written as bytes. */
    void *old, *memory;
    memcpy(&old, array, sizeof old);
    if (!alloc_allowed() || !(memory = resized(old, *cap * size, grown * size)))
        return SH_ERR_NO_MEMORY;
    memcpy(array, &memory, sizeof memory);
    *cap = grown;
    return SH_OK;
}

void sh_buf_init(sh_buf *buf, size_t max_bytes)
{
    *buf = (sh_buf){.max = max_bytes};
}

void sh_buf_release(sh_buf *buf)
{
    free(buf->data);
    *buf = (sh_buf){.max = buf->max};
}

void sh_buf_clear(sh_buf *buf)
{
    buf->len = 0;
}

static sh_status make_room(sh_buf *buf, size_t n)
{
    if (n > buf->max - buf->len)
        return SH_ERR_LIMIT;
    size_t need = buf->len + n;
    if (need <= buf->cap && buf->data)
        return SH_OK;
    size_t cap = buf->cap > buf->max / 2 ? buf->max : buf->cap * 2;
    cap = SH_MAX(SH_MAX(cap, need), SH_MIN(buf->max, BUF_FIRST_BYTES));
    uint8_t *data = NULL;
    if (!alloc_allowed() || !(data = resized(buf->data, buf->len, SH_MAX(cap, 1))))
        return SH_ERR_NO_MEMORY;
    buf->data = data;
    buf->cap = cap;
    return SH_OK;
}

sh_status sh_buf_append_grown(sh_buf *buf, const void *bytes, size_t n)
{
    if (n == 0)
        return SH_OK;
    SH_TRY(make_room(buf, n));
    memcpy(buf->data + buf->len, bytes, n);
    buf->len += n;
    return SH_OK;
}

sh_status sh_buf_printf(sh_buf *buf, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    SH_ASSERT(length >= 0);
    size_t n = (size_t)length;
    if (n == 0)
        return SH_OK;
    /* vsnprintf wants a byte for its final 0, which the buffer's maximum may not leave. */
    char small[256], *text = small;
    if (n >= sizeof small) {
        if (n > buf->max - buf->len)
            return SH_ERR_LIMIT;
        text = sh_calloc(n + 1, 1);
        if (!text)
            return SH_ERR_NO_MEMORY;
    }
    va_start(args, format);
    vsnprintf(text, n + 1, format, args);
    va_end(args);
    sh_status status = sh_buf_append(buf, text, n);
    if (text != small)
        free(text);
    return status;
}

void *sh_buf_reserve(sh_buf *buf, size_t n)
{
    if (make_room(buf, n) != SH_OK)
        return NULL;
    return buf->data + buf->len;
}
