/* Only in programs that link the canary build; see canary.h. */
#include "shared/base/canary.h"

#include <string.h>

sh_canary sh_canary_on = SH_CANARY_NONE;

static const char *const names[SH_CANARIES] = {
    [SH_CANARY_NONE] = "none",
    [SH_CANARY_ACK_BEFORE_COMMIT] = "ack-before-commit",
    [SH_CANARY_NO_SYNC] = "no-sync",
    [SH_CANARY_FORGET_GAP] = "forget-gap",
    [SH_CANARY_DELETE_ON_SEND] = "delete-on-send",
    [SH_CANARY_UPDATE_TWICE] = "update-twice",
    [SH_CANARY_INSTALL_UNCHECKED] = "install-unchecked",
    [SH_CANARY_OLD_MANIFEST] = "old-manifest",
    [SH_CANARY_TOMBSTONE_UNMARKED] = "tombstone-unmarked",
    [SH_CANARY_NO_LEASE] = "no-lease",
    [SH_CANARY_FORGET_BUDGET] = "forget-budget",
    [SH_CANARY_IGNORE_LATER] = "ignore-later",
    [SH_CANARY_LOSE_ROW] = "lose-row",
    [SH_CANARY_LOSE_REQUEST] = "lose-request",
};

const char *sh_canary_name(sh_canary canary)
{
    return canary < SH_CANARIES ? names[canary] : "?";
}

sh_canary sh_canary_find(const char *name)
{
    sh_canary found = SH_CANARY_NONE + 1; /* that is the absence of one */
    while (found < SH_CANARIES && strcmp(names[found], name) != 0)
        found++;
    return found;
}
