/*
 * For loops that wait for another thread for some microseconds.
 * Threads: any.
 */
#ifndef SH_BASE_RELAX_H
#define SH_BASE_RELAX_H

/* Tells the processor that this is such a loop; where it cannot be told, nothing. */
static inline void sh_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

#endif
