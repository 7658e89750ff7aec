#include "tests/sync/fixture.h"

sh_error test_err;

static const char *const tables[T_TABLES] = {"meta", "outbox", "inbox", "chunk"};

void fixture_open(fixture *f)
{
    sh_store_options options = {.tables = tables, .n_tables = T_TABLES, .bytes_max = 256u << 20};
    *f = (fixture){0};
    OK(sh_crypto_init(&test_err));
    OK(sh_store_open_memory(&options, &f->store, &test_err));
    OK(sh_txn_begin(f->store, SH_TXN_WRITE, &f->txn, &test_err));
}

void fixture_commit(fixture *f)
{
    OK(sh_txn_commit(&f->txn, &test_err));
    OK(sh_txn_begin(f->store, SH_TXN_WRITE, &f->txn, &test_err));
}

void fixture_close(fixture *f)
{
    sh_txn_abort(&f->txn);
    sh_store_close(&f->store);
}

sh_outbox fixture_outbox(uint64_t quota)
{
    sh_outbox outbox = {.table = T_OUTBOX, .meta_table = T_META};
    for (int c = 0; c < SH_CLASSES; c++)
        outbox.quota_bytes[c] = quota;
    return outbox;
}
