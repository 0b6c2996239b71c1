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
	u64 in_range;
};

/* What to gather, besides mapped and accessed. */
struct kes_gather {
	const struct kes_entry_format *format;
	bool want_dirty;
	bool want_range;
	u64 range_start;	/* physical address */
	u64 range_bytes;
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

/* As gather_bit() for the bit "@value is below @limit". */
static __always_inline u64 gather_below(u64 word, u64 value, u64 limit)
{
	asm("cmpq %[limit], %[value]\n\t"
	    "adcq %[word], %[word]"
	    : [word] "+r" (word)
	    : [value] "r" (value), [limit] "r" (limit)
	    : "cc");
	return word;
}

/* Bit 0 becomes bit 63. Once for 64 entries. */
static __always_inline u64 reverse_bits(u64 word)
{
	const u64 ones = 0x5555555555555555ULL, pairs = 0x3333333333333333ULL;
	const u64 nibbles = 0x0f0f0f0f0f0f0f0fULL;

	word = (word >> 1 & ones) | (word & ones) << 1;
	word = (word >> 2 & pairs) | (word & pairs) << 2;
	word = (word >> 4 & nibbles) | (word & nibbles) << 4;
	return __builtin_bswap64(word);
}

/* Constant @dirty and @range make four loops of this one. */
static __always_inline struct kes_bits
gather_loop(const u64 *entry, unsigned int count, const struct kes_gather *what,
	    bool dirty, bool range)
{
	const u64 accessed_nr = what->format->accessed_nr, dirty_nr = what->format->dirty_nr;
	const u64 start = what->range_start, bytes = what->range_bytes;
	const u64 frame = kes_entry_frame_mask();
	u64 mapped = 0, accessed = 0, dirtied = 0, in_range = 0;
	const u64 *end = entry + count;

	/*
	 * Upwards, as the CPU fetches ahead. Each bit pushes the ones before it
	 * up, so the words come out the wrong way round.
	 */
	#pragma GCC unroll 8
	for (; entry != end; entry++) {
		u64 value = READ_ONCE(*entry);

		mapped = gather_bit(mapped, value, KES_ENTRY_PRESENT_NR);
		accessed = gather_bit(accessed, value, accessed_nr);
		if (dirty)
			dirtied = gather_bit(dirtied, value, dirty_nr);
		if (range)
			in_range = gather_below(in_range, (value & frame) - start, bytes);
	}
	/* The other bits of an entry that maps nothing mean something else. */
	return (struct kes_bits){
		.mapped = reverse_bits(mapped) >> (64 - count),
		.accessed = reverse_bits(accessed & mapped) >> (64 - count),
		.dirty = dirty ? reverse_bits(dirtied & mapped) >> (64 - count) : 0,
		.in_range = range ? reverse_bits(in_range & mapped) >> (64 - count) : 0,
	};
}

/* Reads @count (1 to 64) entries. */
static __always_inline struct kes_bits
gather_entries(const u64 *entry, unsigned int count, const struct kes_gather *what)
{
	if (what->want_dirty)
		return what->want_range ? gather_loop(entry, count, what, true, true) :
					  gather_loop(entry, count, what, true, false);
	return what->want_range ? gather_loop(entry, count, what, false, true) :
				  gather_loop(entry, count, what, false, false);
}

#endif /* KES_GATHER_H */
