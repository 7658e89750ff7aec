/*
 * The clocks of real processes. The simulator and the cores never read them.
 * Threads: any.
 */
#ifndef SH_BASE_CLOCK_H
#define SH_BASE_CLOCK_H

#include <stdint.h>

uint64_t sh_clock_wall_ms(void); /* since 1970, UTC; may jump when the clock is set */
uint64_t sh_clock_mono_ms(void); /* since some moment; never goes back: for waits */
uint64_t sh_clock_boot_ms(void); /* the same, and goes on while the machine sleeps */

#endif
