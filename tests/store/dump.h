/*
 * A store's rows as text, a line each: table's name, key and value in hex. What a store of an
 * earlier version held is kept so, for the tests of migration; "#" begins a comment, an empty value
 * is "-".
 */
#ifndef TESTS_STORE_DUMP_H
#define TESTS_STORE_DUMP_H

#include "shared/store/store.h"

/* Writes every row of the n tables, in order. SH_ERR_IO, or the store's error. */
SH_MUST_USE sh_status dump_write(sh_store *store, const char *const *tables, size_t n,
                                 const char *path, sh_error *err);
/* Puts the file's rows into the store's tables of those names, in one transaction. SH_ERR_INVALID
 * names the line. */
SH_MUST_USE sh_status dump_read(sh_store *store, const char *const *tables, size_t n,
                                const char *path, sh_error *err);

#endif
