/*
 * What this process takes of the machine's memory, as Linux counts it.
 * Threads: any.
 */
#ifndef SH_BASE_MEMORY_H
#define SH_BASE_MEMORY_H

#include <stdint.h>

/* Bytes; all 0 when /proc cannot be read. */
typedef struct {
    uint64_t resident; /* mapped files' pages and all */
    uint64_t peak;     /* the most that resident was */
    uint64_t data; /* private and writable, touched or not, and the stack: RLIMIT_DATA's count */
} sh_memory;
sh_memory sh_memory_now(void);

#endif
