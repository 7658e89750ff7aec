/*
 * The forward pass as the papers write it, in double and one number at a time: the reference that
 * the fast one is held against on models that tests make.
 */
#ifndef SH_TESTS_MODEL_NAIVE_H
#define SH_TESTS_MODEL_NAIVE_H

#include "shared/model/model.h"

/* logits [n, vocab] of the n tokens at positions 0 .. n - 1; adapter may be NULL. Weights are
 * dequantized exactly, activations are not rounded. Aborts when memory is out. */
void naive_forward(const sh_model *model, const sh_adapter *adapter, const int32_t *tokens,
                   uint32_t n, double *logits);

#endif
