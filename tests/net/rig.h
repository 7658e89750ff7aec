/* What the tests of the transport share: keys, waiting with a deadline, a server that lets a list
 * of keys in. Include after cmocka.h. */
#ifndef SH_TESTS_NET_RIG_H
#define SH_TESTS_NET_RIG_H

#include <stdatomic.h>

#include "shared/net/net.h"

#define MESSAGE_MAX 65536
#define DEADLINE_MS 60000 /* for what must come; the machine may be busy */
#define ENDPOINT    "tcp://127.0.0.1:*"

extern sh_error err;

#define OK(expr)                                                                                   \
    do {                                                                                           \
        sh_status ok_status_ = (expr);                                                             \
        if (ok_status_ != SH_OK)                                                                   \
            fail_msg("%s: %s: %s", #expr, sh_status_name(ok_status_), err.text);                   \
    } while (0)

/* Keys that may connect. */
typedef struct {
    sh_hash keys[8];
    atomic_uint n;
    atomic_uint asked;
} guest_list;
bool guest_allow(void *arg, const sh_hash *key);

sh_net_keys make_keys(void);
sh_net_server *make_server(sh_net *net, const sh_net_keys *keys, guest_list *guests);
/* Dials with short pauses. */
sh_net_client *make_client(sh_net *net, const char *endpoint, const sh_hash *server_key,
                           const sh_net_keys *keys);

/* The next event of this kind; those of other kinds are passed over. The server (may be NULL) is
 * served meanwhile, and must get no message. */
sh_net_event client_until(sh_net_client *client, sh_net_server *server, sh_net_event_kind kind);
/* The next message at the server. */
sh_net_event server_message(sh_net_server *server);
/* Waits a little for either; for loops with an end of their own. */
void serve(sh_net_server *server, sh_net_client *client);
uint64_t rig_now_ms(void);

#endif
