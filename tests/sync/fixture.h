/* A store in memory with the tables that sync needs, and its open write transaction. */
#ifndef SH_TEST_SYNC_FIXTURE_H
#define SH_TEST_SYNC_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "shared/base/rng.h"
#include "shared/sync/sync.h"

enum { T_META, T_OUTBOX, T_INBOX, T_CHUNK, T_TABLES };

typedef struct {
    sh_store *store;
    sh_txn *txn;
} fixture;

void fixture_open(fixture *f);
void fixture_commit(fixture *f); /* and begins the next transaction */
void fixture_close(fixture *f);
sh_outbox fixture_outbox(uint64_t quota);
/* Asserts SH_OK, printing the error's text otherwise. */
#define OK(expr)                                                                                   \
    do {                                                                                           \
        sh_status ok_status_ = (expr);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s: %s", #expr, sh_status_name(ok_status_), test_err.text);              \
    } while (0)
extern sh_error test_err;

#endif
