/* SPDX-License-Identifier: GPL-2.0-only */
/* Just enough of the kernel's headers to build gather.h and rate.c for user space. */
#ifndef SHIM_H
#define SHIM_H

#include <stdbool.h>
#include <stdint.h>
#include_next <linux/types.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;
typedef int64_t s64;
typedef uint64_t phys_addr_t;

#ifndef __always_inline
#define __always_inline		inline __attribute__((always_inline))
#endif
#define READ_ONCE(x)		(*(const volatile __typeof__(x) *)&(x))
#define BIT_ULL(nr)		(1ULL << (nr))
#define PAGE_SHIFT		12
#define PAGE_MASK		(~4095ULL)
#define __PHYSICAL_MASK		((1ULL << 52) - 1)
#define __va(address)		((void *)(uintptr_t)(address))

#define NSEC_PER_USEC		1000ULL
#define NSEC_PER_MSEC		1000000ULL
#define NSEC_PER_SEC		1000000000ULL
#define min(a, b)		((a) < (b) ? (a) : (b))
#define max(a, b)		((a) > (b) ? (a) : (b))
#define min_t(t, a, b)		min((t)(a), (t)(b))
#define max_t(t, a, b)		max((t)(a), (t)(b))
#define clamp(v, lo, hi)	min(max(v, lo), hi)

static inline u64 div_u64(u64 dividend, u32 divisor)
{
	return dividend / divisor;
}

#endif /* SHIM_H */
