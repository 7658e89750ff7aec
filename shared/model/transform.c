#include "shared/model/transform.h"

#include <math.h>
#include <string.h>

#include "shared/math/kernel.h"

typedef float v16 __attribute__((vector_size(SH_LANES * sizeof(float))));
typedef int32_t v16i __attribute__((vector_size(SH_LANES * sizeof(int32_t))));
typedef uint32_t v16u __attribute__((vector_size(SH_LANES * sizeof(uint32_t))));
typedef double v16d __attribute__((vector_size(SH_LANES * sizeof(double))));

#define LEVEL(name) portable_##name
#define TARGET
#include "shared/model/transform_body.h"
#undef LEVEL
#undef TARGET

#if defined(__x86_64__)
#define LEVEL(name) avx2_##name
#define TARGET      __attribute__((target("avx2,fma")))
#include "shared/model/transform_body.h"
#undef LEVEL
#undef TARGET

#define LEVEL(name) avx512_##name
#define TARGET      __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma")))
#include "shared/model/transform_body.h"
#undef LEVEL
#undef TARGET
#endif

const sh_transform *sh_transform_get(void)
{
#if defined(__x86_64__)
    const char *level = sh_kernel_level();
    if (strncmp(level, "avx512", 6) == 0 && __builtin_cpu_supports("avx512dq"))
        return &avx512_table;
    if (strncmp(level, "avx", 3) == 0)
        return &avx2_table;
#endif
    return &portable_table;
}
