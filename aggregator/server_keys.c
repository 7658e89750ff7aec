/* Which keys may connect: the copy of the node table that the ZAP handler's thread reads. */
#include <stdlib.h>
#include <string.h>

#include "aggregator/server_internal.h"

sh_status server_keys_init(server_keys *keys, bool any, sh_error *err)
{
    *keys = (server_keys){.any = any};
    if (pthread_mutex_init(&keys->lock, NULL) != 0)
        return sh_fail(err, SH_ERR_NO_MEMORY, "server: no memory for a lock");
    return SH_OK;
}

void server_keys_release(server_keys *keys)
{
    free(keys->enrolled);
    free(keys->revoked);
    pthread_mutex_destroy(&keys->lock);
    *keys = (server_keys){0};
}

/* Where the key is, or belongs. */
static size_t find(const sh_hash *keys, size_t n, const sh_hash *key, bool *found)
{
    size_t low = 0, high = n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (memcmp(&keys[middle], key, sizeof *key) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    *found = low < n && sh_hash_equal(&keys[low], key);
    return low;
}

static sh_status add(sh_hash **keys, size_t *n, size_t *cap, const sh_hash *key)
{
    bool found;
    size_t at = find(*keys, *n, key, &found);
    if (found)
        return SH_OK;
    SH_TRY(sh_array_reserve((void **)keys, cap, *n + 1, sizeof **keys, SH_COORD_NODES_MAX));
    memmove(*keys + at + 1, *keys + at, (*n - at) * sizeof **keys);
    (*keys)[at] = *key;
    ++*n;
    return SH_OK;
}

static void drop(sh_hash *keys, size_t *n, const sh_hash *key)
{
    bool found;
    size_t at = find(keys, *n, key, &found);
    if (!found)
        return;
    memmove(keys + at, keys + at + 1, (*n - at - 1) * sizeof *keys);
    --*n;
}

sh_status server_keys_set(server_keys *k, const sh_hash *key, bool revoked, sh_error *err)
{
    pthread_mutex_lock(&k->lock);
    sh_status status;
    if (revoked) {
        drop(k->enrolled, &k->n_enrolled, key);
        status = add(&k->revoked, &k->n_revoked, &k->revoked_cap, key);
    } else {
        drop(k->revoked, &k->n_revoked, key);
        status = add(&k->enrolled, &k->n_enrolled, &k->enrolled_cap, key);
    }
    pthread_mutex_unlock(&k->lock);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "server: no room for one more key");
}

bool server_keys_allow(void *arg, const sh_hash *key)
{
    server_keys *k = arg;
    bool enrolled, revoked;
    pthread_mutex_lock(&k->lock);
    find(k->enrolled, k->n_enrolled, key, &enrolled);
    find(k->revoked, k->n_revoked, key, &revoked);
    bool allow = !revoked && (enrolled || k->any);
    pthread_mutex_unlock(&k->lock);
    return allow;
}

static sh_status load(void *arg, const sh_node_row *row)
{
    return server_keys_set(arg, &row->key, row->revoked, NULL);
}

sh_status server_keys_load(server_keys *keys, sh_txn *txn, sh_error *err)
{
    return sh_coord_each_node(txn, load, keys, err);
}
