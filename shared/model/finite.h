/*
 * Whether a row of a tensor, in any type, is all finite numbers: of quantized types the scales (and
 * minima) decide, since quants are finite whatever their bytes are. Internal to model.
 */
#ifndef SH_MODEL_FINITE_H
#define SH_MODEL_FINITE_H

#include "shared/math/quant.h"

/* n values, a multiple of the type's block. */
bool sh_row_is_finite(sh_type type, const void *row, size_t n);

#endif
