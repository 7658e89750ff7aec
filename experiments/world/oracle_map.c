#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "experiments/world/oracle_internal.h"

#define MAP_MIN 16u

static uint64_t mix(uint64_t x)
{
    x ^= x >> 32; /* Stafford's variant 13 of MurmurHash3's finalizer */
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static size_t place(const oracle_map *map, uint64_t key)
{
    size_t at = (size_t)mix(key) & (map->cap - 1);
    while (map->keys[at] != 0 && map->keys[at] != key)
        at = (at + 1) & (map->cap - 1);
    return at;
}

uint64_t *oracle_map_find(const oracle_map *map, uint64_t key)
{
    if (map->n == 0)
        return NULL;
    size_t at = place(map, key);
    return map->keys[at] == key ? &map->values[at] : NULL;
}

void oracle_map_put(oracle_map *map, uint64_t key, uint64_t value)
{
    SH_ASSERT(key != 0);
    if (2 * (map->n + 1) > map->cap) {
        oracle_map old = *map;
        map->cap = SH_MAX(2 * old.cap, MAP_MIN);
        map->keys = calloc(map->cap, sizeof *map->keys);
        map->values = calloc(map->cap, sizeof *map->values);
        SH_ASSERT(map->keys != NULL && map->values != NULL);
        for (size_t i = 0; i < old.cap; i++) {
            if (old.keys[i] == 0)
                continue;
            size_t at = place(map, old.keys[i]);
            map->keys[at] = old.keys[i];
            map->values[at] = old.values[i];
        }
        free(old.keys);
        free(old.values);
    }
    size_t at = place(map, key);
    map->n += map->keys[at] == 0;
    map->keys[at] = key;
    map->values[at] = value;
}

void oracle_map_release(oracle_map *map)
{
    free(map->keys);
    free(map->values);
    *map = (oracle_map){0};
}

uint64_t oracle_hash(const void *bytes, size_t n)
{
    const uint8_t *p = bytes;
    uint64_t h = mix(n + 1), word = 0;
    for (; n >= sizeof word; p += sizeof word, n -= sizeof word) {
        memcpy(&word, p, sizeof word);
        h = mix(h ^ word);
    }
    word = 0;
    if (n > 0)
        memcpy(&word, p, n);
    h = mix(h ^ word ^ (uint64_t)n << 56);
    return h ? h : 1;
}

uint64_t oracle_item_hash(uint8_t cls, const void *payload, size_t n)
{
    uint64_t h = mix(oracle_hash(payload, n) + cls);
    return h ? h : 1;
}

bool oracle_read(const void *bytes, size_t n, sh_msg *msg)
{
    return sh_msg_decode_checked(bytes, n, SH_CHECK_DONE, msg, NULL) == SH_OK;
}

void oracle_grow(void **array, size_t *cap, size_t n, size_t size)
{
    sh_status status = sh_array_reserve(array, cap, n + 1, size, ORACLE_ROWS_MAX);
    SH_ASSERT(status == SH_OK);
}

void oracle_note(oracle_notes *notes, world_rule rule, uint64_t at_ms, uint32_t target,
                 const char *format, ...)
{
    if (notes->n >= ORACLE_NOTED_MAX) {
        notes->more++;
        return;
    }
    oracle_grow((void **)&notes->items, &notes->cap, notes->n, sizeof *notes->items);
    world_violation *v = &notes->items[notes->n++];
    *v = (world_violation){.rule = rule, .at_ms = at_ms, .target = target};
    va_list args;
    va_start(args, format);
    (void)vsnprintf(v->text, sizeof v->text, format, args);
    va_end(args);
}
