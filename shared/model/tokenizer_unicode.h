/*
 * What the tokenizers need of Unicode: code points of bytes that need not be well-formed UTF-8, and
 * the classes that pre-tokenizer rules speak of (\p{L}, \p{N}, \s ...), of Unicode 15.1, which is
 * what llama.cpp's tables have.
 */
#ifndef SH_MODEL_TOKENIZER_UNICODE_H
#define SH_MODEL_TOKENIZER_UNICODE_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
    SH_CLASS_OTHER, /* \p{C} and what is not assigned */
    SH_CLASS_LETTER,
    SH_CLASS_NUMBER,
    SH_CLASS_PUNCTUATION,
    SH_CLASS_SYMBOL,
    SH_CLASS_MARK,
    SH_CLASS_SPACE, /* \s: White_Space, not only category Z */
} sh_char_class;

#define SH_CHAR_REPLACEMENT 0xFFFDu
#define SH_CHAR_MAX         0x10FFFFu

sh_char_class sh_char_class_of(uint32_t code);

/* The code point at text[0] of n > 0 bytes; *used is how many bytes it took. A byte that begins no
 * character is U+FFFD and takes one byte; so does one whose character would lie past U+10FFFF.
 * Overlong forms and surrogates count as characters, as they do for llama.cpp. */
uint32_t sh_char_decode(const uint8_t *text, size_t n, unsigned *used);
/* Bytes written, 1..4. code <= SH_CHAR_MAX. */
unsigned sh_char_encode(uint32_t code, uint8_t out[4]);
/* Bytes of the character that begins with `first`, by it alone, as the tokenizer `llama` has it:
 * stray bytes count as one. */
unsigned sh_char_bytes(uint8_t first);

/* The code point that stands for a byte in a vocabulary of `gpt2` (Radford et al. 2019): itself
 * where it is printable in Latin-1, else 0x100 + k for the k-th of the others. */
uint32_t sh_char_of_byte(uint8_t byte);
/* The byte that a code point stands for, or -1. */
int sh_byte_of_char(uint32_t code);

#endif
