/*
 * What tests of the forward pass may see beside model.h. Internal to model and its tests.
 */
#ifndef SH_MODEL_CONTEXT_INTERNAL_H
#define SH_MODEL_CONTEXT_INTERNAL_H

#include "shared/model/model.h"

typedef enum {
    SH_STAGE_EMBEDDING,       /* layer 0 */
    SH_STAGE_AFTER_ATTENTION, /* the residual stream after a layer's attention */
    SH_STAGE_LAYER_OUTPUT,    /* and after its feed-forward part */
    SH_STAGE_FINAL_NORM,      /* what the output matrix sees; layer n_layers */
} sh_stage;

/* x is [n, width], rows of consecutive positions of which the last is the batch's last. Rows whose
 * logits are not wanted are absent after the attention of the last layer. */
typedef void (*sh_trace_fn)(void *arg, sh_stage stage, uint32_t layer, const float *x, uint32_t n);
void sh_context_trace(sh_context *context, sh_trace_fn fn, void *arg);

#endif
