// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is read and cleared in the entries of one table, and what of it goes to the
 * chunk. The walk (walk.c) finds the tables, holds RCU, and says how entries of the
 * root in hand are to be read.
 */
#include <linux/bitops.h>

#include "compat.h"
#include "table.h"

/* What an entry that maps a huge page takes, in instructions; see walk.c. */
#define HUGE_WORK		100

/* What a leaf of 2 MiB or 1 GiB has, and a link to a table has not. */
#define HUGE_LEAF		(KES_ENTRY_PRESENT | KES_ENTRY_HUGE)

/*
 * Another writer got in between, and left @old: it is taken as it is, a few
 * times at most. Giving up leaves the bits for the next harvest.
 */
static noinline bool entry_clear_again(u64 *entry, u64 old, u64 seen, u64 leaf)
{
	int tries;

	for (tries = 0; tries < 4; tries++) {
		if ((old & leaf) != leaf || !(old & seen))
			return false;
		if (try_cmpxchg64(entry, &old, old & ~seen))
			return true;
	}
	return false;
}

/*
 * Clears the bits @seen in an entry. Only bits that were reported: one that
 * appeared since stays for the next harvest. The entry must still be a leaf of
 * its level, which has all bits of @leaf: KVM may have split it, and then it links
 * a table.
 */
static __always_inline bool entry_clear(u64 *entry, u64 seen, u64 leaf)
{
	u64 old = READ_ONCE(*entry);

	if (likely((old & leaf) == leaf) && likely(try_cmpxchg64(entry, &old, old & ~seen)))
		return true;
	return entry_clear_again(entry, old, seen, leaf);
}

static noinline void entries_clear_accessed(struct kes_walk *walk, u64 *entry, u64 todo, u64 leaf)
{
	const u64 seen = BIT_ULL(walk->gather.format->accessed_nr);

	walk->stats->entries_cleared += hweight64(todo);
	for (; todo; todo &= todo - 1)
		if (unlikely(!entry_clear(&entry[__ffs64(todo)], seen, leaf)))
			walk->stats->entries_cleared--;
}

/*
 * Clears the accessed bits of @accessed and the dirty bits of @dirty, and tells the
 * host first, so that it misses nothing. The caller holds mmu_lock for read, which
 * keeps each frame the guest's.
 */
static noinline void entries_clear_told(struct kes_walk *walk, u64 *entry, u64 accessed,
					u64 dirty, u64 leaf)
{
	const struct kes_entry_format *format = walk->gather.format;
	u64 todo;

	for (todo = accessed | dirty; todo; todo &= todo - 1) {
		unsigned int i = __ffs64(todo);
		u64 value = READ_ONCE(entry[i]), seen = 0;

		if ((value & leaf) != leaf)
			continue;
		if (accessed >> i & 1) {
			seen |= BIT_ULL(format->accessed_nr);
			if (walk->keep_young)
				kes_compat_set_pfn_young(kes_entry_pfn(value));
		}
		if (dirty >> i & 1) {
			seen |= BIT_ULL(format->dirty_nr);
			kes_compat_set_pfn_dirty(kes_entry_pfn(value));
		}
		walk->stats->entries_cleared += entry_clear(&entry[i], seen, leaf);
	}
}

/*
 * Which entries lie on the nodes asked for, where there is not just the one
 * boundary that was gathered.
 */
static noinline u64 entries_on_nodes(const struct kes_walk *walk, const u64 *entry,
				     unsigned int count, const struct kes_bits *bits)
{
	const struct kes_nodes *nodes = &walk->nodes;
	u64 on_nodes = bits->on_nodes, mapped;
	unsigned int i;

	if (nodes->by_page) {
		for (mapped = bits->mapped; mapped; mapped &= mapped - 1) {
			i = __ffs64(mapped);
			if (kes_nodes_has_pfn(nodes, kes_entry_pfn(READ_ONCE(entry[i]))))
				on_nodes |= BIT_ULL(i);
		}
		return on_nodes;
	}
	/* A set of all nodes, or of none. */
	if (!nodes->boundaries)
		return nodes->others ? bits->mapped : 0;
	for (i = 1; i < nodes->boundaries; i++)
		on_nodes ^= gather_boundary(entry, count, nodes->window, nodes->boundary[i]);
	on_nodes &= bits->mapped;
	return nodes->others ? bits->mapped & ~on_nodes : on_nodes;
}

/* Several roots may map the same page: it counts once. */
static __always_inline void word_add(u64 *word, u64 bits, u64 *pages)
{
	if (!bits)
		return;
	*pages += hweight64(bits & ~*word);
	*word |= bits;
}

/* Adds what was gathered from GFN @gfn on to the chunk's bitmaps. */
static __always_inline void chunk_add(struct kes_walk *walk, u64 gfn,
				      const struct kes_bits *bits, u64 *mapped_stat)
{
	unsigned int offset = gfn - walk->gfn_start;
	unsigned int word = offset / 64, shift = offset % 64;
	struct kes_harvest_stats *stats = walk->stats;
	struct kes_chunk *chunk = walk->chunk;

	if (walk->keep_mapped)
		word_add(&chunk->mapped[word], bits->mapped << shift, mapped_stat);
	else
		*mapped_stat += hweight64(bits->mapped);
	word_add(&chunk->accessed[word], bits->accessed << shift, &stats->accessed);
	word_add(&chunk->dirty[word], bits->dirty << shift, &stats->dirty);
	word_add(&chunk->on_nodes[word], bits->on_nodes << shift, &stats->on_nodes);
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

/* What is told to the host is told under mmu_lock. */
static __always_inline void entries_lock(const struct kes_walk *walk)
{
	if (walk->tell_host)
		read_lock(&walk->kvm->mmu_lock);
}

static __always_inline void entries_unlock(const struct kes_walk *walk)
{
	if (walk->tell_host)
		read_unlock(&walk->kvm->mmu_lock);
}

/*
 * Clears, as asked, what was gathered from the entries from @entry on, all of them
 * leaves with the bits of @leaf. The caller holds entries_lock().
 */
static __always_inline void entries_clear(struct kes_walk *walk, u64 *entry,
					  const struct kes_bits *bits, u64 leaf)
{
	u64 accessed = walk->clear_accessed ? bits->accessed : 0;
	u64 dirty = walk->clear_dirty ? bits->dirty : 0;
	u64 told = walk->keep_young ? accessed | dirty : dirty;

	if (told)
		entries_clear_told(walk, entry, accessed & told, dirty, leaf);
	if (accessed & ~told)
		entries_clear_accessed(walk, entry, accessed & ~told, leaf);
}

/* Leaves it to KVM to clear @accessed, the bits of entries from GFN @gfn on. */
static void chunk_clear_later(struct kes_walk *walk, u64 gfn, u64 accessed)
{
	unsigned int offset = gfn - walk->gfn_start;

	walk->old[offset / 64] |= accessed << offset % 64;
}

/* The entries of a last-level table for GFNs [gfn, end). */
void kes_table_harvest(struct kes_walk *walk, u64 *table, u64 gfn, u64 end)
{
	struct kes_harvest_stats *stats = walk->stats;
	u64 mapped = stats->mapped_4k, cleared = stats->entries_cleared;
	u64 *entry = &table[kes_entry_index(gfn, PG_LEVEL_4K)];

	stats->entries_read += end - gfn;
	walk->work += (end - gfn) * walk->read_work;
	entries_lock(walk);
	while (gfn < end) {
		unsigned int count = word_pages(walk, gfn, end);
		struct kes_bits bits = gather_entries(entry, count, &walk->gather);

		if (bits.mapped) {
			entries_clear(walk, entry, &bits, KES_ENTRY_PRESENT);
			if (unlikely(walk->ask_nodes))
				bits.on_nodes = entries_on_nodes(walk, entry, count, &bits);
			chunk_add(walk, gfn, &bits, &stats->mapped_4k);
		}
		if (unlikely(walk->clear_later))
			chunk_clear_later(walk, gfn, bits.accessed);
		entry += count;
		gfn += count;
	}
	entries_unlock(walk);
	walk->work += (stats->entries_cleared - cleared) * walk->clear_work;
	if (stats->mapped_4k != mapped)
		chunk_set_level(walk, end - 1, KES_LEVEL_4K);
}

/*
 * A huge entry that maps GFNs [gfn, end) and perhaps more: its one accessed and
 * one dirty bit stand for all of them. They are cleared with the last page: an
 * entry of 1 GiB spans several chunks, and the later ones must see them too.
 */
void kes_huge_harvest(struct kes_walk *walk, u64 *entry, int level, u64 gfn, u64 end)
{
	bool huge_2m = level == PG_LEVEL_2M;
	struct kes_bits one;

	walk->work += HUGE_WORK + walk->clear_work;
	entries_lock(walk);
	one = gather_one(entry, &walk->gather);
	if (IS_ALIGNED(end, kes_entry_pages(level)))
		entries_clear(walk, entry, &one, HUGE_LEAF);
	entries_unlock(walk);
	if (!one.mapped)
		return;
	if (walk->clear_later && IS_ALIGNED(end, kes_entry_pages(level)))
		chunk_clear_later(walk, end - 1, one.accessed);
	if (walk->ask_nodes)
		one.on_nodes = entries_on_nodes(walk, entry, 1, &one);
	while (gfn < end) {
		unsigned int count = word_pages(walk, gfn, end);
		u64 all = ~0ULL >> (64 - count);
		struct kes_bits bits = {
			.mapped = all,
			.accessed = one.accessed ? all : 0,
			.dirty = one.dirty ? all : 0,
			.on_nodes = one.on_nodes ? all : 0,
		};

		chunk_add(walk, gfn, &bits,
			  huge_2m ? &walk->stats->mapped_2m : &walk->stats->mapped_1g);
		chunk_set_level(walk, gfn, huge_2m ? KES_LEVEL_2M : KES_LEVEL_1G);
		gfn += count;
	}
}

/* Whether an entry of a table of 2 MiB entries maps a huge page. */
static bool entry_is_huge(const u64 *entry)
{
	return (READ_ONCE(*entry) & HUGE_LEAF) == HUGE_LEAF;
}

/* Each of @count bits in @bits stands for the 8 words of 2 MiB. */
static void words_fill(u64 *words, u64 bits, unsigned int count, u64 *pages)
{
	*pages += hweight64(bits) * KES_ENTRIES;
	if (bits == ~0ULL >> (64 - count)) {
		memset(words, 0xff, count * (KES_ENTRIES / 8));
		return;
	}
	for (; bits; bits &= bits - 1) {
		u64 *word = &words[__ffs64(bits) * (KES_ENTRIES / 64)];
		int i;

		#pragma GCC unroll 8
		for (i = 0; i < KES_ENTRIES / 64; i++)
			word[i] = ~0ULL;
	}
}

/*
 * As kes_huge_harvest(), for a row of 2 MiB entries from GFN @gfn on, up to 64 of
 * them. Returns how many there were. Only where they are the only ones that map
 * these pages, whole, and begin at a word of the bitmaps.
 */
unsigned int kes_huge_row_harvest(struct kes_walk *walk, u64 *entry, u64 gfn, u64 end)
{
	unsigned int most = (end - gfn) >> KES_ENTRIES_SHIFT, count = 0, offset, word;
	struct kes_harvest_stats *stats = walk->stats;
	struct kes_chunk *chunk = walk->chunk;
	struct kes_bits bits;
	u64 mapped;
	u8 *level;

	offset = gfn - walk->gfn_start;
	if (walk->several_roots || walk->clear_later || gfn % KES_ENTRIES || offset % 64)
		return 0;
	while (count < most && count < 64 && entry_is_huge(&entry[count]))
		count++;
	if (!count)
		return 0;
	word = offset / 64;
	walk->work += count * (HUGE_WORK + walk->clear_work);
	stats->entries_read += count;
	entries_lock(walk);
	bits = gather_entries(entry, count, &walk->gather);
	entries_clear(walk, entry, &bits, HUGE_LEAF);
	entries_unlock(walk);
	if (walk->ask_nodes)
		bits.on_nodes = entries_on_nodes(walk, entry, count, &bits);
	if (walk->keep_mapped)
		words_fill(&chunk->mapped[word], bits.mapped, count, &stats->mapped_2m);
	else
		stats->mapped_2m += hweight64(bits.mapped) * KES_ENTRIES;
	words_fill(&chunk->accessed[word], bits.accessed, count, &stats->accessed);
	words_fill(&chunk->dirty[word], bits.dirty, count, &stats->dirty);
	words_fill(&chunk->on_nodes[word], bits.on_nodes, count, &stats->on_nodes);
	level = &chunk->levels[(gfn >> KES_ENTRIES_SHIFT) - (walk->gfn_start >> KES_ENTRIES_SHIFT)];
	for (mapped = bits.mapped; mapped; mapped &= mapped - 1)
		level[__ffs64(mapped)] = KES_LEVEL_2M;
	return count;
}
