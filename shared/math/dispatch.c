#include "shared/math/dispatch.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/log.h"

static const char *const level_names[SH_LEVELS] = {
    [SH_LEVEL_PORTABLE] = "portable",
    [SH_LEVEL_AVX2] = "avx2",
    [SH_LEVEL_AVX512_VNNI] = "avx512-vnni",
};

const char *sh_level_name(sh_level level)
{
    SH_ASSERT(level < SH_LEVELS);
    return level_names[level];
}

bool sh_level_available(sh_level level)
{
#if SH_X86
    __builtin_cpu_init();
    /* F16C is older than AVX2: every CPU with this has that, and clang 14 has no name for it. */
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == SH_LEVEL_AVX2)
        return avx2;
    if (level == SH_LEVEL_AVX512_VNNI)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
    return level == SH_LEVEL_PORTABLE;
}

static sh_level level_choose(void)
{
    sh_level best = SH_LEVEL_PORTABLE;
    for (unsigned i = 0; i < SH_LEVELS; i++)
        if (sh_level_available((sh_level)i))
            best = (sh_level)i;
    const char *wanted = getenv("SHOAL_KERNEL");
    if (wanted == NULL || wanted[0] == '\0')
        return best;
    for (unsigned i = 0; i < SH_LEVELS; i++)
        if (strcmp(wanted, level_names[i]) == 0 && sh_level_available((sh_level)i))
            return (sh_level)i;
    sh_log(SH_LOG_WARN, "kernel-level", "SHOAL_KERNEL=%s is not available here, using=%s", wanted,
           level_names[best]);
    return best;
}

sh_level sh_level_get(void)
{
    static atomic_int chosen = -1;
    int level = atomic_load_explicit(&chosen, memory_order_acquire);
    if (level < 0) { /* two threads may both choose; they choose the same */
        level = (int)level_choose();
        atomic_store_explicit(&chosen, level, memory_order_release);
    }
    return (sh_level)level;
}
