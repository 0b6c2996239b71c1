/* SPDX-License-Identifier: GPL-2.0-only */
/* Just enough of the kernel's headers to build gather.h for user space. */
#ifndef SHIM_H
#define SHIM_H

#include <stdbool.h>
#include <stdint.h>
#include_next <linux/types.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint8_t u8;
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

#endif /* SHIM_H */
