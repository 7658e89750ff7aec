/*
 * Connections of a server by their descriptor, for those that have to be ended: they were dropped,
 * or nothing was ever heard on them. A route tells a key's newest connection only, and a peer that
 * is silent has told no key at all.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/net/net_internal.h"

struct net_peer {
    uint64_t since_ms; /* accepted, or dropped; 0: no connection */
    bool heard, dropped;
    sh_hash key; /* once it was heard */
};

void net_peers_opened(net_peers *peers, int fd, uint64_t now_ms)
{
    if (fd < 0 || fd >= NET_PEERS_MAX)
        return;
    size_t n = (size_t)fd + 1;
    if (n > peers->n) {
        /* Without memory the connection is one that nobody watches. */
        if (sh_array_reserve((void **)&peers->items, &peers->cap, n, sizeof *peers->items,
                             NET_PEERS_MAX) != SH_OK)
            return;
        memset(peers->items + peers->n, 0, (n - peers->n) * sizeof *peers->items);
        peers->n = n;
    }
    peers->items[fd] = (net_peer){.since_ms = SH_MAX(now_ms, UINT64_C(1))};
}

void net_peers_closed(net_peers *peers, int fd)
{
    if (fd >= 0 && (size_t)fd < peers->n)
        peers->items[fd] = (net_peer){0};
}

void net_peers_heard(net_peers *peers, int fd, const sh_hash *key)
{
    if (fd < 0 || (size_t)fd >= peers->n || peers->items[fd].since_ms == 0)
        return;
    peers->items[fd].heard = true;
    peers->items[fd].key = *key;
}

void net_peers_drop(net_peers *peers, const sh_hash *key, uint64_t now_ms)
{
    for (size_t i = 0; i < peers->n; i++) {
        net_peer *p = &peers->items[i];
        if (p->since_ms == 0 || !p->heard || p->dropped || !sh_hash_equal(&p->key, key))
            continue;
        p->dropped = true;
        p->since_ms = SH_MAX(now_ms, UINT64_C(1));
    }
}

int net_peers_due(net_peers *peers, uint64_t now_ms, uint32_t silence_ms)
{
    for (; peers->hand < peers->n; peers->hand++) {
        net_peer *p = &peers->items[peers->hand];
        uint64_t age = p->since_ms != 0 && now_ms > p->since_ms ? now_ms - p->since_ms : 0;
        bool due = p->dropped                    ? age >= NET_DROP_LINGER_MS
                   : !p->heard && silence_ms > 0 ? age >= silence_ms
                                                 : false;
        if (!due)
            continue;
        *p = (net_peer){0};
        return (int)peers->hand++;
    }
    peers->hand = 0;
    return -1;
}

void net_peers_release(net_peers *peers)
{
    free(peers->items);
    *peers = (net_peers){0};
}
