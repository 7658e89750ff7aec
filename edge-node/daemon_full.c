/*
 * A store that was full counts as full for a pause. Found full when the pause is over, or at the
 * latest as long after it as it took, it is so again: the pause doubles, up to a limit. After that
 * it is another time, and the pauses begin anew.
 */
#include "edge-node/daemon_internal.h"

bool daemon_full_counts(const daemon_full *full, uint64_t now_ms)
{
    return now_ms < full->until_ms;
}

void daemon_full_found(daemon_full *full, uint64_t now_ms)
{
    bool again = full->pause_ms && now_ms < full->until_ms + full->pause_ms;
    full->pause_ms = again ? SH_MIN(2 * full->pause_ms, (uint64_t)DAEMON_FULL_PAUSE_MAX_MS)
                           : DAEMON_FULL_PAUSE_MS;
    full->until_ms = now_ms + full->pause_ms;
    full->is = true;
}

bool daemon_full_written(daemon_full *full, uint64_t now_ms)
{
    if (!full->is || daemon_full_counts(full, now_ms))
        return false;
    full->is = false;
    return true;
}
