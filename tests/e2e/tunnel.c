#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/e2e/tunnel.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "shared/base/status.h"

#define POLL_MS    20
#define IP_HEAD    20 /* damage comes behind it */
#define SPACE_PATH "/proc/thread-self/ns/net"

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* ---- devices ---- */

static bool set_flags(int fd, const char *name, short flags)
{
    struct ifreq r = {0};
    snprintf(r.ifr_name, sizeof r.ifr_name, "%s", name);
    if (ioctl(fd, SIOCGIFFLAGS, &r) != 0)
        return false;
    r.ifr_flags = (short)(r.ifr_flags | flags);
    return ioctl(fd, SIOCSIFFLAGS, &r) == 0;
}

static bool set_address(int fd, const char *name, const char *address, unsigned long request)
{
    struct ifreq r = {0};
    struct sockaddr_in at = {.sin_family = AF_INET};
    snprintf(r.ifr_name, sizeof r.ifr_name, "%s", name);
    if (inet_pton(AF_INET, address, &at.sin_addr) != 1)
        return false;
    memcpy(&r.ifr_addr, &at, sizeof at);
    return ioctl(fd, request, &r) == 0;
}

/* In the namespace that the thread is in. Returns the device, -1 with errno. */
static int make_device(const char *address)
{
    struct ifreq r = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    snprintf(r.ifr_name, sizeof r.ifr_name, "shoal0");
    int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    bool good = tun >= 0 && fd >= 0 && ioctl(tun, TUNSETIFF, &r) == 0 &&
                set_address(fd, r.ifr_name, address, SIOCSIFADDR) &&
                set_address(fd, r.ifr_name, "255.255.255.0", SIOCSIFNETMASK) &&
                set_flags(fd, r.ifr_name, IFF_UP | IFF_RUNNING) && set_flags(fd, "lo", IFF_UP);
    int reason = errno;
    if (fd >= 0)
        close(fd);
    if (good)
        return tun;
    if (tun >= 0)
        close(tun);
    errno = reason;
    return -1;
}

void tunnel_enter(tunnel *t, int side)
{
    assert_int_equal(setns(side < 0 ? t->home : t->spaces[side], CLONE_NEWNET), 0);
}

/* ---- packets ---- */

static bool chance(tunnel *t, unsigned of_1000)
{
    return sh_rng_below(&t->rng, 1000) < of_1000;
}

static bool is_down(const tunnel_weather *w, unsigned side, uint64_t now)
{
    uint64_t period = ((uint64_t)w->down_ms + w->up_ms) * 1000;
    if ((side == 0 && w->only_b_to_a) || (side == 1 && w->only_a_to_b))
        return true;
    return w->down_ms > 0 && now % period < (uint64_t)w->down_ms * 1000;
}

static void enqueue(tunnel *t, tunnel_side *side, const tunnel_weather *w, const uint8_t *bytes,
                    size_t n)
{
    uint64_t now = now_us();
    if (side->n == TUNNEL_PACKETS_MAX) {
        atomic_fetch_add(&t->too_many, 1);
        return;
    }
    tunnel_packet *p = &side->queue[side->n++];
    side->free_us = SH_MAX(side->free_us, now);
    if (w->rate_kb_s > 0)
        side->free_us += n * 1000 / w->rate_kb_s;
    p->due_us = side->free_us + (uint64_t)w->delay_ms * 1000 +
                sh_rng_below(&t->rng, (uint64_t)w->jitter_ms * 1000 + 1);
    p->n = n;
    memcpy(p->bytes, bytes, n);
    for (size_t i = 0; i + 1 < side->n; i++)
        if (side->queue[i].due_us > p->due_us) {
            atomic_fetch_add(&t->overtaken, 1);
            break;
        }
    if (n > IP_HEAD && chance(t, w->damage)) {
        p->bytes[IP_HEAD + sh_rng_below(&t->rng, n - IP_HEAD)] ^= 0x20;
        atomic_fetch_add(&t->damaged, 1);
    }
}

static void take_in(tunnel *t, unsigned k, const tunnel_weather *w)
{
    static uint8_t bytes[TUNNEL_PACKET_MAX];
    tunnel_side *side = &t->sides[k];
    for (ssize_t n; (n = read(side->tun, bytes, sizeof bytes)) > 0;) {
        if (is_down(w, k, now_us()) || chance(t, w->lose)) {
            atomic_fetch_add(&t->lost, 1);
            continue;
        }
        enqueue(t, side, w, bytes, (size_t)n);
        if (chance(t, w->repeat)) {
            enqueue(t, side, w, bytes, (size_t)n);
            atomic_fetch_add(&t->repeated, 1);
        }
    }
}

/* Gives what is due to the other side; returns when the next is. */
static uint64_t give_out(tunnel *t, unsigned k)
{
    tunnel_side *side = &t->sides[k];
    for (;;) {
        size_t first = 0;
        for (size_t i = 1; i < side->n; i++)
            if (side->queue[i].due_us < side->queue[first].due_us)
                first = i;
        if (side->n == 0)
            return UINT64_MAX;
        if (side->queue[first].due_us > now_us())
            return side->queue[first].due_us;
        tunnel_packet *p = &side->queue[first];
        if (write(t->sides[1 - k].tun, p->bytes, p->n) == (ssize_t)p->n)
            atomic_fetch_add(&t->carried, 1);
        side->n--;
        if (first != side->n)
            *p = side->queue[side->n];
    }
}

static void *carry(void *arg)
{
    tunnel *t = arg;
    while (!atomic_load(&t->stop)) {
        struct pollfd fds[2] = {{.fd = t->sides[0].tun, .events = POLLIN},
                                {.fd = t->sides[1].tun, .events = POLLIN}};
        uint64_t due = SH_MIN(give_out(t, 0), give_out(t, 1)), now = now_us();
        int wait = due <= now ? 0 : (int)SH_MIN((due - now + 999) / 1000, (uint64_t)POLL_MS);
        (void)poll(fds, 2, wait);
        pthread_mutex_lock(&t->lock);
        tunnel_weather weather = t->weather;
        pthread_mutex_unlock(&t->lock);
        take_in(t, 0, &weather);
        take_in(t, 1, &weather);
    }
    return NULL;
}

void tunnel_set(tunnel *t, const tunnel_weather *weather)
{
    pthread_mutex_lock(&t->lock);
    t->weather = *weather;
    pthread_mutex_unlock(&t->lock);
}

const char *tunnel_start(tunnel *t, uint64_t seed)
{
    static char why[160];
    static const char *const addresses[] = {TUNNEL_ADDRESS_A, TUNNEL_ADDRESS_B};
    *t = (tunnel){.spaces = {-1, -1}, .sides = {{.tun = -1}, {.tun = -1}}};
    t->home = open(SPACE_PATH, O_RDONLY | O_CLOEXEC);
    sh_rng_init(&t->rng, seed, 0, 0x7475);
    pthread_mutex_init(&t->lock, NULL);
    atomic_store(&t->runs, true);
    for (unsigned k = 0; k < 2; k++) {
        t->sides[k].queue = calloc(TUNNEL_PACKETS_MAX, sizeof *t->sides[k].queue);
        assert_non_null(t->sides[k].queue);
        bool made = t->home >= 0 && unshare(CLONE_NEWNET) == 0;
        if (made) {
            t->spaces[k] = open(SPACE_PATH, O_RDONLY | O_CLOEXEC);
            t->sides[k].tun = make_device(addresses[k]);
        }
        if (!made || t->spaces[k] < 0 || t->sides[k].tun < 0) {
            snprintf(why, sizeof why, "no network namespaces with TUN devices here: %s",
                     strerror(errno));
            if (made)
                tunnel_enter(t, -1);
            return why;
        }
    }
    tunnel_enter(t, -1);
    assert_int_equal(pthread_create(&t->thread, NULL, carry, t), 0);
    return NULL;
}

void tunnel_stop(tunnel *t)
{
    if (!atomic_exchange(&t->runs, false))
        return;
    atomic_store(&t->stop, true);
    if (t->thread)
        pthread_join(t->thread, NULL);
    for (unsigned k = 0; k < 2; k++) {
        if (t->sides[k].tun >= 0)
            close(t->sides[k].tun);
        if (t->spaces[k] >= 0)
            close(t->spaces[k]);
        free(t->sides[k].queue);
    }
    if (t->home >= 0)
        close(t->home);
    pthread_mutex_destroy(&t->lock);
}
