#include "shared/base/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "shared/base/file.h"

#define STATM_BYTES_MAX 4096

sh_memory sh_memory_now(void)
{
    sh_memory m = {0};
    uint8_t *text = NULL;
    size_t n = 0;
    struct rusage usage;
    unsigned long long resident = 0, data = 0;
    if (sh_file_read("/proc/self/statm", STATM_BYTES_MAX, &text, &n, NULL) != SH_OK)
        return m;
    const bool good =
        sscanf((const char *)text, "%*u %llu %*u %*u %*u %llu", &resident, &data) == 2;
    free(text);
    if (!good || getrusage(RUSAGE_SELF, &usage) != 0)
        return m;
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    m.resident = resident * page;
    m.data = data * page;
    m.peak = (uint64_t)usage.ru_maxrss << 10;
    m.peak = SH_MAX(m.peak, m.resident); /* the kernel counts in steps */
    return m;
}
