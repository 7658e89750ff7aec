#include "shared/stats/bytes.h"

#include <string.h>

#include "shared/base/hash.h"

uint64_t sh_read_fixed(sh_reader *r, unsigned bytes)
{
    if (!r->ok || (size_t)(r->end - r->at) < bytes) {
        r->ok = false;
        return 0;
    }
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++)
        value |= (uint64_t)r->at[i] << (8 * i);
    r->at += bytes;
    return value;
}

double sh_read_double(sh_reader *r)
{
    uint64_t bits = sh_read_fixed(r, 8);
    double value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

float sh_read_float(sh_reader *r)
{
    uint32_t bits = (uint32_t)sh_read_fixed(r, 4);
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

uint64_t sh_read_varint(sh_reader *r)
{
    uint64_t value = 0;
    for (unsigned shift = 0; r->ok && shift < 70; shift += 7) {
        if (r->at == r->end)
            break;
        uint8_t byte = *r->at++;
        if ((shift == 63 && byte > 1) || (shift > 0 && byte == 0))
            break; /* more than 64 bits, or not the shortest form */
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return value;
    }
    r->ok = false;
    return 0;
}

uint32_t sh_read_varint32(sh_reader *r)
{
    uint64_t value = sh_read_varint(r);
    if (value > UINT32_MAX)
        r->ok = false;
    return r->ok ? (uint32_t)value : 0;
}

int64_t sh_read_zigzag(sh_reader *r)
{
    uint64_t value = sh_read_varint(r);
    return (int64_t)(value >> 1) ^ -(int64_t)(value & 1);
}

void sh_write_bytes(sh_writer *w, const void *bytes, size_t n)
{
    if (w->status == SH_OK)
        w->status = sh_buf_append(w->out, bytes, n);
}

void sh_write_fixed(sh_writer *w, uint64_t value, unsigned bytes)
{
    uint8_t b[8];
    for (unsigned i = 0; i < bytes; i++)
        b[i] = (uint8_t)(value >> (8 * i));
    sh_write_bytes(w, b, bytes);
}

void sh_write_double(sh_writer *w, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof(bits));
    sh_write_fixed(w, bits, 8);
}

void sh_write_float(sh_writer *w, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    sh_write_fixed(w, bits, 4);
}

void sh_write_long_varint(sh_writer *w, uint64_t value)
{
    uint8_t b[10];
    size_t n = 0;
    while (value >= 0x80) {
        b[n++] = (uint8_t)(value | 0x80);
        value >>= 7;
    }
    b[n++] = (uint8_t)value;
    sh_write_bytes(w, b, n);
}

uint64_t sh_checksum64(const void *bytes, size_t n)
{
    sh_hash hash = sh_blake2b(bytes, n);
    uint64_t value = 0;
    for (unsigned i = 0; i < 8; i++)
        value |= (uint64_t)hash.b[i] << (8 * i);
    return value;
}
