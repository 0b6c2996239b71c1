// SPDX-License-Identifier: GPL-2.0-only
/*
 * The harvest: one pass over the second-level tables of a range of GFNs.
 *
 * Locking. The walk runs under RCU alone, a chunk at a time: KVM frees tables
 * a grace period after it unlinked them. An entry is changed only by compare
 * and swap from a value that was seen present, so an entry that KVM changes or
 * freezes at the same time is left alone. KVM's own plain stores can at most
 * bring an accessed bit back; that page is reported once more. Clearing dirty
 * bits takes mmu_lock for read, for one table at a time.
 */
#include <linux/bitops.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/nodemask.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "harvest.h"
#include "vm.h"

/* The walk of one chunk. */
struct kes_walk {
	struct kvm *kvm;
	struct kes_chunk *chunk;
	struct kes_harvest_stats *stats;
	nodemask_t nodes;
	bool want_nodes;
	u64 accessed;		/* bit of the entry format */
	u64 dirty;		/* bit of the entry format */
	u64 clear;		/* bits to clear in entries */
	u64 gfn_start;
	u64 gfn_end;
};

/*
 * Clears @bits in an entry that was read as @old. Another writer may get in
 * between: then the new value is taken as it is, a few times at most. Giving up
 * leaves the bits for the next harvest.
 */
static bool entry_clear(u64 *entry, u64 old, u64 bits)
{
	int tries;

	for (tries = 0; tries < 4; tries++) {
		if (!(old & KES_ENTRY_PRESENT) || !(old & bits))
			return false;
		if (try_cmpxchg64(entry, &old, old & ~bits))
			return true;
	}
	return false;
}

static bool pfn_on_nodes(const struct kes_walk *walk, unsigned long pfn)
{
	return pfn_valid(pfn) && node_isset(page_to_nid(pfn_to_page(pfn)), walk->nodes);
}

/* What up to 64 neighbouring pages showed. */
struct kes_bits {
	u64 accessed;
	u64 dirty;
	u64 mapped;
	u64 on_nodes;
};

/*
 * Adds @bits to word @word of the chunk's bitmaps. Several roots may map the
 * same page: each counts once.
 */
static void chunk_add(struct kes_walk *walk, unsigned int word,
		      const struct kes_bits *bits, u64 *mapped_stat)
{
	struct kes_chunk *chunk = walk->chunk;
	struct kes_harvest_stats *stats = walk->stats;

	*mapped_stat += hweight64(bits->mapped & ~chunk->mapped[word]);
	stats->accessed += hweight64(bits->accessed & ~chunk->accessed[word]);
	stats->dirty += hweight64(bits->dirty & ~chunk->dirty[word]);
	stats->on_nodes += hweight64(bits->on_nodes & ~chunk->on_nodes[word]);
	chunk->mapped[word] |= bits->mapped;
	chunk->accessed[word] |= bits->accessed;
	chunk->dirty[word] |= bits->dirty;
	chunk->on_nodes[word] |= bits->on_nodes;
}

static void chunk_set_level(struct kes_walk *walk, u64 gfn, u8 level)
{
	u8 *slot = &walk->chunk->levels[(gfn >> KES_ENTRIES_SHIFT) -
					(walk->gfn_start >> KES_ENTRIES_SHIFT)];

	*slot = max(*slot, level);
}

/*
 * Reads @count (at most 64) entries; bit @shift stands for the first. When dirty
 * bits are to be cleared the caller holds mmu_lock for read, which keeps each
 * frame the guest's.
 */
static void entries_read(struct kes_walk *walk, u64 *entry, unsigned int count,
			 unsigned int shift, struct kes_bits *bits)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		u64 value = READ_ONCE(entry[i]);
		u64 bit = 1ULL << (i + shift);
		u64 clear;

		if (!(value & KES_ENTRY_PRESENT))
			continue;
		bits->mapped |= bit;
		if (value & walk->accessed)
			bits->accessed |= bit;
		if (value & walk->dirty)
			bits->dirty |= bit;
		if (walk->want_nodes && pfn_on_nodes(walk, kes_entry_pfn(value)))
			bits->on_nodes |= bit;
		/*
		 * Only bits that were seen set: a dirty bit that appears later
		 * stays, as the host has not been told of it.
		 */
		clear = value & walk->clear;
		if (!clear)
			continue;
		/* First the word to the host, then the clearing: no gap. */
		if (clear & walk->dirty)
			kes_compat_set_pfn_dirty(kes_entry_pfn(value));
		if (entry_clear(&entry[i], value, clear))
			walk->stats->entries_cleared++;
	}
	walk->stats->entries_read += count;
}

/* The entries of a last-level table for GFNs [gfn, end). */
static void table_read(struct kes_walk *walk, u64 *table, u64 gfn, u64 end)
{
	bool lock = walk->clear & walk->dirty;
	u64 mapped = walk->stats->mapped_4k;

	if (lock)
		read_lock(&walk->kvm->mmu_lock);
	while (gfn < end) {
		unsigned int offset = gfn - walk->gfn_start;
		unsigned int shift = offset % 64;
		unsigned int count = min_t(u64, end - gfn, 64 - shift);
		struct kes_bits bits = {};

		entries_read(walk, &table[kes_entry_index(gfn, PG_LEVEL_4K)],
			     count, shift, &bits);
		if (bits.mapped)
			chunk_add(walk, offset / 64, &bits, &walk->stats->mapped_4k);
		gfn += count;
	}
	if (lock)
		read_unlock(&walk->kvm->mmu_lock);
	if (walk->stats->mapped_4k != mapped)
		chunk_set_level(walk, end - 1, KES_LEVEL_4K);
}

/*
 * A huge entry that maps GFNs [gfn, end) and perhaps more: its one accessed and
 * one dirty bit stand for all of them. An entry of 1 GiB spans several chunks;
 * its bits are cleared with the last page, or the later chunks would not see
 * them.
 */
static void huge_read(struct kes_walk *walk, u64 *entry, int level, u64 gfn, u64 end)
{
	u64 *mapped = level == PG_LEVEL_2M ? &walk->stats->mapped_2m : &walk->stats->mapped_1g;
	u64 pages = kes_entry_pages(level), clear = walk->clear;
	bool lock = clear & walk->dirty;
	struct kes_bits one = {};

	if (!IS_ALIGNED(end, pages))
		walk->clear = 0;
	if (lock)
		read_lock(&walk->kvm->mmu_lock);
	entries_read(walk, entry, 1, 0, &one);
	if (lock)
		read_unlock(&walk->kvm->mmu_lock);
	walk->clear = clear;
	if (!one.mapped)
		return;
	while (gfn < end) {
		unsigned int offset = gfn - walk->gfn_start;
		unsigned int count = min_t(u64, end - gfn, 64 - offset % 64);
		u64 mask = (~0ULL >> (64 - count)) << (offset % 64);
		struct kes_bits bits = {
			.mapped = mask,
			.accessed = one.accessed ? mask : 0,
			.dirty = one.dirty ? mask : 0,
			.on_nodes = one.on_nodes ? mask : 0,
		};

		chunk_add(walk, offset / 64, &bits, mapped);
		chunk_set_level(walk, gfn, level == PG_LEVEL_2M ? KES_LEVEL_2M : KES_LEVEL_1G);
		gfn += count;
	}
}

/*
 * Walks one root over the chunk. Every step starts at the root again: a few
 * cached reads for each 2 MiB, and no table is remembered for longer.
 */
static void root_walk(struct kes_walk *walk, const struct kes_root *root)
{
	u64 end = min(walk->gfn_end, kes_entry_pages(root->level + 1));
	u64 gfn = walk->gfn_start;

	while (gfn < end) {
		u64 *table = root->table, *entry = NULL;
		int level = root->level;
		u64 value = 0, next;

		for (; level > PG_LEVEL_4K; level--) {
			entry = &table[kes_entry_index(gfn, level)];
			value = READ_ONCE(*entry);
			if (!(value & KES_ENTRY_PRESENT) || (value & KES_ENTRY_HUGE))
				break;
			walk->stats->entries_read++;
			table = kes_entry_table(value);
		}
		next = min(end, ALIGN_DOWN(gfn, kes_entry_pages(max(level, PG_LEVEL_2M))) +
				kes_entry_pages(max(level, PG_LEVEL_2M)));
		if (level == PG_LEVEL_4K)
			table_read(walk, table, gfn, next);
		else if (value & KES_ENTRY_PRESENT)
			huge_read(walk, entry, level, gfn, next);
		else
			walk->stats->entries_read++;
		gfn = next;
	}
}

/* Walks all roots over [walk->gfn_start, walk->gfn_end). */
static int chunk_walk(struct kes_walk *walk)
{
	struct kes_root roots[KES_MAX_ROOTS];
	int i, n;

	rcu_read_lock();
	n = kes_vm_roots(walk->kvm, roots);
	for (i = 0; i < n; i++)
		root_walk(walk, &roots[i]);
	rcu_read_unlock();
	if (n < 0)
		return n;
	walk->stats->roots = max_t(u32, walk->stats->roots, n);
	walk->stats->chunks++;
	return 0;
}

/*
 * Empties the chunk for a walk from @gfn on. The 2 MiB unit in which the last
 * chunk ended may go on in this one: its level is kept.
 */
static void chunk_begin(struct kes_walk *walk, u64 gfn, u64 end)
{
	struct kes_chunk *chunk = walk->chunk;
	u8 level = KES_LEVEL_NONE;

	if (gfn == walk->gfn_end && gfn % KES_ENTRIES)
		level = chunk->levels[(gfn >> KES_ENTRIES_SHIFT) -
				      (walk->gfn_start >> KES_ENTRIES_SHIFT)];
	memset(chunk, 0, sizeof(*chunk));
	chunk->levels[0] = level;
	walk->gfn_start = gfn;
	walk->gfn_end = end;
}

static bool bitmap_copy_out(u64 pointer, const u64 *bitmap, u64 offset, u64 pages)
{
	return !pointer || !copy_to_user((u64 __user *)u64_to_user_ptr(pointer) + offset / 64,
					 bitmap, DIV_ROUND_UP(pages, 64) * sizeof(u64));
}

/* Hands the chunk over; chunks start at a multiple of 64 pages of the range. */
static int chunk_copy_out(const struct kes_walk *walk, const struct kes_harvest *arg)
{
	const struct kes_chunk *chunk = walk->chunk;
	u64 offset = walk->gfn_start - arg->gfn_start;
	u64 pages = walk->gfn_end - walk->gfn_start;
	u64 unit = walk->gfn_start >> KES_ENTRIES_SHIFT;
	u64 units = ((walk->gfn_end - 1) >> KES_ENTRIES_SHIFT) - unit + 1;
	u8 __user *levels = u64_to_user_ptr(arg->levels);

	if (!bitmap_copy_out(arg->accessed, chunk->accessed, offset, pages) ||
	    !bitmap_copy_out(arg->dirty, chunk->dirty, offset, pages) ||
	    !bitmap_copy_out(arg->mapped, chunk->mapped, offset, pages) ||
	    !bitmap_copy_out(arg->on_nodes, chunk->on_nodes, offset, pages))
		return -EFAULT;
	levels += unit - (arg->gfn_start >> KES_ENTRIES_SHIFT);
	if (arg->levels && copy_to_user(levels, chunk->levels, units))
		return -EFAULT;
	return 0;
}

static int harvest_check(const struct kes_harvest *arg)
{
	const u32 flags = KES_HARVEST_CLEAR_ACCESSED | KES_HARVEST_CLEAR_DIRTY |
			  KES_HARVEST_FLUSH;
	u64 end;

	if (arg->flags & ~flags || memchr_inv(arg->reserved, 0, sizeof(arg->reserved)))
		return -EINVAL;
	if (!arg->gfn_count || arg->gfn_count > KES_MAX_PAGES ||
	    check_add_overflow(arg->gfn_start, arg->gfn_count, &end))
		return -EINVAL;
	if (arg->nodes_bits > 1024 || (arg->on_nodes && !arg->nodes))
		return -EINVAL;
	return 0;
}

/* Nodes past this kernel's MAX_NUMNODES do not exist: no page lies on them. */
static int harvest_nodes(const struct kes_harvest *arg, nodemask_t *nodes)
{
	const u64 __user *from = u64_to_user_ptr(arg->nodes);
	unsigned int i;
	u64 word;

	nodes_clear(*nodes);
	for (i = 0; i < arg->nodes_bits; i++) {
		if (i % 64 == 0 && get_user(word, from + i / 64))
			return -EFAULT;
		if (i < MAX_NUMNODES && (word >> (i % 64)) & 1)
			node_set(i, *nodes);
	}
	return 0;
}

/* KES_HARVEST. Sleeps between chunks only. */
long kes_harvest(struct kvm *kvm, const struct kes_entry_format *format,
		 struct kes_harvester *harvester, struct kes_harvest *arg)
{
	u64 begin_ns = ktime_get_ns(), end, next;
	struct kes_walk walk = {
		.kvm = kvm,
		.chunk = &harvester->chunk,
		.stats = &arg->stats,
		.want_nodes = arg->on_nodes,
		.accessed = format->accessed,
		.dirty = format->dirty,
	};
	int ret;

	ret = harvest_check(arg);
	if (!ret && walk.want_nodes)
		ret = harvest_nodes(arg, &walk.nodes);
	if (ret)
		return ret;
	if (arg->flags & KES_HARVEST_CLEAR_ACCESSED)
		walk.clear |= format->accessed;
	if (arg->flags & KES_HARVEST_CLEAR_DIRTY)
		walk.clear |= format->dirty;

	memset(&arg->stats, 0, sizeof(arg->stats));
	end = arg->gfn_start + arg->gfn_count;
	for (arg->gfn_next = arg->gfn_start; arg->gfn_next < end; arg->gfn_next = next) {
		next = min(end, arg->gfn_next + KES_CHUNK_PAGES);
		chunk_begin(&walk, arg->gfn_next, next);
		ret = chunk_walk(&walk);
		if (!ret)
			ret = chunk_copy_out(&walk, arg);
		if (ret)
			break;
		cond_resched();
		if (signal_pending(current) ||
		    (arg->budget_ns && ktime_get_ns() - begin_ns > arg->budget_ns)) {
			arg->gfn_next = next;
			break;
		}
	}
	/*
	 * Also after an error, and also when only earlier calls cleared bits:
	 * as long as a TLB holds the old translation, the bits stay clear.
	 */
	if (arg->stats.entries_cleared)
		harvester->unflushed = true;
	if ((arg->flags & KES_HARVEST_FLUSH) && harvester->unflushed) {
		kes_compat_flush_tlbs(kvm);
		harvester->unflushed = false;
		arg->stats.flushes++;
	}
	arg->stats.time_ns = ktime_get_ns() - begin_ns;
	return ret;
}
