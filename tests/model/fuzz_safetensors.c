/* Any bytes end in a status; of a file that is taken, every value can be read. */
#include <string.h>

#include "shared/model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    sh_safetensors *file = NULL;
    sh_error err = {0};
    if (sh_safetensors_open_memory(data, size, "fuzz", &file, &err) != SH_OK) {
        SH_ASSERT(err.text[0] != '\0' && file == NULL);
        return 0;
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < sh_safetensors_count(file); i++) {
        const sh_safetensor *t = sh_safetensors_at(file, i);
        SH_ASSERT(sh_safetensors_find(file, t->name) == t);
        sum += t->bytes;
        const size_t values = t->is_float ? t->bytes / sh_type_row_bytes(t->type, 1) : 0;
        for (size_t at = 0; at < values; at += 100) {
            float out[100];
            sh_safetensor_floats(t, at, SH_MIN(values - at, (size_t)100), out);
        }
    }
    SH_ASSERT(sum <= size); /* no byte is in two tensors */
    sh_safetensors_close(&file);
    return 0;
}
