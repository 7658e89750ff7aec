/*
 * Between store.c, which checks what both implementations must agree on, and the implementations.
 * Private to the module.
 */
#ifndef SH_STORE_BACKEND_H
#define SH_STORE_BACKEND_H

#include "shared/store/store.h"

#define SH_STORE_BYTES_MAX_DEFAULT ((uint64_t)4 << 30)
#define SH_STORE_RESERVE_DEFAULT   ((uint64_t)1 << 20)

typedef struct {
    void (*close)(sh_store *store);
    sh_status (*sync)(sh_store *store, sh_error *err);
    sh_status (*compact)(sh_store *store, sh_error *err);
    sh_status (*backup)(sh_store *store, const char *dir, sh_error *err);
    uint64_t (*bytes_used)(const sh_store *store);
    sh_status (*begin)(sh_store *store, int kind, sh_txn **out, sh_error *err);
    sh_status (*commit)(sh_txn *txn, sh_error *err); /* frees txn in any case */
    void (*abort)(sh_txn *txn);                      /* frees txn */
    /* Arguments are within limits; an error fails the transaction. */
    sh_status (*put)(sh_txn *txn, unsigned table, sh_slice key, sh_slice value, sh_error *err);
    sh_status (*del)(sh_txn *txn, unsigned table, sh_slice key, sh_error *err);
    sh_status (*get)(sh_txn *txn, unsigned table, sh_slice key, sh_slice *value);
    uint64_t (*count)(sh_txn *txn, unsigned table);
    sh_status (*cursor_open)(sh_txn *txn, unsigned table, sh_cursor **out, sh_error *err);
    sh_status (*seek)(sh_cursor *cursor, sh_slice from, sh_slice *key, sh_slice *value);
    sh_status (*next)(sh_cursor *cursor, sh_slice *key, sh_slice *value);
    sh_status (*last)(sh_cursor *cursor, sh_slice *key, sh_slice *value);
    void (*cursor_close)(sh_cursor *cursor);
} sh_store_backend;

/* The implementations' structs begin with these. */
struct sh_store {
    const sh_store_backend *backend;
    size_t n_tables;
    uint64_t bytes_max, reserve_bytes;
    bool read_only;
};

struct sh_txn {
    sh_store *store;
    int kind;
    sh_status failed; /* of the first write that failed: nothing will be committed */
    unsigned cursors; /* open ones */
};

struct sh_cursor {
    sh_txn *txn;
    unsigned table;
};

/* Checks options and fills the common part. */
sh_status sh_store_init(sh_store *store, const sh_store_backend *backend,
                        const sh_store_options *options, sh_error *err);

#endif
