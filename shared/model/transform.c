#include "shared/model/transform_internal.h"

size_t sh_kv_tile_bytes(uint32_t head_size, bool halves)
{
    const size_t values = (head_size + SH_LANES_UP(head_size)) * SH_KV_TILE;
    return values * (halves ? sizeof(uint16_t) : sizeof(float));
}

/* See scratch_of in transform_attend.h. */
size_t sh_attend_scratch_bytes(uint32_t head_size)
{
    const size_t a_query = SH_LANES_UP(head_size) + SH_LANES + 1;
    const size_t weights = (size_t)SH_ATTEND_GROUP * SH_ATTEND_POSITIONS;
    return (SH_ATTEND_CHUNK * a_query + weights) * sizeof(float) +
           SH_ATTEND_TILES * sh_kv_tile_bytes(head_size, false);
}

const sh_transform *sh_transform_at(sh_level level)
{
#if SH_X86
    if (level == SH_LEVEL_AVX512_VNNI)
        return &sh_transform_avx512;
    if (level == SH_LEVEL_AVX2 || level == SH_LEVEL_AVX_VNNI)
        return &sh_transform_avx2;
#endif
    (void)level;
    return &sh_transform_portable;
}

const sh_transform *sh_transform_get(void)
{
    return sh_transform_at(sh_level_get());
}
