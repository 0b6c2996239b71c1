// SPDX-License-Identifier: GPL-2.0-only
/*
 * For how long this module holds a CPU, and an RCU read section or one of KVM's
 * locks, before it lets others have them: histograms of the whole host. What
 * interrupts take in between counts as well.
 */
#include <linux/ktime.h>
#include <linux/log2.h>
#include <linux/minmax.h>
#include <linux/seq_file.h>
#include <linux/spinlock.h>

#include "hold.h"

/* Below 16 us, then each twice as wide; the last has no end. */
#define BUCKETS		10
#define FIRST_US_LOG2	4

static struct {
	u64 count[BUCKETS];
	u64 longest_us;
} histogram[KES_HOLDS];
static DEFINE_SPINLOCK(histogram_lock);

static const char * const names[KES_HOLDS] = {
	[KES_HOLD_HARVEST] = "harvest",
	[KES_HOLD_SAMPLE] = "sample",
};

/* Counts what began at @begin_ns, by ktime_get_ns(), and ends now. */
void kes_hold_count(enum kes_hold hold, u64 begin_ns)
{
	u64 us = (ktime_get_ns() - begin_ns) / NSEC_PER_USEC;
	unsigned int bucket = us ? min(BUCKETS - 1, max(0, ilog2(us) + 1 - FIRST_US_LOG2)) : 0;

	spin_lock(&histogram_lock);
	histogram[hold].count[bucket]++;
	histogram[hold].longest_us = max(histogram[hold].longest_us, us);
	spin_unlock(&histogram_lock);
}

/* Lines of /proc/kvm_ept_sample_stats. */
void kes_holds_show(struct seq_file *file)
{
	int hold, i;

	for (hold = 0; hold < KES_HOLDS; hold++) {
		for (i = 0; i < BUCKETS - 1; i++)
			seq_printf(file, "%s_holds_below_%u_us %llu\n", names[hold],
				   1U << (FIRST_US_LOG2 + i), READ_ONCE(histogram[hold].count[i]));
		seq_printf(file, "%s_holds_longer %llu\n", names[hold],
			   READ_ONCE(histogram[hold].count[i]));
		seq_printf(file, "%s_holds_longest_us %llu\n", names[hold],
			   READ_ONCE(histogram[hold].longest_us));
	}
}
