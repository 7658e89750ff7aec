#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "tests/net/rig.h"

sh_error err;

uint64_t rig_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

bool guest_allow(void *arg, const sh_hash *key)
{
    guest_list *guests = arg;
    atomic_fetch_add(&guests->asked, 1);
    unsigned n = atomic_load(&guests->n);
    for (unsigned i = 0; i < n; i++)
        if (sh_hash_equal(&guests->keys[i], key))
            return true;
    return false;
}

sh_net_keys make_keys(void)
{
    sh_net_keys keys;
    OK(sh_net_keys_make(&keys, &err));
    return keys;
}

sh_net_server *make_server(sh_net *net, const sh_net_keys *keys, guest_list *guests)
{
    sh_net_server *server = NULL;
    sh_net_server_options options = {.endpoint = ENDPOINT,
                                     .keys = keys,
                                     .allow = guests ? guest_allow : NULL,
                                     .arg = guests,
                                     .message_max = MESSAGE_MAX};
    OK(sh_net_server_create(net, &options, &server, &err));
    return server;
}

sh_net_client *make_client(sh_net *net, const char *endpoint, const sh_hash *server_key,
                           const sh_net_keys *keys)
{
    sh_net_client *client = NULL;
    sh_net_client_options options = {.endpoint = endpoint,
                                     .server_key = *server_key,
                                     .keys = keys,
                                     .message_max = MESSAGE_MAX,
                                     .reconnect_min_ms = 20,
                                     .reconnect_max_ms = 100};
    OK(sh_net_client_create(net, &options, &client, &err));
    return client;
}

void serve(sh_net_server *server, sh_net_client *client)
{
    OK(sh_net_wait(&(sh_net_waiting){.servers = &server,
                                     .n_servers = server ? 1 : 0,
                                     .clients = &client,
                                     .n_clients = client ? 1 : 0,
                                     .timeout_ms = 100},
                   &err));
}

sh_net_event client_until(sh_net_client *client, sh_net_server *server, sh_net_event_kind kind)
{
    uint64_t end = rig_now_ms() + DEADLINE_MS;
    while (rig_now_ms() < end) {
        sh_net_event event = {0};
        OK(sh_net_client_next(client, &event, &err));
        if (event.kind == kind)
            return event;
        if (event.kind != SH_NET_NONE)
            continue;
        if (server) {
            OK(sh_net_server_next(server, &event, &err));
            assert_int_equal(event.kind, SH_NET_NONE);
        }
        serve(server, client);
    }
    fail_msg("event %d did not come", (int)kind);
    return (sh_net_event){0};
}

sh_net_event server_message(sh_net_server *server)
{
    uint64_t end = rig_now_ms() + DEADLINE_MS;
    while (rig_now_ms() < end) {
        sh_net_event event = {0};
        OK(sh_net_server_next(server, &event, &err));
        if (event.kind == SH_NET_MESSAGE)
            return event;
        serve(server, NULL);
    }
    fail_msg("no message came");
    return (sh_net_event){0};
}
