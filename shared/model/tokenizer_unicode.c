#include "shared/model/tokenizer_unicode.h"

#include "shared/base/status.h"

enum {
    O = SH_CLASS_OTHER,
    L = SH_CLASS_LETTER,
    N = SH_CLASS_NUMBER,
    P = SH_CLASS_PUNCTUATION,
    S = SH_CLASS_SYMBOL,
    M = SH_CLASS_MARK,
    W = SH_CLASS_SPACE
};

typedef struct {
    uint32_t first : 24; /* a run goes on to the next one's first */
    uint32_t class : 8;
} run;

static const run runs[] = {
#include "shared/model/tokenizer_unicode_table.h"
};

sh_char_class sh_char_class_of(uint32_t code)
{
    if (code - 'a' < 26 || code - 'A' < 26)
        return SH_CLASS_LETTER;
    size_t low = 0, high = SH_COUNT(runs); /* runs[low].first <= code < runs[high].first */
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        if (runs[middle].first <= code)
            low = middle;
        else
            high = middle;
    }
    return (sh_char_class)runs[low].class;
}

uint32_t sh_char_decode(const uint8_t *text, size_t n, unsigned *used)
{
    static const uint8_t lengths[16] = {1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 3, 4};
    static const uint8_t masks[5] = {0, 0x7f, 0x1f, 0x0f, 0x07};
    const unsigned length = text[0] >= 0xf8 ? 0 : lengths[text[0] >> 4];
    *used = 1;
    if (length == 0 || length > n)
        return SH_CHAR_REPLACEMENT;
    uint32_t code = text[0] & masks[length];
    for (unsigned i = 1; i < length; i++) {
        if ((text[i] & 0xc0) != 0x80)
            return SH_CHAR_REPLACEMENT;
        code = code << 6 | (text[i] & 0x3f);
    }
    if (code > SH_CHAR_MAX)
        return SH_CHAR_REPLACEMENT;
    *used = length;
    return code;
}

unsigned sh_char_encode(uint32_t code, uint8_t out[4])
{
    static const uint8_t leads[5] = {0, 0x00, 0xc0, 0xe0, 0xf0};
    const unsigned length = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (unsigned i = length - 1; i > 0; i--) {
        out[i] = (uint8_t)(0x80 | (code & 0x3f));
        code >>= 6;
    }
    out[0] = (uint8_t)(leads[length] | code);
    return length;
}

unsigned sh_char_bytes(uint8_t first)
{
    static const uint8_t by_high_nibble[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4};
    return by_high_nibble[first >> 4];
}

/* ---- bytes and the characters that stand for them ---- */

static bool stands_for_itself(uint32_t byte)
{
    return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
}

uint32_t sh_char_of_byte(uint8_t byte)
{
    if (stands_for_itself(byte))
        return byte;
    if (byte <= 0x20)
        return 0x100u + byte;
    return byte == 0xAD ? 0x143 : 0x121u + (byte - 0x7Fu);
}

int sh_byte_of_char(uint32_t code)
{
    if (code < 0x100)
        return stands_for_itself(code) ? (int)code : -1;
    if (code <= 0x120)
        return (int)(code - 0x100);
    if (code <= 0x142)
        return (int)(code - 0x121 + 0x7F);
    return code == 0x143 ? 0xAD : -1;
}
