/*
 * What the files behind sh_model_open and sh_model_pack share. Internal to model.
 */
#ifndef SH_MODEL_MODEL_INTERNAL_H
#define SH_MODEL_MODEL_INTERNAL_H

#include "shared/model/model.h"

/* Which file it is, as far as its folder tells; all 0: none, or not to be found. */
typedef struct {
    uint64_t device, inode, bytes;
    int64_t seconds, nanoseconds; /* of its last change */
} sh_file_identity;
void sh_model_identify(const char *path, sh_file_identity *out);

/* sh_model is embedded first, so that those who have it find the rest. */
typedef struct {
    sh_model model;
    char (*names)[SH_GGUF_NAME_MAX]; /* one a matrix */
    sh_file_identity file;           /* before it was opened */
} sh_model_block;

/* The keys `<architecture>.*`, checked; vocab and tied_output are left to the tensors. */
SH_MUST_USE sh_status sh_model_read_config(const sh_gguf *gguf, sh_model_config *out,
                                           sh_error *err);
/* `<architecture>.vocab_size`; *out stays as it is without the key. */
SH_MUST_USE sh_status sh_model_read_vocab_size(const sh_gguf *gguf, const sh_model_config *config,
                                               uint32_t *out, sh_error *err);
/* Fills rope_frequency (made here) and rope_magnitude. factors: [head_size / 2] or NULL. */
SH_MUST_USE sh_status sh_model_resolve_rope(sh_model *model, const float *factors, sh_error *err);
/* Unmaps or frees what sh_model_pack made; takes a pack that is NULL. */
void sh_packed_release(struct sh_packed **pack);

#endif
