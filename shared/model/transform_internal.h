/*
 * The tables of transform.h for each kind of processor. Each is a file of its own that defines its
 * lanes and then includes transform_body.h.
 */
#ifndef SH_MODEL_TRANSFORM_INTERNAL_H
#define SH_MODEL_TRANSFORM_INTERNAL_H

#include "shared/model/transform.h"

extern const sh_transform sh_transform_portable;
#if SH_X86
extern const sh_transform sh_transform_avx2;
extern const sh_transform sh_transform_avx512;
#endif

/* Attention goes by blocks of 4 tiles, counted from position 0 whoever asks: a query's running
 * maximum and sums change once a block. A call's queries are taken in chunks, a chunk's in groups
 * whose sums fit the registers. */
#define SH_ATTEND_TILES     4
#define SH_ATTEND_POSITIONS (SH_ATTEND_TILES * SH_KV_TILE)
#define SH_ATTEND_CHUNK     96
#define SH_ATTEND_GROUP     6

/* Attributes of an operation on lanes. Sanitizers check every access of every inlined copy: there
 * operations stay functions, or compiling takes many minutes. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SH_LANES_CHECKED 1
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SH_LANES_CHECKED 1
#endif
#if defined(SH_LANES_CHECKED)
#define SH_LANES_INLINE static inline
#else
#define SH_LANES_INLINE SH_INLINE
#endif

/* Clang unrolls short loops of a known count by itself. */
#if defined(__GNUC__) && !defined(__clang__) && !defined(SH_LANES_CHECKED)
#define SH_UNROLL _Pragma("GCC unroll 16")
#else
#define SH_UNROLL
#endif

#endif
