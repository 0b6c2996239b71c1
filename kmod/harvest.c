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
 *
 * What the tables do not tell, and what only KVM can clear, is asked of KVM after
 * the walk of each chunk, outside of RCU; see young.c.
 */
#include <linux/bitops.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "compat.h"
#include "flush.h"
#include "gather.h"
#include "harvest.h"
#include "nodes.h"
#include "trace.h"
#include "vm.h"
#include "young.h"

static const struct kes_entry_format format_tracked = KES_ENTRY_FORMAT_TRACKED;
static const struct kes_entry_format format_blind = KES_ENTRY_FORMAT_BLIND;

/* The walk of one chunk. */
struct kes_walk {
	struct kvm *kvm;
	struct kes_chunk *chunk;
	u64 *old;		/* see struct kes_harvester */
	struct kes_harvest_stats *stats;
	const struct kes_entry_format *format;
	struct kes_gather gather;	/* its format: that of the root in hand */
	struct kes_nodes nodes;
	bool clear_asked;	/* accessed bits are to be cleared ... */
	bool clear_accessed;	/* ... in the entries of the root in hand */
	bool clear_later;	/* ... by KVM, after the walk */
	bool clear_dirty_asked;	/* dirty bits are to be cleared ... */
	bool clear_dirty;	/* ... in the entries of the root in hand */
	u64 gfn_start;
	u64 gfn_end;
};

/*
 * Another writer got in between, and left @old: it is taken as it is, a few
 * times at most. Giving up leaves the bits for the next harvest.
 */
static noinline bool entry_clear_again(u64 *entry, u64 old, u64 seen)
{
	int tries;

	for (tries = 0; tries < 4; tries++) {
		if (!(old & KES_ENTRY_PRESENT) || !(old & seen))
			return false;
		if (try_cmpxchg64(entry, &old, old & ~seen))
			return true;
	}
	return false;
}

/*
 * Clears the bits @seen in an entry. Only bits that were reported: one that
 * appeared since stays for the next harvest.
 */
static __always_inline bool entry_clear(u64 *entry, u64 seen)
{
	u64 old = READ_ONCE(*entry);

	if (likely((old & (KES_ENTRY_PRESENT | seen)) == (KES_ENTRY_PRESENT | seen)) &&
	    likely(try_cmpxchg64(entry, &old, old & ~seen)))
		return true;
	return entry_clear_again(entry, old, seen);
}

static void entries_clear_accessed(struct kes_walk *walk, u64 *entry, u64 todo)
{
	const u64 seen = BIT_ULL(walk->gather.format->accessed_nr);
	unsigned int cleared = 0;

	for (; todo; todo &= todo - 1)
		cleared += entry_clear(&entry[__ffs64(todo)], seen);
	walk->stats->entries_cleared += cleared;
}

/*
 * Clears the dirty bits of @todo, and the accessed bits of those of them in
 * @accessed. The caller holds mmu_lock for read, which keeps each frame the
 * guest's.
 */
static void entries_clear_dirty(struct kes_walk *walk, u64 *entry, u64 todo, u64 accessed)
{
	const struct kes_entry_format *format = walk->gather.format;

	for (; todo; todo &= todo - 1) {
		unsigned int i = __ffs64(todo);
		u64 seen = BIT_ULL(format->dirty_nr);
		u64 value = READ_ONCE(entry[i]);

		if (!(value & KES_ENTRY_PRESENT))
			continue;
		if (accessed >> i & 1)
			seen |= BIT_ULL(format->accessed_nr);
		/* First the word to the host, then the clearing: no gap. */
		kes_compat_set_pfn_dirty(kes_entry_pfn(value));
		walk->stats->entries_cleared += entry_clear(&entry[i], seen);
	}
}

/* What the first range of nodes does not tell: other ranges, or page by page. */
static noinline u64 entries_on_other_nodes(const struct kes_walk *walk, const u64 *entry,
					   unsigned int count, u64 mapped)
{
	const struct kes_nodes *nodes = &walk->nodes;
	struct kes_gather other = walk->gather;
	u64 on_nodes = 0;
	unsigned int i;

	if (nodes->by_page) {
		for (; mapped; mapped &= mapped - 1) {
			i = __ffs64(mapped);
			if (kes_nodes_has_pfn(nodes, kes_entry_pfn(READ_ONCE(entry[i]))))
				on_nodes |= BIT_ULL(i);
		}
		return on_nodes;
	}
	for (i = 1; i < nodes->ranges; i++) {
		other.range_start = nodes->range[i].start;
		other.range_bytes = nodes->range[i].bytes;
		on_nodes |= gather_entries(entry, count, &other).in_range;
	}
	return on_nodes;
}

/* Which of @count entries that map something lie on the nodes asked for. */
static u64 entries_on_nodes(const struct kes_walk *walk, const u64 *entry,
			    unsigned int count, const struct kes_bits *bits)
{
	if (likely(walk->nodes.ranges <= 1 && !walk->nodes.by_page))
		return bits->in_range;
	return bits->in_range | entries_on_other_nodes(walk, entry, count, bits->mapped);
}

/*
 * Adds what was gathered from GFN @gfn on to the chunk's bitmaps. Several roots
 * may map the same page: each counts once.
 */
static void chunk_add(struct kes_walk *walk, u64 gfn, const struct kes_bits *bits,
		      u64 on_nodes, u64 *mapped_stat)
{
	unsigned int offset = gfn - walk->gfn_start;
	unsigned int word = offset / 64, shift = offset % 64;
	u64 mapped = bits->mapped << shift, accessed = bits->accessed << shift;
	u64 dirty = bits->dirty << shift;
	struct kes_chunk *chunk = walk->chunk;
	struct kes_harvest_stats *stats = walk->stats;

	on_nodes <<= shift;
	*mapped_stat += hweight64(mapped & ~chunk->mapped[word]);
	stats->accessed += hweight64(accessed & ~chunk->accessed[word]);
	chunk->mapped[word] |= mapped;
	chunk->accessed[word] |= accessed;
	if (dirty) {
		stats->dirty += hweight64(dirty & ~chunk->dirty[word]);
		chunk->dirty[word] |= dirty;
	}
	if (on_nodes) {
		stats->on_nodes += hweight64(on_nodes & ~chunk->on_nodes[word]);
		chunk->on_nodes[word] |= on_nodes;
	}
}

/* How many pages from @gfn on share its word of the bitmaps, up to @end. */
static unsigned int word_pages(const struct kes_walk *walk, u64 gfn, u64 end)
{
	return min_t(u64, end - gfn, 64 - (gfn - walk->gfn_start) % 64);
}

static void chunk_set_level(struct kes_walk *walk, u64 gfn, u8 level)
{
	u8 *slot = &walk->chunk->levels[(gfn >> KES_ENTRIES_SHIFT) -
					(walk->gfn_start >> KES_ENTRIES_SHIFT)];

	*slot = max(*slot, level);
}

/*
 * Reads, and clears as asked, @count (1 to 64) entries. With clear_dirty the
 * caller holds mmu_lock for read.
 */
static struct kes_bits entries_harvest(struct kes_walk *walk, u64 *entry,
				       unsigned int count, bool clear)
{
	struct kes_bits bits = gather_entries(entry, count, &walk->gather);
	u64 accessed = clear && walk->clear_accessed ? bits.accessed : 0;
	u64 dirty = clear && walk->clear_dirty ? bits.dirty : 0;

	walk->stats->entries_read += count;
	if (dirty)
		entries_clear_dirty(walk, entry, dirty, accessed);
	if (accessed & ~dirty)
		entries_clear_accessed(walk, entry, accessed & ~dirty);
	return bits;
}

/* Leaves it to KVM to clear @accessed, the bits of entries from GFN @gfn on. */
static void chunk_clear_later(struct kes_walk *walk, u64 gfn, u64 accessed)
{
	unsigned int offset = gfn - walk->gfn_start;

	walk->old[offset / 64] |= accessed << offset % 64;
}

/* The entries of a last-level table for GFNs [gfn, end). */
static void table_harvest(struct kes_walk *walk, u64 *table, u64 gfn, u64 end)
{
	u64 mapped = walk->stats->mapped_4k;

	if (walk->clear_dirty)
		read_lock(&walk->kvm->mmu_lock);
	while (gfn < end) {
		u64 *entry = &table[kes_entry_index(gfn, PG_LEVEL_4K)];
		unsigned int count = word_pages(walk, gfn, end);
		struct kes_bits bits = entries_harvest(walk, entry, count, true);

		if (bits.mapped)
			chunk_add(walk, gfn, &bits, entries_on_nodes(walk, entry, count, &bits),
				  &walk->stats->mapped_4k);
		if (walk->clear_later)
			chunk_clear_later(walk, gfn, bits.accessed);
		gfn += count;
	}
	if (walk->clear_dirty)
		read_unlock(&walk->kvm->mmu_lock);
	if (walk->stats->mapped_4k != mapped)
		chunk_set_level(walk, end - 1, KES_LEVEL_4K);
}

/*
 * A huge entry that maps GFNs [gfn, end) and perhaps more: its one accessed and
 * one dirty bit stand for all of them. They are cleared with the last page: an
 * entry of 1 GiB spans several chunks, and the later ones must see them too.
 */
static void huge_harvest(struct kes_walk *walk, u64 *entry, int level, u64 gfn, u64 end)
{
	bool huge_2m = level == PG_LEVEL_2M;
	struct kes_bits one;
	u64 on_nodes;

	if (walk->clear_dirty)
		read_lock(&walk->kvm->mmu_lock);
	one = entries_harvest(walk, entry, 1, IS_ALIGNED(end, kes_entry_pages(level)));
	on_nodes = entries_on_nodes(walk, entry, 1, &one);
	if (walk->clear_dirty)
		read_unlock(&walk->kvm->mmu_lock);
	if (!one.mapped)
		return;
	if (walk->clear_later && IS_ALIGNED(end, kes_entry_pages(level)))
		chunk_clear_later(walk, end - 1, one.accessed);
	while (gfn < end) {
		unsigned int count = word_pages(walk, gfn, end);
		u64 all = ~0ULL >> (64 - count);
		struct kes_bits bits = {
			.mapped = all,
			.accessed = one.accessed ? all : 0,
			.dirty = one.dirty ? all : 0,
		};

		chunk_add(walk, gfn, &bits, on_nodes ? all : 0,
			  huge_2m ? &walk->stats->mapped_2m : &walk->stats->mapped_1g);
		chunk_set_level(walk, gfn, huge_2m ? KES_LEVEL_2M : KES_LEVEL_1G);
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
			table_harvest(walk, table, gfn, next);
		else if (value & KES_ENTRY_PRESENT)
			huge_harvest(walk, entry, level, gfn, next);
		else
			walk->stats->entries_read++;
		gfn = next;
	}
}

/* How many roots are tracked; -EOPNOTSUPP if they can not tell what is asked. */
static int roots_check(const struct kes_walk *walk, const struct kes_root *roots, int n)
{
	int i, tracked = 0;

	for (i = 0; i < n; i++)
		tracked += roots[i].tracked;
	if (walk->gather.want_dirty && (tracked || !kes_vm_has_tables(walk->kvm)))
		return -EOPNOTSUPP;
	return tracked;
}

/* What the bits of @root mean, and who clears them. */
static void root_select(struct kes_walk *walk, const struct kes_root *root)
{
	bool blind = KES_COMPAT_NESTED_EPT_BLIND && root->guest_mode && !root->tracked &&
		     walk->format->id == KES_FORMAT_EPT;

	walk->gather.format = root->tracked ? &format_tracked :
			      blind ? &format_blind : walk->format;
	walk->clear_accessed = walk->clear_asked && !root->tracked && !blind;
	walk->clear_later = walk->clear_asked && root->tracked;
	walk->clear_dirty = walk->clear_dirty_asked && !blind;
}

/*
 * Walks all roots over [walk->gfn_start, walk->gfn_end). Returns how many of
 * them are tracked.
 */
static int chunk_walk(struct kes_walk *walk)
{
	u64 begin_ns = trace_kes_chunk_enabled() ? ktime_get_ns() : 0;
	struct kes_root roots[KES_MAX_ROOTS];
	int i, n, tracked;

	rcu_read_lock();
	n = kes_vm_roots(walk->kvm, roots);
	tracked = n < 0 ? n : roots_check(walk, roots, n);
	for (i = 0; tracked >= 0 && i < n; i++) {
		root_select(walk, &roots[i]);
		root_walk(walk, &roots[i]);
	}
	rcu_read_unlock();
	if (begin_ns)
		trace_kes_chunk(walk->kvm, walk->gfn_start, walk->gfn_end,
				ktime_get_ns() - begin_ns);
	if (tracked < 0)
		return tracked;
	walk->stats->roots = max_t(u32, walk->stats->roots, n);
	walk->stats->chunks++;
	if (n)
		walk->stats->sources |= KES_SOURCE_TABLES;
	return tracked;
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
	walk->stats->sources |= KES_SOURCE_NOTIFIER;
	if (shadowed)
		walk->stats->accessed += kes_young_find(&young);
	if (walk->clear_asked)
		walk->stats->entries_cleared += kes_young_clear(&young);
	walk->stats->entries_read += young.asked;
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
static int harvest_nodes(const struct kes_harvest *arg, struct kes_nodes *nodes)
{
	const u64 __user *from = u64_to_user_ptr(arg->nodes);
	unsigned int i;
	u64 word;

	nodes_clear(nodes->mask);
	for (i = 0; i < arg->nodes_bits; i++) {
		if (i % 64 == 0 && get_user(word, from + i / 64))
			return -EFAULT;
		if (i < MAX_NUMNODES && (word >> (i % 64)) & 1)
			node_set(i, nodes->mask);
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
	walk->gather.want_dirty = arg->dirty || walk->clear_dirty_asked;
	walk->gather.want_range = walk->nodes.ranges && !walk->nodes.by_page;
	walk->gather.range_start = walk->nodes.range[0].start;
	walk->gather.range_bytes = walk->nodes.range[0].bytes;
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
	memset(&arg->stats, 0, sizeof(arg->stats));
	end = arg->gfn_start + arg->gfn_count;
	for (arg->gfn_next = arg->gfn_start; arg->gfn_next < end; arg->gfn_next = next) {
		/* Not the lesser of two sums: the range may end where 64 bits do. */
		next = arg->gfn_next + min_t(u64, end - arg->gfn_next, KES_CHUNK_PAGES);
		chunk_begin(&walk, arg->gfn_next, next);
		ret = chunk_walk(&walk);
		if (ret >= 0)
			ret = chunk_ask(&walk, ret);
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
		kes_flush_tlbs(kvm);
		harvester->unflushed = false;
		arg->stats.flushes++;
	}
	arg->stats.time_ns = ktime_get_ns() - begin_ns;
	return ret;
}
