/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The only file that knows the bits of second-level table entries: Intel SDM
 * volume 3C, "EPT translation mechanism", AMD APM volume 2, "Nested paging",
 * and arch/x86/kvm/mmu/spte.h for the bits that are KVM's own.
 */
#ifndef KES_ENTRY_H
#define KES_ENTRY_H

#include <linux/bits.h>
#include <linux/mm.h>
#include <linux/types.h>
#include <asm/pgtable_types.h>

#include "uapi/kvm_ept_sample.h"

/*
 * KVM's mark on every entry that maps or links (SPTE_MMU_PRESENT_MASK). Empty
 * entries, MMIO entries and entries that KVM holds frozen do not have it.
 */
#define KES_ENTRY_PRESENT_NR	11
#define KES_ENTRY_PRESENT	BIT_ULL(KES_ENTRY_PRESENT_NR)
/* In a non-last-level table: the entry maps a huge page. Same bit in both. */
#define KES_ENTRY_HUGE		BIT_ULL(7)
/* What an access needs. NPT calls the first "present"; both are the same bits. */
#define KES_ENTRY_READ		BIT_ULL(0)
#define KES_ENTRY_WRITE		BIT_ULL(1)

#define KES_ENTRIES_SHIFT	9
#define KES_ENTRIES		(1U << KES_ENTRIES_SHIFT)

/* Where the hardware writes accessed and dirty. */
struct kes_entry_format {
	u8 accessed_nr;
	u8 dirty_nr;
	u32 id;		/* KES_FORMAT_* */
};

#define KES_ENTRY_FORMAT_EPT { \
	.accessed_nr = 8, .dirty_nr = 9, .id = KES_FORMAT_EPT }
#define KES_ENTRY_FORMAT_NPT { \
	.accessed_nr = 5, .dirty_nr = 6, .id = KES_FORMAT_NPT }

/*
 * EPT without accessed and dirty bits. KVM tracks accesses by faults: it takes
 * all permissions from an entry to make it old, and gives them back at the next
 * access. So an entry that may be read is one that was accessed. Nothing stands
 * for dirty.
 */
#define KES_ENTRY_FORMAT_TRACKED { \
	.accessed_nr = 0, .dirty_nr = 0, .id = KES_FORMAT_EPT }

/*
 * EPT whose bits nobody writes: what is mapped may have been accessed, and what
 * is writable may be dirty. Never to be cleared.
 */
#define KES_ENTRY_FORMAT_BLIND { \
	.accessed_nr = KES_ENTRY_PRESENT_NR, .dirty_nr = 1, .id = KES_FORMAT_EPT }

/* The permissions that are not the same bits in both. */
struct kes_entry_rights {
	u64 execute;		/* EPT: each allows fetches of one kind */
	u64 no_execute;		/* NPT: forbids fetches */
	/*
	 * KVM's permission to itself to make the entry writable without a lock.
	 * An entry that is writable always has it.
	 */
	u64 mmu_writable;
};

#define KES_ENTRY_RIGHTS_EPT { \
	.execute = KES_COMPAT_EPT_EXECUTE, .mmu_writable = KES_COMPAT_EPT_MMU_WRITABLE }
#define KES_ENTRY_RIGHTS_NPT { \
	.no_execute = BIT_ULL(63), .mmu_writable = BIT_ULL(10) }

/* Number of 4 KiB pages that one entry of @level spans; level 1 is the last. */
static inline u64 kes_entry_pages(int level)
{
	return 1ULL << (KES_ENTRIES_SHIFT * (level - 1));
}

static inline unsigned int kes_entry_index(u64 gfn, int level)
{
	return (gfn >> (KES_ENTRIES_SHIFT * (level - 1))) & (KES_ENTRIES - 1);
}

/*
 * Where a step from @gfn on ends: with the last-level table that @gfn is in, or at @end,
 * which is beyond @gfn. Not the lesser of two sums: the table may end where 64 bits do.
 */
static inline u64 kes_entry_step_end(u64 gfn, u64 end)
{
	return gfn + min_t(u64, end - gfn, KES_ENTRIES - kes_entry_index(gfn, 1));
}

/* The bits of an entry that are an address; the one of memory encryption is not. */
static inline u64 kes_entry_frame_mask(void)
{
	return __PHYSICAL_MASK & PAGE_MASK;
}

static inline unsigned long kes_entry_pfn(u64 entry)
{
	return (entry & kes_entry_frame_mask()) >> PAGE_SHIFT;
}

/*
 * An entry in memory, looked at through a window of four bytes from byte @window
 * on: what is seen there compares with an address that is shifted by as many
 * bytes, as the bits above an address are not seen and those below it do not
 * matter. Window 1 shows addresses below 1 TiB; 2 shows 256 TiB, by 64 KiB.
 */
static __always_inline const u32 *kes_entry_window(const u64 *entry, unsigned int window)
{
	return (const u32 *)((const u8 *)entry + window);
}

/* The address above all that are seen. */
static inline u64 kes_entry_window_end(unsigned int window)
{
	return 1ULL << (32 + 8 * window);
}

static inline u64 *kes_entry_table(u64 entry)
{
	return __va(entry & kes_entry_frame_mask());
}

#endif /* KES_ENTRY_H */
