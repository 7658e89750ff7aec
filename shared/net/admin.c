#include "shared/net/admin.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "shared/net/net_internal.h"

#define IPC               "ipc://"
#define ADMIN_CONNECTIONS 16
#define ADMIN_QUEUE       16
#define ADMIN_LINGER_MS   1000 /* a reply that was given goes out */
#define DIAL_MIN_MS       20   /* a tool does not wait long before it tries again */
#define DIAL_MAX_MS       500

struct sh_admin {
    sh_net_server *server;
    sh_hash admin_key;
    char *path; /* of the socket file, removed at the end; NULL: not ipc, or not made */
};

/* ---- the socket file ---- */

static const char *socket_path(const char *endpoint)
{
    return strncmp(endpoint, IPC, strlen(IPC)) == 0 ? endpoint + strlen(IPC) : NULL;
}

typedef enum { FILE_ABSENT, FILE_STALE, FILE_LIVE, FILE_OTHER } file_state;

/* Is somebody listening behind the file? libzmq removes whatever is there when it binds, so that a
 * second program would take the socket away from the first. */
static file_state look_at(const char *path)
{
    struct stat info;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (lstat(path, &info) != 0)
        return FILE_ABSENT;
    if (!S_ISSOCK(info.st_mode) || strlen(path) >= sizeof address.sun_path)
        return FILE_OTHER;
    memcpy(address.sun_path, path, strlen(path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return FILE_OTHER;
    /* EAGAIN: it listens, and its queue is full. */
    bool live = connect(fd, (const struct sockaddr *)&address, sizeof address) == 0 ||
                errno == EAGAIN || errno == EINPROGRESS;
    bool stale = !live && errno == ECONNREFUSED;
    close(fd);
    return live ? FILE_LIVE : stale ? FILE_STALE : FILE_OTHER;
}

static sh_status clear_path(const char *path, sh_error *err)
{
    switch (look_at(path)) {
    case FILE_ABSENT:
        return SH_OK;
    case FILE_STALE:
        if (unlink(path) == 0)
            return SH_OK;
        return sh_fail(err, SH_ERR_IO, "cannot remove the old socket '%s': %s", path,
                       strerror(errno));
    case FILE_LIVE:
        return sh_fail(err, SH_ERR_EXISTS,
                       "'%s': a program answers there already; stop it before you start another "
                       "one in this folder",
                       path);
    default:
        return sh_fail(err, SH_ERR_EXISTS,
                       "'%s' is in the way of the admin socket: remove it or choose another folder",
                       path);
    }
}

/* ---- the daemon's side ---- */

static bool allow(void *arg, const sh_hash *key)
{
    const sh_admin *admin = arg;
    return sh_bytes_equal(key->b, admin->admin_key.b, sizeof key->b);
}

sh_status sh_admin_create(sh_net *net, const char *endpoint, const sh_net_keys *keys,
                          const sh_hash *admin_key, sh_admin **out, sh_error *err)
{
    const char *path = socket_path(endpoint);
    if (path)
        SH_TRY(clear_path(path, err));
    sh_admin *admin = sh_calloc(1, sizeof *admin);
    if (!admin)
        return sh_fail(err, SH_ERR_NO_MEMORY, "admin: no memory");
    sh_status status = SH_OK;
    admin->admin_key = *admin_key;
    SH_GOTO(sh_net_server_create(net,
                                 &(sh_net_server_options){.endpoint = endpoint,
                                                          .keys = keys,
                                                          .allow = allow,
                                                          .arg = admin,
                                                          .connections_max = ADMIN_CONNECTIONS,
                                                          .queue_max = ADMIN_QUEUE,
                                                          .message_max = SH_ADMIN_MESSAGE_MAX},
                                 &admin->server, err));
    /* Before this the keys alone keep others out. */
    if (path && chmod(path, 0600) != 0)
        SH_GOTO(sh_fail(err, SH_ERR_IO, "cannot make '%s' private: %s", path, strerror(errno)));
    admin->path = path ? strdup(path) : NULL;
    *out = admin;
    return SH_OK;
cleanup:
    sh_admin_destroy(&admin);
    return status;
}

void sh_admin_destroy(sh_admin **out)
{
    sh_admin *admin = *out;
    if (!admin)
        return;
    if (admin->path)
        unlink(admin->path);
    sh_net_server_destroy(&admin->server, ADMIN_LINGER_MS);
    free(admin->path);
    free(admin);
    *out = NULL;
}

sh_net_server *sh_admin_server(sh_admin *admin)
{
    return admin->server;
}

json_t *sh_admin_error(const sh_error *err)
{
    json_t *reply = json_object();
    sh_json_set(reply, "ok", json_false());
    sh_json_set(reply, "code", json_string(sh_status_name(err->code)));
    json_t *text = json_string(err->text);
    sh_json_set(reply, "error", text ? text : json_string("an error without a readable text"));
    return reply;
}

void sh_admin_reply(sh_admin *admin, sh_admin_caller caller, json_t *reply)
{
    char *text = json_dumps(reply, JSON_COMPACT);
    json_decref(reply);
    size_t n = text ? strlen(text) : 0;
    if (!text || n > SH_ADMIN_MESSAGE_MAX) {
        sh_error error = {0};
        sh_fail(&error, SH_ERR_LIMIT, "the answer has more than %u bytes", SH_ADMIN_MESSAGE_MAX);
        free(text);
        json_t *instead = sh_admin_error(&error);
        text = json_dumps(instead, JSON_COMPACT);
        json_decref(instead);
        n = text ? strlen(text) : 0;
    }
    /* Whoever is not there any more does not want it. */
    sh_status sent = sh_net_server_answer(admin->server, caller, text ? text : "", n, NULL);
    (void)sent;
    free(text);
}

sh_status sh_admin_next(sh_admin *admin, json_t **request, sh_admin_caller *caller, sh_error *err)
{
    for (;;) {
        sh_net_event event;
        json_error_t where;
        SH_TRY(sh_net_server_next(admin->server, &event, err));
        if (event.kind != SH_NET_MESSAGE) {
            *request = NULL;
            return SH_OK;
        }
        json_t *value =
            json_loadb((const char *)event.data, event.n, JSON_REJECT_DUPLICATES, &where);
        if (json_is_object(value)) {
            *request = value;
            *caller = event.connection;
            return SH_OK;
        }
        sh_error error = {0};
        sh_fail(&error, SH_ERR_INVALID, "the request is no JSON object%s%s", value ? "" : ": ",
                value ? "" : where.text);
        json_decref(value);
        sh_admin_reply(admin, event.connection, sh_admin_error(&error));
    }
}

/* ---- the tool's side ---- */

static sh_status status_named(const char *name)
{
    for (int code = SH_ERR_USAGE; code <= SH_ERR_CRASHED; code++)
        if (name && strcmp(sh_status_name((sh_status)code), name) == 0)
            return (sh_status)code;
    return SH_ERR_INVALID;
}

static sh_status read_reply(const char *endpoint, const sh_net_event *event, json_t **reply,
                            sh_error *err)
{
    json_error_t where;
    json_t *value = json_loadb((const char *)event->data, event->n, 0, &where);
    if (!json_is_object(value)) {
        json_decref(value);
        return sh_fail(err, SH_ERR_INVALID, "'%s': the answer is no JSON object", endpoint);
    }
    if (json_is_true(json_object_get(value, "ok"))) {
        *reply = value;
        return SH_OK;
    }
    const char *text = json_string_value(json_object_get(value, "error"));
    sh_status status = sh_fail(err, status_named(json_string_value(json_object_get(value, "code"))),
                               "%s", text ? text : "the program refused, and did not say why");
    json_decref(value);
    return status;
}

/* One connection, one request, one reply. */
static sh_status converse(sh_net_client *client, const char *endpoint, const char *request,
                          int timeout_ms, json_t **reply, sh_error *err)
{
    uint64_t end_ms = net_now_ms() + (uint64_t)SH_MAX(timeout_ms, 0);
    bool asked = false;
    for (;;) {
        sh_net_event event;
        SH_TRY(sh_net_client_next(client, &event, err));
        switch (event.kind) {
        case SH_NET_UP:
            SH_TRY(sh_net_client_send(client, request, strlen(request), err));
            asked = true;
            continue;
        case SH_NET_MESSAGE:
            return read_reply(endpoint, &event, reply, err);
        case SH_NET_REFUSED:
            return sh_fail(err, SH_ERR_AUTH,
                           "'%s': the program does not accept this admin key, or is not the one "
                           "whose public key we have",
                           endpoint);
        case SH_NET_DOWN:
            return sh_fail(err, SH_ERR_NOT_FOUND, "'%s': the program ended before it answered",
                           endpoint);
        default:
            break;
        }
        uint64_t now = net_now_ms();
        if (now >= end_ms)
            return sh_fail(err, SH_ERR_NOT_FOUND, "'%s': no answer in %d ms: is the program %s?",
                           endpoint, timeout_ms, asked ? "stuck" : "running");
        SH_TRY(sh_net_wait(&(sh_net_waiting){.clients = &client,
                                             .n_clients = 1,
                                             .timeout_ms = (int)(end_ms - now)},
                           err));
    }
}

sh_status sh_admin_call(const char *endpoint, const sh_hash *server_key, const sh_net_keys *keys,
                        json_t *request, int timeout_ms, json_t **reply, sh_error *err)
{
    sh_net *net = NULL;
    sh_net_client *client = NULL;
    const char *path = socket_path(endpoint);
    if (path && look_at(path) != FILE_LIVE)
        return sh_fail(err, SH_ERR_NOT_FOUND, "'%s': nobody answers there: is the program running?",
                       path);
    char *text = json_dumps(request, JSON_COMPACT);
    if (!text)
        return sh_fail(err, SH_ERR_INVALID, "admin: the request cannot be written as JSON");
    sh_status status = SH_OK;
    SH_GOTO(sh_net_create(&net, err));
    SH_GOTO(sh_net_client_create(net,
                                 &(sh_net_client_options){.endpoint = endpoint,
                                                          .server_key = *server_key,
                                                          .keys = keys,
                                                          .queue_max = ADMIN_QUEUE,
                                                          .message_max = SH_ADMIN_MESSAGE_MAX,
                                                          .keep_unread = true,
                                                          .reconnect_min_ms = DIAL_MIN_MS,
                                                          .reconnect_max_ms = DIAL_MAX_MS},
                                 &client, err));
    SH_GOTO(converse(client, endpoint, text, timeout_ms, reply, err));
cleanup:
    sh_net_client_destroy(&client, 0);
    sh_net_destroy(&net);
    free(text);
    return status;
}
