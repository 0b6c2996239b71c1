// SPDX-License-Identifier: GPL-2.0-only
/*
 * The harvest: one pass over the second-level tables of a range of GFNs, a chunk
 * at a time. The walk of a chunk is in walk.c. What the tables do not tell, and
 * what only KVM can clear, is asked of KVM after it, outside of RCU; see young.c.
 */
#include <linux/ktime.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "flush.h"
#include "harvest.h"
#include "hold.h"
#include "vm.h"
#include "young.h"

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
	memset(chunk->accessed, 0, sizeof(chunk->accessed));
	if (walk->gather.want_dirty)
		memset(chunk->dirty, 0, sizeof(chunk->dirty));
	if (walk->keep_mapped)
		memset(chunk->mapped, 0, sizeof(chunk->mapped));
	if (walk->keep_on_nodes)
		memset(chunk->on_nodes, 0, sizeof(chunk->on_nodes));
	memset(chunk->levels, 0, sizeof(chunk->levels));
	chunk->levels[0] = level;
	walk->gfn_start = gfn;
	walk->gfn_end = end;
}

/* What only KVM can tell and clear, after a walk that saw @tracked such roots. */
static int chunk_ask(struct kes_walk *walk, int tracked)
{
	bool shadowed = kes_young_shadowed(walk->kvm);
	struct kes_young young = {
		.kvm = walk->kvm,
		.format = walk->format,
		.gfn_start = walk->gfn_start,
		.gfn_end = walk->gfn_end,
		.accessed = (unsigned long *)walk->chunk->accessed,
		.old = (unsigned long *)walk->old,
		.levels = walk->chunk->levels,
		.clear = walk->clear_asked,
	};

	if (!shadowed && !(tracked && walk->clear_asked))
		return 0;
	if (!kes_young_possible(walk->kvm))
		return -EOPNOTSUPP;
	/* Others may run after each page that KVM is asked for. */
	kes_hold_count(KES_HOLD_HARVEST, walk->hold_ns);
	walk->stats->sources |= KES_SOURCE_NOTIFIER;
	if (shadowed)
		walk->stats->accessed += kes_young_find(&young);
	if (walk->clear_asked)
		walk->stats->entries_cleared += kes_young_clear(&young);
	walk->stats->entries_read += young.asked;
	walk->hold_ns = ktime_get_ns();
	return 0;
}

/*
 * Word by word: for so few a string move gains nothing, and in the lab, which
 * counts each byte of one, it was half of what harvesting huge pages took.
 */
static bool bitmap_copy_out(u64 pointer, const u64 *bitmap, u64 offset, u64 pages)
{
	u64 __user *to = (u64 __user *)u64_to_user_ptr(pointer) + offset / 64;
	unsigned int words = DIV_ROUND_UP(pages, 64), i;

	if (!pointer)
		return true;
	if (!user_write_access_begin(to, words * sizeof(*to)))
		return false;
	for (; words >= 8; words -= 8, to += 8, bitmap += 8)
		#pragma GCC unroll 8
		for (i = 0; i < 8; i++)
			unsafe_put_user(bitmap[i], &to[i], fault);
	for (i = 0; i < words; i++)
		unsafe_put_user(bitmap[i], &to[i], fault);
	user_write_access_end();
	return true;
fault:
	user_write_access_end();
	return false;
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
	kes_hold_count(KES_HOLD_HARVEST, walk->hold_ns);
	return 0;
}

static int harvest_check(const struct kes_harvest *arg)
{
	const u32 flags = KES_HARVEST_CLEAR_ACCESSED | KES_HARVEST_CLEAR_DIRTY |
			  KES_HARVEST_FLUSH | KES_HARVEST_KEEP_YOUNG;
	u64 end;

	if (arg->flags & ~flags || memchr_inv(arg->reserved, 0, sizeof(arg->reserved)))
		return -EINVAL;
	if (!arg->gfn_count || arg->gfn_count > KES_MAX_PAGES ||
	    check_add_overflow(arg->gfn_start, arg->gfn_count, &end))
		return -EINVAL;
	if (arg->nodes_bits > 1024 || (arg->on_nodes && !arg->nodes))
		return -EINVAL;
	if ((arg->flags & KES_HARVEST_KEEP_YOUNG) && !KES_COMPAT_KEEP_YOUNG)
		return -EOPNOTSUPP;
	return 0;
}

/* Nodes past this kernel's MAX_NUMNODES do not exist: no page lies on them. */
static int harvest_nodes(const struct kes_harvest *arg, struct kes_nodes *nodes)
{
	const u64 __user *from = u64_to_user_ptr(arg->nodes);
	unsigned int first, i;
	u64 word;

	nodes_clear(nodes->mask);
	for (first = 0; first < arg->nodes_bits; first += 64) {
		if (get_user(word, from + first / 64))
			return -EFAULT;
		if (arg->nodes_bits - first < 64)
			word &= BIT_ULL(arg->nodes_bits - first) - 1;
		for (; word; word &= word - 1) {
			i = first + __ffs64(word);
			if (i < MAX_NUMNODES)
				node_set(i, nodes->mask);
		}
	}
	kes_nodes_init(nodes);
	return 0;
}

static int walk_init(struct kes_walk *walk, const struct kes_harvest *arg)
{
	int ret = harvest_check(arg);

	if (!ret && arg->on_nodes)
		ret = harvest_nodes(arg, &walk->nodes);
	if (ret)
		return ret;
	walk->clear_asked = arg->flags & KES_HARVEST_CLEAR_ACCESSED;
	walk->clear_dirty_asked = arg->flags & KES_HARVEST_CLEAR_DIRTY;
	walk->keep_young = arg->flags & KES_HARVEST_KEEP_YOUNG;
	walk->keep_mapped = arg->mapped;
	walk->keep_on_nodes = arg->on_nodes;
	walk->gather.want_dirty = arg->dirty || walk->clear_dirty_asked;
	kes_walk_init(walk);
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
		.old = harvester->old,
		.stats = &arg->stats,
		.format = format,
	};
	int ret = walk_init(&walk, arg);

	if (ret)
		return ret;
	end = arg->gfn_start + arg->gfn_count;
	for (arg->gfn_next = arg->gfn_start; arg->gfn_next < end; arg->gfn_next = next) {
		/* Not the lesser of two sums: the range may end where 64 bits do. */
		next = arg->gfn_next + min_t(u64, end - arg->gfn_next, KES_CHUNK_PAGES);
		chunk_begin(&walk, arg->gfn_next, next);
		ret = kes_walk_chunk(&walk);
		if (ret >= 0)
			ret = chunk_ask(&walk, ret);
		if (!ret)
			ret = chunk_copy_out(&walk, arg);
		if (ret) {
			/* What was not reported is not made old later either. */
			memset(harvester->old, 0, sizeof(harvester->old));
			break;
		}
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
		walk.hold_ns = ktime_get_ns();
		kes_flush_tlbs(kvm);
		kes_hold_count(KES_HOLD_HARVEST, walk.hold_ns);
		harvester->unflushed = false;
		arg->stats.flushes++;
	}
	arg->stats.time_ns = ktime_get_ns() - begin_ns;
	return ret;
}
