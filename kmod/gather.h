/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The inner loop of the harvest: up to 64 neighbouring entries become one word
 * of each bitmap. Everything else happens a word at a time, so what stands here
 * is what a harvest costs.
 */
#ifndef KES_GATHER_H
#define KES_GATHER_H

#include "entry.h"

/* Bit i stands for the i-th entry. */
struct kes_bits {
	u64 mapped;
	u64 accessed;
	u64 dirty;
	u64 on_nodes;		/* as the boundary tells */
};

/* What to gather, besides mapped and accessed. */
struct kes_gather {
	const struct kes_entry_format *format;
	bool want_dirty;
	bool want_nodes;	/* what lies below the boundary, see struct kes_nodes */
	unsigned int window;	/* see kes_entry_window() */
	u32 boundary;
	u64 others;		/* 0, or ~0: what does not */
};

/*
 * Shifts bit @nr of @value into @word from below, through the carry flag: two
 * instructions, where compilers make four of the same in C.
 */
static __always_inline u64 gather_bit(u64 word, u64 value, u64 nr)
{
	asm("btq %[nr], %[value]\n\t"
	    "adcq %[word], %[word]"
	    : [word] "+r" (word)
	    : [value] "r" (value), [nr] "rJ" (nr)
	    : "cc");
	return word;
}

/*
 * As gather_bit() for "the frame of @entry lies below @boundary". Read from
 * memory once more: there the bits beside the frame can be left out by address,
 * which takes no instruction.
 */
static __always_inline u64 gather_below(u64 word, const u64 *entry, unsigned int window,
					u32 boundary)
{
	asm("cmpl %[boundary], %[frame]\n\t"
	    "adcq %[word], %[word]"
	    : [word] "+r" (word)
	    : [frame] "m" (*kes_entry_window(entry, window)), [boundary] "r" (boundary)
	    : "cc");
	return word;
}

/* Bit 0 becomes bit 63. */
static __always_inline u64 reverse_bits(u64 word)
{
	const u64 ones = 0x5555555555555555ULL, pairs = 0x3333333333333333ULL;
	const u64 nibbles = 0x0f0f0f0f0f0f0f0fULL;

	/* As most words are: no bit set, or all. */
	if (word + 1 <= 1)
		return word;
	word = (word >> 1 & ones) | (word & ones) << 1;
	word = (word >> 2 & pairs) | (word & pairs) << 2;
	word = (word >> 4 & nibbles) | (word & nibbles) << 4;
	return __builtin_bswap64(word);
}

/* Constant @dirty and @nodes leave out what is not asked for. */
static __always_inline void gather_entry(struct kes_bits *bits, const u64 *entry,
					 const struct kes_gather *what, u64 accessed_nr,
					 u64 dirty_nr, bool dirty, bool nodes)
{
	u64 value = READ_ONCE(*entry);

	bits->mapped = gather_bit(bits->mapped, value, KES_ENTRY_PRESENT_NR);
	bits->accessed = gather_bit(bits->accessed, value, accessed_nr);
	if (dirty)
		bits->dirty = gather_bit(bits->dirty, value, dirty_nr);
	if (nodes)
		bits->on_nodes = gather_below(bits->on_nodes, entry, what->window, what->boundary);
}

/* Constant @dirty and @nodes make four loops of this one. */
static __always_inline struct kes_bits
gather_loop(const u64 *entry, unsigned int count, const struct kes_gather *what,
	    bool dirty, bool nodes)
{
	const u64 accessed_nr = what->format->accessed_nr, dirty_nr = what->format->dirty_nr;
	const struct kes_gather copy = *what;
	unsigned int blocks = count / 8, rest = count % 8, i;
	struct kes_bits bits = {};

	/*
	 * Upwards, as the CPU fetches ahead. Each bit pushes the ones before it
	 * up, so the words come out the wrong way round.
	 */
	for (; blocks; blocks--, entry += 8)
		#pragma GCC unroll 8
		for (i = 0; i < 8; i++)
			gather_entry(&bits, &entry[i], &copy, accessed_nr, dirty_nr,
				     dirty, nodes);
	for (; rest; rest--, entry++)
		gather_entry(&bits, entry, &copy, accessed_nr, dirty_nr, dirty, nodes);
	/* The other bits of an entry that maps nothing mean something else. */
	return (struct kes_bits){
		.mapped = reverse_bits(bits.mapped) >> (64 - count),
		.accessed = reverse_bits(bits.accessed & bits.mapped) >> (64 - count),
		.dirty = dirty ? reverse_bits(bits.dirty & bits.mapped) >> (64 - count) : 0,
		.on_nodes = nodes ? reverse_bits((bits.on_nodes ^ copy.others) & bits.mapped) >>
				    (64 - count) : 0,
	};
}

/* Reads @count (1 to 64) entries. */
static __always_inline struct kes_bits
gather_entries(const u64 *entry, unsigned int count, const struct kes_gather *what)
{
	if (what->want_dirty)
		return what->want_nodes ? gather_loop(entry, count, what, true, true) :
					  gather_loop(entry, count, what, true, false);
	return what->want_nodes ? gather_loop(entry, count, what, false, true) :
				  gather_loop(entry, count, what, false, false);
}

/* Which of @count entries lie below @boundary, whatever they map. */
static __always_inline u64 gather_boundary(const u64 *entry, unsigned int count,
					   unsigned int window, u32 boundary)
{
	unsigned int blocks = count / 8, rest = count % 8, i;
	u64 below = 0;

	for (; blocks; blocks--, entry += 8)
		#pragma GCC unroll 8
		for (i = 0; i < 8; i++)
			below = gather_below(below, &entry[i], window, boundary);
	for (; rest; rest--, entry++)
		below = gather_below(below, entry, window, boundary);
	return reverse_bits(below) >> (64 - count);
}

/* As gather_entries() for one entry. */
static __always_inline struct kes_bits
gather_one(const u64 *entry, const struct kes_gather *what)
{
	const u64 value = READ_ONCE(*entry), mapped = value >> KES_ENTRY_PRESENT_NR & 1;
	struct kes_bits bits = {
		.mapped = mapped,
		.accessed = value >> what->format->accessed_nr & mapped,
	};

	if (what->want_dirty)
		bits.dirty = value >> what->format->dirty_nr & mapped;
	if (what->want_nodes)
		bits.on_nodes = (gather_below(0, &value, what->window, what->boundary) ^
				 what->others) & mapped;
	return bits;
}

#endif /* KES_GATHER_H */
