// SPDX-License-Identifier: GPL-2.0-only
/*
 * Accesses that can not be read from tables, or not cleared there, by way of
 * KVM's own MMU notifier: what the kernel's page reclaim asks it for.
 *
 * - Tables that KVM shadows: those of a guest's own guests, and all tables where
 *   the TDP MMU is off. Which pages they map stands in the heads of the reverse
 *   maps of each memslot. Of a nested guest, the accessed bit is read where the
 *   head leads to one entry; otherwise KVM answers whether the page is young.
 *
 * - Tables without accessed bits. The walk reads there which entries are young;
 *   only KVM can make them old.
 *
 * KVM answers for one page, or clears a range and tells whether any of it was
 * young. So pages are asked first, one by one, and then those that were young
 * are made old: nothing is cleared that is not reported. An access in between
 * belongs to a page that is reported, or stays for the next time. (A page that
 * KVM maps twice, by a huge entry as well, is the exception: the huge entry may
 * become young in between, and is reported then for this page alone.)
 *
 * Locking. Everything here sleeps, under kvm->srcu, which keeps the memslots and
 * their reverse maps; for 2 MiB at a time, as the VMM waits for it when it changes
 * slots. The calls take kvm->mmu_lock themselves, for write up to 6.12: so none
 * covers more than 2 MiB. What heads of reverse maps lead to is read under mmu_lock
 * for read, for at most 2 MiB: KVM changes reverse maps, and frees the tables,
 * under mmu_lock for write.
 */
#include <linux/bitmap.h>
#include <linux/mmu_notifier.h>
#include <linux/sched/signal.h>

#include "compat.h"
#include "entry.h"
#include "vm.h"
#include "young.h"

/* So that the larger of two levels is the larger number, whoever found it. */
static_assert(KES_LEVEL_4K == PG_LEVEL_4K && KES_LEVEL_2M == PG_LEVEL_2M &&
	      KES_LEVEL_1G == PG_LEVEL_1G);

/*
 * Whether KVM may map pages of this VM by tables that can not be walked. The
 * count is KVM's own hint that there are tables of nested guests.
 */
bool kes_young_shadowed(struct kvm *kvm)
{
	return !kes_vm_has_tables(kvm) || READ_ONCE(kvm->arch.indirect_shadow_pages);
}

/* Whether KVM answers as this file needs it. */
bool kes_young_possible(struct kvm *kvm)
{
	const struct mmu_notifier_ops *ops = READ_ONCE(kvm->mmu_notifier.ops);

	return ops && ops->test_young && ops->clear_young;
}

static unsigned long slot_hva(const struct kvm_memory_slot *slot, u64 gfn)
{
	return slot->userspace_addr + ((gfn - slot->base_gfn) << PAGE_SHIFT);
}

/* Whether any entry that maps @gfn is young, in any table. */
static bool gfn_is_young(struct kes_young *young, const struct kvm_memory_slot *slot, u64 gfn)
{
	struct mmu_notifier *notifier = &young->kvm->mmu_notifier;

	young->asked++;
	cond_resched();
	return notifier->ops->test_young(notifier, young->kvm->mm, slot_hva(slot, gfn));
}

/* What kes_compat_rmap() says of @gfn, for entries of @level. */
static unsigned long page_rmap(const struct kvm_memory_slot *slot, u64 gfn, int level)
{
	const struct kvm_rmap_head *heads = READ_ONCE(slot->arch.rmap[level - PG_LEVEL_4K]);
	int shift = KES_ENTRIES_SHIFT * (level - 1);

	return heads ? kes_compat_rmap(&heads[(gfn >> shift) - (slot->base_gfn >> shift)]) : 0;
}

/*
 * What is done with the part [gfn, end) of one 2 MiB unit and one memslot. Bits
 * are counted from the range's start.
 */
struct kes_unit {
	const struct kvm_memory_slot *slot;
	unsigned int first;
	unsigned int end;
	int level;		/* of the largest shadowing entry */
	/*
	 * Making a page old makes a huge entry old that maps it too, in any table:
	 * that waits until the huge entry's last page is reached. Small entries
	 * before that page stay young then, and are reported once more.
	 */
	bool clear;
};

static u64 unit_gfn(const struct kes_young *young, unsigned int bit)
{
	return young->gfn_start + bit;
}

static unsigned long unit_small(const struct kes_young *young, const struct kes_unit *unit,
				unsigned int bit)
{
	return page_rmap(unit->slot, unit_gfn(young, bit), PG_LEVEL_4K);
}

/*
 * A page that answers for the unit's huge entry: one that was not accessed yet,
 * and that no small entry maps too, if there is such a one. unit->end when all
 * pages were accessed.
 */
static unsigned int unit_probe(const struct kes_young *young, const struct kes_unit *unit)
{
	unsigned int bit = find_next_zero_bit(young->accessed, unit->end, unit->first);
	unsigned int probe = bit;

	while (bit < unit->end && unit_small(young, unit, bit))
		bit = find_next_zero_bit(young->accessed, unit->end, bit + 1);
	return bit < unit->end ? bit : probe;
}

/* The huge entry, whose one accessed bit stands for all pages. */
static u64 unit_find_huge(struct kes_young *young, const struct kes_unit *unit)
{
	unsigned int bit = unit_probe(young, unit);
	u64 found = 0;

	if (bit < unit->end && !gfn_is_young(young, unit->slot, unit_gfn(young, bit)))
		return 0;
	for (bit = unit->first; bit < unit->end; bit++)
		found += !__test_and_set_bit(bit, young->accessed);
	if (unit->clear)
		__set_bit(unit->end - 1, young->old);
	return found;
}

/* Adds a page to the accessed ones; returns 1 if it is new there. */
static unsigned int unit_add(struct kes_young *young, const struct kes_unit *unit, unsigned int bit)
{
	if (unit->clear)
		__set_bit(bit, young->old);
	return !__test_and_set_bit(bit, young->accessed);
}

/*
 * Reads the small entries of pages that only one maps, as far as they are laid
 * out as known. The other pages that small entries map go to @ask, counted from
 * the unit's start. Returns how many pages small entries map.
 */
static unsigned int unit_read_small(struct kes_young *young, const struct kes_unit *unit,
				    unsigned long *ask, u64 *found)
{
	bool readable = kes_vm_has_tables(young->kvm);
	unsigned int bit, mapped = 0;

	read_lock(&young->kvm->mmu_lock);
	for (bit = unit->first; bit < unit->end; bit++) {
		unsigned long rmap = unit_small(young, unit, bit);
		const u64 *entry = (const u64 *)rmap;

		if (!rmap)
			continue;
		mapped++;
		if (test_bit(bit, young->accessed))
			unit_add(young, unit, bit);
		else if (!readable || rmap & 1 || !kes_vm_is_shadow_entry(entry))
			__set_bit(bit - unit->first, ask);
		else if (READ_ONCE(*entry) >> young->format->accessed_nr & 1)
			*found += unit_add(young, unit, bit);
	}
	read_unlock(&young->kvm->mmu_lock);
	return mapped;
}

/* The small entries. Returns how many pages they map, and adds to *@found. */
static unsigned int unit_find_small(struct kes_young *young, const struct kes_unit *unit,
				    u64 *found)
{
	DECLARE_BITMAP(ask, KES_ENTRIES) = { 0 };
	unsigned int mapped = unit_read_small(young, unit, ask, found), i;

	for_each_set_bit(i, ask, KES_ENTRIES)
		if (gfn_is_young(young, unit->slot, unit_gfn(young, unit->first + i)))
			*found += unit_add(young, unit, unit->first + i);
	cond_resched();
	return mapped;
}

static u64 unit_find(struct kes_young *young, const struct kvm_memory_slot *slot, u64 gfn, u64 end)
{
	u8 *level = &young->levels[(gfn >> KES_ENTRIES_SHIFT) -
				   (young->gfn_start >> KES_ENTRIES_SHIFT)];
	struct kes_unit unit = {
		.slot = slot,
		.first = gfn - young->gfn_start,
		.end = end - young->gfn_start,
		.level = PG_LEVEL_1G,
	};
	u64 found = 0;

	while (unit.level > PG_LEVEL_4K && !page_rmap(slot, gfn, unit.level))
		unit.level--;
	unit.clear = young->clear &&
		     IS_ALIGNED(end, kes_entry_pages(max_t(int, unit.level, *level)));
	if (unit.level > PG_LEVEL_4K)
		found = unit_find_huge(young, &unit);
	if (unit_find_small(young, &unit, &found) || unit.level > PG_LEVEL_4K)
		*level = max_t(u8, *level, unit.level);
	return found;
}

/*
 * Does @work with all parts of the range that are in a memslot, 2 MiB at most each,
 * and returns the sum. Ends early for a caller that is being killed.
 */
static u64 units_do(struct kes_young *young,
		    u64 (*work)(struct kes_young *young, const struct kvm_memory_slot *slot,
				u64 gfn, u64 end))
{
	struct kvm_memslot_iter iter;
	u64 sum = 0, gfn, next;
	int idx;

	for (gfn = young->gfn_start; gfn < young->gfn_end; gfn = next) {
		next = kes_entry_step_end(gfn, young->gfn_end);
		idx = srcu_read_lock(&young->kvm->srcu);
		kvm_for_each_memslot_in_gfn_range(&iter, __kvm_memslots(young->kvm, 0), gfn, next) {
			u64 from = max(gfn, iter.slot->base_gfn);
			u64 to = min(next, iter.slot->base_gfn + iter.slot->npages);

			if (from < to)
				sum += work(young, iter.slot, from, to);
		}
		srcu_read_unlock(&young->kvm->srcu, idx);
		if (fatal_signal_pending(current))
			break;
	}
	return sum;
}

/*
 * Adds to young->accessed the pages that were accessed through tables that KVM
 * shadows, and to young->levels how those map them. With young->clear, all pages
 * that are to be made old there go to young->old. Returns how many pages were
 * added.
 */
u64 kes_young_find(struct kes_young *young)
{
	return units_do(young, unit_find);
}

/* Makes the pages that are in young->old old. Returns how many those are. */
static u64 unit_clear(struct kes_young *young, const struct kvm_memory_slot *slot, u64 gfn, u64 end)
{
	struct mmu_notifier *notifier = &young->kvm->mmu_notifier;
	unsigned int last = end - young->gfn_start, from, to;
	u64 cleared = 0;

	for (from = gfn - young->gfn_start; (from = find_next_bit(young->old, last, from)) < last;
	     from = to) {
		unsigned long hva = slot_hva(slot, unit_gfn(young, from));

		to = find_next_zero_bit(young->old, last, from);
		notifier->ops->clear_young(notifier, young->kvm->mm, hva,
					   hva + ((unsigned long)(to - from) << PAGE_SHIFT));
		cleared += to - from;
		cond_resched();
	}
	return cleared;
}

/*
 * Makes the entries of the pages in young->old old, and empties it. TLBs are not
 * flushed. Returns how many pages that were.
 */
u64 kes_young_clear(struct kes_young *young)
{
	unsigned int pages = young->gfn_end - young->gfn_start;
	u64 cleared;

	if (bitmap_empty(young->old, pages))
		return 0;
	cleared = units_do(young, unit_clear);
	bitmap_zero(young->old, pages);
	return cleared;
}
