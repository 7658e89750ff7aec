/*
 * A GGUF file written tensor by tensor, for models that do not fit memory twice. The head comes
 * from the writer; the tensors' bytes pass through one buffer.
 */
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/model/gguf_internal.h"

#define BUFFER_BYTES (1u << 20)

struct sh_gguf_stream {
    const sh_gguf_writer *writer;
    sh_file_writer file;
    size_t tensor;     /* the one that is next */
    uint64_t received; /* of its bytes */
    uint8_t *buffer;   /* [BUFFER_BYTES] */
    size_t buffered;
};

static sh_status flush(sh_gguf_stream *s, sh_error *err)
{
    SH_TRY(sh_file_writer_append(&s->file, s->buffer, s->buffered, err));
    s->buffered = 0;
    return SH_OK;
}

static sh_status put(sh_gguf_stream *s, const void *bytes, size_t n, sh_error *err)
{
    if (n > BUFFER_BYTES - s->buffered)
        SH_TRY(flush(s, err));
    if (n >= BUFFER_BYTES)
        return sh_file_writer_append(&s->file, bytes, n, err);
    memcpy(s->buffer + s->buffered, bytes, n);
    s->buffered += n;
    return SH_OK;
}

sh_status sh_gguf_stream_begin(const sh_gguf_writer *w, const char *path, sh_gguf_stream **out,
                               sh_error *err)
{
    sh_status status = SH_OK;
    sh_buf head;
    sh_buf_init(&head, SIZE_MAX);
    sh_gguf_stream *s = sh_calloc(1, sizeof *s);
    if (s == NULL || (s->buffer = sh_calloc(1, BUFFER_BYTES)) == NULL) {
        status = sh_fail(err, SH_ERR_NO_MEMORY, "out of memory to write '%s'", path);
        goto cleanup;
    }
    s->writer = w;
    status = sh_gguf_writer_head(w, &head);
    if (status != SH_OK) {
        sh_fail(err, status, "cannot encode the header of '%s': %s", path, sh_status_name(status));
        goto cleanup;
    }
    SH_GOTO(sh_file_writer_open(path, &s->file, err));
    SH_GOTO(put(s, head.data, head.len, err));
    *out = s;
    s = NULL;

cleanup:
    sh_buf_release(&head);
    sh_gguf_stream_cancel(&s);
    return status;
}

sh_status sh_gguf_stream_write(sh_gguf_stream *stream, const void *bytes, size_t n, sh_error *err)
{
    static const uint8_t zeros[SH_GGUF_ALIGNMENT];
    SH_ASSERT(stream->tensor < sh_gguf_writer_n_tensors(stream->writer));
    const uint64_t whole = sh_gguf_writer_tensor_bytes(stream->writer, stream->tensor);
    SH_ASSERT(n <= whole - stream->received);
    SH_TRY(put(stream, bytes, n, err));
    stream->received += n;
    if (stream->received < whole)
        return SH_OK;
    stream->tensor++;
    stream->received = 0;
    const size_t past = (size_t)(whole % SH_GGUF_ALIGNMENT);
    return past == 0 ? SH_OK : put(stream, zeros, SH_GGUF_ALIGNMENT - past, err);
}

sh_status sh_gguf_stream_finish(sh_gguf_stream **stream, sh_error *err)
{
    sh_status status = SH_OK;
    sh_gguf_stream *s = *stream;
    SH_ASSERT(s->tensor == sh_gguf_writer_n_tensors(s->writer));
    SH_GOTO(flush(s, err));
    SH_GOTO(sh_file_writer_commit(&s->file, err));

cleanup:
    sh_gguf_stream_cancel(stream);
    return status;
}

void sh_gguf_stream_cancel(sh_gguf_stream **stream)
{
    sh_gguf_stream *s = *stream;
    if (s == NULL)
        return;
    sh_file_writer_abandon(&s->file);
    free(s->buffer);
    free(s);
    *stream = NULL;
}
