#include "shared/base/failpoint.h"

#include <stdlib.h>
#include <string.h>

static sh_failpoint *find(sh_failpoints *set, const char *name)
{
    for (size_t i = 0; i < set->n; i++)
        if (strcmp(set->points[i].name, name) == 0)
            return &set->points[i];
    return NULL;
}

sh_status sh_failpoint_arm(sh_failpoints *set, const char *name, uint32_t skip, sh_error *err)
{
    size_t n = strlen(name);
    if (n == 0 || n >= SH_FAILPOINT_NAME_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "fail point '%.64s': a name has 1 to %d bytes", name,
                       SH_FAILPOINT_NAME_MAX - 1);
    sh_failpoint *point = find(set, name);
    if (!point) {
        if (set->n == SH_FAILPOINTS_MAX)
            return sh_fail(err, SH_ERR_LIMIT, "fail point '%s': there are %d already", name,
                           SH_FAILPOINTS_MAX);
        point = &set->points[set->n++];
        *point = (sh_failpoint){0};
        memcpy(point->name, name, n + 1);
    }
    point->skip = skip;
    point->armed = true;
    return SH_OK;
}

sh_status sh_failpoint_arm_list(sh_failpoints *set, const char *list, sh_error *err)
{
    sh_failpoints armed = *set; /* all of the list or nothing */
    for (const char *item = list; *item;) {
        size_t n = strcspn(item, ",");
        size_t name_n = strcspn(item, ":,");
        char name[SH_FAILPOINT_NAME_MAX];
        if (name_n == 0 || name_n >= sizeof name)
            return sh_fail(err, SH_ERR_LIMIT, "fail points '%.100s': a name has 1 to %zu bytes",
                           list, sizeof name - 1);
        memcpy(name, item, name_n);
        name[name_n] = 0;
        uint64_t skip = 0;
        for (size_t i = name_n + 1; i < n; i++) {
            if (item[i] < '0' || item[i] > '9' || skip > UINT32_MAX / 10)
                return sh_fail(err, SH_ERR_USAGE,
                               "fail point '%s': the passes to let through are not a number", name);
            skip = skip * 10 + (uint64_t)(item[i] - '0');
        }
        if (name_n + 1 == n || skip > UINT32_MAX)
            return sh_fail(err, SH_ERR_USAGE,
                           "fail point '%s': the passes to let through are not a number", name);
        SH_TRY(sh_failpoint_arm(&armed, name, (uint32_t)skip, err));
        item += n + (item[n] == ',');
    }
    *set = armed;
    return SH_OK;
}

bool sh_failpoint_hit(sh_failpoints *set, const char *name)
{
    if (!set)
        return false;
    sh_failpoint *point = find(set, name);
    if (!point || !point->armed)
        return false;
    if (point->skip > 0) {
        point->skip--;
        return false;
    }
    point->armed = false;
    point->hits++;
    return true;
}
