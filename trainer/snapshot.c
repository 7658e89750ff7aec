/*
 * The file of a snapshot, all numbers little-endian:
 *
 *     0        8 bytes   magic "SHSNAPSH"
 *     8        u32       version, 1
 *     12       u32       n_sessions
 *     16       u64       n_tokens
 *     24       ...       n_sessions times: u64 session, u32 start (index of its first token)
 *     ...      ...       n_tokens times i32: tokens
 *     ...      ...       n_tokens times u8: mask, SH_TOKEN_ bits
 *     the end  32 bytes  BLAKE2b-256 of everything before
 *
 * starts[0] is 0, starts grow, each is below n_tokens. The file holds what users wrote: it is for
 * its owner only, lives as long as the training that it is made for, and never leaves the machine.
 */
#include "trainer/snapshot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/base/file.h"
#include "shared/base/hash.h"

#define SNAPSHOT_VERSION 1
#define MAGIC            "SHSNAPSH"
#define HEAD_BYTES       24
#define SESSION_BYTES    12
#define TOKEN_BYTES      5
#define CHECK_BYTES      sizeof(sh_hash)
#define FILE_BYTES_MAX                                                                             \
    (HEAD_BYTES + (size_t)SH_SNAPSHOT_TOKENS_MAX * (SESSION_BYTES + TOKEN_BYTES) + CHECK_BYTES)

void sh_snapshot_release(sh_snapshot *s)
{
    free(s->tokens);
    free(s->mask);
    free(s->starts);
    free(s->sessions);
    *s = (sh_snapshot){0};
}

size_t sh_snapshot_targets(const sh_snapshot *s)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n_tokens; i++)
        n += (s->mask[i] & SH_TOKEN_TARGET) != 0;
    return n;
}

static sh_status reserve(sh_snapshot *s, size_t tokens, size_t sessions)
{
    size_t need = s->n_tokens + tokens, max = SH_SNAPSHOT_TOKENS_MAX;
    SH_TRY(sh_array_reserve((void **)&s->tokens, &s->tokens_cap, need, sizeof *s->tokens, max));
    SH_TRY(sh_array_reserve((void **)&s->mask, &s->mask_cap, need, 1, max));
    need = s->n_sessions + sessions;
    SH_TRY(sh_array_reserve((void **)&s->starts, &s->starts_cap, need, sizeof *s->starts, max));
    return sh_array_reserve((void **)&s->sessions, &s->sessions_cap, need, sizeof *s->sessions,
                            max);
}

sh_status sh_snapshot_add(sh_snapshot *s, uint64_t session, const int32_t *tokens, size_t n,
                          uint8_t mask)
{
    if (n == 0)
        return SH_OK;
    SH_TRY(reserve(s, n, 1));
    bool goes_on = s->n_sessions && s->sessions[s->n_sessions - 1] == session;
    if (!goes_on) {
        s->starts[s->n_sessions] = (uint32_t)s->n_tokens;
        s->sessions[s->n_sessions++] = session;
    }
    memcpy(s->tokens + s->n_tokens, tokens, n * sizeof *tokens);
    memset(s->mask + s->n_tokens, mask, n);
    s->n_tokens += n;
    return SH_OK;
}

/* ---- file ---- */

static uint8_t *put_le(uint8_t *p, uint64_t x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (uint8_t)(x >> (8 * i));
    return p + n;
}

static uint64_t get_le(const uint8_t *p, size_t n)
{
    uint64_t x = 0;
    for (size_t i = 0; i < n; i++)
        x |= (uint64_t)p[i] << (8 * i);
    return x;
}

static size_t file_bytes(uint64_t n_sessions, uint64_t n_tokens)
{
    return HEAD_BYTES + (size_t)n_sessions * SESSION_BYTES + (size_t)n_tokens * TOKEN_BYTES +
           CHECK_BYTES;
}

sh_status sh_snapshot_save(const sh_snapshot *s, const char *path, sh_error *err)
{
    size_t n = file_bytes(s->n_sessions, s->n_tokens);
    uint8_t *bytes = sh_calloc(n, 1);
    if (!bytes)
        return sh_fail(err, SH_ERR_NO_MEMORY, "'%s': no memory for a snapshot of %zu tokens", path,
                       s->n_tokens);
    memcpy(bytes, MAGIC, 8);
    uint8_t *p = put_le(bytes + 8, SNAPSHOT_VERSION, 4);
    p = put_le(p, s->n_sessions, 4);
    p = put_le(p, s->n_tokens, 8);
    for (size_t i = 0; i < s->n_sessions; i++) {
        p = put_le(p, s->sessions[i], 8);
        p = put_le(p, s->starts[i], 4);
    }
    for (size_t i = 0; i < s->n_tokens; i++)
        p = put_le(p, (uint32_t)s->tokens[i], 4);
    if (s->n_tokens)
        memcpy(p, s->mask, s->n_tokens);
    sh_hash check = sh_blake2b(bytes, n - CHECK_BYTES);
    memcpy(bytes + n - CHECK_BYTES, check.b, CHECK_BYTES);
    sh_status status = sh_file_write_private(path, bytes, n, err);
    free(bytes);
    return status;
}

static sh_status check_file(const uint8_t *bytes, size_t n, const char *path, sh_error *err)
{
    if (n < HEAD_BYTES + CHECK_BYTES || memcmp(bytes, MAGIC, 8) != 0)
        return sh_fail(err, SH_ERR_INVALID, "'%s' is not a training snapshot", path);
    uint64_t version = get_le(bytes + 8, 4);
    if (version != SNAPSHOT_VERSION)
        return sh_fail(err, SH_ERR_UNSUPPORTED,
                       "'%s': version %llu of a snapshot is unknown; this program reads %d", path,
                       (unsigned long long)version, SNAPSHOT_VERSION);
    uint64_t n_sessions = get_le(bytes + 12, 4), n_tokens = get_le(bytes + 16, 8);
    if (n_tokens > SH_SNAPSHOT_TOKENS_MAX || n_sessions > n_tokens)
        return sh_fail(err, SH_ERR_INVALID, "'%s': a snapshot of %llu tokens in %llu sessions",
                       path, (unsigned long long)n_tokens, (unsigned long long)n_sessions);
    if (n != file_bytes(n_sessions, n_tokens))
        return sh_fail(err, SH_ERR_INVALID, "'%s': %zu bytes, where its head says %zu", path, n,
                       file_bytes(n_sessions, n_tokens));
    sh_hash check = sh_blake2b(bytes, n - CHECK_BYTES);
    if (memcmp(bytes + n - CHECK_BYTES, check.b, CHECK_BYTES) != 0)
        return sh_fail(err, SH_ERR_CORRUPT, "'%s': the checksum does not hold", path);
    return SH_OK;
}

/* What check_file let through; only the order of the sessions can still be wrong. */
static sh_status decode(const uint8_t *bytes, const char *path, sh_snapshot *s, sh_error *err)
{
    s->n_sessions = (size_t)get_le(bytes + 12, 4);
    s->n_tokens = (size_t)get_le(bytes + 16, 8);
    const uint8_t *p = bytes + HEAD_BYTES;
    for (size_t i = 0; i < s->n_sessions; i++, p += SESSION_BYTES) {
        s->sessions[i] = get_le(p, 8);
        s->starts[i] = (uint32_t)get_le(p + 8, 4);
        bool ordered = i == 0 ? s->starts[i] == 0 : s->starts[i] > s->starts[i - 1];
        if (!ordered || s->starts[i] >= s->n_tokens)
            return sh_fail(err, SH_ERR_INVALID, "'%s': session %zu begins at token %u", path, i,
                           s->starts[i]);
    }
    if (s->n_tokens && !s->n_sessions)
        return sh_fail(err, SH_ERR_INVALID, "'%s': tokens without a session", path);
    for (size_t i = 0; i < s->n_tokens; i++, p += 4)
        s->tokens[i] = (int32_t)get_le(p, 4);
    for (size_t i = 0; i < s->n_tokens; i++)
        s->mask[i] = p[i];
    return SH_OK;
}

bool sh_snapshot_is_file(const char *path)
{
    char magic[8];
    FILE *file = fopen(path, "rb");
    if (!file)
        return false;
    const bool is = fread(magic, 1, sizeof magic, file) == sizeof magic &&
                    memcmp(magic, MAGIC, sizeof magic) == 0;
    fclose(file);
    return is;
}

sh_status sh_snapshot_load(const char *path, sh_snapshot *out, sh_error *err)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    sh_snapshot s = {0};
    SH_TRY(sh_file_read(path, FILE_BYTES_MAX, &bytes, &n, err));
    sh_status status = SH_OK;
    SH_GOTO(check_file(bytes, n, path, err));
    status = reserve(&s, (size_t)get_le(bytes + 16, 8), (size_t)get_le(bytes + 12, 4));
    if (status != SH_OK)
        SH_GOTO(sh_fail(err, status, "'%s': no memory for the snapshot", path));
    SH_GOTO(decode(bytes, path, &s, err));
    *out = s;
    s = (sh_snapshot){0};
cleanup:
    sh_snapshot_release(&s);
    free(bytes);
    return status;
}
