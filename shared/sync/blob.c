/*
 * Blobs as chunks: key = BLAKE2b-256 of the chunk (32), value = the chunk's bytes. A chunk that
 * two blobs share is stored once.
 */
#include <string.h>

#include "shared/sync/sync.h"

#define HASH_BYTES sizeof(sh_hash)

sh_status sh_blob_put(sh_txn *txn, unsigned table, const void *bytes, size_t n, sh_error *err)
{
    const uint8_t *p = bytes;
    for (size_t at = 0; at < n; at += SH_CHUNK_BYTES) {
        size_t chunk = SH_MIN(n - at, (size_t)SH_CHUNK_BYTES);
        sh_hash hash = sh_blake2b(p + at, chunk);
        sh_slice there;
        sh_status status = sh_txn_get(txn, table, hash.b, HASH_BYTES, &there);
        if (status == SH_OK)
            continue;
        if (status != SH_ERR_NOT_FOUND)
            return sh_fail(err, status, "chunk table: cannot be read");
        SH_TRY(sh_txn_put(txn, table, hash.b, HASH_BYTES, p + at, chunk, err));
    }
    return SH_OK;
}

sh_status sh_chunk_put(sh_txn *txn, unsigned table, const sh_msg_chunk *chunk, sh_error *err)
{
    if (chunk->bytes.n == 0 || chunk->bytes.n > SH_CHUNK_BYTES)
        return sh_fail(err, SH_ERR_CORRUPT, "chunk of %zu bytes, a chunk has 1 to %u",
                       chunk->bytes.n, SH_CHUNK_BYTES);
    if (!chunk->checked) {
        sh_hash hash = sh_blake2b(chunk->bytes.data, chunk->bytes.n);
        if (!sh_hash_equal(&hash, &chunk->hash))
            return sh_fail(err, SH_ERR_CORRUPT, "chunk of %zu bytes does not match its hash",
                           chunk->bytes.n);
    }
    return sh_txn_put(txn, table, chunk->hash.b, HASH_BYTES, chunk->bytes.data, chunk->bytes.n,
                      err);
}

static bool listed(const uint8_t *hashes, uint32_t n, const uint8_t *hash)
{
    for (uint32_t i = 0; i < n; i++)
        if (memcmp(hashes + i * HASH_BYTES, hash, HASH_BYTES) == 0)
            return true;
    return false;
}

sh_status sh_blob_missing(sh_txn *txn, unsigned table, const sh_blob *blob, uint8_t *hashes,
                          uint32_t max, uint32_t *n, sh_error *err)
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < blob->n_chunks && found < max; i++) {
        const uint8_t *hash = blob->chunk_hashes + i * HASH_BYTES;
        sh_slice there;
        sh_status status = sh_txn_get(txn, table, hash, HASH_BYTES, &there);
        if (status == SH_OK)
            continue;
        if (status != SH_ERR_NOT_FOUND)
            return sh_fail(err, status, "chunk table: cannot be read");
        if (!listed(hashes, found, hash)) /* a blob may hold the same chunk twice */
            memcpy(hashes + found++ * HASH_BYTES, hash, HASH_BYTES);
    }
    *n = found;
    return SH_OK;
}

sh_status sh_blob_get(sh_txn *txn, unsigned table, const sh_blob *blob, sh_buf *out, sh_error *err)
{
    size_t start = out->len;
    uint64_t left = blob->bytes;
    sh_status status = SH_OK;
    if (blob->n_chunks > SH_BLOB_CHUNKS_MAX ||
        blob->n_chunks != (blob->bytes + SH_CHUNK_BYTES - 1) / SH_CHUNK_BYTES)
        return sh_fail(err, SH_ERR_CORRUPT, "blob of %llu bytes cannot have %u chunks",
                       (unsigned long long)blob->bytes, blob->n_chunks);
    for (uint32_t i = 0; i < blob->n_chunks; i++) {
        sh_slice chunk;
        uint64_t want = SH_MIN(left, (uint64_t)SH_CHUNK_BYTES);
        status = sh_txn_get(txn, table, blob->chunk_hashes + i * HASH_BYTES, HASH_BYTES, &chunk);
        if (status != SH_OK) {
            status = sh_fail(err, status, "blob: chunk %u of %u is missing", i, blob->n_chunks);
            goto cleanup;
        }
        if (chunk.n != want) {
            status = sh_fail(err, SH_ERR_CORRUPT, "blob: chunk %u has %zu bytes, not %llu", i,
                             chunk.n, (unsigned long long)want);
            goto cleanup;
        }
        status = sh_buf_append(out, chunk.data, chunk.n);
        if (status != SH_OK) {
            status = sh_fail(err, status, "blob of %llu bytes: no room",
                             (unsigned long long)blob->bytes);
            goto cleanup;
        }
        left -= want;
    }
    sh_hash sha = sh_sha256(out->data + start, out->len - start);
    if (!sh_hash_equal(&sha, &blob->sha256))
        status = sh_fail(err, SH_ERR_CORRUPT, "blob of %llu bytes does not match its SHA-256",
                         (unsigned long long)blob->bytes);
cleanup:
    if (status != SH_OK)
        out->len = start;
    return status;
}

sh_status sh_blob_delete(sh_txn *txn, unsigned table, const sh_blob *blob, const sh_blob *keep,
                         size_t n_keep, sh_error *err)
{
    for (uint32_t i = 0; i < blob->n_chunks; i++) {
        const uint8_t *hash = blob->chunk_hashes + i * HASH_BYTES;
        bool kept = false;
        for (size_t k = 0; k < n_keep && !kept; k++)
            kept = listed(keep[k].chunk_hashes, keep[k].n_chunks, hash);
        if (!kept)
            SH_TRY(sh_txn_del(txn, table, hash, HASH_BYTES, err));
    }
    return SH_OK;
}
