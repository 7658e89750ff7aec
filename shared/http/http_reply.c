#include "shared/http/http.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void sh_http_json(sh_http_reply *reply, int status, json_t *value)
{
    char *text = value ? json_dumps(value, JSON_COMPACT) : NULL;
    json_decref(value);
    reply->status = status;
    reply->content_type = "application/json";
    sh_buf_clear(&reply->body);
    if (!text || sh_buf_append(&reply->body, text, strlen(text)) != SH_OK) {
        static const char sorry[] =
            "{\"error\":{\"message\":\"the answer could not be made: memory is out, or it is too "
            "long\",\"type\":\"server_error\",\"param\":null,\"code\":null}}";
        reply->status = 500;
        if (sh_buf_append(&reply->body, sorry, sizeof sorry - 1) != SH_OK)
            sh_buf_clear(&reply->body); /* the status alone has to say it */
    }
    free(text);
}

static json_t *string_or_null(const char *text)
{
    json_t *value = text ? json_string(text) : NULL;
    return value ? value : json_null();
}

void sh_http_fail(sh_http_reply *reply, int status, const char *type, const char *param,
                  const char *code, const char *format, ...)
{
    char text[SH_ERROR_TEXT_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);

    json_t *message = json_string(text);
    if (!message) { /* cut inside a character, or a client's bytes that are no UTF-8 */
        for (char *c = text; *c; c++)
            if ((unsigned char)*c >= 0x80)
                *c = '?';
        message = json_string(text);
    }
    json_t *error = json_object(), *root = json_object();
    SH_ASSERT(message && error && root);
    sh_json_set(error, "message", message);
    sh_json_set(error, "type", string_or_null(type));
    sh_json_set(error, "param", string_or_null(param));
    sh_json_set(error, "code", string_or_null(code));
    sh_json_set(root, "error", error);
    sh_http_json(reply, status, root);
}
