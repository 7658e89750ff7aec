#include "shared/math/dispatch.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/log.h"

#if SH_X86
#include <cpuid.h>
#elif defined(SH_TARGET_NEON)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

static const char *const level_names[SH_LEVELS] = {
    [SH_LEVEL_PORTABLE] = "portable",
    [SH_LEVEL_NEON_DOTPROD] = "neon-dotprod",
    [SH_LEVEL_AVX2] = "avx2",
    [SH_LEVEL_AVX_VNNI] = "avx-vnni",
    [SH_LEVEL_AVX512_VNNI] = "avx512-vnni",
};

const char *sh_level_name(sh_level level)
{
    SH_ASSERT(level < SH_LEVELS);
    return level_names[level];
}

#if SH_X86
/* Not every compiler's __builtin_cpu_supports knows the name. */
static bool has_avx_vnni(void)
{
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

bool sh_level_available(sh_level level)
{
#if SH_X86
    __builtin_cpu_init();
    /* F16C is older than AVX2: every CPU with this has that, and clang 14 has no name for it. */
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (level == SH_LEVEL_AVX2)
        return avx2;
    if (level == SH_LEVEL_AVX_VNNI)
        return avx2 && has_avx_vnni();
    if (level == SH_LEVEL_AVX512_VNNI)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#elif defined(SH_TARGET_NEON)
    if (level == SH_LEVEL_NEON_DOTPROD)
        return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
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

static atomic_int level_in_use = -1;

bool sh_level_force(sh_level level)
{
    SH_ASSERT(sh_level_available(level));
    int found = -1;
    return atomic_compare_exchange_strong(&level_in_use, &found, (int)level) || found == (int)level;
}

sh_level sh_level_get(void)
{
    int level = atomic_load_explicit(&level_in_use, memory_order_acquire);
    if (level < 0) { /* two threads may both choose: the first one's choice stays */
        int chosen = (int)level_choose();
        if (atomic_compare_exchange_strong(&level_in_use, &level, chosen))
            level = chosen;
    }
    return (sh_level)level;
}
