/*
 * Which instruction set the kernels use: internal to math and its tests.
 *
 * The level is chosen once, by sh_kernel_force, else from SHOAL_KERNEL in the environment, else as
 * the best that the CPU has, and stays the same for the life of the process.
 */
#ifndef SH_MATH_DISPATCH_H
#define SH_MATH_DISPATCH_H

#include "shared/base/status.h"

typedef enum {
    SH_LEVEL_PORTABLE,
    SH_LEVEL_NEON_DOTPROD,
    SH_LEVEL_AVX2,
    SH_LEVEL_AVX_VNNI,
    SH_LEVEL_AVX512_VNNI,
    SH_LEVELS
} sh_level;

/* The level in use. Thread-safe. */
sh_level sh_level_get(void);
/* Whether this CPU (and this build) can run a level. */
bool sh_level_available(sh_level level);
const char *sh_level_name(sh_level level);
/* Makes it the level in use. false: another is in use already. The level is available. */
SH_MUST_USE bool sh_level_force(sh_level level);

#if defined(__x86_64__)
#define SH_X86             1
#define SH_TARGET_AVX2     __attribute__((target("avx2,fma,f16c")))
#define SH_TARGET_AVX_VNNI __attribute__((target("avx2,fma,f16c,avxvnni")))
#define SH_TARGET_AVX512                                                                           \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")))
#else
#define SH_X86 0
#endif
/* Clang can have one function with another target's intrinsics since version 16. */
#if defined(__aarch64__) && defined(__linux__) &&                                                  \
    (defined(__ARM_FEATURE_DOTPROD) || !defined(__clang__) || __clang_major__ >= 16)
#define SH_TARGET_NEON __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
/* Compiled once for each level that inlines it. */
#define SH_INLINE static inline __attribute__((always_inline))

#endif
