/*
 * Little-endian bytes for the formats of this module: a cursor that reads within bounds and
 * remembers its first failure, so that a decoder checks once; appends that do the same.
 * Threads: plain data. Internal to shared/stats.
 */
#ifndef SH_STATS_BYTES_H
#define SH_STATS_BYTES_H

#include "shared/base/buf.h"

/* Reading: after the first failure every read gives 0 and ok stays false. */
typedef struct {
    const uint8_t *at, *end;
    bool ok;
} sh_reader;

uint64_t sh_read_fixed(sh_reader *r, unsigned bytes); /* bytes 1 to 8 */
double sh_read_double(sh_reader *r);
float sh_read_float(sh_reader *r);
uint64_t sh_read_varint(sh_reader *r); /* LEB128, at most 10 bytes, shortest form only */
uint32_t sh_read_varint32(sh_reader *r);
int64_t sh_read_zigzag(sh_reader *r);

/* Writing: the first error sticks in status. */
typedef struct {
    sh_buf *out;
    sh_status status;
} sh_writer;

void sh_write_fixed(sh_writer *w, uint64_t value, unsigned bytes);
void sh_write_double(sh_writer *w, double value);
void sh_write_float(sh_writer *w, float value);
void sh_write_long_varint(sh_writer *w, uint64_t value);
static inline void sh_write_varint(sh_writer *w, uint64_t value)
{
    if (value < 0x80 && w->status == SH_OK && w->out->len < w->out->cap) /* most are */
        w->out->data[w->out->len++] = (uint8_t)value;
    else
        sh_write_long_varint(w, value);
}
static inline void sh_write_zigzag(sh_writer *w, int64_t value)
{
    sh_write_varint(w, ((uint64_t)value << 1) ^ (value < 0 ? UINT64_MAX : 0));
}
void sh_write_bytes(sh_writer *w, const void *bytes, size_t n);

/* The first eight bytes of BLAKE2b-256, which ends every format here. */
uint64_t sh_checksum64(const void *bytes, size_t n);

#endif
