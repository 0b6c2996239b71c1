// SPDX-License-Identifier: GPL-2.0-only
/*
 * The harvest's inner loop, built from the module's own source, over tables in
 * user space: time per entry beside a plain read of the same bytes, and beside
 * the loop that one would write first.
 *
 *   cc -O2 -fno-strict-aliasing -Ishim -I.. gather.c -o gather && ./gather [MIB]
 *
 * Prints one line of JSON for each share of young entries. Unlike what is
 * measured on emulated hosts, these are nanoseconds of the machine it runs on.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gather.h"

#define REPEAT 5

#define WRITE_ONCE(x, value)	(*(volatile __typeof__(x) *)&(x) = (value))

static const struct kes_entry_format format = KES_ENTRY_FORMAT_EPT;
/* Bits that are gathered and not used further. */
static u64 rest;

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

/* Every entry maps a page; each is young with the chance of @percent in 100. */
static void fill(u64 *entry, size_t count, unsigned int percent)
{
	u64 random = 88172645463325252ULL;

	for (size_t i = 0; i < count; i++) {
		random ^= random << 13;
		random ^= random >> 7;
		random ^= random << 17;
		entry[i] = KES_ENTRY_PRESENT | 7 | (u64)i << PAGE_SHIFT;
		if (random % 100 < percent)
			entry[i] |= BIT_ULL(format.accessed_nr);
	}
}

static u64 plain_read(u64 *entry, size_t count)
{
	u64 sum = 0;

	for (size_t i = 0; i < count; i++)
		sum += READ_ONCE(entry[i]);
	return sum;
}

static void clear(u64 *entry, u64 *accessed)
{
	u64 old = READ_ONCE(*entry);

	if (__atomic_compare_exchange_n(entry, &old, old & ~BIT_ULL(format.accessed_nr), false,
					__ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
		(*accessed)++;
}

/*
 * 64 entries to a word, then only the young ones again. What else is gathered
 * goes to a word that nobody reads, as the module's go to bitmaps.
 */
static __always_inline u64 gathered_with(u64 *entry, size_t count, bool dirty, bool nodes)
{
	const struct kes_gather what = {
		.format = &format,
		.want_dirty = dirty,
		.want_nodes = nodes,
		.window = 1,
		.boundary = 1U << 24,
	};
	u64 accessed = 0;

	for (size_t i = 0; i < count; i += 64) {
		struct kes_bits bits = gather_entries(&entry[i], 64, &what);
		u64 todo = bits.accessed;

		WRITE_ONCE(rest, bits.dirty ^ bits.on_nodes);
		for (; todo; todo &= todo - 1)
			clear(&entry[i + __builtin_ctzll(todo)], &accessed);
	}
	return accessed;
}

static u64 gathered(u64 *entry, size_t count)
{
	return gathered_with(entry, count, false, false);
}

static u64 gathered_dirty(u64 *entry, size_t count)
{
	return gathered_with(entry, count, true, false);
}

static u64 gathered_all(u64 *entry, size_t count)
{
	return gathered_with(entry, count, true, true);
}

/* One entry after the other. */
static u64 one_by_one(u64 *entry, size_t count)
{
	u64 accessed = 0;

	for (size_t i = 0; i < count; i++) {
		u64 value = READ_ONCE(entry[i]);

		if ((value & KES_ENTRY_PRESENT) && (value & BIT_ULL(format.accessed_nr)))
			clear(&entry[i], &accessed);
	}
	return accessed;
}

/* The best of several runs over freshly filled tables, in ns per entry. */
static double best_ns(u64 (*loop)(u64 *, size_t), u64 *entry, size_t count,
		      unsigned int percent, u64 *result)
{
	double best = 1e18;

	for (int i = 0; i < REPEAT; i++) {
		double start, taken;

		fill(entry, count, percent);
		start = now_ns();
		*result = loop(entry, count);
		taken = (now_ns() - start) / count;
		best = taken < best ? taken : best;
	}
	return best;
}

int main(int argc, char **argv)
{
	const unsigned int percents[] = { 0, 10, 50, 100 };
	size_t mib = argc > 1 ? strtoul(argv[1], NULL, 0) : 512;
	size_t count = mib << 17;
	u64 *entry = mib ? aligned_alloc(1 << 21, mib << 20) : NULL;

	if (!entry) {
		fprintf(stderr, "gather: no memory for %zu MiB of entries\n", mib);
		return 1;
	}
	for (size_t i = 0; i < sizeof(percents) / sizeof(percents[0]); i++) {
		u64 ignored, ours, theirs;
		double with_dirty, with_all;
		double read = best_ns(plain_read, entry, count, percents[i], &ignored);
		double gather = best_ns(gathered, entry, count, percents[i], &ours);
		double naive = best_ns(one_by_one, entry, count, percents[i], &theirs);

		if (ours != theirs) {
			fprintf(stderr, "gather: %llu young entries found, not %llu\n",
				(unsigned long long)ours, (unsigned long long)theirs);
			return 1;
		}
		with_dirty = best_ns(gathered_dirty, entry, count, percents[i], &ignored);
		with_all = best_ns(gathered_all, entry, count, percents[i], &ignored);
		printf("{\"young_percent\":%u,\"read_ns\":%.3f,\"gather_ns\":%.3f,\"dirty_ns\":%.3f,\"nodes_ns\":%.3f,\"one_by_one_ns\":%.3f}\n",
		       percents[i], read, gather, with_dirty, with_all, naive);
	}
	free(entry);
	return 0;
}
