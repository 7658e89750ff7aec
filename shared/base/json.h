/*
 * JSON is jansson's json_t throughout; this header adds files and errors in our form.
 */
#ifndef SH_BASE_JSON_H
#define SH_BASE_JSON_H

#include <jansson.h>

#include "shared/base/hash.h"

#define SH_JSON_BYTES_MAX ((size_t)256 << 20)

/* *out is a new reference (json_decref). SH_ERR_INVALID names the line. */
SH_MUST_USE sh_status sh_json_load(const char *path, json_t **out, sh_error *err);
/* What a text from others may hold; checked in one pass before anything is built, because a tree
 * takes some 50 times the bytes of "[[],[],...". */
typedef struct {
    size_t bytes_max, values_max; /* values: commas and brackets count */
    uint32_t depth_max;
} sh_json_limits;
/* JSON from bytes; name is for errors. SH_ERR_LIMIT names the limit. */
SH_MUST_USE sh_status sh_json_decode(const void *text, size_t n, const char *name,
                                     const sh_json_limits *limits, json_t **out, sh_error *err);
/* The same of one line of a file of lines: errors name the line. */
typedef struct {
    const char *name; /* of the file */
    size_t number;    /* of the line, from 1 */
    const char *text;
    size_t bytes;
} sh_json_line;
SH_MUST_USE sh_status sh_json_decode_line(const sh_json_line *line, const sh_json_limits *limits,
                                          json_t **out, sh_error *err);
/* Atomic; keys in insertion order, two spaces of indent, a final newline. */
SH_MUST_USE sh_status sh_json_save(const char *path, const json_t *value, sh_error *err);
/* Takes over value: json_object_set_new that asserts on the out-of-memory that we do not survive.
 */
void sh_json_set(json_t *object, const char *key, json_t *value);
json_t *sh_json_uint(uint64_t x);          /* at most 2^63 - 1 is kept */
json_t *sh_json_hash(const sh_hash *hash); /* 64 hexadecimal digits */
/* NaN and infinities become null, which JSON has instead. */
json_t *sh_json_number(double x);

#endif
