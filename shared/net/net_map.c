/* Open addressing with linear probing; at most half full. */
#include <stdlib.h>
#include <string.h>

#include "shared/net/net_internal.h"

#define CAP_MIN 64

struct net_map_slot {
    sh_hash key;
    uint64_t value;
    bool used;
};

/* Keys are public keys of peers, which a peer may choose: a bad choice makes the table slow for as
 * long as it may connect, and no more than that. */
static size_t home(const net_map *map, const sh_hash *key)
{
    uint64_t h;
    memcpy(&h, key->b, sizeof h);
    h *= 0x9e3779b97f4a7c15ull;
    return (size_t)(h >> 32) & (map->cap - 1);
}

/* The slot of key, or the free one where it would go. */
static size_t find(const net_map *map, const sh_hash *key)
{
    size_t i = home(map, key);
    while (map->slots[i].used && !sh_hash_equal(&map->slots[i].key, key))
        i = (i + 1) & (map->cap - 1);
    return i;
}

bool net_map_get(const net_map *map, const sh_hash *key, uint64_t *value)
{
    if (map->n == 0)
        return false;
    const struct net_map_slot *s = &map->slots[find(map, key)];
    if (s->used)
        *value = s->value;
    return s->used;
}

static sh_status grow(net_map *map)
{
    net_map bigger = {.n = map->n, .cap = SH_MAX(map->cap * 2, CAP_MIN), .max = map->max};
    bigger.slots = sh_calloc(bigger.cap, sizeof *bigger.slots);
    if (!bigger.slots)
        return SH_ERR_NO_MEMORY;
    for (size_t i = 0; i < map->cap; i++)
        if (map->slots[i].used)
            bigger.slots[find(&bigger, &map->slots[i].key)] = map->slots[i];
    free(map->slots);
    *map = bigger;
    return SH_OK;
}

sh_status net_map_put(net_map *map, const sh_hash *key, uint64_t value)
{
    uint64_t old;
    if (!net_map_get(map, key, &old)) {
        if (map->n >= map->max)
            return SH_ERR_LIMIT;
        if ((map->n + 1) * 2 > map->cap)
            SH_TRY(grow(map));
        map->n++;
    }
    map->slots[find(map, key)] = (struct net_map_slot){*key, value, true};
    return SH_OK;
}

void net_map_remove(net_map *map, const sh_hash *key)
{
    uint64_t old;
    if (!net_map_get(map, key, &old))
        return;
    size_t mask = map->cap - 1, hole = find(map, key);
    map->n--;
    /* What stands behind the hole moves into it if its search would pass there. */
    for (size_t i = (hole + 1) & mask; map->slots[i].used; i = (i + 1) & mask) {
        size_t from = home(map, &map->slots[i].key);
        if (((i - from) & mask) >= ((i - hole) & mask)) {
            map->slots[hole] = map->slots[i];
            hole = i;
        }
    }
    map->slots[hole].used = false;
}

void net_map_evict(net_map *map)
{
    if (map->n == 0)
        return;
    while (!map->slots[map->hand & (map->cap - 1)].used)
        map->hand++;
    sh_hash key = map->slots[map->hand & (map->cap - 1)].key;
    map->hand++;
    net_map_remove(map, &key);
}

void net_map_release(net_map *map)
{
    free(map->slots);
    *map = (net_map){0};
}
