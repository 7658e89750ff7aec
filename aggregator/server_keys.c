/* Which keys may connect: the copy of the node table that the ZAP handler's thread reads. */
#include <stdlib.h>
#include <string.h>

#include "aggregator/server_internal.h"
#include "shared/base/clock.h"

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
    SH_TRY(sh_array_reserve((void **)keys, cap, *n + 1, sizeof **keys, SERVER_KEYS_MAX));
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

static void drop_guest(server_keys *k, const sh_hash *key)
{
    for (size_t i = 0; i < k->n_guests; i++)
        if (sh_hash_equal(&k->guests[i].key, key)) {
            k->guests[i] = k->guests[--k->n_guests];
            return;
        }
}

sh_status server_keys_set(server_keys *k, const sh_hash *key, sh_key_access access, sh_error *err)
{
    sh_status status = SH_OK;
    pthread_mutex_lock(&k->lock);
    if (access != SH_KEY_ALLOWED)
        drop(k->enrolled, &k->n_enrolled, key);
    else
        status = add(&k->enrolled, &k->n_enrolled, &k->enrolled_cap, key);
    if (access != SH_KEY_SHUT)
        drop(k->revoked, &k->n_revoked, key);
    else
        status = add(&k->revoked, &k->n_revoked, &k->revoked_cap, key);
    if (access != SH_KEY_UNKNOWN)
        drop_guest(k, key);
    pthread_mutex_unlock(&k->lock);
    return status == SH_OK ? SH_OK : sh_fail(err, status, "server: no room for one more key");
}

void server_keys_open(server_keys *k, uint64_t until_ms)
{
    pthread_mutex_lock(&k->lock);
    k->open_until_ms = until_ms;
    pthread_mutex_unlock(&k->lock);
}

/* A key that nobody knows, while there are tokens. */
static bool admit_guest(server_keys *k, const sh_hash *key)
{
    uint64_t now = sh_clock_mono_ms();
    if (sh_clock_wall_ms() >= k->open_until_ms)
        return false;
    for (size_t i = k->n_guests; i-- > 0;)
        if (now - k->guests[i].at_ms >= SERVER_GUEST_MS)
            k->guests[i] = k->guests[--k->n_guests];
    drop_guest(k, key);
    if (k->n_guests >= SERVER_GUESTS_MAX)
        return false;
    k->guests[k->n_guests++] = (server_guest){*key, now};
    return true;
}

bool server_keys_allow(void *arg, const sh_hash *key)
{
    server_keys *k = arg;
    bool enrolled, revoked;
    pthread_mutex_lock(&k->lock);
    find(k->enrolled, k->n_enrolled, key, &enrolled);
    find(k->revoked, k->n_revoked, key, &revoked);
    bool allow = !revoked && (enrolled || k->any || admit_guest(k, key));
    pthread_mutex_unlock(&k->lock);
    return allow;
}

static sh_status load(void *arg, const sh_hash *key, bool allowed)
{
    return server_keys_set(arg, key, allowed ? SH_KEY_ALLOWED : SH_KEY_SHUT, NULL);
}

sh_status server_keys_load(server_keys *keys, sh_txn *txn, sh_error *err)
{
    server_keys fresh = {0};
    SH_TRY(server_keys_init(&fresh, keys->any, err));
    sh_status status = sh_coord_each_key(txn, load, &fresh, err);
    if (status == SH_OK) {
        pthread_mutex_lock(&keys->lock);
        sh_hash *enrolled = keys->enrolled, *revoked = keys->revoked;
        keys->enrolled = fresh.enrolled;
        keys->n_enrolled = fresh.n_enrolled;
        keys->enrolled_cap = fresh.enrolled_cap;
        keys->revoked = fresh.revoked;
        keys->n_revoked = fresh.n_revoked;
        keys->revoked_cap = fresh.revoked_cap;
        fresh.enrolled = enrolled;
        fresh.revoked = revoked;
        pthread_mutex_unlock(&keys->lock);
    }
    server_keys_release(&fresh);
    return status;
}
