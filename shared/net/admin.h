/*
 * Commands to a running program: one JSON object in, one out, over the transport (CURVE, so that
 * only the holder of the admin key is heard) on an ipc socket in the program's folder. A daemon
 * makes that folder its working directory, and a tool goes there too: "ipc://admin.sock" then has
 * no length to worry about.
 *
 *     request  {"command": "status", ...}
 *     reply    {"ok": true, ...} or {"ok": false, "code": "not-found", "error": "one line"}
 *
 * Threads and ownership: as for a server of net.h.
 */
#ifndef SH_NET_ADMIN_H
#define SH_NET_ADMIN_H

#include "shared/base/json.h"
#include "shared/net/net.h"

#define SH_ADMIN_MESSAGE_MAX (4u << 20)
#define SH_ADMIN_ENDPOINT    "ipc://admin.sock"

typedef struct sh_admin sh_admin;
typedef uint32_t sh_admin_caller; /* tools share a key: an answer goes to the connection */
/* Removes a socket file that a killed program left. The socket is for its owner only (0600). */
SH_MUST_USE sh_status sh_admin_create(sh_net *net, const char *endpoint, const sh_net_keys *keys,
                                      const sh_hash *admin_key, sh_admin **out, sh_error *err);
void sh_admin_destroy(sh_admin **admin);
sh_net_server *sh_admin_server(sh_admin *admin); /* for sh_net_wait */
/* *request is a new reference, or NULL when none is there now; what is no JSON object is answered
 * and skipped. *caller is for the reply. */
SH_MUST_USE sh_status sh_admin_next(sh_admin *admin, json_t **request, sh_admin_caller *caller,
                                    sh_error *err);
/* Takes over reply. A tool that went away is no error. */
void sh_admin_reply(sh_admin *admin, sh_admin_caller caller, json_t *reply);
json_t *sh_admin_error(const sh_error *err); /* {"ok": false, ...} */

/* The tool's side: one call. SH_ERR_NOT_FOUND: nobody answers there (is the program running?);
 * SH_ERR_AUTH: it does not accept our key; else the status that the reply's code names. *reply is a
 * new reference. */
SH_MUST_USE sh_status sh_admin_call(const char *endpoint, const sh_hash *server_key,
                                    const sh_net_keys *keys, json_t *request, int timeout_ms,
                                    json_t **reply, sh_error *err);

#endif
