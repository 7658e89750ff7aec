#include "tests/store/dump.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void put_hex(FILE *f, sh_slice s)
{
    if (s.n == 0)
        fputc('-', f);
    for (size_t i = 0; i < s.n; i++)
        fprintf(f, "%02x", ((const uint8_t *)s.data)[i]);
}

static sh_status write_table(sh_txn *txn, unsigned table, const char *name, FILE *f, sh_error *err)
{
    sh_cursor *cursor = NULL;
    sh_slice key, value;
    SH_TRY(sh_cursor_open(txn, table, &cursor, err));
    sh_status status = sh_cursor_seek(cursor, NULL, 0, &key, &value);
    for (; status == SH_OK; status = sh_cursor_next(cursor, &key, &value)) {
        fprintf(f, "%s ", name);
        put_hex(f, key);
        fputc(' ', f);
        put_hex(f, value);
        fputc('\n', f);
    }
    sh_cursor_close(&cursor);
    if (status != SH_ERR_NOT_FOUND)
        return sh_fail(err, status, "dump: table %s cannot be read", name);
    return SH_OK;
}

sh_status dump_write(sh_store *store, const char *const *tables, size_t n, const char *path,
                     sh_error *err)
{
    sh_txn *txn = NULL;
    FILE *f = fopen(path, "w");
    if (f == NULL)
        return sh_fail(err, SH_ERR_IO, "dump '%s': %s", path, strerror(errno));
    sh_status status = sh_txn_begin(store, SH_TXN_READ, &txn, err);
    for (size_t t = 0; t < n && status == SH_OK; t++)
        status = write_table(txn, (unsigned)t, tables[t], f, err);
    sh_txn_abort(&txn);
    if (fclose(f) != 0 && status == SH_OK)
        status = sh_fail(err, SH_ERR_IO, "dump '%s': %s", path, strerror(errno));
    return status;
}

/* In place: the bytes are never longer than their digits. False: not hex. */
static bool get_hex(char *text, sh_slice *out)
{
    static const char digits[] = "0123456789abcdef";
    size_t n = strcmp(text, "-") == 0 ? 0 : strlen(text);
    if (n % 2 != 0)
        return false;
    for (size_t i = 0; i < n; i += 2) {
        const char *high = strchr(digits, text[i]), *low = strchr(digits, text[i + 1]);
        if (high == NULL || low == NULL)
            return false;
        text[i / 2] = (char)((high - digits) << 4 | (low - digits));
    }
    *out = (sh_slice){text, n / 2};
    return true;
}

static sh_status read_line(sh_txn *txn, const char *const *tables, size_t n, char *line,
                           sh_error *err)
{
    char *rest = NULL;
    char *name = strtok_r(line, " \n", &rest);
    if (name == NULL || name[0] == '#')
        return SH_OK;
    char *k = strtok_r(NULL, " \n", &rest), *v = strtok_r(NULL, " \n", &rest);
    sh_slice key, value;
    size_t t = 0;
    while (t < n && strcmp(tables[t], name) != 0)
        t++;
    if (t == n)
        return sh_fail(err, SH_ERR_INVALID, "no table '%s' here", name);
    if (k == NULL || v == NULL || !get_hex(k, &key) || !get_hex(v, &value))
        return sh_fail(err, SH_ERR_INVALID, "want a table, a key and a value in hex");
    return sh_txn_put(txn, (unsigned)t, key.data, key.n, value.data, value.n, err);
}

sh_status dump_read(sh_store *store, const char *const *tables, size_t n, const char *path,
                    sh_error *err)
{
    sh_txn *txn = NULL;
    char *line = NULL;
    size_t cap = 0, number = 0;
    sh_error local = {0};
    FILE *f = fopen(path, "r");
    if (f == NULL)
        return sh_fail(err, SH_ERR_IO, "dump '%s': %s", path, strerror(errno));
    sh_status status = SH_OK;
    SH_GOTO(sh_txn_begin(store, SH_TXN_WRITE, &txn, err));
    while (getline(&line, &cap, f) >= 0) {
        number++;
        status = read_line(txn, tables, n, line, &local);
        if (status != SH_OK) {
            status = sh_fail(err, status, "dump '%s', line %zu: %s", path, number, local.text);
            goto cleanup;
        }
    }
    status = sh_txn_commit(&txn, err);
cleanup:
    sh_txn_abort(&txn);
    free(line);
    fclose(f);
    return status;
}
