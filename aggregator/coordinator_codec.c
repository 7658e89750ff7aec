/* Bytes of the coordinator's rows: little-endian integers, IEEE doubles as their bits. A reader
 * that runs out of bytes turns bad and gives zeros; callers look once, at the end. */
#include <string.h>

#include "aggregator/coordinator_internal.h"

void coord_writer_init(coord_writer *w)
{
    sh_buf_init(&w->buf, COORD_ROW_BYTES_MAX);
    w->bad = false;
}

void coord_put_bytes(coord_writer *w, const void *bytes, size_t n)
{
    if (n != 0 && sh_buf_append(&w->buf, bytes, n) != SH_OK)
        w->bad = true;
}

void coord_put_uint(coord_writer *w, uint64_t x, unsigned bytes)
{
    uint8_t b[8];
    for (unsigned i = 0; i < bytes; i++)
        b[i] = (uint8_t)(x >> (8 * i));
    coord_put_bytes(w, b, bytes);
}

void coord_put_f64(coord_writer *w, double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    coord_put_uint(w, bits, 8);
}

void coord_put_hash(coord_writer *w, const sh_hash *h)
{
    coord_put_bytes(w, h->b, sizeof h->b);
}

void coord_put_text(coord_writer *w, const char *text)
{
    size_t n = strnlen(text, UINT8_MAX);
    coord_put_uint(w, n, 1);
    coord_put_bytes(w, text, n);
}

coord_reader coord_reader_of(sh_slice value)
{
    coord_reader r = {.p = value.data, .bad = false};
    r.end = value.n == 0 ? r.p : r.p + value.n;
    return r;
}

void coord_get_bytes(coord_reader *r, void *out, size_t n)
{
    if (n == 0)
        return;
    if (r->bad || (size_t)(r->end - r->p) < n) {
        r->bad = true;
        memset(out, 0, n);
        return;
    }
    memcpy(out, r->p, n);
    r->p += n;
}

uint64_t coord_get_uint(coord_reader *r, unsigned bytes)
{
    uint8_t b[8] = {0};
    coord_get_bytes(r, b, bytes);
    uint64_t x = 0;
    for (unsigned i = 0; i < bytes; i++)
        x |= (uint64_t)b[i] << (8 * i);
    return x;
}

double coord_get_f64(coord_reader *r)
{
    uint64_t bits = coord_get_uint(r, 8);
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

sh_hash coord_get_hash(coord_reader *r)
{
    sh_hash h;
    coord_get_bytes(r, h.b, sizeof h.b);
    return h;
}

void coord_get_text(coord_reader *r, char *out, size_t out_bytes)
{
    size_t n = (size_t)coord_get_uint(r, 1);
    if (n >= out_bytes) {
        r->bad = true;
        n = 0;
    }
    coord_get_bytes(r, out, n);
    out[n] = '\0';
}
