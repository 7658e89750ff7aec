/*
 * Connections that send and send, and no message comes of it: one of frames without end, which
 * libzmq puts together in memory before it shows the first. What the kernel has received on a
 * connection (TCP_INFO, Linux) is compared with what it had when a message was last heard on it;
 * past NET_UNHEARD_MAX it is shut. Heartbeats are no messages: NET_HEARTBEAT_BYTES_S are forgiven.
 */
#include <errno.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "shared/net/net_internal.h"

struct net_unheard_slot {
    bool open, heard;   /* heard: since the last look */
    uint64_t explained; /* bytes received that nobody wonders about */
};

static uint64_t received(int fd)
{
    struct tcp_info info = {0};
    socklen_t n = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &n) != 0)
        return 0; /* no TCP, or gone */
    return info.tcpi_bytes_received;
}

void net_unheard_open(net_unheard *u, int fd)
{
    if (fd < 0 || sh_array_reserve((void **)&u->slots, &u->cap, (size_t)fd + 1, sizeof *u->slots,
                                   NET_UNHEARD_FDS_MAX) != SH_OK)
        return; /* not watched */
    if (u->n < (size_t)fd + 1) {
        memset(u->slots + u->n, 0, ((size_t)fd + 1 - u->n) * sizeof *u->slots);
        u->n = (size_t)fd + 1;
    }
    u->watched += !u->slots[fd].open;
    u->slots[fd] = (struct net_unheard_slot){.open = true};
}

void net_unheard_close(net_unheard *u, int fd)
{
    if (fd < 0 || (size_t)fd >= u->n || !u->slots[fd].open)
        return;
    u->slots[fd].open = false;
    u->watched--;
}

void net_unheard_message(net_unheard *u, int fd)
{
    if (fd >= 0 && (size_t)fd < u->n)
        u->slots[fd].heard = true;
}

uint64_t net_unheard_due(const net_unheard *u)
{
    return u->watched > 0 ? u->next_ms : UINT64_MAX;
}

/* All that was whole has been read by now: what is more is part of a message, or on its way here.
 */
void net_unheard_look(net_unheard *u, uint64_t now_ms, uint64_t allowed,
                      void (*shut)(void *arg, int fd), void *arg)
{
    if (u->watched == 0 || now_ms < u->next_ms)
        return;
    uint64_t forgiven = (now_ms - u->last_ms) * NET_HEARTBEAT_BYTES_S / 1000;
    for (size_t fd = 0; fd < u->n; fd++) {
        struct net_unheard_slot *slot = &u->slots[fd];
        if (!slot->open)
            continue;
        uint64_t bytes = received((int)fd);
        slot->explained = slot->heard ? bytes : SH_MIN(bytes, slot->explained + forgiven);
        slot->heard = false;
        if (bytes - slot->explained > NET_UNHEARD_MAX + allowed) {
            shut(arg, (int)fd);
            slot->explained = bytes;
        }
    }
    u->last_ms = now_ms;
    u->next_ms = now_ms + NET_UNHEARD_LOOK_MS + u->watched / NET_UNHEARD_LOOKS_A_MS;
}

void net_unheard_release(net_unheard *u)
{
    free(u->slots);
    *u = (net_unheard){0};
}
