/*
 * Records to and from MessagePack, driven by tables of fields: one table is the encoder, the
 * decoder and the limits of a message. Private to the module.
 *
 * The encoding is canonical: integers, lengths and counts in their shortest form, float32 and
 * float64 for exactly the fields of that type, arrays of exactly the table's length. Whatever else
 * comes is refused, so that decoded bytes encode to themselves. The decoder reserves nothing;
 * slices point into its input.
 */
#ifndef SH_WIRE_CODEC_H
#define SH_WIRE_CODEC_H

#include "shared/wire/wire.h"

typedef enum {
    WIRE_U8,       /* uint8_t */
    WIRE_U32,      /* uint32_t */
    WIRE_U64,      /* uint64_t */
    WIRE_BOOL,     /* bool */
    WIRE_F32,      /* float, finite */
    WIRE_F64,      /* double, finite */
    WIRE_TEXT,     /* const char *: UTF-8 without control characters, copied to `storage` */
    WIRE_HASH,     /* sh_hash: bin of 32 bytes */
    WIRE_BYTES,    /* sh_bytes: bin */
    WIRE_BLOB,     /* sh_blob: array [sha256, bytes, chunk hashes] */
    WIRE_HASHES,   /* sh_hash_list: bin of n * 32 bytes */
    WIRE_BITMAP,   /* uint64_t[SH_ACK_BITMAP_WORDS]: bin, bit i is byte i/8's bit i%8 */
    WIRE_PLAN,     /* sh_train_plan: nil when it says not to train, else an array by `sub` */
    WIRE_EVALUATE, /* sh_evaluate_plan: nil without a candidate, else an array by `sub` */
    WIRE_LIST,     /* records by `sub`, `size` bytes apart, at most max; their uint32_t count is at
                      `storage`: array of arrays */
    WIRE_CONST,    /* no field: the number `min`, which must be there */
    WIRE_MAGIC,    /* no field: the text `name`, which must be there */
} wire_kind;

typedef struct wire_schema wire_schema;
typedef struct {
    const char *name;
    wire_kind kind;
    size_t offset;
    uint64_t min, max; /* of a number, a text's or bin's bytes, a count of hashes */
    size_t storage;    /* WIRE_TEXT: offset of a char[max + 1] in the record */
    const wire_schema *sub;
    size_t size;
} wire_field;

struct wire_schema {
    const char *name;
    const wire_field *fields;
    size_t n_fields;
    /* Rules between fields; what: for the error's text. May be NULL. */
    sh_status (*check)(const void *record, sh_error *err);
};

#define WIRE_SCHEMA(name, fields, check)                                                           \
    {                                                                                              \
        name, fields, SH_COUNT(fields), check                                                      \
    }

/* Appends; out is as it was on error. */
sh_status sh_wire_encode(const wire_schema *schema, const void *record, sh_buf *out, sh_error *err);
/* All n bytes must be one record. The record is written also on error: hand in a scratch one. */
sh_status sh_wire_decode(const wire_schema *schema, const void *bytes, size_t n, void *record,
                         sh_error *err);
/* The first element of an array, an unsigned number, whatever follows. */
sh_status sh_wire_peek_number(const char *what, const void *bytes, size_t n, uint64_t *out,
                              sh_error *err);
/* Points the texts of a record that was copied from elsewhere at its own storage. */
void sh_wire_rebase_texts(const wire_schema *schema, void *record);

#endif
