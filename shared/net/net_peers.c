/*
 * Connections of a server by their descriptor, and one look at all of them that ends
 *   - those whose key was dropped, NET_DROP_LINGER_MS ago: a route tells a key's newest only;
 *   - those on which nothing was ever heard, past the limit of silence: they have told no key;
 *   - those that send and send, and no message comes of it: one of frames without end, which libzmq
 *     puts together in memory before it shows the first. What the kernel has received on a
 *     connection (TCP_INFO, Linux) is compared with what it had when a message was last heard on
 *     it; past NET_UNHEARD_MAX it is shut. Heartbeats are no messages: NET_HEARTBEAT_BYTES_S are
 *     forgiven;
 *   - those that send more than is read, by more than `allowed` bytes above that: libzmq's own
 *     limit is not used (net_socket_create says why).
 */
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "shared/net/net_internal.h"

struct net_peer {
    uint64_t since_ms;  /* accepted, or dropped; 0: no connection */
    uint64_t explained; /* bytes received that nobody wonders about */
    uint64_t read;      /* bytes of messages heard since the last look */
    bool heard, spoke;  /* ever; since the last look */
    bool dropped;
    sh_hash key; /* once it was heard */
    uint32_t connection;
};

static uint64_t received(int fd)
{
    struct tcp_info info = {0};
    socklen_t n = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n) != 0)
        return 0; /* no TCP, or gone */
    return info.tcpi_bytes_received;
}

static struct net_peer *peer_at(const net_peers *peers, int fd)
{
    bool there = fd >= 0 && (size_t)fd < peers->n && peers->items[fd].since_ms != 0;
    return there ? &peers->items[fd] : NULL;
}

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
    peers->watched += peers->items[fd].since_ms == 0;
    peers->items[fd] = (struct net_peer){.since_ms = SH_MAX(now_ms, UINT64_C(1))};
}

void net_peers_closed(net_peers *peers, int fd)
{
    struct net_peer *p = peer_at(peers, fd);
    if (p == NULL)
        return;
    *p = (struct net_peer){0};
    peers->watched--;
}

bool net_peers_has(const net_peers *peers, int fd, uint32_t connection)
{
    const struct net_peer *p = peer_at(peers, fd);
    return p != NULL && p->heard && p->connection == connection;
}

void net_peers_heard(net_peers *peers, int fd, const sh_hash *key, uint32_t connection, size_t n)
{
    struct net_peer *p = peer_at(peers, fd);
    if (p == NULL)
        return;
    p->heard = p->spoke = true;
    p->read += n + NET_MESSAGE_BYTES;
    p->key = *key;
    p->connection = connection;
}

void net_peers_drop(net_peers *peers, const sh_hash *key, const uint32_t *but, uint64_t now_ms)
{
    for (size_t i = 0; i < peers->n; i++) {
        struct net_peer *p = &peers->items[i];
        if (p->since_ms == 0 || !p->heard || p->dropped || !sh_hash_equal(&p->key, key) ||
            (but != NULL && p->connection == *but))
            continue;
        p->dropped = true;
        p->since_ms = SH_MAX(now_ms, UINT64_C(1));
    }
}

uint64_t net_peers_due(const net_peers *peers)
{
    return peers->watched > 0 ? peers->next_ms : UINT64_MAX;
}

/* Whether the bytes that came and were not heard are too many. Idle: all that was whole has been
 * read, and what is more is part of a message, or on its way here. Else whole messages may wait,
 * `allowed` bytes of them. */
static bool is_unheard(struct net_peer *p, int fd, const net_peers_looking *look, uint64_t forgiven)
{
    uint64_t bytes = received(fd), read = p->read;
    p->read = 0;
    if (!look->idle) {
        p->explained = SH_MIN(bytes, p->explained + read + forgiven);
        return bytes - p->explained > NET_UNHEARD_MAX + look->allowed;
    }
    p->explained = p->spoke ? bytes : SH_MIN(bytes, p->explained + forgiven);
    p->spoke = false;
    return bytes - p->explained > NET_UNHEARD_MAX;
}

static bool is_over(const struct net_peer *p, const net_peers_looking *look)
{
    uint64_t age = look->now_ms > p->since_ms ? look->now_ms - p->since_ms : 0;
    if (p->dropped)
        return age >= NET_DROP_LINGER_MS;
    /* Its first word may wait to be read. */
    return look->idle && !p->heard && look->silence_ms > 0 && age >= look->silence_ms;
}

void net_peers_look(net_peers *peers, const net_peers_looking *look)
{
    uint64_t pause = NET_PEERS_LOOK_MS + peers->watched / NET_PEERS_LOOKS_A_MS;
    /* A server that is never idle is looked at half as often. */
    if (peers->watched == 0 || look->now_ms < peers->next_ms + (look->idle ? 0 : pause))
        return;
    uint64_t forgiven = (look->now_ms - peers->last_ms) * NET_HEARTBEAT_BYTES_S / 1000;
    for (size_t i = 0; i < peers->n; i++) {
        struct net_peer *p = &peers->items[i];
        if (p->since_ms == 0)
            continue;
        bool unheard = is_unheard(p, (int)i, look, forgiven);
        if (!unheard && !is_over(p, look))
            continue;
        look->shut(look->arg, (int)i);
        net_peers_closed(peers, (int)i); /* once is enough */
    }
    peers->last_ms = look->now_ms;
    peers->next_ms = look->now_ms + pause;
}

void net_peers_release(net_peers *peers)
{
    free(peers->items);
    *peers = (net_peers){0};
}
