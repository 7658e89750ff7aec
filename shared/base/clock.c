#include "shared/base/clock.h"

#include <time.h>

static uint64_t read_ms(clockid_t clock)
{
    struct timespec t;
    if (clock_gettime(clock, &t) != 0)
        return 0;
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

uint64_t sh_clock_wall_ms(void)
{
    return read_ms(CLOCK_REALTIME);
}

uint64_t sh_clock_mono_ms(void)
{
    return read_ms(CLOCK_MONOTONIC);
}

uint64_t sh_clock_boot_ms(void)
{
#ifdef CLOCK_BOOTTIME
    return read_ms(CLOCK_BOOTTIME);
#else
    return read_ms(CLOCK_MONOTONIC);
#endif
}
