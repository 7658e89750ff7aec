/* Adapters for a tiny model: any bytes end in a status; what is taken is written the same again. */
#include <string.h>

#include "shared/base/buf.h"
#include "shared/model/model.h"

#define BYTES_MAX (16u << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const sh_model_config config = {.n_layers = 1,
                                           .width = 8,
                                           .n_heads = 2,
                                           .n_kv_heads = 1,
                                           .head_size = 4,
                                           .ffn = 16,
                                           .vocab = 16,
                                           .context = 8};
    sh_adapter *a = NULL, *b = NULL;
    sh_buf first, second;
    sh_error err = {0};
    sh_status status = sh_adapter_decode(data, size, "fuzz", &config, &a, &err);
    if (status != SH_OK) {
        SH_ASSERT(a == NULL && err.code == status && err.text[0] != '\0');
        return 0;
    }
    sh_buf_init(&first, BYTES_MAX);
    sh_buf_init(&second, BYTES_MAX);
    status = sh_adapter_encode(a, &first, NULL);
    SH_ASSERT(status == SH_OK);
    status = sh_adapter_decode(first.data, first.len, "again", &config, &b, NULL);
    SH_ASSERT(status == SH_OK);
    status = sh_adapter_encode(b, &second, NULL);
    SH_ASSERT(status == SH_OK && first.len == second.len);
    SH_ASSERT(memcmp(first.data, second.data, first.len) == 0);
    sh_adapter_destroy(&a);
    sh_adapter_destroy(&b);
    sh_buf_release(&first);
    sh_buf_release(&second);
    return 0;
}
